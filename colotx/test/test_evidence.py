"""Tests for L{colotx.evidence}."""

from __future__ import annotations

import json
import struct

from twisted.trial.unittest import SynchronousTestCase

from colotx.evidence import Difference, Evidence, guessCause
from colotx.packets import Flow

FLOW = Flow(b"", 4, 6, bytes([10, 0, 0, 2]), bytes([10, 0, 0, 9]), b"\0\x50\x12\x67")


class Guesses(SynchronousTestCase):
    """L{guessCause}."""

    def test_each(self) -> None:
        cases = {
            "time stamp": [
                (b"Date: Mon, 01 Jan 2026 12:00:01", b"Date: Mon, 01 Jan 2026 12:00:02"),
                (b"now=1767225600;", b"now=1767225601;"),
                (struct.pack(">QI", 5, 1767225600), struct.pack(">QI", 5, 1767225661)),
                (struct.pack("<I", 1767225600) + b"rest", struct.pack("<I", 1767225661) + b"rest"),
            ],
            "id": [(b"session=0badc0ffee0ddf00d;", b"session=1badc0ffee1ddf0a7;")],
            "ordering": [(b"abcd", b"cdab")],
            "content": [(b"yes", b"not")],
        }
        for guess, pairs in cases.items():
            for ours, theirs in pairs:
                self.assertEqual(guessCause(Difference("content", 0, ours, theirs)), guess, ours)

    def test_withoutBytes(self) -> None:
        self.assertEqual(guessCause(Difference("time-out", 0, b"x", b"")), "time-out")
        self.assertEqual(guessCause(Difference("length", 0, b"x", b"")), "length")


class Collection(SynchronousTestCase):
    """L{Evidence}."""

    def test_bounded(self) -> None:
        evidence = Evidence(ring=3, clock=lambda: 5.0)
        for number in range(2000):
            flow = FLOW._replace(selector=struct.pack(">HH", 80, number))
            evidence.record(flow, Difference("content", number, bytes(1000), b"x" * 1000))
            evidence.record(FLOW, Difference("time-out", None, b"", b""))
        described = evidence.describe()
        self.assertEqual(len(evidence.exhibits), 3)
        self.assertLess(len(json.dumps(described)), 10000)
        self.assertEqual(described["reasons"], {"content": 2000, "time-out": 2000})
        first = described["flows"][0]  # type: ignore[index]
        self.assertEqual(first, {"flow": "tcp 10.0.0.2:80 > 10.0.0.9:4711", "checkpoints": 2000})

    def test_describe(self) -> None:
        evidence = Evidence(clock=lambda: 5.0)
        evidence.record(FLOW, Difference("content", 3, b"ab", b"cd", "why"))
        evidence.record(None, Difference("table-full", None, b"", b""))
        one, two = evidence.describe()["last"]  # type: ignore[misc]
        self.assertEqual(
            one,
            {
                "time": 5.0,
                "flow": "tcp 10.0.0.2:80 > 10.0.0.9:4711",
                "direction": "guest to client",
                "reason": "content",
                "guess": "content",
                "offset": 3,
                "primary": "6162",
                "secondary": "6364",
                "note": "why",
            },
        )
        self.assertEqual(two["flow"], "all flows")
