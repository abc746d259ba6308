"""Disk replication for guests without replicated disks."""

from __future__ import annotations

from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from colotx.interfaces import ColoMode, IReplication


@implementer(IReplication)
class NoReplication:
    """The guest has no disk that must follow: every step is done at once."""

    def startAll(self, mode: ColoMode) -> Deferred[None]:
        """Nothing to start."""
        return succeed(None)

    def doCheckpointAll(self) -> Deferred[None]:
        """Nothing to rotate."""
        return succeed(None)

    def stopAll(self, failover: bool) -> Deferred[None]:
        """Nothing to stop."""
        return succeed(None)

    def getErrorAll(self) -> None:
        """Nothing can be broken."""
