"""
The output gate of a primary with an active secondary: what both VMs said leaves at once, the rest with a checkpoint.

It joins the comparer and the keeper of windows, which know frames, to the gate's epochs. Nothing here knows the
checkpoint process or a port.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from colotx.compare import CompareLimits, Comparer, Evidence
from colotx.gate import OutputGate
from colotx.windows import WindowKeeper


class LockstepGate(OutputGate):
    """
    An L{OutputGate} whose current epoch is compared while a secondary runs: from one L{closeEpoch} to the next, until
    L{suspend}.

    @ivar evidence: what differed.
    """

    def __init__(
        self,
        now: Callable[[], float],
        deliver: Callable[[Sequence[bytes]], None],
        wantCheckpoint: Callable[[str], None],
        throttle: Callable[[bool], None],
        compare: CompareLimits,
    ) -> None:
        """
        @param now: monotonic seconds.
        @param compare: the comparer's bounds.
        """
        super().__init__(deliver, wantCheckpoint, throttle)
        self.evidence = Evidence()
        self._comparer = Comparer(now, self._agreed, wantCheckpoint, compare, self.evidence)
        self._windows = WindowKeeper()
        self._comparing = False
        self._counted = (0, 0)

    @property
    def compareLimits(self) -> CompareLimits:
        """The comparer's bounds; can be set at any time."""
        return self._comparer.limits

    @compareLimits.setter
    def compareLimits(self, limits: CompareLimits) -> None:
        self._comparer.limits = limits

    def hold(self, frames: Sequence[bytes]) -> None:
        """As L{OutputGate.hold}."""
        self._windows.learn(frames)
        super().hold(frames)

    def compare(self, frames: Sequence[bytes]) -> None:
        """What the secondary said, in order, of the epoch under way."""
        if self._comparing:
            self._windows.said(frames)
            self._comparer.secondary(frames)
            if updates := self._windows.updates():
                self._deliver(updates)
            self._recount()
            self._relax()

    def scan(self) -> None:
        """To be called every C{expiredScanCycle}: what nobody said for too long asks for a checkpoint."""
        if self._comparing:
            self._comparer.scan()

    def closeEpoch(self) -> int:
        """As L{OutputGate.closeEpoch}; from the next epoch on frames are compared."""
        epoch = super().closeEpoch()
        self._comparing = True
        return epoch

    def suspend(self) -> None:
        """There is no secondary to compare with: what was not agreed on waits, and what comes."""
        frames, size = self._take()
        self._count(-len(frames), -size)
        self._comparing = False
        super()._keep(frames)

    def describe(self) -> dict[str, object]:
        """The comparer's counters, and the keeper's."""
        return {**self._comparer.describe(), "windows": asdict(self._windows.statistics)}

    def _agreed(self, frames: Sequence[bytes]) -> None:
        self.statistics.released += len(frames)
        self._deliver(self._windows.lower(frames))

    def _keep(self, frames: Sequence[bytes]) -> None:
        if self._comparing:
            self._comparer.primary(frames)
            self._recount()
        else:
            super()._keep(frames)

    def _take(self) -> tuple[list[bytes], int]:
        # What came before comparing began is the older.
        frames, size = super()._take()
        held = self._comparer.flush()
        heldBytes = sum(map(len, held))
        # They are counted already, and whoever takes them counts them off.
        self._counted = (0, 0)
        updates = self._windows.forget()
        updateBytes = sum(map(len, updates))
        self._count(len(updates), updateBytes)
        return frames + updates + held, size + updateBytes + heldBytes

    def _recount(self) -> None:
        frames, size = self._comparer.heldFrames, self._comparer.heldBytes
        self._count(frames - self._counted[0], size - self._counted[1])
        self._counted = (frames, size)


__all__ = ["LockstepGate"]
