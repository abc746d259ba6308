"""
The bytes the client sends, what became of them, and the silences between them.

Sans-IO: this module knows records, counters and gaps, no sockets and no clocks. A connection's stream is a row
of 16-byte records, each naming its connection and its place, so that what comes back tells exactly which byte
is missing, came twice, changed, or came late.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

RECORD_SIZE = 16
_HEAD = struct.Struct(">IQ")
_CHECK = struct.Struct(">I")
_REMEMBERED = 65536


def record(tag: int, counter: int) -> bytes:
    """@return: record number C{counter} of the connection C{tag} (32 bits): both, and a CRC-32 of them."""
    head = _HEAD.pack(tag, counter)
    return head + _CHECK.pack(zlib.crc32(head))


class EchoChecker:
    """
    Checks one connection's echo, byte by byte, in any chunking.

    @ivar echoed: bytes that came back right, each counted once.
    @ivar doubled: bytes of records that came again.
    @ivar corrupted: bytes that belong to no record.
    @ivar reordered: bytes of records that came after later ones (they are echoed, too).
    """

    def __init__(self, tag: int) -> None:
        self._tag = tag
        self._next = 0
        self._skipped: set[int] = set()
        self._rest = bytearray()
        self.echoed = self.doubled = self.corrupted = self.reordered = 0

    @property
    def pending(self) -> int:
        """Bytes of a record not whole yet."""
        return len(self._rest)

    def feed(self, data: bytes) -> None:
        """The next bytes that came back."""
        rest = self._rest
        rest += data
        position = 0
        while position + RECORD_SIZE <= len(rest):
            tag, counter = _HEAD.unpack_from(rest, position)
            if tag != self._tag or rest[position : position + RECORD_SIZE] != record(tag, counter):
                self.corrupted += 1
                position += 1
                continue
            self._account(counter)
            position += RECORD_SIZE
        del rest[:position]

    def _account(self, counter: int) -> None:
        if counter == self._next:
            self._next += 1
        elif counter > self._next:
            # Bounded: of a larger hole the first records are remembered, the others are lost for good.
            room = _REMEMBERED - len(self._skipped)
            self._skipped.update(range(self._next, min(counter, self._next + room)))
            self._next = counter + 1
        elif counter in self._skipped:
            self._skipped.remove(counter)
            self.reordered += RECORD_SIZE
        else:
            self.doubled += RECORD_SIZE
            return
        self.echoed += RECORD_SIZE

    def finish(self) -> None:
        """Nothing more will come: judge a record that was cut."""
        rest = bytes(self._rest)
        self._rest.clear()
        if record(self._tag, self._next).startswith(rest):
            self.echoed += len(rest)
        else:
            self.corrupted += len(rest)


def percentile(values: Iterable[float], share: float) -> float | None:
    """@return: the nearest-rank percentile (C{share} 0 to 1) of the values, None when there are none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """p50, p99 and the largest of something, in milliseconds; None when there was nothing to measure."""

    p50: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Quantiles:
        """@param values: in milliseconds."""
        ordered = sorted(values)
        return cls(*(rounded(percentile(ordered, share)) for share in (0.5, 0.99, 1.0)))


def rounded(value: float | None) -> float | None:
    """@return: milliseconds to the tenth of a millisecond that is about what a clock here tells."""
    return None if value is None else round(value, 1)


class GapMeter:
    """
    Measures the silences of an echo: the usual ones before the C{mark} (the moment of the kill), and the longest
    that ends after it, which is the outage. Times in seconds of one monotonic clock.
    """

    def __init__(self, started: float) -> None:
        self._last = started
        self._marked: float | None = None
        self._outage = 0.0
        self._usual: deque[float] = deque(maxlen=100_000)

    def arrived(self, now: float) -> None:
        """Echoed bytes came."""
        gap = now - self._last
        self._last = now
        if self._marked is None:
            self._usual.append(gap)
        else:
            self._outage = max(self._outage, gap)

    def mark(self, at: float) -> None:
        """The kill was at this moment."""
        self._marked = at

    def silent(self, now: float) -> None:
        """Bytes are due and nothing came until now: the open gap counts as well."""
        if self._marked is not None:
            self._outage = max(self._outage, now - self._last)

    @property
    def outage(self) -> float | None:
        """Milliseconds, None without a kill."""
        return None if self._marked is None else round(self._outage * 1000, 1)

    @property
    def usual(self) -> Quantiles:
        """The gaps before the kill (the last 100,000 of them)."""
        return Quantiles.of(gap * 1000 for gap in self._usual)
