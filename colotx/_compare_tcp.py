"""
One TCP connection, as the comparer judges it: what the secondary said, what of the primary waits.

Sequence space, not frames: the two guests may cut the same bytes differently, repeat and reorder them. The rules,
all modulo 2**32:

  - A segment of the primary is equal when every byte of its payload was seen at the same place of the secondary's
    stream with the same value. Bytes that were judged stay for a while, so that a retransmission is judged too.
  - FIN counts as a byte after the payload: both must have it at the same place.
  - Its acknowledgement must not be ahead of the highest the secondary sent: what a client was told to forget, both
    have.
  - SYN: both must have sent one with the same SYN and ACK flags, the same acknowledgement and the same payload. The
    initial sequence numbers may differ; later segments of the secondary arrive translated. A SYN with another
    initial number begins the connection afresh.
  - RST: for each, the secondary must have sent one that acknowledges no less.
  - Window, urgent pointer, options (time stamps, SACK) and the other flags may differ.

A connection first seen in the middle (after a checkpoint) needs no SYN. This module knows no frames and no clock.
"""

from __future__ import annotations

from collections import deque

from colotx.evidence import Difference
from colotx.packets import Flow

FIN = 0x01
SYN = 0x02
RST = 0x04
ACK = 0x10
CONTROL = FIN | SYN | RST | ACK
"""The flags that are judged. A segment with ACK alone of these is a plain one."""

MASK = 0xFFFFFFFF
HALF = 0x80000000

_HISTORY_SEGMENTS = 64
_HISTORY_BYTES = 256 * 1024
_MAX_RESETS = 64

Segment = tuple[int, float, tuple[bytes, ...], int, int, int, bytes]
"""Held: number of arrival, time of arrival (s), frames, sequence number, acknowledgement, flags, payload."""


class TcpFlow:
    """
    One direction (guest to client) of one TCP connection.

    @ivar flow: which.
    @ivar theirs: the secondary's bytes: payload by sequence number, in order of arrival.
    @ivar ack: the highest acknowledgement of the secondary; None: none seen.
    @ivar waiting: the primary's segments that may not leave yet, in order.
    @ivar reached: sequence number of the primary's segment that left last; None: none yet.
    @ivar room: how many entries C{theirs} may have before L{prune} is due.
    @ivar seen: time of the last frame of either side, seconds.
    @ivar stuck: the two differ: nothing leaves before the next checkpoint.
    @ivar asked: a checkpoint was asked for.
    @ivar deaf: the secondary said more than is kept: its segments are ignored until the next checkpoint.
    """

    __slots__ = (
        "_cursor",
        "_end",
        "_examined",
        "_fin",
        "_origin",
        "_paired",
        "_resets",
        "_syn",
        "ack",
        "asked",
        "deaf",
        "flow",
        "reached",
        "room",
        "seen",
        "stuck",
        "theirs",
        "waiting",
    )

    def __init__(self, flow: Flow, seen: float) -> None:
        self.flow = flow
        self.theirs: dict[int, bytes] = {}
        self.ack: int | None = None
        self.waiting: deque[Segment] = deque()
        self.reached: int | None = None
        self.room = 2 * _HISTORY_SEGMENTS
        self.seen = seen
        self.stuck = False
        self.asked = False
        self.deaf = False
        self._cursor = 0  # key of the entry of theirs in which the search ended last
        self._end: int | None = None  # the end of the examined ones of theirs, in sequence space
        self._examined: int | None = None  # key of the last of those
        self._fin: int | None = None  # place of the secondary's FIN
        self._syn: tuple[int, int, int, bytes] | None = None  # the secondary's: sequence, ack, flags, payload
        self._paired: int | None = None  # the primary's initial number that its SYN answers
        self._resets: list[int] = []  # acknowledgements of the secondary's RSTs not used up
        self._origin: int | None = None  # the primary's sequence number that stream offsets count from

    def learn(self, seq: int, ack: int, flags: int, payload: bytes) -> None:
        """The secondary said this."""
        if flags & RST:
            if len(self._resets) < _MAX_RESETS:
                self._resets.append(ack)
            return
        if flags & SYN:
            syn = (seq, ack if flags & ACK else 0, flags & (SYN | ACK), payload)
            if syn != self._syn:
                self._startAfresh(syn)
            return
        if flags & ACK and (self.ack is None or (ack - self.ack) & MASK < HALF):
            self.ack = ack
        if payload and not self.deaf:
            known = self.theirs.get(seq)
            if known is None or len(known) < len(payload):
                self.theirs[seq] = payload
                self._reach(seq, payload)
        if flags & FIN:
            self._fin = (seq + len(payload)) & MASK

    def _startAfresh(self, syn: tuple[int, int, int, bytes]) -> None:
        self._syn = syn
        self._paired = None
        self.theirs.clear()
        self.room = 2 * _HISTORY_SEGMENTS
        self.ack = syn[1] if syn[2] & ACK else None
        self._end = self._examined = None
        self._fin = None
        self.reached = None
        self.deaf = False

    def advance(self, leaving: list[bytes]) -> Difference | None:
        """
        Let those that wait leave, in order, up to the first that may not.

        @param leaving: their frames are appended.
        @return: what differs, if that is why the first may not; the flow is C{stuck} then.
        """
        waiting, theirs = self.waiting, self.theirs
        while waiting and not self.stuck:
            segment = waiting[0]
            _, _, frames, seq, ack, flags, payload = segment
            if flags & CONTROL == ACK and payload and theirs.get(seq) == payload and self._acknowledged(ack):
                self.reached = seq  # the common case of judge()
            elif (verdict := self.judge(segment)) is not True:
                if not verdict:
                    return None
                self.stuck = True
                return verdict
            leaving += frames
            waiting.popleft()
        return None

    def judge(self, segment: Segment) -> bool | Difference:
        """
        By all rules.

        @param segment: the first of those that wait.
        @return: True: it may leave; False: not yet; a L{Difference}: never before a checkpoint.
        """
        _, _, _, seq, ack, flags, payload = segment
        if flags & RST:
            return self._judgeReset(ack, flags)
        if flags & SYN:
            return self._judgeSyn(seq, ack, flags, payload)
        if self._origin is None:
            self._origin = seq
        done, size = 0, len(payload)
        while done < size:
            place = (seq + done) & MASK
            said, skip = self._find(place)
            if not said:
                if place == self._fin:
                    return self._difference("length", segment, done, b"")
                return False
            span = min(size - done, len(said) - skip)
            if payload[done : done + span] != said[skip : skip + span]:
                wrong = next(at for at in range(span) if payload[done + at] != said[skip + at])
                return self._difference("content", segment, done + wrong, said[max(0, skip + wrong - 16) :])
            done += span
        if flags & FIN:
            place = (seq + size) & MASK
            if self._fin != place:
                said, skip = self._find(place)
                if said or self._fin is not None:
                    return self._difference("length", segment, size, said[skip:])
                return False
        if flags & ACK and not self._acknowledged(ack):
            return False
        if size:
            self.reached = seq
        return True

    def _judgeReset(self, ack: int, flags: int) -> bool:
        for at, theirs in enumerate(self._resets):
            if not flags & ACK or (theirs - ack) & MASK < HALF:
                del self._resets[at]
                return True
        return False

    def _judgeSyn(self, seq: int, ack: int, flags: int, payload: bytes) -> bool:
        if self._syn is None or self._syn[1:] != (ack if flags & ACK else 0, flags & (SYN | ACK), payload):
            return False
        if self._paired is None:
            self._paired = seq
            self._origin = (seq + 1) & MASK
        return self._paired == seq

    def _acknowledged(self, ack: int) -> bool:
        return self.ack is not None and (self.ack - ack) & MASK < HALF

    def _find(self, place: int) -> tuple[bytes, int]:
        """@return: the secondary's payload that has this place, and where in it; empty: none has."""
        theirs = self.theirs
        said = theirs.get(place)
        if said is not None:
            self._cursor = place
            return said, 0
        said = theirs.get(self._cursor, b"")
        skip = (place - self._cursor) & MASK
        if skip < len(said):
            return said, skip
        if self._isBeyond(place):
            return b"", 0
        for start, said in reversed(theirs.items()):
            skip = (place - start) & MASK
            if skip < len(said):
                self._cursor = start
                return said, skip
        return b"", 0

    def _isBeyond(self, place: int) -> bool:
        """
        Whether the secondary's stream has not come so far: the common case of a search in vain. Looks at each of its
        segments once, in the search after it came.
        """
        for seq, said in reversed(self.theirs.items()):
            if seq == self._examined:
                break
            self._reach(seq, said)
        self._examined = next(reversed(self.theirs), None)
        return self._end is None or (place - self._end) & MASK < HALF

    def _reach(self, seq: int, said: bytes) -> None:
        end = (seq + len(said)) & MASK
        if self._end is None or (end - self._end) & MASK < HALF:
            self._end = end

    def prune(self, history: int = _HISTORY_SEGMENTS) -> int:
        """
        Forget the secondary's bytes that were judged, but for the last ones.

        @param history: how many segments of them are kept.
        @return: how many of its segments the primary has not said yet.
        """
        reached, theirs = self.reached, self.theirs
        judged = [] if reached is None else [seq for seq in theirs if (reached - seq) & MASK < HALF]
        ahead = len(theirs) - len(judged)
        kept = 0
        for count, seq in enumerate(reversed(judged)):
            kept += len(theirs[seq])
            if count >= history or kept > _HISTORY_BYTES:
                del theirs[seq]
        self.room = len(theirs) + _HISTORY_SEGMENTS
        return ahead

    def lacking(self, segment: Segment) -> Difference:
        """@return: what the primary's segment waits for, in words, as evidence of a time-out."""
        _, _, _, seq, ack, flags, payload = segment
        if flags & RST:
            return self._difference("time-out", segment, 0, b"", "the secondary sent no RST")
        if flags & SYN:
            return self._difference("time-out", segment, 0, b"", "the secondary sent no such SYN")
        done = 0
        while done < len(payload):
            said, skip = self._find((seq + done) & MASK)
            if not said:
                return self._difference(
                    "time-out", segment, done, b"", "the secondary did not send these bytes"
                )
            done += len(said) - skip
        if flags & FIN and self._fin is None:
            return self._difference("time-out", segment, len(payload), b"", "the secondary sent no FIN")
        behind = "nothing" if self.ack is None else f"{(ack - self.ack) & MASK} bytes less"
        return self._difference("time-out", segment, 0, b"", f"the secondary acknowledged {behind}")

    def _difference(
        self, reason: str, segment: Segment, at: int, theirs: bytes, note: str = ""
    ) -> Difference:
        seq, payload = segment[3], segment[6]
        offset = None if self._origin is None else (seq + at - self._origin) & MASK
        first = max(0, at - 16) if reason == "content" else at
        return Difference(reason, offset, payload[first:], theirs, note)
