"""
The lab's processes: a daemon in its host's namespace, and the client in its own.

This module knows how to start, ask and end them. It must not know what a test or a demonstration wants to show.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

import colotx
from colotx.errors import ColoError
from colotx.lab.client import TrafficSettings
from colotx.lab.namespaces import Namespace
from colotx.qmp import QmpClient, connectQmp

STOP_LIMIT = 5.0
"""Seconds a process may take to end when asked to; then it is killed."""
_CONNECT_LIMIT = 1.0
_LINE_LIMIT = 1 << 20
_SOURCE = str(Path(colotx.__file__).parents[1])


class LabError(ColoError):
    """Something in the lab did not come about; says what, and in which log to look."""


class LabProcess(ProcessProtocol):
    """
    A process in a namespace. What it prints on standard error goes to a file, and so does its standard output
    unless C{onLine} takes it.

    @ivar pid: its id; 0 when it does not run.
    """

    transport: IProcessTransport

    def __init__(
        self, reactor: Any, namespace: Namespace, log: Path, onLine: Callable[[bytes], None] | None = None
    ) -> None:
        self._reactor = reactor
        self._namespace = namespace
        self.log = log
        self._onLine = onLine
        self._rest = b""
        self._waiters: list[Deferred[int]] = []
        self.pid = 0
        self.status = 0

    def start(self, arguments: Sequence[str], directory: Path, **variables: str) -> None:
        """
        Run it.

        @param directory: its working directory.
        @param variables: added to its environment.
        """
        environment = {**os.environ, **variables}
        paths = [_SOURCE, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        command = self._namespace.command(*arguments)
        with self.log.open("ab") as log:
            output: str | int = "r" if self._onLine else log.fileno()
            self._reactor.spawnProcess(
                self,
                command[0],
                command,
                env=environment,
                path=str(directory),
                childFDs={0: "w", 1: output, 2: log.fileno()},
            )
        self.pid = self.transport.pid or 0

    def whenEnded(self) -> Deferred[int]:
        """@return: a Deferred firing with the exit status (negative: the signal), at once when it does not run."""
        waiter: Deferred[int] = Deferred(self._waiters.remove)
        self._waiters.append(waiter)
        if not self.pid:
            self._tellEnded()
        return waiter

    async def stop(self) -> None:
        """Ask it to end, wait, kill it after L{STOP_LIMIT}. Harmless when it does not run."""
        if self.pid:
            os.kill(self.pid, signal.SIGTERM)
            ended = self.whenEnded()
            killing = self._reactor.callLater(STOP_LIMIT, self.kill)
            await ended
            if killing.active():
                killing.cancel()

    def kill(self) -> None:
        """SIGKILL, and nothing else. Harmless when it does not run."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def lastWords(self) -> str:
        """@return: the last line of its log."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "none")
        return "none"

    def outReceived(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_LINE_LIMIT:]
        for line in lines:
            assert self._onLine is not None
            self._onLine(line)

    def processEnded(self, reason: Failure) -> None:
        ended: Any = reason.value  # ProcessDone or ProcessTerminated
        self.pid = 0
        self.status = -ended.signal if ended.signal else ended.exitCode or 0
        self._tellEnded()

    def _tellEnded(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.callback(self.status)


def writeToml(path: Path, values: Mapping[str, object]) -> None:
    """Write a flat TOML file: strings, whole numbers, truth values and lists of strings."""
    # A JSON scalar, or list of them, is a TOML one, but for DEL, which TOML wants escaped.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()]
    path.write_text("".join(lines).replace("\x7f", "\\u007f"), encoding="utf-8")


class DaemonProcess:
    """
    C{twistd colo} on a host.

    @ivar process: the L{LabProcess}.
    @ivar events: the QMP events of its control socket since the first query: name, data, and when they came
        (seconds of C{time.monotonic}).
    """

    def __init__(
        self, reactor: Any, host: Namespace, directory: Path, settings: Mapping[str, object]
    ) -> None:
        """
        @param directory: made for its configuration and logs; its working directory.
        @param settings: TOML keys and values; C{control} and C{state-dir}, which exists, are among them.
        """
        self._reactor = reactor
        self.directory = directory
        self.settings = settings
        self.events: list[tuple[str, Mapping[str, Any], float]] = []
        self._control: QmpClient | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self.process = LabProcess(reactor, host, directory / "daemon.log")

    def start(self) -> None:
        """Run it, with the settings as they are now."""
        writeToml(self.directory / "config.toml", self.settings)
        # Not the twistd script: it may be elsewhere than this Python's modules.
        twistd = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
        command = [*twistd, "-n", "--pidfile=", "colo", "--config", "config.toml"]
        # What it leaves in its temporary directory when it is killed goes with its state.
        self.process.start(command, self.directory, TMPDIR=str(self.settings["state-dir"]))

    async def query(self, command: str, **arguments: object) -> Any:
        """
        A command on the control socket.

        @return: what it returns.
        @raise LabError: the daemon does not run.
        @raise colotx.errors.GuestError: no answer, or an error answer.
        """
        if not self.process.pid:
            raise LabError(
                f"a daemon has ended with status {self.process.status}, its last words: "
                f"{self.process.lastWords()} (see {self.process.log})"
            )
        if self._control is None:
            self._control = await connectQmp(self._reactor, str(self.settings["control"]), _CONNECT_LIMIT)
            self._control.onEvent = lambda name, data, _: self.events.append((name, data, time.monotonic()))
            self._control.onLost = lambda _: self._forget()
        return await self._control.execute(command, arguments or None)

    def _forget(self) -> None:
        self._control = None

    async def stop(self) -> None:
        """End it."""
        if self._control is not None:
            self._control.close()
            self._control = None
        await self.process.stop()


class ClientProcess:
    """
    L{colotx.lab.client} in the client's namespace.

    @ivar progress: its last word on how far it is.
    """

    def __init__(self, reactor: Any, namespace: Namespace, directory: Path) -> None:
        self._reactor = reactor
        self._directory = directory
        self.progress: Mapping[str, Any] = {}
        self._last: dict[str, Mapping[str, Any]] = {}
        self._waiting: tuple[str, Deferred[Mapping[str, Any]]] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self.process = LabProcess(reactor, namespace, directory / "client.log", self._lineReceived)

    async def start(self, settings: TrafficSettings) -> None:
        """
        Run it, and wait until its connections are open.

        @raise LabError: they are not.
        """
        arguments = [sys.executable, "-m", "colotx.lab.client", *settings.arguments()]
        self.process.start(arguments, self._directory)
        self.process.whenEnded().addCallback(self._ended)
        await self._expect("connected", settings.connectTimeout + 10)

    def open(self, count: int, interval: float) -> None:
        """Let it open C{count} more connections, one each C{interval} seconds, until the kill."""
        self.process.transport.writeToChild(0, f"open {count} {interval}\n".encode())

    def mark(self, at: float) -> None:
        """Tell it when the kill was, seconds of C{time.monotonic}."""
        self.process.transport.writeToChild(0, f"mark {at}\n".encode())

    async def finish(self, timeout: float) -> Mapping[str, Any]:
        """
        Let it stop sending and wait for what is due.

        @param timeout: seconds, more than its own drain time-out.
        @return: its report.
        """
        if self.process.pid:
            self.process.transport.writeToChild(0, b"drain\n")
        return await self._expect("report", timeout)

    async def stop(self) -> None:
        """End it, whatever it does."""
        await self.process.stop()

    async def _expect(self, event: str, timeout: float) -> Mapping[str, Any]:
        if event not in self._last:
            waiter: Deferred[Mapping[str, Any]] = Deferred()
            self._waiting = (event, waiter)
            if self.process.pid:
                waiter.addTimeout(timeout, self._reactor, lambda *_: self._last.get(event))
                await waiter
            self._waiting = None
        if event not in self._last:
            reason = self._last.get("failed", {}).get("reason") or self.process.lastWords()
            raise LabError(f"the client: {reason} (see {self.process.log})")
        return self._last[event]

    def _lineReceived(self, line: bytes) -> None:
        with self.process.log.open("ab") as log:
            log.write(line + b"\n")
        message = json.loads(line)
        self._last[message["event"]] = message
        if message["event"] == "progress":
            self.progress = message
        if self._waiting is not None and self._waiting[0] == message["event"]:
            self._wake()

    def _ended(self, _: int) -> None:
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None:
            (_, waiter), self._waiting = self._waiting, None
            waiter.callback({})
