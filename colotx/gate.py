"""
Output commit: what the primary guest says waits here until it may leave.

L{OutputGate} is the part that every kind of secondary needs: frames of one epoch wait for the checkpoint that
covers them (rule 4 of the design: in doubt, hold). It takes frames and gives frames, knows no port, no clock and
no checkpoint process, and never drops a frame: at the high-water mark it asks for an early checkpoint, at the limit
it holds the guest's port back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zope.interface import implementer

from colotx.interfaces import IOutputGate


@dataclass(frozen=True, slots=True)
class GateLimits:
    """
    Bounds of the frames an L{OutputGate} holds.

    @ivar highWater: bytes above which an early checkpoint is asked for.
    @ivar limit: bytes above which the guest's port is paused; what is in flight then (one read of the port) may
        still come on top.
    """

    highWater: int = 8 * 1024 * 1024
    limit: int = 64 * 1024 * 1024


@dataclass(slots=True)
class GateStatistics:
    """
    Counters since the start.

    @ivar released: frames that left.
    @ivar heldFrames: frames that wait now.
    @ivar heldBytes: their bytes, without any framing.
    @ivar maxHeldBytes: the most that ever waited, bytes.
    @ivar throttled: how often the guest's port was paused because the limit was reached.
    """

    released: int = 0
    heldFrames: int = 0
    heldBytes: int = 0
    maxHeldBytes: int = 0
    throttled: int = 0


@implementer(IOutputGate)
class OutputGate:
    """
    The gate between the primary guest's NIC and the outside. It starts open (unprotected).

    Frames held with the gate shut belong to the current epoch until L{closeEpoch}; L{release} lets an epoch, and all
    before it, leave in order.
    """

    def __init__(
        self,
        deliver: Callable[[Sequence[bytes]], None],
        wantCheckpoint: Callable[[str], None],
        throttle: Callable[[bool], None],
        limits: GateLimits = GateLimits(),
    ) -> None:
        """
        @param deliver: takes the frames that leave.
        @param wantCheckpoint: asked with a reason when much is held.
        @param throttle: True: pause the guest's port; False: go on.
        """
        self._deliver = deliver
        self._wantCheckpoint = wantCheckpoint
        self._throttle = throttle
        self._limits = limits
        self._closed: deque[tuple[int, list[bytes], int]] = deque()
        self._current: list[bytes] = []
        self._currentBytes = 0
        self._epoch = 1
        self._asked = False
        self._throttling = False
        self.isOpen = True
        self.statistics = GateStatistics()

    def hold(self, frames: Sequence[bytes]) -> None:
        """Frames of the guest, in order: they leave at once when the gate is open, else wait."""
        if self.isOpen:
            self.statistics.released += len(frames)
            self._deliver(frames)
            return
        self._keep(frames)
        held = self.statistics.heldBytes
        if held > self._limits.highWater and not self._asked:
            self._asked = True
            self._wantCheckpoint(f"{held} bytes of output wait for a checkpoint")
        if held > self._limits.limit and not self._throttling:
            self._throttling = True
            self.statistics.throttled += 1
            self._throttle(True)

    def closeEpoch(self) -> int:
        """@return: the number of the epoch just closed; what it held waits for L{release} of that number."""
        epoch = self._epoch
        self._epoch += 1
        self._closed.append((epoch, *self._take()))
        self._asked = False
        return epoch

    def release(self, epoch: int) -> None:
        """Let epochs up to C{epoch} leave, in order. Epochs that have left already are no error."""
        while self._closed and self._closed[0][0] <= epoch:
            _, frames, size = self._closed.popleft()
            self._leave(frames, size)
        self._relax()

    def open(self) -> None:
        """Let everything leave, and everything that comes."""
        self.isOpen = True
        self.release(self._epoch)
        self._leave(*self._take())
        self._relax()

    def shut(self) -> None:
        """Frames wait from now on. Harmless when it is shut already."""
        self.isOpen = False

    def _keep(self, frames: Sequence[bytes]) -> None:
        """These wait in the current epoch."""
        size = sum(map(len, frames))
        self._current.extend(frames)
        self._currentBytes += size
        self._count(len(frames), size)

    def _take(self) -> tuple[list[bytes], int]:
        """@return: what waits in the current epoch, which is empty then, and its bytes."""
        taken = self._current, self._currentBytes
        self._current, self._currentBytes = [], 0
        return taken

    def _leave(self, frames: list[bytes], size: int) -> None:
        if frames:
            self._count(-len(frames), -size)
            self.statistics.released += len(frames)
            self._deliver(frames)

    def _count(self, frames: int, size: int) -> None:
        statistics = self.statistics
        statistics.heldFrames += frames
        statistics.heldBytes += size
        statistics.maxHeldBytes = max(statistics.maxHeldBytes, statistics.heldBytes)

    def _relax(self) -> None:
        if self._throttling and self.statistics.heldBytes <= self._limits.limit // 2:
            self._throttling = False
            self._throttle(False)
