"""
The client of the demonstration and the tests: many TCP connections to the guest's services, each byte checked.

Runs as a process of its own (C{python -m colotx.lab.client}) inside the client's network namespace. It writes one
JSON object a line to its standard output (C{connected}, C{progress}, at the end C{report}) and reads one command
a line from its standard input::

    open COUNT SECONDS   open so many more connections, one each so many seconds, until the mark
    mark SECONDS         the kill was at this moment of CLOCK_MONOTONIC, which all processes of one machine share
    drain                stop sending, wait for what is due, report, end; end of file says the same

Exit status 0: every byte came, once, in order, and every connection lived.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count, cycle
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectError
from twisted.internet.protocol import Protocol
from twisted.internet.task import LoopingCall, deferLater
from twisted.python.failure import Failure

from colotx.errors import ConfigError
from colotx.lab.conversations import KINDS, TICK, Conversation
from colotx.lab.running import CommandInput, runToEnd
from colotx.lab.traffic import GapMeter
from colotx.settings import keyOf

PROGRESS_INTERVAL = 0.5
VERDICT_LIMIT = 10.0
"""Seconds the guest's memory check may take to answer."""
_ATTEMPT_LIMIT = 2.0
_NEWCOMER_LIMIT = 20.0
"""Seconds a connection may take to open; one whose SYN meets the kill waits for its retransmissions."""
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class TrafficSettings:
    """
    What to send, and to whom.

    @ivar host: an address of the guest.
    @ivar host6: another one, for every other connection of a kind; empty: none.
    @ivar kinds: of connections, with commas between (L{KINDS}); they are opened in turn.
    @ivar connections: how many at once.
    @ivar rate: bytes a second of each echo.
    @ivar bulkRate: bytes a second of each download and upload.
    @ivar window: bytes of each that may be under way; it bounds every buffer here.
    @ivar connectTimeout: seconds the service may take to appear.
    @ivar drainTimeout: seconds the last bytes may take.
    @ivar hungAfter: seconds without a byte after which a connection that lives, and has one due, is hung.
    @ivar seed: makes the bytes of two runs differ.
    @ivar verdictPort: the port that tells the verdict of the guest's memory check; 0: do not ask.
    """

    host: str
    host6: str = ""
    kinds: str = "echo"
    connections: int = 4
    rate: int = 32_000
    bulkRate: int = 128_000
    window: int = 65_536
    connectTimeout: float = 60.0
    drainTimeout: float = 30.0
    hungAfter: float = 10.0
    seed: int = 0
    verdictPort: int = 0

    def __post_init__(self) -> None:
        """@raise ConfigError: a kind that is none."""
        if unknown := set(self.kinds.split(",")) - set(KINDS):
            raise ConfigError(f"no kind of connection: {', '.join(unknown)}; there are {', '.join(KINDS)}")

    def arguments(self) -> list[str]:
        """@return: the command line that says the same."""
        options = {keyOf(f.name): getattr(self, f.name) for f in fields(self)}
        return [options.pop("host"), *(f"--{name}={value}" for name, value in options.items())]


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
        self._connections: list[Conversation] = []
        self._plan = self._conversations()
        self._toOpen = 0
        self._interval = 0.0
        self._nextOpening = 0.0
        self._opening = 0
        self._unopened: list[str] = []
        self._marked: float | None = None
        self._drainUntil: float | None = None
        self._over: Deferred[None] = Deferred()
        self._verdicts: list[str] = []
        self._gaps = GapMeter(now())
        self._started = self._nextProgress = now()

    def _conversations(self) -> Iterator[tuple[str, Conversation]]:
        """The connections to open, with their hosts: all kinds to one host, then all to the other, and again."""
        settings = self._settings
        kinds = settings.kinds.split(",")
        hosts = [host for host in (settings.host, settings.host6) if host]
        tags = count(settings.seed << 8)
        for host, kind in cycle([(host, kind) for host in hosts for kind in kinds]):
            rate = settings.rate if kind == "echo" else settings.bulkRate
            conversation = KINDS[kind](next(tags) & 0xFFFFFFFF, rate, settings.window, self.now)
            conversation.version = 6 if ":" in host else 4
            yield host, conversation

    async def connect(self) -> None:
        """
        Open all connections; the service may need time to appear.

        @raise ConfigError: it did not, in C{connectTimeout} seconds.
        """
        settings = self._settings
        deadline = self.now() + settings.connectTimeout
        for _ in range(settings.connections):
            host, conversation = next(self._plan)
            await self._open(host, conversation.port, conversation, deadline)
            self._begin(conversation)
        self._verdicts.append(await self._askVerdict())
        self._started = self._nextProgress = self.now()
        self._gaps = GapMeter(self._started)
        self._emit({"event": "connected", "connections": settings.connections})

    def _begin(self, conversation: Conversation) -> None:
        self._connections.append(conversation)
        if conversation.kind == "echo":
            conversation.onHeard = lambda now: self._gaps.arrived(now)

    async def _open(
        self, host: str, port: int, protocol: Protocol, deadline: float, attempt: float = _ATTEMPT_LIMIT
    ) -> None:
        kind = TCP6ClientEndpoint if ":" in host else TCP4ClientEndpoint
        endpoint = kind(self._reactor, host, port, timeout=attempt)
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
            host, port = self._settings.host, self._settings.verdictPort
            await self._open(host, port, reader, self.now() + VERDICT_LIMIT)
        except ConfigError as error:
            return str(error)
        reader.told.addTimeout(VERDICT_LIMIT, self._reactor, lambda *_: "no answer in time")
        return await reader.told

    async def run(self) -> dict[str, Any]:
        """
        Send until C{drain}, wait until all came, or hangs, or C{drainTimeout} passed.

        @return: the report.
        """
        ticking = LoopingCall(self._tick)
        ticking.clock = self._reactor
        ticking.start(TICK)
        try:
            await self._over
        finally:
            ticking.stop()
        report = self._report()
        self._verdicts.append(await self._askVerdict())
        return {**report, "memory_check": self._verdicts}

    def open(self, count: int, interval: float) -> None:
        """Open so many more, one each C{interval} seconds, until the mark."""
        self._toOpen, self._interval = count, interval
        self._nextOpening = self.now()

    def mark(self, at: float) -> None:
        """The kill was at this moment."""
        self._marked = at
        self._toOpen = 0
        self._gaps.mark(at)
        for connection in self._connections:
            connection.gaps.mark(at)

    def drain(self) -> None:
        """Stop sending. Harmless when it was said before."""
        if self._drainUntil is None:
            self._drainUntil = self.now() + self._settings.drainTimeout
            self._toOpen = 0
            for connection in self._connections:
                connection.drain()

    def _tick(self) -> None:
        now = self.now()
        for connection in self._connections:
            connection.tick()
        if self._toOpen and now >= self._nextOpening:
            self._toOpen -= 1
            self._nextOpening = now + self._interval
            ensureDeferred(self._openNewcomer()).addErrback(lambda why: self._unopened.append(str(why.value)))
        if now >= self._nextProgress:
            self._nextProgress = now + PROGRESS_INTERVAL
            self._emit({"event": "progress", **self._sums()})
        if self._drainUntil is not None and not self._over.called:
            undone = [one for one in self._connections if one.lost is None and not one.settled]
            hung = all(one.isHung(now, self._settings.hungAfter) for one in undone)
            if (hung and not self._opening) or now >= self._drainUntil:
                self._over.callback(None)

    async def _openNewcomer(self) -> None:
        host, conversation = next(self._plan)
        self._opening += 1
        try:
            await self._open(host, conversation.port, conversation, 0.0, _NEWCOMER_LIMIT)
        finally:
            self._opening -= 1
        self._begin(conversation)
        if self._drainUntil is not None:
            conversation.drain()

    def _sums(self) -> dict[str, int]:
        return {
            "sent": sum(one.sent for one in self._connections),
            "received": sum(one.ledger.received for one in self._connections),
            "resets": sum(one.lost is not None for one in self._connections),
        }

    def _report(self) -> dict[str, Any]:
        now = self.now()
        if any(one.due for one in self._connections if one.kind == "echo"):
            self._gaps.silent(now)
        each = [one.finish(now, self._settings.hungAfter) for one in self._connections]
        totals = ("lost", "doubled", "corrupted", "reordered", "hung")
        return {
            "event": "report",
            "seconds": round(now - self._started, 3),
            **self._sums(),
            **{name: sum(one[name] for one in each) for name in totals},
            "unopened": len(self._unopened) + self._opening,
            "opening_problems": self._unopened,
            "outage_ms": self._gaps.outage,
            "usual_gap_ms": asdict(self._gaps.usual),
            "connections": each,
        }


FAULTS = ("lost", "doubled", "corrupted", "reordered", "resets", "hung", "unopened")
"""What a report should not find: bytes, and connections that did not live, did not go on, or did not come about."""


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
        description="Talk to a test guest over many connections and check every byte that comes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("host", help="address of the service")
    helps = {
        "host6": "another address of it, for every other connection of a kind",
        "kinds": f"kinds of connections, with commas between: {', '.join(KINDS)}",
        "connections": "how many at once",
        "rate": "bytes a second of each echo",
        "bulkRate": "bytes a second of each download and upload",
        "window": "bytes under way of each at most",
        "connectTimeout": "seconds the service may take to appear",
        "drainTimeout": "seconds the last bytes may take",
        "hungAfter": "seconds without a byte that is due",
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
            case ["open", number, interval]:
                client.open(int(number), float(interval))
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
