"""Tests of L{colotx.lab.traffic}."""

from __future__ import annotations

import hashlib
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.lab.traffic import (
    RECORD_SIZE,
    BlockChecker,
    EchoChecker,
    GapMeter,
    Ledger,
    NumbersChecker,
    Quantiles,
    percentile,
    record,
)

TAG = 7


def stream(*counters: int) -> bytes:
    return b"".join(record(TAG, counter) for counter in counters)


def checked(data: bytes, seed: int = 0) -> EchoChecker:
    """A checker fed in pieces of random size, and finished."""
    checker = EchoChecker(TAG)
    pieces = random.Random(seed)
    position = 0
    while position < len(data):
        size = pieces.randrange(1, 50)
        checker.feed(data[position : position + size])
        position += size
    checker.finish()
    return checker


def counts(checker: Ledger) -> tuple[int, int, int, int]:
    return checker.received, checker.doubled, checker.corrupted, checker.reordered


class EchoCheckerTests(SynchronousTestCase):
    def test_clean(self) -> None:
        """What comes back as it was sent is echoed, and nothing else."""
        self.assertEqual(counts(checked(stream(*range(100)))), (1600, 0, 0, 0))

    def test_missing(self) -> None:
        """A hole leaves its bytes out of what is echoed."""
        self.assertEqual(counts(checked(stream(0, 1, 4, 5))), (64, 0, 0, 0))

    def test_doubled(self) -> None:
        """Records that come again are doubled, and echoed once."""
        self.assertEqual(counts(checked(stream(0, 1, 2, 1, 2, 3))), (64, 32, 0, 0))

    def test_reordered(self) -> None:
        """A record that comes after a later one is echoed late, and not lost; a second time it is doubled."""
        self.assertEqual(counts(checked(stream(0, 2, 1, 3, 1))), (64, 16, 0, 16))

    def test_corrupted(self) -> None:
        """A changed byte costs its record; the next one is found again."""
        data = bytearray(stream(0, 1, 2))
        data[20] ^= 1
        self.assertEqual(counts(checked(bytes(data))), (32, 0, 16, 0))

    def test_otherConnection(self) -> None:
        """Records of another connection are no echo of this one."""
        self.assertEqual(counts(checked(record(TAG + 1, 0))), (0, 0, 16, 0))

    def test_bytesInserted(self) -> None:
        """A few bytes too many are corrupt; the stream goes on behind them."""
        self.assertEqual(counts(checked(stream(0) + b"abc" + stream(1))), (32, 0, 3, 0))

    def test_cutRecord(self) -> None:
        """The first part of the next record at the end is echoed as far as it goes; anything else is corrupt."""
        self.assertEqual(counts(checked(stream(0, 1)[:-5])), (27, 0, 0, 0))
        self.assertEqual(counts(checked(stream(0) + stream(5)[:13])), (16, 0, 13, 0))

    def test_pending(self) -> None:
        """A record that is not whole yet is neither lost nor echoed."""
        checker = EchoChecker(TAG)
        checker.feed(stream(0)[:10])
        self.assertEqual((checker.received, checker.pending), (0, 10))

    def test_hugeHole(self) -> None:
        """A hole larger than what is remembered stays bounded: its records are lost when they come later."""
        checker = checked(stream(1 << 40, 3, (1 << 40) - 1))
        self.assertEqual(counts(checker), (32, 16, 0, 16))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 30)), st.integers(0, 1000))
    def test_againstModel(self, counters: list[int], seed: int) -> None:
        """For any order of whole records: the first of each is echoed, others are doubled, in any chunking."""
        checker = checked(stream(*counters), seed)
        different = len(set(counters))
        late = sum(
            counter not in counters[:index] and counter < max(counters[:index], default=-1)
            for index, counter in enumerate(counters)
        )
        self.assertEqual(
            counts(checker),
            (
                different * RECORD_SIZE,
                (len(counters) - different) * RECORD_SIZE,
                0,
                late * RECORD_SIZE,
            ),
        )

    @settings(max_examples=100, deadline=None)
    @given(st.binary(max_size=200))
    def test_garbage(self, data: bytes) -> None:
        """Whatever comes, every byte is accounted for."""
        self.assertEqual(sum(counts(checked(data))), len(data))


CYCLE = b"".join(b"%d\n" % number for number in range(1, 1200))


class NumbersCheckerTests(SynchronousTestCase):
    def check(self, data: bytes, seed: int = 0) -> tuple[int, int, int, int, int]:
        """Received, lost, doubled, corrupted, reordered, of data that comes in pieces of random size."""
        checker = NumbersChecker(CYCLE)
        pieces = random.Random(seed)
        position = 0
        while position < len(data):
            size = pieces.randrange(1, 3000)
            checker.feed(data[position : position + size])
            position += size
        return checker.received, checker.lost, checker.doubled, checker.corrupted, checker.reordered

    def test_clean(self) -> None:
        """Any beginning of the numbers, again and again, is right, to the byte."""
        for length in (0, 1, 100, len(CYCLE), len(CYCLE) + 1, 2 * len(CYCLE) + 55):
            self.assertEqual(self.check((CYCLE * 3)[:length]), (length, 0, 0, 0, 0))

    def test_lost(self) -> None:
        """Missing lines are lost, also over the end of a cycle."""
        self.assertEqual(self.check(b"1\n2\n5\n6\n"), (8, 4, 0, 0, 0))
        data = CYCLE * 2
        cut = data[: len(CYCLE) - 10] + data[len(CYCLE) + 4 :]
        self.assertEqual(self.check(cut), (len(cut), 14, 0, 0, 0))

    def test_doubled(self) -> None:
        """Lines that come again are doubled, and the rest goes on, also over the end of a cycle."""
        self.assertEqual(self.check(b"1\n2\n3\n2\n3\n4\n"), (8, 0, 4, 0, 0))
        data = CYCLE + b"1\n" + CYCLE[-10:] + CYCLE
        self.assertEqual(self.check(data)[1:], (0, 12, 0, 0))

    def test_reordered(self) -> None:
        """A line that comes late is received and reordered, not lost."""
        self.assertEqual(self.check(b"1\n3\n2\n4\n"), (8, 0, 0, 0, 2))

    def test_corrupted(self) -> None:
        """A changed byte costs its line, which is then lost as well; the next is found again."""
        self.assertEqual(self.check(b"1\n2\nx\n4\n"), (6, 2, 0, 2, 0))
        self.assertEqual(self.check(b"1\n02\n2\n"), (4, 0, 0, 3, 0))

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 9000), st.integers(1, 3000), st.booleans(), st.integers(0, 1000))
    def test_anyCut(self, position: int, length: int, again: bool, seed: int) -> None:
        """A piece cut out, or in once more, anywhere, is found, and what follows is right again."""
        data = CYCLE * 4
        if again:
            wrong = data[: position + length] + data[position:]
        else:
            wrong = data[:position] + data[position + length :]
        received, lost, doubled, corrupted, _ = self.check(wrong, seed)
        self.assertTrue(lost or doubled or corrupted)
        self.assertGreater(received, len(data) - position - length - 2 * len(CYCLE))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from([b"1\n", b"2\n", b"12", b"\n", b"x", b"1199\n", b"0\n", b"00000000"])))
    def test_garbage(self, pieces: list[bytes]) -> None:
        """Whatever comes, every byte is accounted for, but for a line not yet whole."""
        data = b"".join(pieces)
        received, _, doubled, corrupted, _ = self.check(data)
        self.assertIn(len(data) - received - doubled - corrupted, range(7))


class BlockCheckerTests(SynchronousTestCase):
    def told(self, *blocks: bytes) -> tuple[int, int, int, int]:
        """A sink was sent the blocks a, bb, ccc, and told of these."""
        checker = BlockChecker()
        for block in (b"a", b"bb", b"ccc"):
            checker.expect(block)
        text = b"".join(hashlib.md5(block).hexdigest().encode() + b"\n" for block in blocks)
        for byte in text:
            checker.feed(bytes([byte]))
        return counts(checker)

    def test_words(self) -> None:
        """Blocks told once and in order are received; any other order or block is found."""
        self.assertEqual(self.told(b"a", b"bb", b"ccc"), (6, 0, 0, 0))
        self.assertEqual(self.told(b"a", b"a", b"bb"), (3, 1, 0, 0))
        self.assertEqual(self.told(b"bb", b"a"), (3, 0, 0, 1))
        self.assertEqual(self.told(b"a", b"x"), (1, 0, 33, 0))


class GapMeterTests(SynchronousTestCase):
    def test_outage(self) -> None:
        """The outage is the longest gap that ends after the mark; the gaps before are the usual ones."""
        meter = GapMeter(10.0)
        for now in (10.01, 10.03, 10.04):
            meter.arrived(now)
        meter.mark(10.045)
        for now in (10.34, 10.35):
            meter.arrived(now)
        self.assertEqual(meter.outage, 300.0)
        self.assertEqual(meter.usual, Quantiles(10.0, 20.0, 20.0))

    def test_stillSilent(self) -> None:
        """An outage that never ended counts as far as it went."""
        meter = GapMeter(0.0)
        meter.mark(0.5)
        meter.silent(2.0)
        self.assertEqual(meter.outage, 2000.0)

    def test_noKill(self) -> None:
        """Without a mark there is no outage."""
        meter = GapMeter(0.0)
        meter.arrived(5.0)
        meter.silent(9.0)
        self.assertIs(meter.outage, None)

    def test_nothing(self) -> None:
        """Nothing measured gives no figures."""
        self.assertEqual(GapMeter(0.0).usual, Quantiles(None, None, None))


class PercentileTests(SynchronousTestCase):
    def test_nearestRank(self) -> None:
        """Percentiles are values that occurred."""
        values = [5.0, 1.0, 3.0, 2.0, 4.0]
        self.assertEqual([percentile(values, share) for share in (0, 0.5, 0.99, 1)], [1.0, 3.0, 5.0, 5.0])
