"""Figures of checkpoints: percentiles, totals, and a bounded history."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.statistics import HISTORY, PHASES, CheckpointRecord, CheckpointStatistics, percentile, summary


class PercentileTests(SynchronousTestCase):
    def test_known(self) -> None:
        values = [float(n) for n in range(1, 101)]
        self.assertEqual(percentile(values, 0.0), 1.0)
        self.assertEqual(percentile(values, 0.5), 51.0)
        self.assertEqual(percentile(values, 0.99), 100.0)
        self.assertEqual(percentile(values, 1.0), 100.0)
        self.assertEqual(percentile([3.0, 1.0, 2.0], 0.5), 2.0)

    def test_none(self) -> None:
        self.assertEqual(percentile([], 0.5), 0.0)
        self.assertEqual(summary([]), {"p50": 0.0, "p99": 0.0, "max": 0.0})

    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
    @settings(max_examples=50, deadline=None)
    def test_isOneOfTheValues(self, values, fraction) -> None:
        self.assertIn(percentile(values, fraction), values)

    @given(st.lists(st.floats(0, 1e6), max_size=50))
    @settings(max_examples=50, deadline=None)
    def test_order(self, values) -> None:
        kept = summary(iter(values))
        self.assertTrue(kept["p50"] <= kept["p99"] <= kept["max"])


class StatisticsTests(SynchronousTestCase):
    def test_phases(self) -> None:
        self.assertEqual(PHASES, ("request", "stop", "live", "device", "downtime", "commit", "load"))

    def test_nothingYet(self) -> None:
        described = CheckpointStatistics().describe()
        self.assertEqual(described["checkpoints"], 0)
        self.assertIsNone(described["last-checkpoint"])

    def test_totals(self) -> None:
        statistics = CheckpointStatistics()
        statistics.add(CheckpointRecord(0, "initial transfer", ramBytes=1000, deviceBytes=10))
        statistics.add(CheckpointRecord(1, "timer", downtime=5.0, ramBytes=100, deviceBytes=10))
        statistics.failed += 1
        described = statistics.describe()
        self.assertEqual(described["checkpoints"], 2)
        self.assertEqual(described["failed-checkpoints"], 1)
        self.assertEqual(described["checkpoint-bytes"], 1120)
        self.assertEqual(described["phases-ms"]["downtime"], {"p50": 5.0, "p99": 5.0, "max": 5.0})
        self.assertEqual(described["last-checkpoint"]["reason"], "timer")
        json.dumps(described)

    def test_bounded(self) -> None:
        statistics = CheckpointStatistics()
        for number in range(HISTORY + 10):
            statistics.add(CheckpointRecord(number, "timer"))
        self.assertEqual(len(statistics.records), HISTORY)
        self.assertEqual(statistics.checkpoints, HISTORY + 10)
        self.assertEqual(statistics.records[-1].number, HISTORY + 9)
