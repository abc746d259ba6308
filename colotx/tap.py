"""What twistd calls to build the daemon: options in, service out."""

from __future__ import annotations

import sys
from typing import Any

from twisted.application.service import IService
from twisted.python import usage

from colotx.errors import ColoError
from colotx.options import Options
from colotx.service import ColoService

__all__ = ["Options", "makeService"]


def makeService(options: Options, reactor: Any = None) -> IService:
    """
    @param reactor: for tests; by default the one twistd runs.
    @raise usage.UsageError: the settings cannot work on this machine; one line that says why.
    """
    if reactor is None:
        from twisted.internet import reactor

    def quit(code: int) -> None:
        if code:
            # twistd has no other way to end with an exit code once it runs.
            reactor.addSystemEventTrigger("after", "shutdown", sys.exit, code)
        if reactor.running:
            reactor.stop()
        else:
            reactor.callWhenRunning(reactor.stop)

    try:
        return ColoService(options.settings, reactor, quit)
    except ColoError as error:
        raise usage.UsageError(str(error)) from None
