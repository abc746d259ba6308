"""
The client of the demonstration and the tests: many TCP connections to the guest's echo service, each byte checked.

Runs as a process of its own (C{python -m colotx.lab.client}) inside the client's network namespace. It writes one
JSON object a line to its standard output (C{connected}, C{progress}, at the end C{report}) and reads one command
a line from its standard input::

    mark SECONDS     the kill was at this moment of CLOCK_MONOTONIC, which all processes of one machine share
    drain            stop sending, wait for what is due, report, end; end of file says the same

Exit status 0: every byte sent came back, once, in order, and every connection lived.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import ITCPTransport
from twisted.internet.protocol import Protocol
from twisted.internet.task import LoopingCall, deferLater
from twisted.python.failure import Failure

from colotx.errors import ConfigError
from colotx.lab.running import CommandInput, runToEnd
from colotx.lab.traffic import RECORD_SIZE, EchoChecker, GapMeter, record
from colotx.settings import keyOf

TICK = 0.01
"""Seconds between two sendings."""
PROGRESS_INTERVAL = 0.5
VERDICT_LIMIT = 10.0
"""Seconds the guest's memory check may take to answer."""
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class TrafficSettings:
    """
    What to send, and to whom.

    @ivar connections: how many at once.
    @ivar rate: bytes a second of each connection.
    @ivar window: bytes of each that may be under way; it bounds every buffer here.
    @ivar connectTimeout: seconds the service may take to appear.
    @ivar drainTimeout: seconds the last echoes may take.
    @ivar seed: makes the bytes of two runs differ.
    @ivar verdictPort: the port that tells the verdict of the guest's memory check; 0: do not ask.
    """

    host: str
    port: int = 7
    connections: int = 4
    rate: int = 32_000
    window: int = 65_536
    connectTimeout: float = 60.0
    drainTimeout: float = 30.0
    seed: int = 0
    verdictPort: int = 0

    def arguments(self) -> list[str]:
        """@return: the command line that says the same."""
        options = {keyOf(f.name): getattr(self, f.name) for f in fields(self)}
        return [options.pop("host"), *(f"--{name}={value}" for name, value in options.items())]


class EchoConnection(Protocol):
    """
    One connection: sends its records, checks what comes back.

    @ivar sent: bytes given to TCP.
    @ivar checker: what came back.
    @ivar gaps: this connection's silences.
    @ivar lost: None, or why the connection is gone.
    """

    transport: ITCPTransport | None

    def __init__(self, tag: int, settings: TrafficSettings, owner: TrafficClient) -> None:
        self._tag = tag
        self._settings = settings
        self._owner = owner
        self._counter = 0
        self._allowance = 0.0
        self.sent = 0
        self.checker = EchoChecker(tag)
        self.lost: str | None = None
        self.gaps: GapMeter

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.setTcpNoDelay(True)
        self.gaps = GapMeter(self._owner.now())

    @property
    def due(self) -> int:
        """Bytes sent and not seen again."""
        return self.sent - self.checker.echoed - self.checker.pending

    def send(self) -> None:
        """Send what a tick allows and the window has room for."""
        # What the window refused is not caught up with: the rate after an outage is the rate before it.
        budget = self._allowance % RECORD_SIZE + self._settings.rate * TICK
        self._allowance = budget
        room = self._settings.window - self.due
        count = int(min(budget, room)) // RECORD_SIZE
        if self.lost is not None or count <= 0:
            return
        data = b"".join(record(self._tag, number) for number in range(self._counter, self._counter + count))
        self._counter += count
        self.sent += len(data)
        assert self.transport is not None
        self.transport.write(data)

    def dataReceived(self, data: bytes) -> None:
        now = self._owner.now()
        self.gaps.arrived(now)
        self.checker.feed(data)
        self._owner.echoed(now)

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.lost = "closed" if reason is None else reason.getErrorMessage()
        self._owner.echoed(None)

    def finish(self, now: float) -> dict[str, Any]:
        """
        Judge.

        @return: what the report says of this connection.
        """
        if self.due:
            self.gaps.silent(now)
        self.checker.finish()
        checker = self.checker
        return {
            "sent": self.sent,
            "echoed": checker.echoed,
            "lost": self.sent - checker.echoed,
            "doubled": checker.doubled,
            "corrupted": checker.corrupted,
            "reordered": checker.reordered,
            "reset": self.lost,
            "outage_ms": self.gaps.outage,
            "usual_gap_ms": asdict(self.gaps.usual),
        }


class VerdictReader(Protocol):
    """
    Reads all that the guest's memory check says: C{<round> ok} or C{<round> CORRUPT}.

    @ivar told: fires with it when the connection ends.
    """

    def __init__(self) -> None:
        self._text = b""
        self.told: Deferred[str] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self._text = (self._text + data)[:100]

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.told.callback(self._text.decode(errors="replace").strip())


class TrafficClient:
    """
    All connections of one run.

    @param reactor: connects and tells the time for timers.
    @param now: seconds of the clock the marks are told in.
    @param emit: takes the JSON objects.
    """

    def __init__(
        self, reactor: Any, settings: TrafficSettings, emit: Emit, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._emit = emit
        self.now = now
        self._connections: list[EchoConnection] = []
        self._stop: Deferred[None] = Deferred()
        self._drained: Deferred[None] | None = None
        self._verdicts: list[str] = []
        self._gaps = GapMeter(now())
        self._started = self._nextProgress = now()

    async def connect(self) -> None:
        """
        Open all connections; the service may need time to appear.

        @raise ConfigError: it did not, in C{connectTimeout} seconds.
        """
        settings = self._settings
        deadline = self.now() + settings.connectTimeout
        for index in range(settings.connections):
            connection = EchoConnection((settings.seed << 8 | index) & 0xFFFFFFFF, settings, self)
            await self._open(settings.port, connection, deadline)
            self._connections.append(connection)
        self._verdicts.append(await self._askVerdict())
        self._started = self._nextProgress = self.now()
        self._gaps = GapMeter(self._started)
        self._emit({"event": "connected", "connections": settings.connections})

    async def _open(self, port: int, protocol: Protocol, deadline: float) -> None:
        host = self._settings.host
        endpoint = TCP4ClientEndpoint(self._reactor, host, port, timeout=2)
        while True:
            try:
                await connectProtocol(endpoint, protocol)  # type: ignore[no-untyped-call]
                return
            except ConnectError as error:
                if self.now() >= deadline:
                    raise ConfigError(f"nothing answers at {host} port {port} in time: {error}") from None
            await deferLater(self._reactor, 0.1)

    async def _askVerdict(self) -> str:
        if not self._settings.verdictPort:
            return ""
        reader = VerdictReader()
        try:
            await self._open(self._settings.verdictPort, reader, self.now() + VERDICT_LIMIT)
        except ConfigError as error:
            return str(error)
        reader.told.addTimeout(VERDICT_LIMIT, self._reactor, lambda *_: "no answer in time")
        return await reader.told

    async def run(self) -> dict[str, Any]:
        """
        Send until C{drain}, wait until all is echoed or C{drainTimeout} passed.

        @return: the report.
        """
        sending = LoopingCall(self._tick)
        sending.clock = self._reactor
        sending.start(TICK)
        try:
            await self._stop
        finally:
            sending.stop()
        if self._due():
            self._drained = Deferred()
            self._drained.addTimeout(self._settings.drainTimeout, self._reactor, lambda *_: None)
            await self._drained
        report = self._report()
        self._verdicts.append(await self._askVerdict())
        return {**report, "memory_check": self._verdicts}

    def drain(self) -> None:
        """Stop sending. Harmless when it was said before."""
        if not self._stop.called:
            self._stop.callback(None)

    def mark(self, at: float) -> None:
        """The kill was at this moment."""
        self._gaps.mark(at)
        for connection in self._connections:
            connection.gaps.mark(at)

    def echoed(self, now: float | None) -> None:
        """A connection got bytes (C{now}), or was lost (None)."""
        if now is not None:
            self._gaps.arrived(now)
        if self._drained is not None and not self._due():
            drained, self._drained = self._drained, None
            drained.callback(None)

    def _due(self) -> bool:
        return any(connection.due > 0 and connection.lost is None for connection in self._connections)

    def _tick(self) -> None:
        for connection in self._connections:
            connection.send()
        now = self.now()
        if now >= self._nextProgress:
            self._nextProgress = now + PROGRESS_INTERVAL
            self._emit(
                {
                    "event": "progress",
                    "sent": sum(connection.sent for connection in self._connections),
                    "echoed": sum(connection.checker.echoed for connection in self._connections),
                    "resets": sum(connection.lost is not None for connection in self._connections),
                }
            )

    def _report(self) -> dict[str, Any]:
        now = self.now()
        if any(connection.due for connection in self._connections):
            self._gaps.silent(now)
        each = [connection.finish(now) for connection in self._connections]
        totals = ("sent", "echoed", "lost", "doubled", "corrupted", "reordered")
        return {
            "event": "report",
            "seconds": round(now - self._started, 3),
            **{name: sum(one[name] for one in each) for name in totals},
            "resets": sum(one["reset"] is not None for one in each),
            "outage_ms": self._gaps.outage,
            "usual_gap_ms": asdict(self._gaps.usual),
            "connections": each,
        }


FAULTS = ("lost", "doubled", "corrupted", "reordered", "resets")
"""What a report counts and should not find: bytes, and connections that did not live."""


def isMemoryIntact(before: str, after: str) -> bool:
    """
    Compare the words of the guest's memory check at the start and at the end.

    @return: whether its memory is whole and it never fell behind a round it had told of.
    """
    match before.split(), after.split():
        case [], []:
            return True
        case [first, "ok"], [last, "ok"]:
            return int(first) <= int(last)
    return False


def isClean(report: Mapping[str, Any]) -> bool:
    """@return: whether a report finds nothing wrong at all."""
    return isMemoryIntact(*report["memory_check"]) and not any(report[name] for name in FAULTS)


def _arguments(argv: Sequence[str]) -> TrafficSettings:
    parser = argparse.ArgumentParser(
        prog="python -m colotx.lab.client",
        description="Talk to an echo service over many connections and check every byte that comes back.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("host", help="address of the service")
    helps = {
        "port": "TCP port of the service",
        "connections": "how many at once",
        "rate": "bytes a second of each connection",
        "window": "bytes under way of each at most",
        "connectTimeout": "seconds the service may take to appear",
        "drainTimeout": "seconds the last echoes may take",
        "seed": "makes the bytes of two runs differ",
        "verdictPort": "TCP port of the guest's memory check; 0: do not ask",
    }
    defaults = TrafficSettings(host="")
    for name, text in helps.items():
        default = getattr(defaults, name)
        parser.add_argument(f"--{keyOf(name)}", dest=name, type=type(default), default=default, help=text)
    return TrafficSettings(**vars(parser.parse_args(argv)))


async def _main(reactor: Any, settings: TrafficSettings) -> int:
    def emit(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)

    client = TrafficClient(reactor, settings, emit)

    def command(words: list[str]) -> None:
        match words:
            case ["mark", seconds]:
                client.mark(float(seconds))
            case ["drain"]:
                client.drain()

    await client.connect()
    CommandInput(reactor, command).ended.addCallback(lambda _: client.drain())
    report = await client.run()
    emit(report)
    return 0 if isClean(report) else 1


def main(argv: Sequence[str]) -> int:
    """@return: the exit status."""
    from twisted.internet import reactor

    settings = _arguments(argv)
    return runToEnd(reactor, lambda: _main(reactor, settings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
