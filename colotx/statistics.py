"""
Phase timings of checkpoints, kept as statistics: a bounded ring of records and totals since the start.

All times are milliseconds of the monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields

HISTORY = 4096
"""Records kept; about 40 bytes a field, so a megabyte."""


@dataclass(slots=True)
class CheckpointRecord:
    """
    One checkpoint.

    @ivar number: counts from 1 in a protection; 0 is the initial one.
    @ivar reason: what triggered it.
    @ivar request: REQUEST sent to REPLY received (ms).
    @ivar stop: asking the guest to stop until no virtual CPU ran (ms).
    @ivar live: transfer of the RAM out of the guest (ms).
    @ivar device: the device state (ms).
    @ivar downtime: from asking the guest to stop until it ran again (ms); an upper bound of what clients see.
    @ivar commit: from the guest's stop until the peer held the checkpoint, RECEIVED (ms): output waited that long
        at most, plus the time since the checkpoint before.
    @ivar load: RECEIVED to LOADED (ms).
    @ivar ramBytes: bytes of the RAM section.
    @ivar deviceBytes: bytes of the device state.
    """

    number: int
    reason: str
    request: float = 0.0
    stop: float = 0.0
    live: float = 0.0
    device: float = 0.0
    downtime: float = 0.0
    commit: float = 0.0
    load: float = 0.0
    ramBytes: int = 0
    deviceBytes: int = 0


PHASES = tuple(f.name for f in fields(CheckpointRecord) if f.type == "float")


def percentile(values: Iterable[float], fraction: float) -> float:
    """The nearest-rank percentile. @param fraction: 0..1. @return: 0.0 when there are no values."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def summary(values: Iterable[float]) -> dict[str, float]:
    """p50, p99 and max of milliseconds, rounded to a microsecond."""
    kept = list(values)
    return {
        "p50": round(percentile(kept, 0.5), 3),
        "p99": round(percentile(kept, 0.99), 3),
        "max": round(max(kept, default=0.0), 3),
    }


class CheckpointStatistics:
    """What C{query-colotx-stats} tells about checkpoints."""

    def __init__(self) -> None:
        self.records: deque[CheckpointRecord] = deque(maxlen=HISTORY)
        self.checkpoints = 0
        self.failed = 0
        self.bytes = 0

    def add(self, record: CheckpointRecord) -> None:
        """A checkpoint the peer holds."""
        self.records.append(record)
        self.checkpoints += 1
        self.bytes += record.ramBytes + record.deviceBytes

    def describe(self) -> dict[str, object]:
        """Totals, and p50/p99/max of each phase over the last records (ms)."""
        last = self.records[-1] if self.records else None
        return {
            "checkpoints": self.checkpoints,
            "failed-checkpoints": self.failed,
            "checkpoint-bytes": self.bytes,
            "phases-ms": {phase: summary(getattr(r, phase) for r in self.records) for phase in PHASES},
            "last-checkpoint": None
            if last is None
            else {f.name: getattr(last, f.name) for f in fields(CheckpointRecord)},
        }
