"""
Receive windows: what a client may send is what both VMs can take.

Clients know the primary's window. When the secondary's VM reads slower its own is smaller. What is sent beyond it is
lost to the secondary, which then acknowledges less than the primary, whose acknowledgements wait for a checkpoint. So a
segment of the primary leaves with a window that ends where the nearer one of the two ends::

    edge = ack + window << scale

It leaves only if it acknowledges no more than the secondary did (L{colotx.compare}). The secondary may have
acknowledged more: then its window is counted from there. To take it as it is would move the edge back, and a client
whose edge moved back (Linux: C{tcp_acceptable_seq}) says things that neither VM heeds, for ever. The scale is the same
in both VMs, for the guest's settings are. A connection whose SYN was not seen has none that is known, and keeps the
primary's windows. What both had at a checkpoint both can take, so nothing but the scales is remembered across one.

When the secondary's window opens again the primary has nothing to say, for its own was open all the time: the client is
told in the words of the primary's segment that left last. The secondary's own words would not do: their time stamps may
be behind (RFC 7323, 5).

Sans-IO: this module takes frames and gives frames. Nothing here raises on any bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from colotx._segments import (
    FIN,
    HALF,
    MASK,
    RST,
    SYN,
    Segment,
    acknowledgement,
    ahead,
    find,
    rewrite,
    windowScale,
    word,
)

_MAX_CONNECTIONS = 16384

_IPV4 = b"\x08\x00\x45"
_IPV6 = b"\x86\xdd"
_TCP = b"\x06"

_spoken = struct.Struct(">IxxH").unpack
"""Of the 8 bytes of a TCP header from the acknowledgement on: that, and the window."""


@dataclass(slots=True)
class WindowStatistics:
    """
    Counters since the start.

    @ivar lowered: segments that left with the secondary's window.
    @ivar updates: segments made to tell a client that it opened again.
    """

    lowered: int = 0
    updates: int = 0


@dataclass(slots=True)
class _Told:
    """
    What the client of a lowered connection knows.

    @ivar frame: the primary's segment that left last, with its own window.
    @ivar segment: where it is in there.
    @ivar following: sequence number after all that left.
    @ivar window: what the client was told.
    @ivar scale: of the windows.
    """

    frame: bytes
    segment: Segment
    following: int
    window: int
    scale: int


class WindowKeeper:
    """
    Between the comparer and the outside.

    @ivar statistics: L{WindowStatistics}.
    """

    def __init__(self) -> None:
        self._scales: dict[bytes, int] = {}
        self._spoken: dict[bytes, bytes] = {}  # the secondary's acknowledgement and window
        self._told: dict[bytes, _Told] = {}
        self._opening: set[bytes] = (
            set()
        )  # of those told: what the secondary spoke of since the last updates()
        self.statistics = WindowStatistics()

    def learn(self, frames: Sequence[bytes]) -> None:
        """What the primary said, whether it leaves or waits: its SYNs tell the scale (RFC 7323, 2)."""
        scales = self._scales
        for frame in frames:
            key, start = _find(frame)
            if key is None or not frame[start + 13] & SYN:
                continue
            scales.pop(key, None)
            if (segment := find(frame)) is not None:
                scales[key] = windowScale(frame, segment)
        while len(scales) > _MAX_CONNECTIONS:
            del scales[next(iter(scales))]

    def said(self, frames: Sequence[bytes]) -> None:
        """What the secondary said, in order, in the primary's sequence space; before it is compared."""
        spoken, told = self._spoken, self._told
        for frame in frames:
            key, start = _find(frame)
            if key is None:
                continue
            if frame[start + 13] & (SYN | RST):
                # Of a connection that ended, or of one that the same ports had before.
                spoken.pop(key, None)
                told.pop(key, None)
                continue
            spoken[key] = frame[start + 8 : start + 16]
            if key in told:
                self._opening.add(key)
        while len(spoken) > _MAX_CONNECTIONS:
            oldest = next(iter(spoken))
            del spoken[oldest]
            told.pop(oldest, None)

    def lower(self, frames: Sequence[bytes]) -> Sequence[bytes]:
        """
        What the primary said and the secondary agreed to.

        @return: the same, with no window beyond the secondary's; what needs no change is the same object.
        """
        spoken, told = self._spoken, self._told
        lowered: list[bytes] | None = None
        for number, frame in enumerate(frames):
            key, start = _find(frame)
            theirs = spoken.get(key) if key is not None else None
            # It acknowledges no more than they, so its edge is nearer when its window is smaller. As bytes they sort
            # like the numbers.
            if theirs is None or (theirs[6:] >= frame[start + 14 : start + 16] and key not in told):
                continue
            if lowered is None:
                lowered = list(frames)
            lowered[number] = self._lower(frame, theirs)
        return frames if lowered is None else lowered

    def updates(self) -> list[bytes]:
        """@return: segments for clients whose lowered windows opened meanwhile."""
        result: list[bytes] = []
        for key in self._opening:
            told, theirs = self._told.get(key), self._spoken.get(key)
            if told is None or theirs is None:
                continue
            window = _nearer(told.frame, told.segment, theirs, told.scale)
            # A receiver, too, tells only of twice as much, and of nothing useless: the secondary is one.
            if window > told.window and window >= 2 * told.window:
                self._update(told, window, result)
        self._opening.clear()
        return result

    def forget(self) -> list[bytes]:
        """
        A checkpoint was taken, or there is no secondary any more: the primary's windows count.

        @return: segments that tell clients so, to leave once that is certain.
        """
        result: list[bytes] = []
        for told in self._told.values():
            own = _window(told.frame, told.segment)
            if told.window < own:
                self._update(told, own, result)
        self._spoken.clear()
        self._told.clear()
        self._opening.clear()
        return result

    def _lower(self, frame: bytes, theirs: bytes) -> bytes:
        segment = find(frame)
        if segment is None or (scale := self._scales.get(segment.key)) is None:
            return frame
        key, start, data, end = segment
        flags = frame[start + 13]
        if flags & (SYN | RST):
            # RFC 7323, 2.2: the window of a SYN is not scaled. Nobody heeds that of an RST.
            self._told.pop(key, None)
            return frame
        following = (word(frame, start + 4)[0] + end - data + (flags & FIN)) & MASK
        window = _nearer(frame, segment, theirs, scale)
        told = self._told.get(key)
        if told is None:
            self._told[key] = _Told(frame, segment, following, window, scale)
        else:
            if ahead(following, told.following):
                told.following = following
            told.frame, told.segment, told.window = frame, segment, window
        own = _window(frame, segment)
        if window == own:
            return frame
        self.statistics.lowered += 1
        # The 32 bits that end with the window.
        (old,) = word(frame, start + 12)
        return rewrite(frame, start, start + 16, [(start + 12, old, old - own + window)])

    def _update(self, told: _Told, window: int, result: list[bytes]) -> None:
        _, start, data, _ = told.segment
        header = told.frame[: start + 14] + window.to_bytes(2, "big") + told.frame[start + 16 : data]
        update = acknowledgement(header, told.segment, told.following)
        if update is not None:
            told.window = window
            self.statistics.updates += 1
            result.append(update)


def _find(frame: bytes) -> tuple[bytes | None, int]:
    """@return: as L{find}, the key, or None, and the index of the TCP header; quicker, as little is needed."""
    kind = frame[12:15]
    if kind == _IPV4:
        if frame[23:24] != _TCP:
            return None, 0
        if not frame[20] & 0x3F and not frame[21] and len(frame) >= 54:
            return frame[26:38], 34
    elif kind[:2] == _IPV6 and frame[20:21] == _TCP and len(frame) >= 74:
        return frame[22:58], 54
    segment = find(frame)
    return (segment.key, segment.start) if segment is not None else (None, 0)


def _window(frame: bytes, segment: Segment) -> int:
    at = segment.start + 14
    return frame[at] << 8 | frame[at + 1]


def _nearer(frame: bytes, segment: Segment, theirs: bytes, scale: int) -> int:
    """@return: the primary's window, or what makes its segment's edge the secondary's if that is nearer."""
    acknowledged, own = _spoken(frame[segment.start + 8 : segment.start + 16])
    ack, window = _spoken(theirs)
    room = (ack + (window << scale) - acknowledged) & MASK
    return min(own, room >> scale) if room < HALF else 0


__all__ = ["WindowKeeper", "WindowStatistics"]
