"""Answers as text for people."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx._report import WHAT_TO_DO, aligned, durationText, statisticsText, statusText, valueText
from colotx.status import Protection
from colotx.test.test_control import FakeNode
from colotx.test.test_qmp_codec import BOUNDED, objects


class StatusTextTests(SynchronousTestCase):
    """L{statusText}."""

    def test_whole(self) -> None:
        """Everything an operator asks, one line each."""
        self.assertEqual(
            statusText(FakeNode().described).splitlines(),
            [
                "VM                guest0",
                "Role              primary",
                "Guest             running",
                "Status            protected for 2 min 6 s, since 2026-01-02 03:04:05 UTC",
                "Why               the peer holds a checkpoint",
                "If the peer dies  the guest runs on here",
                "Peer              192.0.2.2:7800",
                "Epoch             3",
                "What to do        nothing",
            ],
        )

    def test_advice(self) -> None:
        """Every status there is has an advice."""
        self.assertEqual(set(WHAT_TO_DO), {protection.value for protection in Protection})

    def test_otherVersions(self) -> None:
        """Members that are missing, strange or unknown do no harm."""
        self.assertIn("see the daemon's log", statusText({}))
        text = statusText({"status": "odd", "since": "yesterday", "held-frames": 3})
        self.assertIn("odd, since yesterday", text)
        self.assertIn("Held frames  3", text)

    @BOUNDED
    @given(objects, st.sampled_from(["status", "since", "seconds", "why", "peer"]))
    def test_anything(self, answer: dict[str, object], name: str) -> None:
        """Any JSON object is shown somehow."""
        for value in list(answer.values()):
            statusText({**answer, name: value})
        statisticsText(answer)


class StatisticsTextTests(SynchronousTestCase):
    """L{statisticsText}."""

    def test_whole(self) -> None:
        """Figures one a line, phases as a table."""
        self.assertEqual(
            statisticsText(FakeNode().statistics).splitlines(),
            [
                "Checkpoints      12",
                "Last checkpoint  none",
                "Held frames      4",
                "",
                "Phases ms    p50    p99     max",
                "stop       0.500  1.250   2.000",
                "downtime   5.000  9.000  13.000",
            ],
        )

    def test_nothing(self) -> None:
        """An empty answer is an empty text."""
        self.assertEqual(statisticsText({}), "")


class ValueTests(SynchronousTestCase):
    """Single values."""

    def test_duration(self) -> None:
        """The two largest units."""
        for seconds, text in [
            (0, "0 s"),
            (1.5, "1.5 s"),
            (59.94, "59.9 s"),
            (125.5, "2 min 6 s"),
            (3600, "1 h 0 min"),
            (100_000, "1 d 3 h"),
        ]:
            self.assertEqual(durationText(seconds), text)

    def test_value(self) -> None:
        """Thousands are set apart, nothing is said to be none."""
        examples: list[tuple[object, str]] = [
            (None, "none"),
            ("", "none"),
            ({}, "none"),
            ([], "none"),
            (True, "yes"),
            (1234567, "1 234 567"),
            (0.12345, "0.123"),
            ({"a": 1, "b": [2, None]}, "a 1, b 2, none"),
        ]
        for value, text in examples:
            self.assertEqual(valueText(value), text)

    def test_aligned(self) -> None:
        """No space at the ends of lines."""
        self.assertEqual(aligned([("a", "bbb"), ("cc", "d")]), "a   bbb\ncc  d")
