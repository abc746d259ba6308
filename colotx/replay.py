"""
What the secondary guest said and no client has acknowledged, to be said at once at a failover.

When the primary's host dies, output that was compared equal may never have left it, and acknowledgements neither.
Nobody would notice before a retransmission timer (200 ms and more) runs out. L{ReplayBuffer.replay} says it again right
away: of each connection the first segments outstanding and the last one, and what the guest acknowledged last, which
lets a client go on that waits for it. TCP takes what comes twice (RFC 9293, 3.10.7.4); nothing but TCP is remembered,
so no datagram is doubled.

Frames are in the clients' space here, in both directions: the buffer sits outside of the translator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from colotx._segments import (
    ACK,
    FIN,
    MASK,
    RST,
    SYN,
    Segment,
    acknowledgement,
    ahead,
    find,
    reverse,
    rewrite,
    timestamps,
    word,
)
from colotx.translate import JUMP


@dataclass(frozen=True, slots=True)
class ReplayLimits:
    """
    Bounds of a L{ReplayBuffer}.

    @ivar connections: of more, the oldest is forgotten.
    @ivar perConnection: bytes of frames outstanding; what comes then is not remembered.
    @ivar total: bytes of all connections; the same.
    @ivar burst: segments of one connection sent again, besides the last.
    """

    connections: int = 4096
    perConnection: int = 512 * 1024
    total: int = 32 * 1024 * 1024
    burst: int = 10


@dataclass(slots=True)
class _Connection:
    """
    @ivar segment: where the headers of the last frame were; C{header}: that frame up to its payload.
    @ivar following: the sequence number after that frame.
    @ivar handshake: its SYN, while nobody answered.
    @ivar edge: the highest sequence number remembered; None: nothing yet.
    @ivar outstanding: (sequence number after it, frame).
    @ivar size: bytes in C{outstanding}.
    """

    segment: Segment
    header: bytes = b""
    following: int = 0
    handshake: bytes | None = None
    edge: int | None = None
    outstanding: deque[tuple[int, bytes]] = field(default_factory=deque)
    size: int = 0


class ReplayBuffer:
    """
    Remembers the secondary guest's TCP output until clients acknowledge it.

    @ivar size: bytes of frames outstanding.
    @ivar skipped: segments that were not remembered because a bound was reached.
    """

    def __init__(self, limits: ReplayLimits = ReplayLimits()) -> None:
        self._limits = limits
        self._outbound: dict[bytes, _Connection] = {}
        self._inbound: dict[bytes, _Connection] = {}
        self.size = 0
        self.skipped = 0

    def __len__(self) -> int:
        """@return: how many connections are remembered."""
        return len(self._outbound)

    def output(self, frames: Sequence[bytes]) -> None:
        """What the guest sent, in the clients' space."""
        outbound = self._outbound
        for frame in frames:
            segment = find(frame)
            if segment is None:
                continue
            key, start, data, end = segment
            flags = frame[start + 13]
            connection = outbound.get(key)
            if flags & (RST | SYN) and connection is not None:
                self._forget(connection)
                connection = None
            if flags & RST:
                continue
            if connection is None:
                connection = self._remember(segment)
            length = end - data + (flags & FIN)
            connection.segment = segment
            connection.header = frame[:data]
            if flags & SYN:
                length += 1
                connection.handshake = frame
            connection.following = following = (word(frame, start + 4)[0] + length) & MASK
            if length and not flags & SYN:
                edge = connection.edge
                if edge is None or ahead(following, edge):
                    self._append(connection, following, frame)

    def input(self, frames: Sequence[bytes]) -> None:
        """What clients sent, in their own space."""
        inbound = self._inbound
        if not inbound:
            return
        for frame in frames:
            segment = find(frame)
            if segment is None or (connection := inbound.get(segment.key)) is None:
                continue
            flags = frame[segment.start + 13]
            if flags & RST:
                self._forget(connection)
            elif flags & ACK:
                connection.handshake = None
                outstanding = connection.outstanding
                if outstanding:
                    (acknowledged,) = word(frame, segment.start + 8)
                    while outstanding and not ahead(outstanding[0][0], acknowledged):
                        size = len(outstanding.popleft()[1])
                        connection.size -= size
                        self.size -= size

    def reset(self) -> None:
        """A checkpoint was loaded: the guest does not know what it said."""
        self._outbound.clear()
        self._inbound.clear()
        self.size = 0

    def withTimestamps(self) -> list[bytes]:
        """@return: the keys (see L{colotx.translate.Translator.promoted}) of connections that have time stamps."""
        return [
            key
            for key, connection in self._outbound.items()
            if timestamps(connection.header, connection.segment)
        ]

    def replay(self) -> list[bytes]:
        """
        @return: what to send at a failover. Time stamps are those of the last frame and L{JUMP}: the client drops
            what is older than the last it took, and may have taken one of the primary's.
        """
        frames: list[bytes] = []
        for connection in self._outbound.values():
            if connection.handshake is not None:
                frames.append(connection.handshake)
                continue
            header, segment, outstanding = connection.header, connection.segment, connection.outstanding
            chosen = [frame for _, frame in islice(outstanding, self._limits.burst)]
            if len(outstanding) > len(chosen):
                chosen.append(outstanding[-1][1])
            if not chosen or not chosen[-1].startswith(header):
                last = acknowledgement(header, segment, connection.following)
                chosen += [] if last is None else [last]
            at = timestamps(header, segment)
            stamp = (word(header, at)[0] + JUMP) & MASK if at else None
            frames += chosen if stamp is None else [_stamped(frame, stamp) for frame in chosen]
        return frames

    def _append(self, connection: _Connection, following: int, frame: bytes) -> None:
        size = len(frame)
        limits = self._limits
        if connection.size + size > limits.perConnection or self.size + size > limits.total:
            self.skipped += 1
            return
        connection.edge = following
        connection.outstanding.append((following, frame))
        connection.size += size
        self.size += size

    def _remember(self, segment: Segment) -> _Connection:
        if len(self._outbound) >= self._limits.connections:
            self._forget(next(iter(self._outbound.values())))
        connection = _Connection(segment)
        self._outbound[segment.key] = self._inbound[reverse(segment.key)] = connection
        return connection

    def _forget(self, connection: _Connection) -> None:
        key = connection.segment.key
        del self._outbound[key]
        del self._inbound[reverse(key)]
        self.size -= connection.size


def _stamped(frame: bytes, stamp: int) -> bytes:
    segment = find(frame)
    if segment is None or not (at := timestamps(frame, segment)):
        return frame
    return rewrite(frame, segment.start, segment.start + 16, [(at, word(frame, at)[0], stamp)])


__all__ = ["ReplayBuffer", "ReplayLimits"]
