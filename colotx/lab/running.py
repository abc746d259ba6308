"""
What the lab's programs share: running one coroutine to its end, so that its C{finally} clauses are done also after
Ctrl-C, and taking commands from standard input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.stdio import StandardIO
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python.failure import Failure

from colotx.errors import ColoError, ConfigError
from colotx.lab.namespaces import becomePrivileged

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def runPrivileged(
    module: str, argv: Sequence[str], main: Callable[[Any], Coroutine[Deferred[Any], Any, int]]
) -> int:
    """
    L{runToEnd} of a program that makes network namespaces, on the reactor of this process.

    @param module: the program's, to start it again inside a user namespace.
    @param main: gets the reactor.
    @return: the exit status.
    """
    try:
        becomePrivileged(module, argv)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    from twisted.internet import reactor

    return runToEnd(reactor, lambda: main(reactor))


def runToEnd(reactor: Any, main: Callable[[], Coroutine[Deferred[Any], Any, int]]) -> int:
    """
    Run the reactor until the coroutine ends. SIGINT and SIGTERM cancel it; what it still awaits in its C{finally}
    clauses is waited for.

    @return: what it returned; 1 after an error (told on standard error); L{INTERRUPTED} when it was cancelled.
    """
    status = INTERRUPTED
    stopping = False
    task: Deferred[Any] = Deferred()

    def finished(result: int | Failure) -> None:
        nonlocal status
        if not isinstance(result, Failure):
            status = result
        elif isinstance(result.value, ColoError):
            print(result.getErrorMessage(), file=sys.stderr)
            status = 1
        elif not isinstance(result.value, CancelledError):
            print(result.getTraceback(), file=sys.stderr)
            status = 1
        if not stopping:
            reactor.stop()

    def start() -> None:
        nonlocal task
        task = ensureDeferred(main())
        task.addBoth(finished)

    def stop() -> Deferred[Any]:
        nonlocal stopping
        stopping = True
        task.cancel()
        return task

    reactor.callWhenRunning(start)
    reactor.addSystemEventTrigger("before", "shutdown", stop)
    reactor.run()
    return status


class CommandInput(LineOnlyReceiver):
    """
    Commands on standard input, one a line of at most 200 bytes.

    @param command: called with the words of each line.
    @ivar ended: fires at the end of the input.
    """

    delimiter = b"\n"
    MAX_LENGTH = 200

    def __init__(self, reactor: Any, command: Callable[[list[str]], None]) -> None:
        self._command = command
        self.ended: Deferred[None] = Deferred()
        StandardIO(self, reactor=reactor)  # type: ignore[no-untyped-call]

    def lineReceived(self, line: bytes) -> None:
        self._command(line.decode(errors="replace").split())

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.ended.callback(None)
