"""
The kinds of connection the client holds with a guest, each with its service and its way to check what comes.

This module knows one connection at a time; how many there are, when they begin and when all is over is
L{colotx.lab.client}'s.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from twisted.internet.interfaces import ITCPTransport
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure

from colotx.lab.guestimage import ECHO_PORT, NUMBERS_PORT, SINK_BLOCK, SINK_PORT, numbers
from colotx.lab.traffic import (
    RECORD_SIZE,
    BlockChecker,
    EchoChecker,
    GapMeter,
    Ledger,
    NumbersChecker,
    record,
)

TICK = 0.01
"""Seconds between two calls of L{Conversation.tick}."""
_CYCLE = numbers()
_READ = 4096
"""Bytes a download takes at once; with more its rate would come in lumps."""
_BUFFER = 16384
"""Bytes of a download that the client's kernel may hold ready (it takes it for twice that)."""
_MORE = 1 << 16
"""Bytes after which a download lives for certain: more than was under way."""


class Conversation(Protocol):
    """
    One connection: says what it has to say, checks what comes.

    @cvar kind: what it is called.
    @cvar port: of the guest's service.
    @ivar version: of IP.
    @ivar gaps: its silences.
    @ivar lost: None, or why the connection is gone before its time.
    @ivar opened: when it was open, seconds of the client's clock.
    @ivar onHeard: is told when bytes came.
    """

    kind: str
    port: int
    version = 4
    transport: ITCPTransport | None

    def __init__(self, tag: int, rate: float, window: int, now: Callable[[], float]) -> None:
        """
        @param tag: makes its bytes differ from all others'.
        @param rate: bytes a second.
        @param window: bytes that may be under way.
        """
        self._tag = tag
        self._rate = rate
        self._window = window
        self._now = now
        self._counter = 0
        self._allowance = 0.0
        self._draining = False
        self.sent = 0
        self.lost: str | None = None
        self.onHeard: Callable[[float], object] = lambda _: None
        self.opened = now()
        self.gaps = GapMeter(self.opened)

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.setTcpNoDelay(True)
        self.opened = self._now()
        self.gaps = GapMeter(self.opened)

    def dataReceived(self, data: bytes) -> None:
        now = self._now()
        self.gaps.arrived(now)
        self.onHeard(now)
        self.feed(data)

    def connectionLost(self, reason: Failure | None = None) -> None:
        if not self.settled:
            self.lost = "closed" if reason is None else reason.getErrorMessage()

    @property
    def ledger(self) -> Ledger:
        """What came."""
        raise NotImplementedError

    @property
    def due(self) -> int:
        """Bytes sent and not yet answered."""
        raise NotImplementedError

    @property
    def settled(self) -> bool:
        """Whether, after C{drain}, all came that must come."""
        return self._draining and not self.due

    def feed(self, data: bytes) -> None:
        """Check this."""
        raise NotImplementedError

    def tick(self) -> None:
        """Send what a tick allows and the window has room for."""
        # What the window refused is not caught up with: the rate after an outage is the rate before it.
        budget = self._allowance % RECORD_SIZE + self._rate * TICK
        self._allowance = budget
        count = int(min(budget, self._window - self.due)) // RECORD_SIZE
        if self.lost is not None or self._draining or count <= 0:
            return
        data = b"".join(record(self._tag, number) for number in range(self._counter, self._counter + count))
        self._counter += count
        self.sent += len(data)
        assert self.transport is not None
        self.transport.write(data)
        self._wrote(data)

    def _wrote(self, data: bytes) -> None:
        """These bytes were given to TCP."""

    def drain(self) -> None:
        """Say nothing more; C{settled} tells when all has come. Harmless when it was said before."""
        self._draining = True

    def isHung(self, now: float, limit: float) -> bool:
        """@return: whether it lives, has something due, and got nothing for C{limit} seconds."""
        return self.lost is None and not self.settled and self.gaps.silence(now) >= limit

    def finish(self, now: float, hungAfter: float) -> dict[str, Any]:
        """
        Judge.

        @return: what the report says of this connection.
        """
        hung = self.isHung(now, hungAfter)
        if self.due:
            self.gaps.silent(now)
        faults = self._faults()
        return {
            "kind": self.kind,
            "version": self.version,
            "opened": round(self.opened, 3),
            "sent": self.sent,
            "received": self.ledger.received,
            **faults,
            "reset": self.lost,
            "hung": hung,
            "outage_ms": self.gaps.outage,
            "usual_gap_ms": asdict(self.gaps.usual),
        }

    def _faults(self) -> dict[str, int]:
        """Bytes that are not as they must be."""
        ledger = self.ledger
        return {
            "lost": self.sent - ledger.received,
            "doubled": ledger.doubled,
            "corrupted": ledger.corrupted,
            "reordered": ledger.reordered,
        }


class Echo(Conversation):
    """Sends records and gets them back."""

    kind = "echo"
    port = ECHO_PORT

    def __init__(self, tag: int, rate: float, window: int, now: Callable[[], float]) -> None:
        super().__init__(tag, rate, window, now)
        self._checker = EchoChecker(tag)

    @property
    def ledger(self) -> Ledger:
        return self._checker

    @property
    def due(self) -> int:
        return self.sent - self._checker.received - self._checker.pending

    def feed(self, data: bytes) -> None:
        self._checker.feed(data)

    def _faults(self) -> dict[str, int]:
        self._checker.finish()
        return super()._faults()


class Download(Conversation):
    """
    Gets numbers without end. At the end it is well when some more of them came: TCP may hold bytes that came before a
    kill.
    """

    kind = "download"
    port = NUMBERS_PORT

    def __init__(self, tag: int, rate: float, window: int, now: Callable[[], float]) -> None:
        super().__init__(tag, rate, window, now)
        self._checker = NumbersChecker(_CYCLE)
        self._came = 0
        self._wanted = 0

    def connectionMade(self) -> None:
        super().connectionMade()
        transport: Any = self.transport
        transport.bufferSize = _READ
        transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)

    @property
    def ledger(self) -> Ledger:
        return self._checker

    @property
    def due(self) -> int:
        return max(0, self._wanted - self._came)

    def feed(self, data: bytes) -> None:
        self._came += len(data)
        self._checker.feed(data)
        self._allowance -= len(data)
        if self._allowance <= 0:
            transport: Any = self.transport
            transport.pauseProducing()

    def tick(self) -> None:
        self._allowance = min(self._allowance + self._rate * TICK, self._window)
        if self._allowance > 0 and self.lost is None:
            transport: Any = self.transport
            transport.resumeProducing()

    def drain(self) -> None:
        if not self._draining:
            self._wanted = self._came + _MORE
        super().drain()

    def _faults(self) -> dict[str, int]:
        return {**super()._faults(), "lost": self._checker.lost}


class Upload(Conversation):
    """Sends blocks and gets their checksums; what was received is what the guest confirmed."""

    kind = "upload"
    port = SINK_PORT

    def __init__(self, tag: int, rate: float, window: int, now: Callable[[], float]) -> None:
        super().__init__(tag, rate, window, now)
        self._checker = BlockChecker()
        self._block = b""

    @property
    def ledger(self) -> Ledger:
        return self._checker

    @property
    def due(self) -> int:
        return self.sent - self._checker.received

    def feed(self, data: bytes) -> None:
        self._checker.feed(data)

    def _wrote(self, data: bytes) -> None:
        self._block += data
        while len(self._block) >= SINK_BLOCK:
            self._checker.expect(self._block[:SINK_BLOCK])
            self._block = self._block[SINK_BLOCK:]

    def drain(self) -> None:
        if not self._draining and self.lost is None:
            if self._block:
                self._checker.expect(self._block)
            transport: Any = self.transport
            transport.loseWriteConnection()
        super().drain()


KINDS: Mapping[str, type[Conversation]] = {one.kind: one for one in (Echo, Download, Upload)}
"""All kinds, by name."""
