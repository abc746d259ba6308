"""What the demonstration found, as values, as a table and as JSON. It must not know how it was found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    ("after detection", "after_detection_ms"),
    ("slowest", "slowest_ms"),
    ("usual gap p99 ms", "usual_gap_p99"),
    ("connections", "connections"),
    ("late", "late"),
    ("hung", "hung"),
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
    @ivar after_detection_ms: what is left of the outage without the detection.
    @ivar slowest_ms: the same of the echo that was silent longest: its client may have had to wait for the time-out of
        its own retransmission, which is 200 ms at least.
    @ivar last_checkpoint: when the last one before the kill was seen, seconds of C{time.monotonic}.
    @ivar usual_gap_p99: the same before the kill, 99 % of them shorter.
    @ivar connections: how many there were when the client ended.
    @ivar late: how many of them began after the last checkpoint before the kill.
    @ivar resets: connections that did not live.
    @ivar hung: connections that lived, but did not go on.
    @ivar unopened: connections that did not come about.
    @ivar kinds: what the client found, by the kind of connection.
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
    after_detection_ms: float | None = None
    slowest_ms: float | None = None
    last_checkpoint: float | None = None
    usual_gap_p99: float | None = None
    sent: int = 0
    lost: int = 0
    doubled: int = 0
    corrupted: int = 0
    reordered: int = 0
    connections: int = 0
    late: int = 0
    resets: int = 0
    hung: int = 0
    unopened: int = 0
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    memory_check: Sequence[str] = ()
    problem: str | None = None
    logs: str | None = None

    @property
    def result(self) -> str:
        """One word."""
        return "ok" if self.problem is None else "FAILED"

    def observe(self, statistics: Mapping[str, Any], now: float) -> int:
        """
        What the primary's daemon says of its checkpoints, again and again until the kill.

        @param now: seconds of C{time.monotonic}.
        @return: how many there have been.
        """
        count = int(statistics["checkpoints"])
        if count != self.checkpoints:
            self.checkpoints, self.last_checkpoint = count, now
        downtime = statistics["phases-ms"]["downtime"]
        self.downtime_p50, self.downtime_p99 = downtime["p50"], downtime["p99"]
        return count

    def take(self, report: Mapping[str, Any]) -> None:
        """What the client found, once the times of this round are known."""
        each = report["connections"]
        self.outage_ms = report["outage_ms"]
        self.usual_gap_p99 = report["usual_gap_ms"]["p99"]
        self.memory_check = report["memory_check"]
        self.sent = report["sent"]
        for name in FAULTS:
            setattr(self, name, report[name])
        self.connections = len(each)
        if self.last_checkpoint is not None:
            self.late = sum(one["opened"] > self.last_checkpoint for one in each)
        outages = [one["outage_ms"] for one in each if one["kind"] == "echo" and one["outage_ms"] is not None]
        if outages and self.detection_ms is not None and self.outage_ms is not None:
            # A cut link is detected late, while what is on its way still arrives: nothing may be left then.
            self.after_detection_ms = round(max(0.0, self.outage_ms - self.detection_ms), 1)
            self.slowest_ms = round(max(0.0, *outages, self.detection_ms) - self.detection_ms, 1)
        self.kinds = byKind(each)
        if not isClean(report):
            found = [f"{name} {report[name]}" for name in FAULTS if report[name]]
            self.problem = f"the client found: {', '.join(found)} (memory check {self.memory_check})"


_AMOUNTS = ("sent", "received", "lost", "doubled", "reordered", "corrupted", "hung")


def byKind(connections: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """
    Sum up a client's connections.

    @return: by kind and version of IP: bytes, connections that failed, and the outage of each connection.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in connections:
        nothing = {"connections": 0, **dict.fromkeys(_AMOUNTS, 0), "resets": 0, "outages_ms": []}
        sums = found.setdefault(f"{one['kind']} IPv{one['version']}", nothing)
        sums["connections"] += 1
        for name in _AMOUNTS:
            sums[name] += one[name]
        sums["resets"] += one["reset"] is not None
        if one["outage_ms"] is not None:
            sums["outages_ms"].append(one["outage_ms"])
    return found


def summary(results: Sequence[RoundResult]) -> dict[str, Any]:
    """
    All rounds in one object. Each round has its own downtime percentiles: p50 is the median of the rounds' and p99
    the worst of them.
    """
    halves = [one.downtime_p50 for one in results if one.downtime_p50 is not None]
    worst = [one.downtime_p99 for one in results if one.downtime_p99 is not None]
    return {
        "rounds": len(results),
        "failed_rounds": sum(one.problem is not None for one in results),
        "checkpoints": sum(one.checkpoints or 0 for one in results),
        "outage_ms": _quantiles(results, "outage_ms"),
        "downtime_ms": {
            "p50": round(statistics.median(halves), 3) if halves else None,
            "p99": max(worst, default=None),
        },
        "detection_ms": _quantiles(results, "detection_ms"),
        "after_detection_ms": _quantiles(results, "after_detection_ms"),
        "slowest_ms": _quantiles(results, "slowest_ms"),
        "bytes_sent": sum(one.sent for one in results),
        "bytes_lost": sum(one.lost for one in results),
        "bytes_doubled": sum(one.doubled for one in results),
        "bytes_corrupted": sum(one.corrupted for one in results),
        "bytes_reordered": sum(one.reordered for one in results),
        "connections": sum(one.connections for one in results),
        "connections_late": sum(one.late for one in results),
        "connections_lost": sum(one.resets + one.unopened for one in results),
        "connections_hung": sum(one.hung for one in results),
        "kinds": _allKinds(results),
        "each": [asdict(one) for one in results],
    }


def _quantiles(results: Sequence[RoundResult], name: str) -> dict[str, float | None]:
    """Of what there is."""
    return asdict(Quantiles.of(found for one in results if (found := getattr(one, name)) is not None))


def _allKinds(results: Sequence[RoundResult]) -> dict[str, dict[str, Any]]:
    """The kinds of all rounds together."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        for kind, sums in result.kinds.items():
            total = found.setdefault(kind, dict.fromkeys(sums, 0) | {"outages_ms": []})
            for name, value in sums.items():
                total[name] = total[name] + value
    for total in found.values():
        total["outage_ms"] = asdict(Quantiles.of(total.pop("outages_ms")))
    return found


def kindsTable(found: Mapping[str, Any]) -> str:
    """@param found: from L{summary}. @return: the kinds of connection, a line each."""
    rows = [["", "connections", *_AMOUNTS, "resets", "outage p50", "p99 ms"]]
    for kind, sums in found["kinds"].items():
        amounts = [_cell(sums[name]) for name in ("connections", *_AMOUNTS, "resets")]
        rows.append([kind, *amounts, _cell(sums["outage_ms"]["p50"]), _cell(sums["outage_ms"]["p99"])])
    return _aligned(rows)


def table(results: Sequence[RoundResult]) -> str:
    """The rounds, a line each."""
    rows = [[title for title, _ in _COLUMNS]]
    rows += [[_cell(getattr(one, attribute)) for _, attribute in _COLUMNS] for one in results]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def line(found: Mapping[str, Any]) -> str:
    """@param found: from L{summary}. @return: all of it in one line."""
    outage, downtime, after = found["outage_ms"], found["downtime_ms"], found["after_detection_ms"]
    return (
        f"outage {_cell(outage['p50'])} ms (p50; max {_cell(outage['max'])}), "
        f"after detection {_cell(after['p50'])} ms (p50; p99 {_cell(after['p99'])}), "
        f"{found['checkpoints']} checkpoints, "
        f"downtime p50 {_cell(downtime['p50'])} ms, p99 {_cell(downtime['p99'])} ms, "
        f"bytes lost {found['bytes_lost']}, bytes doubled {found['bytes_doubled']}, "
        f"connections hung {found['connections_hung']} of {found['connections']} ({found['connections_late']} late)"
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
