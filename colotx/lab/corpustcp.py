"""
The corpus' TCP flows: what the guest sends of a connection, twice, by two stacks that cut, time and repeat it each in
its own way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from colotx.lab.corpuspair import Maker, Pair, Verdict
from colotx.lab.framekit import ACK, FIN, PSH, RST, SEQUENCES, SYN, TCP, Path, selective, timestamps

LEAVES, HELD, EITHER = Verdict.LEAVES, Verdict.HELD, Verdict.EITHER


@dataclass(frozen=True, slots=True)
class Segment:
    """
    @ivar offset: bytes from the beginning of what the case shows of the stream.
    @ivar acknowledged: the same, of the other direction.
    """

    offset: int
    data: bytes
    acknowledged: int
    flags: int = ACK | PSH

    @property
    def end(self) -> int:
        return self.offset + len(self.data) + bool(self.flags & FIN)


class Stack:
    """One guest's TCP: the fields that two guests fill differently."""

    def __init__(
        self, chance: random.Random, path: Path, ports: tuple[int, int], base: int, theirs: int
    ) -> None:
        """
        @param base: the sequence number at offset 0; as the client sees it.
        @param theirs: the client's, at offset 0.
        """
        self._chance, self._path, self._ports = chance, path, ports
        self._base, self.theirs = base, theirs
        self._ident = chance.randrange(1 << 16)
        self._clock = chance.randrange(SEQUENCES)
        self._echoed = chance.randrange(SEQUENCES)
        self.stamps = False
        self.window = 502
        self.ttl = 64
        self.options = b""

    def frame(self, segment: Segment) -> bytes:
        """On the wire."""
        self._ident += 1
        options = self.options
        if self.stamps:
            self._clock += self._chance.randrange(3)
            options += timestamps(self._clock, self._echoed)
        acknowledged = self.theirs + segment.acknowledged if segment.flags & ACK else 0
        packet = self._path.tcp(
            self._ports,
            self._base + segment.offset,
            acknowledged,
            segment.flags,
            segment.data,
            self.window,
            options,
        )
        return self._path.ip(TCP, packet, self._ident, self.ttl)

    def frames(self, segments: Iterable[Segment]) -> tuple[bytes, ...]:
        """On the wire, each."""
        return tuple(self.frame(segment) for segment in segments)


class Flow:
    """A connection of both guests, and chance to decide about it."""

    def __init__(
        self,
        chance: random.Random,
        path: Path,
        ports: tuple[int, int],
        base: int | None = None,
        theirs: int | None = None,
    ) -> None:
        self.chance = chance
        # Away from the wrap, unless it is what the case is about.
        base = chance.randrange(1 << 20, 1 << 31) if base is None else base
        theirs = chance.randrange(1 << 20, 1 << 31) if theirs is None else theirs
        self.first = Stack(chance, path, ports, base, theirs)
        self.second = Stack(chance, path, ports, base, theirs)
        self.data = chance.randbytes(chance.randrange(2000, 12000))
        self.asked = 300
        """Bytes the client had sent before what the case shows."""

    def cut(self, data: bytes, offset: int = 0, largest: int = 1460) -> list[Segment]:
        """Segments of any sizes."""
        segments = []
        done = 0
        while done < len(data):
            size = self.chance.choice((largest, largest, self.chance.randrange(1, largest + 1)))
            segments.append(Segment(offset + done, data[done : done + size], self.asked))
            done += size
        return segments

    def pair(
        self,
        primary: Sequence[Segment],
        secondary: Sequence[Segment],
        verdict: Callable[[Segment], Verdict] = lambda segment: LEAVES,
        wanted: bool | None = False,
        ordered: bool = True,
    ) -> Pair:
        """
        Both sides' segments on the wire.

        @param verdict: of a segment of the primary.
        """
        first = tuple((self.first.frame(segment), verdict(segment)) for segment in primary)
        second = self.second.frames(secondary)
        end = max(segment.end for segment in (*primary, *secondary))
        acknowledged = max(segment.acknowledged for segment in (*primary, *secondary))
        if any(segment.flags & (FIN | RST) for segment in (*primary, *secondary)):
            return Pair(first, second, wanted, ordered)
        more = [Segment(end, self.chance.randbytes(700), acknowledged)]
        later = self.first.frames(more), self.second.frames(more)
        return Pair(first, second, wanted, ordered, later)


def _same(flow: Flow) -> Pair:
    segments = flow.cut(flow.data)
    return flow.pair(segments, segments)


def _segmentation(flow: Flow) -> Pair:
    return flow.pair(flow.cut(flow.data), flow.cut(flow.data, largest=flow.chance.choice((536, 1448, 9000))))


def _offload(flow: Flow) -> Pair:
    flow.data = flow.chance.randbytes(60000)
    return flow.pair(flow.cut(flow.data, largest=40000), flow.cut(flow.data, largest=65000))


def _reordered(flow: Flow) -> Pair:
    sides = [flow.cut(flow.data), flow.cut(flow.data)]
    for side in flow.chance.sample(sides, flow.chance.choice((1, 2))):
        for _ in range(1 + len(side) // 3):
            place = flow.chance.randrange(len(side))
            moved = side.pop(place)
            side.insert(min(place + flow.chance.randrange(1, 4), len(side)), moved)
    return flow.pair(sides[0], sides[1], ordered=False)


def _retransmitted(flow: Flow) -> Pair:
    sides = [flow.cut(flow.data), flow.cut(flow.data)]
    for side in flow.chance.sample(sides, flow.chance.choice((1, 2))):
        for _ in range(1 + len(side) // 3):
            place = flow.chance.randrange(len(side))
            again = side[place]
            if flow.chance.random() < 0.5 and len(again.data) > 1:
                # Cut anew: its second half.
                half = len(again.data) // 2
                again = replace(again, offset=again.offset + half, data=again.data[half:])
            side.insert(min(place + flow.chance.randrange(1, 5), len(side)), again)
    return flow.pair(sides[0], sides[1], ordered=False)


def _retransmittedOther(flow: Flow) -> Pair:
    """The primary's guest repeats a segment with other bytes."""
    segments = flow.cut(flow.data)
    victim = flow.chance.randrange(len(segments))
    wrong = _changed(flow, segments[victim])
    primary = [*segments, wrong]
    return flow.pair(primary, segments, lambda s: HELD if s is wrong else LEAVES, wanted=True)


def _acknowledging(flow: Flow) -> Pair:
    """A download by the guest: nothing but acknowledgements, at other places, and the same one in the end."""

    def acknowledgements() -> list[Segment]:
        steps = sorted(flow.chance.sample(range(1, 40), flow.chance.randrange(1, 12)))
        return [Segment(0, b"", 1448 * step, ACK) for step in (*steps, 40)]

    return flow.pair(acknowledgements(), acknowledgements())


def _piggyback(flow: Flow) -> Pair:
    """Data that acknowledges, at other places on the other side, which has come as far in the end."""
    sides = []
    for _ in range(2):
        asked = flow.asked
        side = []
        for segment in flow.cut(flow.data):
            asked += flow.chance.choice((0, 0, 300))
            side.append(replace(segment, acknowledged=asked))
        side.append(Segment(len(flow.data), b"", 40000, ACK))
        sides.append(side)
    return flow.pair(sides[0], sides[1])


def _acknowledgedAhead(flow: Flow) -> Pair:
    """The primary acknowledges what the secondary never did."""
    segments = flow.cut(flow.data)
    place = flow.chance.randrange(len(segments))
    primary = [
        replace(segment, acknowledged=flow.asked + 1000) if number >= place else segment
        for number, segment in enumerate(segments)
    ]
    return flow.pair(
        primary, segments, lambda s: HELD if s.acknowledged > flow.asked else LEAVES, wanted=True
    )


def _acknowledgementAhead(flow: Flow) -> Pair:
    """The same, with no data in it."""
    acks = [Segment(0, b"", flow.asked + 1448 * step, ACK) for step in range(1, 9)]
    known = flow.chance.randrange(1, 8)
    return flow.pair(acks, acks[:known], lambda s: LEAVES if s in acks[:known] else HELD, wanted=True)


def _timestamps(flow: Flow) -> Pair:
    flow.first.stamps = flow.second.stamps = True
    return _segmentation(flow)


def _windows(flow: Flow) -> Pair:
    flow.first.window, flow.second.window = flow.chance.sample(range(1000), 2)
    flow.second.ttl = 255
    if flow.chance.random() < 0.7:
        left = flow.chance.randrange(1 << 20, 1 << 31)
        flow.second.options = selective([(left, left + 1448)])
    return _same(flow)


def _keepAlive(flow: Flow) -> Pair:
    segments = flow.cut(flow.data)
    probe = Segment(len(flow.data) - 1, flow.chance.choice((b"", flow.data[-1:])), flow.asked, ACK)
    return flow.pair([*segments, probe, probe], segments)


def _finished(flow: Flow) -> Pair:
    """FIN with the last data, or after it."""
    sides = []
    for _ in range(2):
        side = flow.cut(flow.data)
        if flow.chance.random() < 0.5:
            side[-1] = replace(side[-1], flags=ACK | PSH | FIN)
        else:
            side.append(Segment(len(flow.data), b"", flow.asked, ACK | FIN))
        sides.append(side)
    return flow.pair(sides[0], sides[1])


def _finishedAlone(flow: Flow) -> Pair:
    """The primary closes, the secondary does not."""
    segments = flow.cut(flow.data)
    fin = Segment(len(flow.data), b"", flow.asked, ACK | FIN)
    return flow.pair([*segments, fin], segments, lambda s: HELD if s is fin else LEAVES, wanted=True)


def _finishedEarly(flow: Flow) -> Pair:
    """The primary closes where the secondary goes on talking."""
    half = len(flow.data) // 2
    fin = Segment(half, b"", flow.asked, ACK | FIN)
    primary = [*flow.cut(flow.data[:half]), fin]
    return flow.pair(primary, flow.cut(flow.data), lambda s: HELD if s is fin else LEAVES, wanted=True)


def _reset(flow: Flow) -> Pair:
    segments = [*flow.cut(flow.data), Segment(len(flow.data), b"", flow.asked, ACK | RST)]
    return flow.pair(segments, segments)


def _resetAlone(flow: Flow) -> Pair:
    """The primary breaks the connection, the secondary does not."""
    segments = flow.cut(flow.data)
    rst = Segment(len(flow.data), b"", flow.asked, ACK | RST)
    return flow.pair([*segments, rst], segments, lambda s: HELD if s is rst else LEAVES, wanted=True)


def _corrupted(flow: Flow) -> Pair:
    """One byte differs. What follows it may wait or not."""
    segments = flow.cut(flow.data)
    victim = flow.chance.randrange(len(segments))
    wrong = _changed(flow, segments[victim])
    changed = [*segments[:victim], wrong, *segments[victim + 1 :]]
    primary, secondary = (changed, segments) if flow.chance.random() < 0.5 else (segments, changed)

    def verdict(segment: Segment) -> Verdict:
        return LEAVES if segment.end <= wrong.offset else HELD if segment.offset == wrong.offset else EITHER

    return flow.pair(primary, secondary, verdict, wanted=True, ordered=False)


def _corruptedRecut(flow: Flow) -> Pair:
    """One byte differs, and the segments as well."""
    place = flow.chance.randrange(len(flow.data))
    other = bytearray(flow.data)
    other[place] ^= 1 << flow.chance.randrange(8)

    def verdict(segment: Segment) -> Verdict:
        return LEAVES if segment.end <= place else HELD if segment.offset <= place else EITHER

    return flow.pair(flow.cut(flow.data), flow.cut(bytes(other)), verdict, wanted=True, ordered=False)


def _lost(flow: Flow) -> Pair:
    """The secondary did not say one segment. What follows it may wait or not."""
    segments = flow.cut(flow.data)
    lost = segments[flow.chance.randrange(len(segments))]
    secondary = [segment for segment in segments if segment is not lost]

    def verdict(segment: Segment) -> Verdict:
        return HELD if segment is lost else LEAVES if segment.end <= lost.offset else EITHER

    return flow.pair(segments, secondary or [replace(lost, data=b"")], verdict, wanted=True, ordered=False)


def _lostAtPrimary(flow: Flow) -> Pair:
    """The primary did not say one segment: nothing is wrong with what it said."""
    segments = flow.cut(flow.data)
    lost = flow.chance.randrange(len(segments))
    primary = [*segments[:lost], *segments[lost + 1 :]]
    return flow.pair(primary or segments, segments, wanted=None)


def _silent(flow: Flow) -> Pair:
    """The secondary is behind: it has said the first part only."""
    segments = flow.cut(flow.data)
    done = flow.chance.randrange(1, len(segments)) if len(segments) > 1 else 0
    behind = segments[:done] or [Segment(0, b"", flow.asked, ACK)]
    return flow.pair(segments, behind, lambda s: LEAVES if s in segments[:done] else HELD, wanted=True)


def _changed(flow: Flow, segment: Segment) -> Segment:
    data = bytearray(segment.data)
    data[flow.chance.randrange(len(data))] ^= 1 << flow.chance.randrange(8)
    return replace(segment, data=bytes(data))


def _on(make: Callable[[Flow], Pair], wraps: bool = False) -> Maker:
    def maker(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair:
        near = SEQUENCES - chance.randrange(1, 1500)
        return make(Flow(chance, path, ports, *((near, near - 2000) if wraps else ())))

    return maker


def _handshake(answered: bool, alike: bool) -> Maker:
    """
    The guest opens a connection, or accepts one; with a sequence number of its own. What follows was translated into
    the primary's, as it always is before it is compared.

    @param answered: the guest accepts.
    @param alike: both do; else the secondary's refuses, or opens nothing.
    """

    def maker(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair:
        flow = Flow(chance, path, ports)
        flow.asked = 1
        flow.data = flow.data[:4000]
        other = Stack(chance, path, ports, chance.randrange(SEQUENCES), 0)
        flags = SYN | ACK if answered else SYN
        hello = Segment(0, b"", flow.asked, flags)
        first = flow.first.frame(hello)
        if answered:
            other = Stack(chance, path, ports, chance.randrange(SEQUENCES), flow.first.theirs)
        if alike:
            segments = [Segment(1, b"", flow.asked, ACK), *flow.cut(flow.data, offset=1)]
            rest = flow.pair(segments, segments)
            return replace(
                rest,
                primary=((first, LEAVES), *rest.primary),
                secondary=(other.frame(hello), *rest.secondary),
            )
        refused = replace(hello, flags=RST | ACK)
        return Pair(((first, HELD),), (other.frame(refused),) if answered else (), wanted=True)

    return maker


TCP_FLOWS: dict[str, Maker] = {
    "tcp-same": _on(_same),
    "tcp-segmentation": _on(_segmentation),
    "tcp-offload": _on(_offload),
    "tcp-reordered": _on(_reordered),
    "tcp-retransmitted": _on(_retransmitted),
    "tcp-retransmitted-other": _on(_retransmittedOther),
    "tcp-ack": _on(_acknowledging),
    "tcp-ack-piggyback": _on(_piggyback),
    "tcp-ack-ahead-data": _on(_acknowledgedAhead),
    "tcp-ack-ahead": _on(_acknowledgementAhead),
    "tcp-timestamps": _on(_timestamps),
    "tcp-windows": _on(_windows),
    "tcp-keepalive": _on(_keepAlive),
    "tcp-wrap": _on(_segmentation, wraps=True),
    "tcp-wrap-ack": _on(_acknowledging, wraps=True),
    "tcp-wrap-ack-ahead": _on(_acknowledgementAhead, wraps=True),
    "tcp-wrap-corrupted": _on(_corrupted, wraps=True),
    "tcp-accept": _handshake(answered=True, alike=True),
    "tcp-connect": _handshake(answered=False, alike=True),
    "tcp-accept-refused": _handshake(answered=True, alike=False),
    "tcp-connect-alone": _handshake(answered=False, alike=False),
    "tcp-fin": _on(_finished),
    "tcp-fin-alone": _on(_finishedAlone),
    "tcp-fin-early": _on(_finishedEarly),
    "tcp-rst": _on(_reset),
    "tcp-rst-alone": _on(_resetAlone),
    "tcp-corrupted": _on(_corrupted),
    "tcp-corrupted-recut": _on(_corruptedRecut),
    "tcp-lost": _on(_lost),
    "tcp-lost-at-primary": _on(_lostAtPrimary),
    "tcp-behind": _on(_silent),
}
