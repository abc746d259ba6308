"""
When the next checkpoint is due: the timer x-checkpoint-delay and early requests, coalesced.

The rules are QEMU's (QEMU-FACTS, "Checkpoint triggers"): the timer runs from the last notification, a change of the
delay notifies at once, and whatever triggers before the pending notification is reset makes one checkpoint. Where
QEMU lets the period drift by the time its timer fires late, ours keeps to the grid, so that a delay of 50 ms means 20
checkpoints a second.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import deferLater

DEFAULT_DELAY = 20000
"""QEMU's default of x-checkpoint-delay, milliseconds."""


class CheckpointTrigger:
    """
    One pending notification, a timer that makes it, and at most one waiter for it.

    However many notifications come, the guest runs for C{floor} milliseconds between two checkpoints: a storm of
    differences must not keep it standing.

    @ivar floor: milliseconds, 0 or more.
    @ivar early: notifications that were not the timer's.
    @ivar deferred: checkpoints that had to wait for the floor.
    """

    def __init__(self, clock: IReactorTime, delay: int = DEFAULT_DELAY, floor: int = 0) -> None:
        """@param delay: x-checkpoint-delay, milliseconds, above 0."""
        self._clock = clock
        self._delay = delay
        self._timer: IDelayedCall | None = None
        self._due = 0.0
        self._pending: str | None = None
        self._waiter: Deferred[None] | None = None
        self._resumed = 0.0
        self.floor = floor
        self.early = 0
        self.deferred = 0

    @property
    def delay(self) -> int:
        """x-checkpoint-delay, milliseconds."""
        return self._delay

    @delay.setter
    def delay(self, milliseconds: int) -> None:
        self._delay = milliseconds
        if self._timer is not None:
            self.notify("x-checkpoint-delay was set")

    def arm(self) -> None:
        """Start the timer: the first notification comes after one delay."""
        self._arm(self._clock.seconds())

    def disarm(self) -> None:
        """Stop the timer and forget what is pending."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pending = None

    def notify(self, reason: str) -> None:
        """Ask for a checkpoint now. While one is pending this changes nothing."""
        self.early += 1
        self._notify(reason)
        if self._timer is not None:
            self._arm(self._clock.seconds())

    def reset(self) -> None:
        """What was asked for up to now is covered by the checkpoint being taken."""
        self._pending = None

    async def wait(self) -> str:
        """Wait until a checkpoint is due. @return: the reason."""
        while self._pending is None:
            self._waiter = Deferred()
            try:
                await self._waiter
            finally:
                self._waiter = None
        rest = self._resumed + self.floor / 1000 - self._clock.seconds()
        if rest > 0:
            self.deferred += 1
            reason = self._pending
            await deferLater(self._clock, rest)
            return reason
        return self._pending

    def resumed(self) -> None:
        """The guest runs again after a checkpoint."""
        self._resumed = self._clock.seconds()

    def _notify(self, reason: str) -> None:
        if self._pending is None:
            self._pending = reason
            if self._waiter is not None:
                self._waiter.callback(None)

    def _arm(self, start: float) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        now = self._clock.seconds()
        period = self._delay / 1000
        self._due = start + period if start + period > now else now + period
        self._timer = self._clock.callLater(self._due - now, self._expired)

    def _expired(self) -> None:
        self._arm(self._due)
        self._notify("timer")
