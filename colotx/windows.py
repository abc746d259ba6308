"""
Receive windows: what a client may send is what both VMs can take.

Clients know the primary's window. When the secondary's VM reads slower its own is smaller. What is sent beyond it is
lost to the secondary, which then acknowledges less than the primary, whose acknowledgements wait for a checkpoint. So a
segment of the primary leaves with the smaller of the two windows. It leaves only if it acknowledges no more than
the secondary did (L{colotx.compare}), so the edge it shows to the client,

    ack of the primary + smaller window << scale

is not beyond the secondary's; the scale is of the guest's settings, thus the same in both, and need not be known. What
both had at the last checkpoint both can take, so nothing is remembered across one.

When the secondary's window opens again the primary has nothing to say, for its own was open all the time: the client is
told in the words of the primary's segment that left last. The secondary's own words would not do: their time stamps may
be behind (RFC 7323, 5).

Sans-IO: this module takes frames and gives frames. Nothing here raises on any bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colotx._segments import FIN, MASK, RST, SYN, Segment, acknowledgement, ahead, find, rewrite, word

_MAX_CONNECTIONS = 16384

_IPV4 = b"\x08\x00\x45"
_IPV6 = b"\x86\xdd"
_TCP = b"\x06"
_WINDOW = 14
"""Where the window is in a TCP header: 2 bytes, compared as they are; of the same length they sort as numbers."""


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
    """

    frame: bytes
    segment: Segment
    following: int
    window: bytes

    @property
    def own(self) -> bytes:
        """The primary's window."""
        at = self.segment.start + _WINDOW
        return self.frame[at : at + 2]


class WindowKeeper:
    """
    Between the comparer and the outside, from one checkpoint to the next.

    @ivar statistics: L{WindowStatistics}.
    """

    def __init__(self) -> None:
        self._windows: dict[bytes, bytes] = {}  # the secondary's, by connection
        self._told: dict[bytes, _Told] = {}
        self._opening: set[bytes] = (
            set()
        )  # of those told: what the secondary spoke of since the last updates()
        self.statistics = WindowStatistics()

    def said(self, frames: Sequence[bytes]) -> None:
        """What the secondary said, in order, in the primary's sequence space; before it is compared."""
        windows, told = self._windows, self._told
        for frame in frames:
            key, start = _find(frame)
            if key is None:
                continue
            if frame[start + 13] & (SYN | RST):
                # Of a connection that ended, or of one that the same ports had before.
                windows.pop(key, None)
                told.pop(key, None)
                continue
            windows[key] = frame[start + 14 : start + 16]
            if key in told:
                self._opening.add(key)
        while len(windows) > _MAX_CONNECTIONS:
            oldest = next(iter(windows))
            del windows[oldest]
            told.pop(oldest, None)

    def lower(self, frames: Sequence[bytes]) -> Sequence[bytes]:
        """
        What the primary said and the secondary agreed to.

        @return: the same, with no window above the secondary's; what needs no change is the same object.
        """
        windows, told = self._windows, self._told
        lowered: list[bytes] | None = None
        for number, frame in enumerate(frames):
            key, start = _find(frame)
            window = windows.get(key) if key is not None else None
            if window is None or (window >= frame[start + 14 : start + 16] and key not in told):
                continue
            if lowered is None:
                lowered = list(frames)
            lowered[number] = self._lower(frame, window)
        return frames if lowered is None else lowered

    def updates(self) -> list[bytes]:
        """@return: segments for clients whose lowered windows opened meanwhile."""
        result: list[bytes] = []
        for key in self._opening:
            told, window = self._told.get(key), self._windows.get(key)
            if told is None or window is None:
                continue
            window = min(window, told.own)
            # A receiver, too, tells only of twice as much, and of nothing useless: the secondary is one.
            if window > told.window and _number(window) >= 2 * _number(told.window):
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
            if told.window < told.own:
                self._update(told, told.own, result)
        self._windows.clear()
        self._told.clear()
        self._opening.clear()
        return result

    def _lower(self, frame: bytes, theirs: bytes) -> bytes:
        segment = find(frame)
        if segment is None:
            return frame
        key, start, data, end = segment
        flags = frame[start + 13]
        if flags & (SYN | RST):
            # RFC 7323, 2.2: the window of a SYN is not scaled. Nobody heeds that of an RST.
            self._told.pop(key, None)
            return frame
        following = (word(frame, start + 4)[0] + end - data + (flags & FIN)) & MASK
        own = frame[start + _WINDOW : start + _WINDOW + 2]
        window = min(own, theirs)
        told = self._told.get(key)
        if told is None:
            self._told[key] = _Told(frame, segment, following, window)
        else:
            if ahead(following, told.following):
                told.following = following
            told.frame, told.segment, told.window = frame, segment, window
        if window == own:
            return frame
        self.statistics.lowered += 1
        # The 32 bits that end with the window.
        (old,) = word(frame, start + 12)
        new = old - _number(own) + _number(window)
        return rewrite(frame, start, start + 16, [(start + 12, old, new)])

    def _update(self, told: _Told, window: bytes, result: list[bytes]) -> None:
        _, start, data, _ = told.segment
        header = told.frame[: start + _WINDOW] + window + told.frame[start + _WINDOW + 2 : data]
        update = acknowledgement(header, told.segment, told.following)
        if update is not None:
            told.window = window
            self.statistics.updates += 1
            result.append(update)


def _number(window: bytes) -> int:
    return int.from_bytes(window, "big")


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


__all__ = ["WindowKeeper", "WindowStatistics"]
