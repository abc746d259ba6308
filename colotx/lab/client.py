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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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

TICK = 0.01
"""Seconds between two sendings."""
PROGRESS_INTERVAL = 0.5
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
    """

    host: str
    port: int = 7
    connections: int = 4
    rate: int = 32_000
    window: int = 65_536
    connectTimeout: float = 60.0
    drainTimeout: float = 30.0
    seed: int = 0


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
            self._connections.append(await self._connectOne(index, deadline))
        self._started = self._nextProgress = self.now()
        self._gaps = GapMeter(self._started)
        self._emit({"event": "connected", "connections": settings.connections})

    async def _connectOne(self, index: int, deadline: float) -> EchoConnection:
        settings = self._settings
        endpoint = TCP4ClientEndpoint(self._reactor, settings.host, settings.port, timeout=2)
        while True:
            connection = EchoConnection((settings.seed << 8 | index) & 0xFFFFFFFF, settings, self)
            try:
                await connectProtocol(endpoint, connection)  # type: ignore[no-untyped-call]
                return connection
            except ConnectError as error:
                if self.now() >= deadline:
                    where = f"{settings.host} port {settings.port}"
                    raise ConfigError(
                        f"no echo service at {where} after {settings.connectTimeout:.0f} s: {error}"
                    ) from None
            await deferLater(self._reactor, 0.1)

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
        return self._report()

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


def isClean(report: dict[str, Any]) -> bool:
    """@return: whether a report tells of not one byte lost, doubled, changed or reordered, and no connection lost."""
    return not any(report[name] for name in ("lost", "doubled", "corrupted", "reordered", "resets"))


def _arguments(argv: Sequence[str]) -> TrafficSettings:
    defaults = TrafficSettings(host="")
    parser = argparse.ArgumentParser(
        prog="python -m colotx.lab.client",
        description="Talk to an echo service over many connections and check every byte that comes back.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("host", help="address of the service")
    parser.add_argument("--port", type=int, default=defaults.port, help="TCP port of the service")
    parser.add_argument("--connections", type=int, default=defaults.connections, help="how many at once")
    parser.add_argument("--rate", type=int, default=defaults.rate, help="bytes a second of each connection")
    parser.add_argument("--window", type=int, default=defaults.window, help="bytes under way of each at most")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="makes the bytes of two runs differ")
    for name, text in (
        ("connect-timeout", "seconds the service may take to appear"),
        ("drain-timeout", "seconds the last echoes may take"),
    ):
        attribute = name.split("-")[0] + "Timeout"
        parser.add_argument(
            f"--{name}", type=float, dest=attribute, default=getattr(defaults, attribute), help=text
        )
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
