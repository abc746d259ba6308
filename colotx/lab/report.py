"""What the demonstration found, as values, as a table and as JSON. It must not know how it was found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from colotx.lab.client import FAULTS, isClean
from colotx.lab.traffic import Quantiles

_COLUMNS = (
    ("round", "number"),
    ("kill", "kill"),
    ("checkpoints", "checkpoints"),
    ("downtime p50", "downtime_p50"),
    ("p99 ms", "downtime_p99"),
    ("detection ms", "detection_ms"),
    ("outage ms", "outage_ms"),
    ("usual gap p99 ms", "usual_gap_p99"),
    ("lost", "lost"),
    ("doubled", "doubled"),
    ("result", "result"),
)


@dataclass(slots=True)
class RoundResult:
    """
    One round. Times in milliseconds, amounts in bytes; None: it did not come to that.

    @ivar number: counts from 1.
    @ivar kill: what was killed.
    @ivar checkpoints: committed before the kill.
    @ivar downtime_p50: of the guest, by a checkpoint.
    @ivar detection_ms: from the kill until the secondary's daemon said that the peer is lost.
    @ivar failover_ms: from the kill until the secondary's daemon said that the guest runs.
    @ivar outage_ms: the longest time without any echoed byte after the kill.
    @ivar usual_gap_p99: the same before the kill, 99 % of them shorter.
    @ivar resets: connections that did not live.
    @ivar memory_check: the word of the guest's memory check before and after.
    @ivar problem: None when all went well, else what did not.
    @ivar logs: where they are, when they are kept.
    """

    number: int
    kill: str
    checkpoints: int | None = None
    downtime_p50: float | None = None
    downtime_p99: float | None = None
    detection_ms: float | None = None
    failover_ms: float | None = None
    outage_ms: float | None = None
    usual_gap_p99: float | None = None
    sent: int = 0
    lost: int = 0
    doubled: int = 0
    corrupted: int = 0
    reordered: int = 0
    resets: int = 0
    memory_check: Sequence[str] = ()
    problem: str | None = None
    logs: str | None = None

    @property
    def result(self) -> str:
        """One word."""
        return "ok" if self.problem is None else "FAILED"

    def take(self, report: Mapping[str, Any]) -> None:
        """What the client found."""
        self.outage_ms = report["outage_ms"]
        self.usual_gap_p99 = report["usual_gap_ms"]["p99"]
        self.memory_check = report["memory_check"]
        for name in ("sent", *FAULTS):
            setattr(self, name, report[name])
        if not isClean(report):
            found = [f"{name} {report[name]}" for name in FAULTS if report[name]]
            self.problem = f"the client found: {', '.join(found)} (memory check {self.memory_check})"


def summary(results: Sequence[RoundResult]) -> dict[str, Any]:
    """
    All rounds in one object. Each round has its own downtime percentiles: p50 is the median of the rounds' and p99
    the worst of them.
    """
    outage = Quantiles.of(one.outage_ms for one in results if one.outage_ms is not None)
    halves = [one.downtime_p50 for one in results if one.downtime_p50 is not None]
    worst = [one.downtime_p99 for one in results if one.downtime_p99 is not None]
    return {
        "rounds": len(results),
        "failed_rounds": sum(one.problem is not None for one in results),
        "checkpoints": sum(one.checkpoints or 0 for one in results),
        "outage_ms": asdict(outage),
        "downtime_ms": {
            "p50": round(statistics.median(halves), 3) if halves else None,
            "p99": max(worst, default=None),
        },
        "detection_ms": asdict(
            Quantiles.of(one.detection_ms for one in results if one.detection_ms is not None)
        ),
        "bytes_sent": sum(one.sent for one in results),
        "bytes_lost": sum(one.lost for one in results),
        "bytes_doubled": sum(one.doubled for one in results),
        "bytes_corrupted": sum(one.corrupted for one in results),
        "bytes_reordered": sum(one.reordered for one in results),
        "connections_lost": sum(one.resets for one in results),
        "each": [asdict(one) for one in results],
    }


def table(results: Sequence[RoundResult]) -> str:
    """The rounds, a line each."""
    rows = [[title for title, _ in _COLUMNS]]
    rows += [[_cell(getattr(one, attribute)) for _, attribute in _COLUMNS] for one in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def line(found: Mapping[str, Any]) -> str:
    """@param found: from L{summary}. @return: all of it in one line."""
    outage, downtime = found["outage_ms"], found["downtime_ms"]
    return (
        f"outage {_cell(outage['p50'])} ms (p50; max {_cell(outage['max'])}), "
        f"{found['checkpoints']} checkpoints, "
        f"downtime p50 {_cell(downtime['p50'])} ms, p99 {_cell(downtime['p99'])} ms, "
        f"bytes lost {found['bytes_lost']}, bytes doubled {found['bytes_doubled']}"
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
