"""What C{colo explain} prints."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from colotx._explain import explainText
from colotx.evidence import Difference, Evidence
from colotx.packets import flowOf, locate

FRAME = bytes.fromhex("525400c0100152540000000208004500001c00000000401100000a4d00020a4d00091f90123400080000")


def flow():
    return flowOf(FRAME, locate(FRAME), 0)


class ExplainTests(SynchronousTestCase):
    def test_nothing(self) -> None:
        self.assertIn("no difference", explainText(Evidence().describe()))

    def test_differences(self) -> None:
        evidence = Evidence()
        evidence.record(flow(), Difference("content", 1234, b"one", b"two\x00", "the rest is equal"))
        evidence.record(flow(), Difference("time-out", None, b"three", b""))
        text = explainText(evidence.describe())
        for words in ("content", "time-out", "10.77.0.2:8080", "at byte 1 234", "the rest is equal"):
            self.assertIn(words, text)
        self.assertIn("primary   6f 6e 65 ", text)
        self.assertIn("two.", text)
        self.assertEqual(text.count("secondary "), 1)

    def test_onlyTheLast(self) -> None:
        evidence = Evidence()
        for number in range(20):
            evidence.record(flow(), Difference("content", number, b"a", b"b"))
        text = explainText(evidence.describe(), last=2)
        self.assertEqual(text.count("at byte"), 2)
        self.assertIn("at byte 19", text)
