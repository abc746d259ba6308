"""C{python -m colotx} is the C{colo} command."""

import sys

from colotx.cli import main

sys.exit(main())
