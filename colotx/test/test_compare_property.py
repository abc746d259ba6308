"""
The promise of the comparer, by hypothesis: whatever the two guests' segments look like and in which order they come,
what leaves of a connection is the beginning of what the primary said, and nothing in it was not said by the
secondary too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.test.framekit import ACK, CLIENT6, FIN, GUEST6, Bench, tcp

SPACE = 1 << 32
PORTS = (4711, 4712)


@dataclass(frozen=True)
class Said:
    """One segment: position in the stream, payload, acknowledgement (in the client's stream), FIN."""

    port: int
    at: int
    payload: bytes
    ack: int
    fin: bool


@dataclass
class Heard:
    """The oracle: what the secondary was heard to say in one connection."""

    values: dict[int, set[int]] = field(default_factory=dict)
    ack: int = -1
    fins: set[int] = field(default_factory=set)

    def hear(self, said: Said) -> None:
        for at, value in enumerate(said.payload, said.at):
            self.values.setdefault(at, set()).add(value)
        self.ack = max(self.ack, said.ack)
        if said.fin:
            self.fins.add(said.at + len(said.payload))

    def covers(self, said: Said) -> bool:
        bytesSeen = all(value in self.values.get(at, ()) for at, value in enumerate(said.payload, said.at))
        return (
            bytesSeen and said.ack <= self.ack and (not said.fin or said.at + len(said.payload) in self.fins)
        )


def cut(rng: random.Random, port: int, stream: bytes, faults: bool) -> list[Said]:
    """One guest's segments of a stream: cut anywhere, some said twice, some with other boundaries."""
    said: list[Said] = []
    at, ack = 0, 0
    while at < len(stream):
        size = rng.randint(1, 12)
        ack += rng.randint(0, 3)
        end = min(at + size, len(stream))
        said.append(Said(port, at, stream[at:end], ack, end == len(stream)))
        if rng.random() < 0.2:
            said.append(Said(port, end, b"", ack, False))
        if faults and rng.random() < 0.3:
            first = rng.randint(0, end - 1)
            last = rng.randint(first + 1, end)
            said.append(Said(port, first, stream[first:last], ack, last == len(stream)))
        at = end
    if faults:
        for _ in range(rng.randint(0, 3)):
            a, b = rng.randrange(len(said)), rng.randrange(len(said))
            said[a], said[b] = said[b], said[a]
        said = [one for one in said if rng.random() > 0.03]
    return said


def corrupt(rng: random.Random, said: list[Said]) -> None:
    candidates = [at for at, one in enumerate(said) if one.payload]
    if candidates:
        at = rng.choice(candidates)
        one = said[at]
        wrong = bytearray(one.payload)
        wrong[rng.randrange(len(wrong))] ^= 1 << rng.randrange(8)
        said[at] = Said(one.port, one.at, bytes(wrong), one.ack, one.fin)


class PrefixProperty(SynchronousTestCase):
    """L{Comparer} against the oracle L{Heard}."""

    def play(
        self, seed: int, faults: bool, corrupted: str | None, version: int
    ) -> tuple[Bench, list, list, list]:
        rng = random.Random(seed)
        ours: list[Said] = []
        theirs: list[Said] = []
        for port in PORTS:
            stream = rng.randbytes(rng.randint(1, 90))
            ours += cut(rng, port, stream, faults)
            theirs += cut(rng, port, stream, faults)
        if corrupted:
            corrupt(rng, ours if corrupted == "primary" else theirs)
        start = rng.choice((5, SPACE - 30, SPACE // 2 - 30))
        clients = rng.choice((9, SPACE - 4, SPACE // 2 - 4))
        ends = {"source": GUEST6, "destination": CLIENT6} if version == 6 else {}

        def frame(said: Said, side: int) -> bytes:
            flags = ACK | (FIN if said.fin else 0)
            stamp = side * 1000 + rng.randrange(1000)
            return tcp(
                start + said.at, said.payload, clients + said.ack, flags, said.port, stamp=stamp, **ends
            )

        bench = Bench()
        meaning: dict[int, Said] = {}
        frames: list[bytes] = []
        heard = {port: Heard() for port in PORTS}
        while ours or theirs:
            batch = rng.randint(1, 8)
            if ours and (not theirs or rng.random() < 0.5):
                some, ours = ours[:batch], ours[batch:]
                new = [frame(said, 0) for said in some]
                for said, one in zip(some, new, strict=True):
                    meaning[id(one)] = said
                frames += new
                left = bench.primary(*new)
            else:
                some, theirs = theirs[:batch], theirs[batch:]
                for said in some:
                    heard[said.port].hear(said)
                left = bench.secondary(*[frame(said, 1) for said in some])
            for one in left:
                said = meaning[id(one)]
                self.assertTrue(heard[said.port].covers(said), said)
        return bench, frames, [meaning[id(one)] for one in frames], [heard[port] for port in PORTS]

    def check(self, seed: int, faults: bool, corrupted: str | None, version: int) -> None:
        bench, frames, said, heard = self.play(seed, faults, corrupted, version)
        bench.wait(0.5)
        leftIds = {id(one) for one in bench.left}
        self.assertEqual(len(leftIds), len(bench.left))
        for port, oracle in zip(PORTS, heard, strict=True):
            of = [(frame, one) for frame, one in zip(frames, said, strict=True) if one.port == port]
            left = [frame for frame in bench.left if any(frame is other for other, _ in of)]
            self.assertEqual([id(a) for a in left], [id(a) for a, _ in of[: len(left)]])
            if not corrupted:
                due = 0
                while due < len(of) and oracle.covers(of[due][1]):
                    due += 1
                self.assertEqual(len(left), due, "a segment that both said must leave")
        held = bench.comparer.heldFrames
        flushed = bench.comparer.flush()
        self.assertEqual(held, len(frames) - len(bench.left))
        self.assertEqual([id(a) for a in flushed], [id(a) for a in frames if id(a) not in leftIds])
        self.assertEqual((bench.comparer.heldFrames, bench.comparer.heldBytes), (0, 0))

    @settings(max_examples=250, deadline=None)
    @given(st.integers(0, SPACE), st.sampled_from((4, 6)))
    def test_segmentation(self, seed: int, version: int) -> None:
        self.check(seed, False, None, version)

    @settings(max_examples=400, deadline=None)
    @given(st.integers(0, SPACE), st.sampled_from((4, 6)))
    def test_repetitionOrderAndLoss(self, seed: int, version: int) -> None:
        self.check(seed, True, None, version)

    @settings(max_examples=400, deadline=None)
    @given(st.integers(0, SPACE), st.sampled_from(("primary", "secondary")), st.booleans())
    def test_corruption(self, seed: int, side: str, faults: bool) -> None:
        self.check(seed, faults, side, 4)
