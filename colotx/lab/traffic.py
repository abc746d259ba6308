"""
The bytes the client sends and gets, what became of them, and the silences between them.

Sans-IO: this module knows records, counters and gaps, no sockets and no clocks. A stream is a row of numbered pieces:
an echoed one of 16-byte records, each naming its connection and its place; a download of lines that are numbers; an
upload of blocks, each told back by its checksum. So what comes tells exactly what is missing, came twice, changed, or
came late.
"""

from __future__ import annotations

import hashlib
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
_LONGEST_LINE = 7
"""Bytes that may pass without the end of a line before a download is corrupt."""


def record(tag: int, counter: int) -> bytes:
    """@return: record number C{counter} of the connection C{tag} (32 bits): both, and a CRC-32 of them."""
    head = _HEAD.pack(tag, counter)
    return head + _CHECK.pack(zlib.crc32(head))


class Ledger:
    """
    Accounts for the numbered pieces of a stream, in the order they came.

    @ivar received: bytes that came right, each counted once.
    @ivar doubled: bytes of pieces that came again.
    @ivar corrupted: bytes that belong to no piece.
    @ivar reordered: bytes of pieces that came after later ones (they are received, too).
    """

    def __init__(self) -> None:
        self._next = 0
        self._skipped: set[int] = set()
        self.received = self.doubled = self.corrupted = self.reordered = 0

    def account(self, counter: int, size: int) -> None:
        """Piece number C{counter} came, C{size} bytes."""
        if counter == self._next:
            self._next += 1
        elif counter > self._next:
            # Bounded: of a larger hole the first pieces are remembered, the others are lost for good.
            room = _REMEMBERED - len(self._skipped)
            self._skipped.update(range(self._next, min(counter, self._next + room)))
            self._next = counter + 1
        elif counter in self._skipped:
            self._skipped.remove(counter)
            self.reordered += size
        else:
            self.doubled += size
            return
        self.received += size


class EchoChecker(Ledger):
    """Checks one connection's echo, byte by byte, in any chunking."""

    def __init__(self, tag: int) -> None:
        super().__init__()
        self._tag = tag
        self._rest = bytearray()

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
            self.account(counter, RECORD_SIZE)
            position += RECORD_SIZE
        del rest[:position]

    def finish(self) -> None:
        """Nothing more will come: judge a record that was cut."""
        rest = bytes(self._rest)
        self._rest.clear()
        if record(self._tag, self._next).startswith(rest):
            self.received += len(rest)
        else:
            self.corrupted += len(rest)


class NumbersChecker(Ledger):
    """
    Checks a download of the numbers from 1 to a largest, a line each, again and again, by position. Only where a byte
    is not the expected one it reads lines, to find out where the stream goes on: a cut in a line costs that line, too.

    @param cycle: the bytes of all these lines once.
    """

    def __init__(self, cycle: bytes) -> None:
        super().__init__()
        self._cycle = cycle
        self._lines = cycle.count(b"\n")
        self._at = 0
        self._rest = b""

    @property
    def lost(self) -> int:
        """Bytes that are missing before the last one that came."""
        return self._at - self.received

    def feed(self, data: bytes) -> None:
        """The next bytes that came."""
        data, self._rest = self._rest + data, b""
        while data:
            expected = self._cycle[self._at % len(self._cycle) :][: len(data)]
            if data.startswith(expected):
                taken = len(expected)
            else:
                taken = next(
                    i for i, (one, other) in enumerate(zip(data, expected, strict=False)) if one != other
                )
            self.received += taken
            self._at += taken
            data = data[taken:]
            if taken < len(expected):
                data = self._resynchronise(data)

    def _resynchronise(self, data: bytes) -> bytes:
        """
        The next byte is not the expected one.

        @return: what follows the next line that can be read.
        """
        position = self._at % len(self._cycle)
        begun = position - (self._cycle.rfind(b"\n", 0, position) + 1)
        data = self._cycle[position - begun : position] + data
        self.received -= begun
        self._at -= begun
        line, newline, after = data.partition(b"\n")
        if not newline and len(data) < _LONGEST_LINE:
            self._rest = data
            return b""
        cycles, position = divmod(self._at, len(self._cycle))
        expected = cycles * self._lines + self._cycle.count(b"\n", 0, position)
        number = int(line) if line.isdigit() and len(line) < _LONGEST_LINE else 0
        if not 1 <= number <= self._lines or line != b"%d" % number:
            wrong = min(len(line) + 1, _LONGEST_LINE)
            self.corrupted += wrong
            return data[wrong:]
        half = self._lines // 2
        counter = max(expected + (number - 1 - expected + half) % self._lines - half, number - 1)
        self._next = expected
        self.account(counter, len(line) + 1)
        if self._next > expected:
            self._at = self._position(self._next)
        return after

    def _position(self, counter: int) -> int:
        """@return: where line number C{counter} of the stream begins."""
        cycles, before = divmod(counter, self._lines)
        # The lines before it in its cycle: all have one digit, those from 10 on a second, and so on, and an end.
        digits = sum(max(0, before - int(10**power) + 1) for power in range(len(str(self._lines))))
        return cycles * len(self._cycle) + digits + before


class BlockChecker(Ledger):
    """Checks the lines in which a sink tells the MD5 of each block it got."""

    def __init__(self) -> None:
        super().__init__()
        self._sent = 0
        self._blocks: dict[bytes, tuple[int, int]] = {}
        self._rest = b""

    def expect(self, block: bytes) -> None:
        """This block was sent. The last thousands are remembered."""
        digest = hashlib.md5(block, usedforsecurity=False).hexdigest().encode()
        self._blocks[digest] = self._sent, len(block)
        self._sent += 1
        if len(self._blocks) > _REMEMBERED // 16:
            del self._blocks[next(iter(self._blocks))]

    def feed(self, data: bytes) -> None:
        """The sink said this."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line in self._blocks:
                self.account(*self._blocks[line])
            else:
                self.corrupted += len(line) + 1


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
    Measures the silences of a connection: the usual ones before the C{mark} (the moment of the kill), and the longest
    that ends after it, which is the outage. Times in seconds of one monotonic clock.
    """

    def __init__(self, started: float) -> None:
        self._last = started
        self._marked: float | None = None
        self._outage = 0.0
        self._usual: deque[float] = deque(maxlen=100_000)

    def arrived(self, now: float) -> None:
        """Bytes came."""
        gap = now - self._last
        self._last = now
        if self._marked is None:
            self._usual.append(gap)
        else:
            self._outage = max(self._outage, gap)

    def mark(self, at: float) -> None:
        """The kill was at this moment."""
        self._marked = at

    def silence(self, now: float) -> float:
        """@return: seconds since the last bytes."""
        return now - self._last

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
