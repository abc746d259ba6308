"""No arbiter: who may go on by whose word."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from colotx.interfaces import Grant, IWitness
from colotx.witness.policy import PolicyWitness


class PolicyTests(SynchronousTestCase):
    def acquire(self, policy: str, forced: bool) -> Grant | None:
        return self.successResultOf(PolicyWitness(policy).acquire("vm", 5, "me", forced))

    def test_interface(self) -> None:
        verifyObject(IWitness, PolicyWitness("hold"))

    def test_silenceAlonePromotesNobody(self) -> None:
        self.assertIsNone(self.acquire("hold", False))

    def test_failoverIsTheOperatorsWordBeforehand(self) -> None:
        grant = self.acquire("failover", False)
        self.assertEqual(grant, Grant(5, "on-lost-peer=failover"))

    def test_forcedGoesWithEitherPolicy(self) -> None:
        for policy in ("hold", "failover"):
            grant = self.acquire(policy, True)
            assert grant is not None
            self.assertEqual(grant.epoch, 5)
            self.assertIn("operator", grant.source)
