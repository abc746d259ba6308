"""What twistd calls to build the daemon: options in, service out."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

from twisted.application.service import IService

from colotx.comparedaemon import CompareDaemon
from colotx.comparesettings import CompareSettings
from colotx.errors import ColoError
from colotx.options import Options
from colotx.service import ColoService

__all__ = ["Options", "makeService"]


def makeService(options: Options, reactor: Any = None) -> IService:
    """
    @param reactor: for tests; by default the one twistd runs.
    @raise SystemExit: the settings cannot work on this machine; one line that says why, and exit code 1.
    """
    if reactor is None:
        from twisted.internet import reactor

    def quit(code: int) -> None:
        if code:
            # twistd has no way to end with an exit code once it runs, and Twisted swallows a SystemExit of a trigger.
            reactor.addSystemEventTrigger("after", "shutdown", atexit.register, _exit, code)
        if reactor.running:
            reactor.stop()
        else:
            reactor.callWhenRunning(reactor.stop)

    settings = options.settings
    if isinstance(settings, CompareSettings):
        return CompareDaemon(settings, reactor, quit)
    try:
        return ColoService(settings, reactor, quit)
    except ColoError as error:
        # twistd shows a UsageError in one line only while it parses options; from here it would be a traceback.
        raise SystemExit(f"twistd colo: {error}") from None


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
