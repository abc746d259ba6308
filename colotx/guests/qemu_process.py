"""
A running QEMU: its process, its QMP connection and its NIC's socket.

This module knows how to start a QEMU, how to hear that it died, and how to end it. It does not know checkpoints.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.error import ProcessDone
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from colotx._qmp_codec import JsonObject
from colotx.errors import ConfigError, GuestError, GuestLost, GuestTimeout
from colotx.guests.qemu_arguments import MappedRam, QemuSettings, SocketPaths, commandLine
from colotx.qmp import QmpClient, connectQmp

_TAIL = 4096
"""Bytes of QEMU's standard error that are kept for messages."""

_QUIT_TIMEOUT = 3.0
"""Seconds QEMU has to quit before it is killed."""

EventReceiver = Callable[[str, JsonObject], None]


class _Output(ProcessProtocol):
    """
    Keeps the end of what QEMU says, and tells when it ended.

    @ivar ended: fires with None, never fails.
    """

    _log = Logger(namespace="colotx.guests.qemu")

    def __init__(self, onEnded: Callable[[str], None]) -> None:
        self._onEnded = onEnded
        self._tail = b""
        self._waiting: list[Deferred[None]] = []
        self.alive = False

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.alive = True
        self.transport.closeStdin()

    def outReceived(self, data: bytes) -> None:
        """A guest's serial console may end here: it is nobody's, and must not fill the pipe."""

    def errReceived(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-_TAIL:]
        for line in data.decode(errors="replace").splitlines():
            self._log.debug("qemu: {line}", line=line)

    def processEnded(self, reason: Failure) -> None:
        self.alive = False
        how = "it exited by itself" if isinstance(reason.value, ProcessDone) else reason.getErrorMessage()
        words = self.words
        self._onEnded(f"QEMU ended ({how.rstrip('.')})" + (f": {words}" if words else ""))
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)

    @property
    def words(self) -> str:
        """QEMU's last words, one line."""
        lines = (line.strip() for line in self._tail.decode(errors="replace").splitlines())
        return "; ".join(line for line in lines if line)[-500:]

    def whenEnded(self) -> Deferred[None]:
        """@return: a Deferred that fires when the process is gone."""
        if not self.alive:
            return succeed(None)
        waiter: Deferred[None] = Deferred()
        self._waiting.append(waiter)
        return waiter


class QemuProcess:
    """
    One QEMU, from start to end. It is started once.

    @ivar onLost: called once with a L{GuestLost} when QEMU ended without L{end}, or says it is about to.
    @ivar onEvent: called with each QMP event's name and data.
    @ivar paths: its sockets.
    @ivar qmp: the QMP connection, once started.
    """

    _log = Logger(namespace="colotx.guests.qemu")

    def __init__(
        self,
        reactor: Any,
        settings: QemuSettings,
        paths: SocketPaths,
        onLost: Callable[[GuestLost], None],
        onEvent: EventReceiver,
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self.paths = paths
        self._onLost: Callable[[GuestLost], None] | None = onLost
        self._onEvent = onEvent
        self._output = _Output(self._ended)
        self._starting: Deferred[QmpClient] | None = None
        self._qmp: QmpClient | None = None
        self.lost: GuestLost | None = None

    def watch(self, onLost: Callable[[GuestLost], None], onEvent: EventReceiver) -> None:
        """Somebody else is told from now on."""
        self._onLost, self._onEvent = onLost, onEvent

    @property
    def qmp(self) -> QmpClient:
        """
        The QMP connection.

        @raise GuestError: there is none: QEMU was not started, or is gone.
        """
        if self.lost is not None:
            raise self.lost
        if self._qmp is None:
            raise GuestError("QEMU was not started")
        return self._qmp

    @property
    def pid(self) -> int:
        """The process id, for whoever watches or breaks it from outside."""
        assert self._output.transport is not None
        return int(self._output.transport.pid)

    async def start(self, restoring: bool = False, ram: MappedRam | None = None) -> None:
        """
        Start QEMU and connect to its QMP.

        @param restoring: make it wait for its state.
        @param ram: what it maps as its main RAM.
        @raise ConfigError: there is no such QEMU, or the runtime directory cannot be written.
        @raise GuestError: QEMU ended, with its own words, or did not answer in time.
        """
        if shutil.which(self._settings.binary) is None:
            raise ConfigError(f"there is no QEMU {self._settings.binary!r}: install it or set its path")
        try:
            os.makedirs(self.paths.directory, mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the runtime directory cannot be used: {error}") from error
        command = commandLine(self._settings, self.paths, restoring, ram)
        self._log.debug("starting {command}", command=command)
        environment = {**os.environ, **self._settings.environment}
        self._reactor.spawnProcess(self._output, command[0], command, env=environment)
        self._starting = connectQmp(self._reactor, self.paths.qmp, self._settings.startTimeout)
        try:
            self._qmp = await self._starting
        except CancelledError:
            if self.lost is None:
                raise
            raise self.lost from None
        except GuestError as error:
            raise self.withWords(error) from error
        finally:
            self._starting = None
        self._qmp.onEvent = lambda name, data, when: self._event(name, data)

    async def execute(self, command: str, arguments: JsonObject | None = None, timeout: float = 10.0) -> Any:
        """
        Run a QMP command.

        @param timeout: seconds.
        @raise GuestError: as L{QmpClient.execute}.
        """
        return await self.qmp.execute(command, arguments, timeout)

    async def end(self) -> None:
        """End QEMU: ask it to quit, then kill it; remove its directory. Never fails, harmless when it is gone."""
        self._onLost = None
        if self._output.alive and self._qmp is not None:
            asked = self._qmp.execute("quit", timeout=_QUIT_TIMEOUT)
            asked.addErrback(lambda failure: None)
            await self.whenEnded(_QUIT_TIMEOUT)
        self.kill()
        await self.whenEnded(_QUIT_TIMEOUT)
        if self._qmp is not None:
            self._qmp.close()
        shutil.rmtree(self.paths.directory, ignore_errors=True)

    def kill(self) -> None:
        """End QEMU at once."""
        if self._output.alive:
            assert self._output.transport is not None
            self._output.transport.signalProcess("KILL")

    async def whenEnded(self, seconds: float) -> None:
        """Wait until QEMU ended, for C{seconds} at most."""
        ended = self._output.whenEnded()
        ended.addTimeout(seconds, self._reactor, lambda result, timeout: None)
        await ended

    def withWords(self, error: GuestError) -> GuestError:
        """@return: the error, with QEMU's last words if it has said any."""
        words = self._output.words
        kind = GuestTimeout if isinstance(error, GuestTimeout) else GuestError
        return kind(f"{error}; QEMU says: {words}") if words else error

    def _fail(self, error: GuestLost) -> None:
        """QEMU is no use any more: nobody hears of it a second time."""
        self.lost = self.lost or error
        onLost, self._onLost = self._onLost, None
        if onLost is not None:
            onLost(error)

    def _ended(self, how: str) -> None:
        self.lost = GuestLost(how)
        if self._starting is not None:
            # What fails is the start, and it tells its caller.
            self._starting.cancel()
            return
        self._fail(self.lost)

    def _event(self, name: str, data: JsonObject) -> None:
        self._onEvent(name, data)
        if name == "SHUTDOWN":
            self._fail(GuestLost(f"the guest shut down: {data.get('reason', 'no reason given')}"))


__all__ = ["QemuProcess"]
