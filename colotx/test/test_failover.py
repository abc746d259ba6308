"""The failover state machine."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import FailoverError, StorageError
from colotx.failover import FailoverCause, FailoverService, FailoverState, FailoverStatus
from colotx.interfaces import ColoMode, Grant

S = FailoverStatus


class FakeRole:
    """Notes what it is told, with the state at that moment."""

    def __init__(self) -> None:
        self.mode = ColoMode.SECONDARY
        self.loading = False
        self.grant: Deferred[Grant | None] = Deferred()
        self.did: list[tuple[str, FailoverStatus]] = []
        self.service: FailoverService

    async def obtainGrant(self, cause: FailoverCause) -> Grant | None:
        self.did.append(("grant", self.service.state.status))
        return await self.grant

    async def shutTransport(self, cause: FailoverCause) -> None:
        self.did.append(("shut", self.service.state.status))

    async def goLive(self, grant: Grant) -> None:
        self.did.append((f"live in {grant.epoch}", self.service.state.status))


class StateTests(SynchronousTestCase):
    def test_compareAndSet(self) -> None:
        state = FailoverState()
        self.assertFalse(state.requested)
        self.assertFalse(state.compareAndSet(S.REQUIRE, S.ACTIVE))
        self.assertIs(state.status, S.NONE)
        self.assertTrue(state.compareAndSet(S.NONE, S.REQUIRE))
        self.assertTrue(state.requested)


class ServiceTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.role = FakeRole()
        self.exits: list[tuple[ColoMode, str]] = []
        self.service = FailoverService(self.role, lambda mode, reason: self.exits.append((mode, reason)))
        self.role.service = self.service

    def test_orderOfSteps(self) -> None:
        d = self.service.request(FailoverCause("test"))
        self.assertNoResult(d)
        self.role.grant.callback(Grant(7, "test"))
        self.successResultOf(d)
        self.assertEqual(self.role.did, [("grant", S.ACTIVE), ("shut", S.ACTIVE), ("live in 7", S.COMPLETED)])
        self.assertEqual(self.exits, [(ColoMode.SECONDARY, "request")])

    def test_secondRequestIsRefused(self) -> None:
        d = self.service.request(FailoverCause("one"))
        error = self.assertRaises(FailoverError, self.service.request, FailoverCause("two"))
        self.assertIn("already activated", str(error))
        self.role.grant.callback(Grant(2, "test"))
        self.successResultOf(d)
        self.assertRaises(FailoverError, self.service.request, FailoverCause("three"))

    def test_noMode(self) -> None:
        self.role.mode = ColoMode.NONE
        self.assertRaises(FailoverError, self.service.request, FailoverCause("test"))
        self.assertIs(self.service.state.status, S.NONE)

    def test_notGranted(self) -> None:
        d = self.service.request(FailoverCause("silence"))
        self.role.grant.callback(None)
        self.assertIn("silence", str(self.failureResultOf(d, FailoverError).value))
        self.assertIs(self.service.state.status, S.NONE)
        self.assertEqual(self.role.did, [("grant", S.ACTIVE)])
        self.assertEqual(self.exits, [])

    def test_grantCannotBeStored(self) -> None:
        d = self.service.request(FailoverCause("silence"))
        self.role.grant.errback(StorageError("disk full"))
        self.failureResultOf(d, StorageError)
        self.assertIs(self.service.state.status, S.NONE)

    def test_relaunch(self) -> None:
        """A checkpoint that is being loaded is finished first; then the same request is made again."""
        self.role.loading = True
        d = self.service.request(FailoverCause("test"))
        self.assertIs(self.service.state.status, S.RELAUNCH)
        self.assertEqual(self.role.did, [])
        self.role.loading = False
        self.role.grant.callback(Grant(2, "test"))
        self.assertTrue(self.service.loaded())
        self.successResultOf(d)
        self.assertIs(self.service.state.status, S.COMPLETED)
        self.assertEqual(self.exits, [(ColoMode.SECONDARY, "request")])

    def test_relaunchNotGranted(self) -> None:
        self.role.loading = True
        d = self.service.request(FailoverCause("test"))
        self.role.loading = False
        self.role.grant.callback(None)
        self.service.loaded()
        self.failureResultOf(d, FailoverError)
        self.assertIs(self.service.state.status, S.NONE)

    def test_loadedWithoutRequest(self) -> None:
        self.assertFalse(self.service.loaded())
        self.assertIs(self.service.state.status, S.NONE)
