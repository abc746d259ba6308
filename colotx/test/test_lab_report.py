"""Tests of L{colotx.lab.report}."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from colotx.lab.report import RoundResult, line, summary, table


def clientConnection(**found: Any) -> dict[str, Any]:
    """What it says of one connection."""
    return {
        "kind": "echo",
        "version": 4,
        "opened": 50.0,
        **dict.fromkeys(("sent", "received"), 1000),
        **dict.fromkeys(("lost", "doubled", "corrupted", "reordered", "hung"), 0),
        "reset": None,
        "outage_ms": 320.5,
        **found,
    }


def clientReport(**found: Any) -> dict[str, Any]:
    """What a client says after a clean round, but for C{found}."""
    return {
        "sent": 1000,
        **dict.fromkeys(("lost", "doubled", "corrupted", "reordered", "resets", "hung", "unopened"), 0),
        "connections": [clientConnection()],
        "outage_ms": 310.5,
        "usual_gap_ms": {"p50": 9.0, "p99": 61.0, "max": 70.0},
        "memory_check": ["3 ok", "5 ok"],
        **found,
    }


def rounds() -> list[RoundResult]:
    first = RoundResult(1, "host", checkpoints=40, downtime_p50=4.0, downtime_p99=11.0, detection_ms=12.0)
    first.take(clientReport())
    second = RoundResult(2, "host", checkpoints=60, downtime_p50=6.0, downtime_p99=9.0, detection_ms=20.0)
    second.take(clientReport(outage_ms=420.0, lost=16, doubled=32))
    third = RoundResult(3, "host", problem="not protected", logs="/somewhere")
    return [first, second, third]


class RoundResultTests(SynchronousTestCase):
    def test_clean(self) -> None:
        """A clean report is no problem."""
        self.assertEqual(rounds()[0].result, "ok")

    def test_faults(self) -> None:
        """Each fault alone fails the round and is named."""
        for fault in ("lost", "doubled", "corrupted", "reordered", "resets", "hung", "unopened"):
            result = RoundResult(1, "host")
            result.take(clientReport(**{fault: 1}))
            self.assertEqual(result.result, "FAILED")
            self.assertIn(f"{fault} 1", str(result.problem))

    def test_memory(self) -> None:
        """So does a memory check that is not content."""
        result = RoundResult(1, "host")
        result.take(clientReport(memory_check=["3 ok", "4 CORRUPT"]))
        self.assertIn("CORRUPT", str(result.problem))

    def test_observe(self) -> None:
        """The last checkpoint was when their number was first seen."""
        result = RoundResult(1, "host")
        downtime = {"p50": 4.0, "p99": 5.0}
        for count, now in ((1, 10.0), (2, 20.0), (2, 30.0)):
            result.observe({"checkpoints": count, "phases-ms": {"downtime": downtime}}, now)
        self.assertEqual((result.checkpoints, result.last_checkpoint), (2, 20.0))
        self.assertEqual((result.downtime_p50, result.downtime_p99), (4.0, 5.0))

    def test_late(self) -> None:
        """Connections younger than the last checkpoint are counted."""
        result = RoundResult(1, "host", last_checkpoint=60.0)
        result.take(clientReport(connections=[clientConnection(opened=at) for at in (59.0, 60.5, 61.0)]))
        self.assertEqual((result.connections, result.late), (3, 2))

    def test_afterDetection(self) -> None:
        """The detection is no part of it; the slowest is an echo, and none that was opened after the kill."""
        result = RoundResult(1, "host", detection_ms=20.0)
        each = [clientConnection(outage_ms=outage) for outage in (50.0, 70.0, None)]
        result.take(clientReport(connections=[*each, clientConnection(kind="upload", outage_ms=300.0)]))
        self.assertEqual((result.after_detection_ms, result.slowest_ms), (290.5, 50.0))

    def test_kinds(self) -> None:
        """Connections are summed up by kind and version of IP, over all rounds."""
        results = []
        for outage in (100.0, 300.0):
            result = RoundResult(1, "host")
            each = [
                clientConnection(outage_ms=outage),
                clientConnection(version=6, lost=16, reset="gone", hung=True),
            ]
            result.take(clientReport(connections=each))
            results.append(result)
        kinds = summary(results)["kinds"]
        self.assertEqual(list(kinds), ["echo IPv4", "echo IPv6"])
        self.assertEqual(kinds["echo IPv4"]["outage_ms"], {"p50": 100.0, "p99": 300.0, "max": 300.0})
        self.assertEqual(
            [kinds["echo IPv6"][name] for name in ("connections", "sent", "lost", "resets", "hung")],
            [2, 2000, 32, 2, 2],
        )


class SummaryTests(SynchronousTestCase):
    def test_keys(self) -> None:
        """All rounds together, in the keys the documentation promises."""
        found = summary(rounds())
        self.assertEqual(
            {
                key: found[key]
                for key in ("rounds", "failed_rounds", "checkpoints", "bytes_lost", "bytes_doubled")
            },
            {"rounds": 3, "failed_rounds": 2, "checkpoints": 100, "bytes_lost": 16, "bytes_doubled": 32},
        )
        self.assertEqual(found["outage_ms"], {"p50": 310.5, "p99": 420.0, "max": 420.0})
        self.assertEqual(found["downtime_ms"], {"p50": 5.0, "p99": 11.0})
        self.assertEqual(json.loads(json.dumps(found))["bytes_lost"], 16)

    def test_nothing(self) -> None:
        """No round that came to anything still makes a summary and a line."""
        found = summary([RoundResult(1, "link", problem="no")])
        self.assertEqual(found["outage_ms"], {"p50": None, "p99": None, "max": None})
        self.assertIn("outage - ms", line(found))

    def test_line(self) -> None:
        """The line says everything in order."""
        self.assertEqual(
            line(summary(rounds())),
            "outage 310.5 ms (p50; max 420.0), after detection 298.5 ms (p50; p99 400.0), 100 checkpoints, "
            "downtime p50 5.0 ms, p99 11.0 ms, bytes lost 16, bytes doubled 32, connections hung 0 of 2 (0 late)",
        )

    def test_table(self) -> None:
        """A line each, columns aligned."""
        lines = table(rounds()).split("\n")
        self.assertEqual(len(lines), 4)
        self.assertEqual(len(set(map(len, lines))), 1)
        self.assertTrue(lines[1].endswith("ok"))
        self.assertTrue(lines[3].endswith("FAILED"))
