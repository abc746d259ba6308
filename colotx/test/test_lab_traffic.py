"""Tests of L{colotx.lab.traffic}."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.lab.traffic import RECORD_SIZE, EchoChecker, GapMeter, Quantiles, percentile, record

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


def counts(checker: EchoChecker) -> tuple[int, int, int, int]:
    return checker.echoed, checker.doubled, checker.corrupted, checker.reordered


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
        self.assertEqual((checker.echoed, checker.pending), (0, 10))

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
