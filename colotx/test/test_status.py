"""Honest status: since when, why, and who is told."""

from __future__ import annotations

from datetime import UTC, datetime

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from colotx.status import Protection, StatusBoard


class StatusTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.told: list[tuple[str, dict[str, object]]] = []
        self.board = StatusBoard(self.clock, lambda event, data: self.told.append((event, data)))

    def test_starting(self) -> None:
        described = self.board.describe()
        self.assertEqual((described["status"], described["why"]), ("unprotected", "starting"))
        self.assertEqual(self.told, [])

    def test_change(self) -> None:
        self.clock.advance(5)
        self.board.set(Protection.PROTECTED, "it is", "goes on")
        self.clock.advance(2.5)
        described = self.board.describe()
        self.assertEqual(described["status"], "protected")
        self.assertEqual(described["why"], "it is")
        self.assertEqual(described["if-peer-dies"], "goes on")
        self.assertEqual(described["seconds"], 2.5)
        age = datetime.now(UTC) - datetime.fromisoformat(str(described["since"]))
        self.assertTrue(0 <= age.total_seconds() < 60)
        self.assertEqual(self.told, [("COLOTX_STATUS_CHANGE", {"status": "protected", "why": "it is"})])

    def test_anotherReasonIsToldButSinceStays(self) -> None:
        self.board.set(Protection.DEGRADED, "one", "c")
        self.clock.advance(3)
        self.board.set(Protection.DEGRADED, "two", "c")
        self.assertEqual(self.board.describe()["seconds"], 3)
        self.assertEqual([data["why"] for _, data in self.told], ["one", "two"])

    def test_sameAgainIsNoNews(self) -> None:
        for _ in range(3):
            self.board.set(Protection.DEGRADED, "one", "c")
        self.assertEqual(len(self.told), 1)
