"""The comparer's bounds and times, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CompareLimits:
    """
    Bounds and times of a L{Comparer}; may be replaced at run time.

    @ivar compareTimeout: how long a frame of the primary waits before a checkpoint is asked for, ms.
    @ivar expiredScanCycle: how often L{Comparer.scan} is to be called, ms.
    @ivar maxQueueSize: frames per flow and side that wait before a checkpoint is asked for.
    @ivar maxFlows: flows in the table.
    @ivar maxHeldBytes: bytes of the primary that wait before a checkpoint is asked for.
    @ivar maxSecondaryBytes: bytes of the secondary that are kept.
    @ivar maxDatagrams: incomplete datagrams per side.
    @ivar idle: after how long without a frame a flow is forgotten, ms.
    """

    compareTimeout: int = 3000
    expiredScanCycle: int = 1000
    maxQueueSize: int = 1024
    maxFlows: int = 16384
    maxHeldBytes: int = 8 * 1024 * 1024
    maxSecondaryBytes: int = 64 * 1024 * 1024
    maxDatagrams: int = 256
    idle: int = 60000


@dataclass(slots=True)
class CompareStatistics:
    """
    Counters since the start.

    @ivar primary: frames of the primary that came.
    @ivar secondary: frames of the secondary that came.
    @ivar released: frames of the primary that left because both said the same.
    @ivar flushed: frames of the primary that left by a checkpoint.
    @ivar held: frames of the primary that had to wait, whatever became of them.
    @ivar forgotten: frames of the secondary that did not fit.
    @ivar flushes: checkpoints.
    @ivar asked: checkpoints asked for, by reason.
    """

    primary: int = 0
    secondary: int = 0
    released: int = 0
    flushed: int = 0
    held: int = 0
    forgotten: int = 0
    flushes: int = 0
    asked: dict[str, int] = field(default_factory=dict)
