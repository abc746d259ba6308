"""
No arbiter: the operator decides, or has decided beforehand.

C{hold} follows rule 5 of the design: silence alone promotes nobody. C{failover} is the operator's explicit word that
silence is enough; on both hosts at once it lets both go on when only the link is cut, and the log says so.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from colotx.interfaces import Grant, IWitness


@implementer(IWitness)
class PolicyWitness:
    """Grants what an operator forces, and with the policy C{failover} everything."""

    def __init__(self, onLostPeer: str) -> None:
        """@param onLostPeer: C{hold} or C{failover}."""
        self._onLostPeer = onLostPeer

    def acquire(self, vm: str, epoch: int, holder: str, forced: bool) -> Deferred[Grant | None]:
        """See L{IWitness.acquire}; answers at once."""
        if forced:
            return succeed(Grant(epoch, "operator, or proof that the other guest is dead"))
        if self._onLostPeer == "failover":
            return succeed(Grant(epoch, "on-lost-peer=failover"))
        return succeed(None)
