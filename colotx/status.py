"""
Honest status: what protection the guest has now, since when, why, and what happens if the peer dies now.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from datetime import UTC, datetime

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger


class Protection(enum.Enum):
    """How protected the guest is."""

    PROTECTED = "protected"
    """The secondary holds a checkpoint; either host may die."""
    RESYNCING = "resyncing"
    """The guest runs and serves; its state is on its way to the secondary."""
    DEGRADED = "degraded"
    """Something is held back until somebody decides."""
    UNPROTECTED = "unprotected"
    """One host has the guest, or none."""


class StatusBoard:
    """
    The status now.

    @ivar protection: one word.
    @ivar why: one line.
    @ivar consequence: what happens if the peer dies now, one line.
    """

    log = Logger()

    def __init__(self, clock: IReactorTime, changed: Callable[[str, dict[str, object]], None]) -> None:
        """@param changed: called with an event name and its data when the status changes."""
        self._clock = clock
        self._changed = changed
        self.protection = Protection.UNPROTECTED
        self.why = "starting"
        self.consequence = "nothing is protected yet"
        self._mark()

    def set(self, protection: Protection, why: str, consequence: str) -> None:
        """Change it; the same again changes nothing, not even since when."""
        if (protection, why, consequence) == (self.protection, self.why, self.consequence):
            return
        if protection is not self.protection:
            self._mark()
        self.protection, self.why, self.consequence = protection, why, consequence
        self.log.info("status: {protection.value} ({why})", protection=protection, why=why)
        self._changed("COLOTX_STATUS_CHANGE", {"status": protection.value, "why": why})

    def describe(self) -> dict[str, object]:
        """For C{query-colotx-status}: C{seconds} is how long it has been so, C{since} the wall clock's ISO time."""
        return {
            "status": self.protection.value,
            "why": self.why,
            "if-peer-dies": self.consequence,
            "since": self._wall.isoformat(timespec="milliseconds"),
            "seconds": round(self._clock.seconds() - self._since, 3),
        }

    def _mark(self) -> None:
        self._since = self._clock.seconds()
        self._wall = datetime.fromtimestamp(time.time(), UTC)
