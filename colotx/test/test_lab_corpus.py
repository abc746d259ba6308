"""Tests for L{colotx.lab.corpus}."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from colotx.lab.corpus import Case, corpus
from colotx.lab.corpuspair import Pair, Verdict
from colotx.packets import flowOf, locate

A, B, C = b"a" * 60, b"b" * 60, b"c" * 60


def case(*verdicts: tuple[bytes, Verdict], ordered: bool = True) -> Case:
    """A case of which only the primary's side matters."""
    return Case("x", "x", Pair(verdicts, (), None, ordered))


class JudgeTests(SynchronousTestCase):
    """L{Case.judge}."""

    def test_right(self) -> None:
        """All that leaves must, none that is held, perhaps what may."""
        it = case((A, Verdict.LEAVES), (B, Verdict.EITHER), (C, Verdict.HELD))
        self.assertEqual([it.judge([A]), it.judge([A, B]), it.judge([A, B, C], all_=True)], [[], [], []])

    def test_wrong(self) -> None:
        """Each fault has its name."""
        it = case((A, Verdict.LEAVES), (B, Verdict.LEAVES), (C, Verdict.HELD))
        self.assertEqual(it.judge([A]), ["kept"])
        self.assertEqual(it.judge([A, B, C]), ["leaked"])
        self.assertEqual(it.judge([A, B, b"?"]), ["foreign"])
        self.assertEqual(it.judge([A, B, B]), ["foreign"])
        self.assertEqual(it.judge([B, A]), ["order"])
        self.assertEqual(it.judge([A, B], all_=True), ["kept"])

    def test_order(self) -> None:
        """Where order is no matter, it is not judged."""
        self.assertEqual(case((A, Verdict.LEAVES), (B, Verdict.LEAVES), ordered=False).judge([B, A]), [])

    def test_alike(self) -> None:
        """Of two equal frames, one of which is held, one leaves."""
        it = case((A, Verdict.LEAVES), (A, Verdict.HELD))
        self.assertEqual([it.judge([A]), it.judge([A, A]), it.judge([])], [[], ["leaked"], ["kept"]])


class CorpusTests(SynchronousTestCase):
    """L{corpus}."""

    def test_deterministic(self) -> None:
        """A seed is a corpus; another is another."""
        first, again, other = (list(corpus(seed, 1)) for seed in (1, 1, 2))
        self.assertEqual(first, again)
        self.assertEqual([it.name for it in first], [it.name for it in other])
        self.assertNotEqual(first, other)

    def test_names(self) -> None:
        """Hundreds of cases, each with a name of its own, in all kinds of networks."""
        cases = list(corpus(1))
        names = [it.name for it in cases]
        self.assertGreater(len(names), 500)
        self.assertEqual(len(set(names)), len(names))
        for network in ("ipv4", "ipv6", "ipv4 vlan", "ipv6 vlan", "ipv4 qinq", "ipv6 qinq"):
            self.assertIn(f"tcp-segmentation {network} 0", names)

    def test_flowsOfTheirOwn(self) -> None:
        """No two cases share a flow, ARP's apart."""
        owner: dict[object, str] = {}
        for it in corpus(1, 2):
            for frame in {*(frame for frame, _ in it.pair.primary), *it.pair.secondary}:
                layers = locate(frame)
                if layers.version:
                    self.assertEqual(owner.setdefault(flowOf(frame, layers), it.name), it.name)

    def test_samePairsHaveEqualStreams(self) -> None:
        """What is called the same is not the same frames where guests differ, but as many."""
        for it in corpus(1, 1):
            if it.category in ("udp-same", "tcp-same") and "ipv4" in it.name:
                primary = [frame for frame, _ in it.pair.primary]
                self.assertEqual(len(primary), len(it.pair.secondary))
                self.assertFalse(set(primary) & set(it.pair.secondary))

    def test_everythingHeldIsWanted(self) -> None:
        """A frame that must be held needs a checkpoint."""
        for it in corpus(1, 1):
            if any(verdict is Verdict.HELD for _, verdict in it.pair.primary):
                self.assertTrue(it.pair.wanted, it.name)
