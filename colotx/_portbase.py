"""
What every frame port has: somebody to give frames to, limits and counters.

This module does not know where frames come from.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.logger import Logger

from colotx.errors import ColoError

log = Logger()

MAX_FRAME = 65536 + 14
"""Bytes: the largest frame taken. QEMU's own limit is a little above."""

HIGH_WATER = 1 << 20
"""Bytes waiting to be sent from which on a port says C{congested}."""

QUEUE_LIMIT = 16 << 20
"""Bytes waiting to be sent from which on frames are refused (and counted)."""

Receiver = Callable[[list[bytes]], object]


class BasePort:
    """What every port has: somebody to give frames to, and counters."""

    receiver: Receiver | None = None
    onLost: Callable[[ColoError], object] | None = None
    dropped = 0

    def _deliver(self, frames: list[bytes]) -> None:
        if not frames:
            return
        if self.receiver is None:
            self._drop(len(frames), "nobody receives")
        else:
            self.receiver(frames)

    def _drop(self, count: int, why: str) -> None:
        # The first one is worth a line in the log, a flood of them is what the counter is for.
        if not self.dropped:
            log.warn("{port}: dropping frames: {why}", port=self, why=why)
        self.dropped += count

    def _fail(self, error: ColoError) -> None:
        log.error("{port}: {error}", port=self, error=error)
        onLost, self.onLost = self.onLost, None
        if onLost is not None:
            onLost(error)
