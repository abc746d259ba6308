"""
The secondary's role. Every expectation is one of: exactly one guest speaks, or none does until somebody decides.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.internet.defer import fail as failed

from colotx.errors import ConfigError, FailoverError, GuestError, PeerError, PeerLost, StorageError
from colotx.failover import FailoverStatus
from colotx.interfaces import ColoMode, Grant, RunState
from colotx.role import RESYNC_GRACE
from colotx.state import PersistentState, StateStore
from colotx.test.rolekit import OPERATOR, RoleCase, Session


class JudgeTests(RoleCase):
    def setUp(self) -> None:
        super().setUp()
        self.b.store.save(PersistentState(3, "secondary", False))
        self.start()

    def test_primaryOfThisEpochOrLater(self) -> None:
        for epoch in (3, 9):
            self.assertIsNone(self.b.role.judge(self.a.hello(epoch=epoch)))

    def test_stalePrimary(self) -> None:
        """This host went on after it, one day: its guest is a ghost."""
        self.assertIn("stale epoch", self.b.role.judge(self.a.hello(epoch=2)))

    def test_twoSecondaries(self) -> None:
        self.assertIn("two secondaries", self.b.role.judge(self.a.hello(role="secondary", epoch=3)))

    def test_wrongKind(self) -> None:
        reason = self.b.role.judge(self.a.hello(secondary="active", epoch=3))
        self.assertEqual(reason, "the peer wants an active secondary, this one is passive")

    def test_laterEpochIsKept(self) -> None:
        self.a.store.save(PersistentState(7, "primary", False))
        self.connect()
        self.assertEqual(StateStore(self.b.store._directory).current, PersistentState(7, "secondary", True))


class HoldTests(RoleCase):
    """--on-lost-peer=hold."""

    def test_nothingRunsHere(self) -> None:
        self.start()
        self.assertIs(self.b.role.runState, RunState.SHUTDOWN)
        self.assertIn("no primary", self.b.why)

    def test_nothingIsHeldYet(self) -> None:
        self.start()
        self.failureResultOf(self.b.request(), FailoverError)
        self.assertSpeaks(self.a)

    def test_primaryDies(self) -> None:
        session = self.protect()
        session.right.lose(PeerLost("no heartbeat"))
        self.advance(RESYNC_GRACE * 2)
        self.assertFalse(self.b.speaks)
        self.assertIn("degraded: holding the last checkpoint", self.b.why)
        self.assertEqual(self.b.exits, [{"mode": "secondary", "reason": "error"}])
        self.assertEqual(self.b.store.current.epoch, 1)

    def test_thenTheOperator(self) -> None:
        self.protect().right.lose(PeerLost("no heartbeat"))
        self.successResultOf(self.b.request())
        self.assertTrue(self.b.speaks)
        self.assertEqual(self.b.store.current, PersistentState(2, "primary", False))
        self.assertIn("alone in epoch 2", self.b.why)
        self.assertEqual(self.b.exits[-1], {"mode": "secondary", "reason": "request"})

    def test_operatorWhileThePrimaryLives(self) -> None:
        """It falls silent, and stays so."""
        self.protect()
        self.assertSpeaks()
        self.a.say(b"never covered")
        self.successResultOf(self.b.request())
        self.advance(0.01)
        self.assertSpeaks(self.b)
        self.advance(RESYNC_GRACE * 2)
        self.assertSpeaks(self.b)
        self.assertEqual(self.a.heard, [])
        self.assertIn("goes on at the peer", self.a.why)

    def test_primaryThatComesBackIsRefused(self) -> None:
        self.protect().cut()
        self.successResultOf(self.b.request())
        self.assertIn("second primary", self.b.role.judge(self.a.hello()))
        self.assertSpeaks(self.b)

    def test_primarysDaemonWasRestarted(self) -> None:
        """Its guest died with it: what is held here is all there is, and must not make way for a fresh boot."""
        session = self.protect()
        self.assertIsNone(
            self.b.role.judge(self.a.hello(instance="another"))
        )  # the link refuses: it is occupied
        session.cut()
        self.advance(0.01)
        self.assertFalse(self.b.speaks)
        self.assertIn("goes on here", self.b.role.judge(self.a.hello(instance="another")))
        self.advance(0.01)
        self.assertTrue(self.b.speaks)
        self.assertEqual(self.b.store.current, PersistentState(2, "primary", False))

    def test_primaryThatWasAwayMayComeBack(self) -> None:
        """The same daemon, its guest alive and held: no failover, a new synchronisation."""
        self.protect().cut()
        self.assertIsNone(self.b.role.judge(self.a.hello()))
        self.advance(0.01)
        self.assertFalse(self.b.speaks)

    def test_primaryBeforeTheFirstCheckpoint(self) -> None:
        self.start()
        self.connect().cut()
        self.advance(RESYNC_GRACE * 2)
        self.assertSpeaks(self.a)
        self.assertIn("no checkpoint that could go on", self.b.why)


class FailoverPolicyTests(RoleCase):
    """--on-lost-peer=failover."""

    policy = "failover"

    def test_primaryDies(self) -> None:
        session = self.protect()
        self.a.say(b"never covered")
        session.right.lose(PeerLost("no heartbeat"))
        self.assertTrue(self.b.speaks)
        self.assertEqual(self.b.store.current.epoch, 2)
        self.assertEqual(self.a.heard, [])

    def test_primaryDiesAnywhereInACheckpoint(self) -> None:
        """After each piece of it."""
        for pieces in range(1, 8):
            with self.subTest(pieces):
                self.setUp()
                session = self.protect()
                self.a.role.trigger.notify("test")
                for _ in range(pieces):
                    self.clock.advance(0.0005)
                    if session.left.transport.sent:
                        session.right.colo.dataReceived(session.left.transport.sent.popleft())
                    if session.right.transport.sent:
                        session.left.colo.dataReceived(session.right.transport.sent.popleft())
                session.right.lose(PeerLost("no heartbeat"))
                self.advance(0.02)
                self.assertTrue(self.b.speaks)

    def test_epochThatCannotBeStored(self) -> None:
        session = self.protect()
        self.breakStore(self.b)
        session.right.lose(PeerLost("no heartbeat"))
        self.advance(RESYNC_GRACE * 2)
        self.assertFalse(self.b.speaks)
        self.assertIs(self.b.role.failover.state.status, FailoverStatus.NONE)
        self.failureResultOf(self.b.request(), StorageError)
        del self.b.store.save
        self.successResultOf(self.b.request())
        self.assertTrue(self.b.speaks)

    def test_epochIsStoredBeforeTheGuestRuns(self) -> None:
        session = self.protect()
        epochs: list[int] = []
        promote = self.b.role.standby.promote

        def noted():
            epochs.append(StateStore(self.b.store._directory).current.epoch)
            return promote()

        self.b.role.standby.promote = noted
        session.right.lose(PeerLost("no heartbeat"))
        self.assertEqual(epochs, [2])
        self.assertTrue(self.b.speaks)

    def test_grantComesLate(self) -> None:
        """A witness takes its time. No session can begin meanwhile, or the primary would speak again."""
        grant: Deferred[Grant | None] = Deferred()
        session = self.protect()
        self.b.around.witness.acquire = lambda *arguments: grant
        session.right.lose(PeerLost("no heartbeat"))
        self.assertIn("a failover is under way", self.b.role.judge(self.a.hello()))
        self.assertFalse(self.b.speaks)
        grant.callback(Grant(2, "witness"))
        self.assertTrue(self.b.speaks)

    def test_sessionThatWasAcceptedBeforeTheFailover(self) -> None:
        """Accepted, but not established yet, when the failover began."""
        grant: Deferred[Grant | None] = Deferred()
        session = self.protect()
        self.b.around.witness.acquire = lambda *arguments: grant
        session.right.lose(PeerLost("no heartbeat"))
        session.left.lose(PeerError("reset"))
        late = Session(self.clock, self.a, self.b)
        self.sessions.append(late)
        self.b.role.sessionEstablished(late.right)
        self.a.role.sessionEstablished(late.left)
        late.flush()
        self.assertSpeaks()
        grant.callback(Grant(2, "witness"))
        self.assertSpeaks(self.b)

    def test_supersededIsNotPromoted(self) -> None:
        """In a resynchronisation the primary speaks uncovered: the old checkpoint knows nothing of that."""
        session = self.protect()
        session.cut(PeerError("reset"))
        again = self.connect()
        self.a.say(b"uncovered")
        self.assertEqual(self.a.heard, [b"uncovered"])
        again.right.lose(PeerLost("no heartbeat"))
        self.advance(RESYNC_GRACE * 2)
        self.assertFalse(self.b.speaks)
        self.assertIn("older than what the primary said", self.b.why)

    def test_supersededByTheOperatorOnly(self) -> None:
        self.test_supersededIsNotPromoted()
        self.successResultOf(self.b.request(OPERATOR))
        self.assertTrue(self.b.speaks)

    def test_supersededAndTheGuestIsDead(self) -> None:
        session = self.protect()
        session.cut(PeerError("reset"))
        again = self.connect()
        again.right.receive({"type": "guest-lost", "reason": "crashed"})
        again.right.lose(PeerLost("closed"))
        self.assertFalse(self.b.speaks)

    def test_sessionThatCannotBeRemembered(self) -> None:
        """The primary speaks uncovered already; so the old checkpoint is void, whatever happens here."""
        session = self.protect()
        session.cut(PeerError("reset"))
        self.a.store.save(PersistentState(2, "primary", True))
        self.breakStore(self.b)
        self.assertRaises(StorageError, self.connect)
        self.advance(RESYNC_GRACE * 2)
        self.assertFalse(self.b.speaks)


class ResyncTests(RoleCase):
    policy = "failover"

    def fault(self) -> Session:
        """The primary asks for a new session."""
        session = self.protect()
        session.right.receive({"type": "resync", "reason": "a fault"})
        session.right.lose(PeerLost("the peer closed the session: a fault"))
        session.over = True
        return session

    def test_holdsForTheGrace(self) -> None:
        self.fault()
        self.advance(RESYNC_GRACE - 0.1)
        self.assertFalse(self.b.speaks)
        self.assertIn("the primary wants a new session", self.b.why)

    def test_thenThePeerCountsAsLost(self) -> None:
        self.fault()
        self.advance(RESYNC_GRACE + 0.1)
        self.assertTrue(self.b.speaks)

    def test_operatorDuringTheGrace(self) -> None:
        self.fault()
        self.successResultOf(self.b.request())
        self.assertTrue(self.b.speaks)
        self.advance(RESYNC_GRACE * 2)
        self.assertEqual(self.b.store.current.epoch, 2)

    def settling(self, session: Session) -> Deferred[None]:
        """The next checkpoint's load takes until this fires."""
        done: Deferred[None] = Deferred()
        settle = self.b.role.standby.settle
        self.b.role.standby.settle = lambda: done.addCallback(lambda _: settle())
        self.a.role.trigger.notify("test")
        self.advance(0.01)
        self.assertTrue(self.b.role.loading)
        return done

    def test_byeWhileLoading(self) -> None:
        """The good-bye of a primary that asked for a new session is no death."""
        session = self.protect()
        done = self.settling(session)
        session.right.receive({"type": "resync", "reason": "a fault"})
        session.right.lose(PeerLost("the peer closed the session: a fault"))
        session.over = True
        done.callback(None)
        self.advance(RESYNC_GRACE - 0.1)
        self.assertFalse(self.b.speaks)

    def test_dialedAgainIsNoDeath(self) -> None:
        """The primary noticed first that a session was broken: its new hello proves that it lives."""
        session = self.protect()
        session.right.lose(PeerError("the same instance dialed again"))
        self.assertFalse(self.b.speaks)
        session.cut()

    def test_newSessionWhileLoading(self) -> None:
        """The old protection ends late; it must not throw away what the new one staged."""
        session = self.protect()
        done = self.settling(session)
        session.cut(PeerError("the same instance dialed again"))
        del self.b.role.standby.settle
        self.connect()
        self.advance(0.02)
        self.assertEqual(self.b.role.standby.checkpoint, 2)
        done.callback(None)
        self.advance(0.5)
        self.assertIn("protected", self.b.why)
        self.assertIn("protected", self.a.why)

    def test_failoverWhileLoading(self) -> None:
        """The load is finished first: RELAUNCH."""
        session = self.protect()
        done = self.settling(session)
        going = self.b.request()
        self.assertIs(self.b.role.failover.state.status, FailoverStatus.RELAUNCH)
        self.assertNoResult(going)
        self.assertFalse(self.b.speaks)
        done.callback(None)
        self.successResultOf(going)
        self.advance(0.01)
        self.assertSpeaks(self.b)

    def test_faultOnThisSide(self) -> None:
        """No room for a checkpoint: the one before stays, the primary is asked for a new session."""
        session = self.protect()
        held = self.b.role.standby.checkpoint

        def full(raw, events):
            raise StorageError("no room")

        self.b.role.standby.stageLive = full
        self.a.role.trigger.notify("test")
        self.advance(0.01)
        self.assertIn("resync", session.right.said)
        self.assertEqual(self.b.role.standby.checkpoint, held)
        self.assertSpeaks()
        del self.b.role.standby.stageLive
        self.connect()
        self.advance(RESYNC_GRACE * 2)
        self.assertIn("protected", self.b.why)
        self.assertEqual(self.b.store.current.epoch, 1)

    def test_bugInAProtection(self) -> None:
        session = self.protect()
        self.b.role.standby.stageLive = lambda raw, events: 1 // 0
        self.a.role.trigger.notify("test")
        self.advance(0.01)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertIn("resync", session.right.said)
        self.assertSpeaks()
        del self.b.role.standby.stageLive
        self.connect()
        self.advance(RESYNC_GRACE * 2)
        self.assertIn("protected", self.b.why)

    def test_damagedAddresses(self) -> None:
        """Nothing a peer says gets out of here as anything but an error of that peer."""
        session = self.protect()
        session.right.receive({"type": "addresses", "sightings": 7})
        self.advance(0.01)
        self.assertIn("resync", session.right.said)
        self.assertSpeaks()


class PeerSaysTests(RoleCase):
    policy = "hold"

    def test_guestLost(self) -> None:
        """No silence, but word: with hold, too."""
        session = self.protect()
        self.a.role.guest.shutdown()
        session.right.receive({"type": "guest-lost", "reason": "crashed"})
        self.advance(0.01)
        self.assertSpeaks(self.b)

    def test_guestLostBeforeACheckpoint(self) -> None:
        self.start()
        session = self.connect()
        session.right.receive({"type": "guest-lost", "reason": "crashed"})
        session.cut()
        self.assertFalse(self.b.speaks)
        self.assertIs(self.b.role.mode, ColoMode.NONE)


class TakenOverTests(RoleCase):
    policy = "failover"

    def test_primaryGoesOnAlone(self) -> None:
        session = self.protect()
        session.right.receive({"type": "taken-over", "reason": "operator"})
        session.right.lose(PeerLost("closed"))
        self.advance(RESYNC_GRACE * 2)
        self.assertFalse(self.b.speaks)

    def test_aCheckpointOnItsWayChangesNothing(self) -> None:
        """It arrives on another connection, so it may arrive later."""
        session = self.protect()
        self.a.role.trigger.notify("test")
        self.clock.advance(0.001)
        session.right.colo.dataReceived(session.left.transport.take())  # REQUEST
        session.left.colo.dataReceived(session.right.transport.take())  # REPLY
        self.clock.advance(0.001)
        checkpoint = session.left.transport.take()
        self.assertGreater(len(checkpoint), 4096)
        session.right.receive({"type": "taken-over", "reason": "operator"})
        session.right.colo.dataReceived(checkpoint)
        session.right.lose(PeerLost("closed"))
        self.advance(RESYNC_GRACE * 2)
        self.assertFalse(self.b.speaks)
        self.assertIn("older than what the primary said", self.b.why)


class PromotionTests(RoleCase):
    """What can fail between the grant and the first word of the guest."""

    policy = "failover"

    def test_promotionFails(self) -> None:
        session = self.protect()
        promote = self.b.role.standby.promote
        self.b.role.standby.promote = lambda: failed(GuestError("no memory"))
        session.right.lose(PeerLost("no heartbeat"))
        self.assertFalse(self.b.speaks)
        self.b.role.standby.promote = promote
        self.successResultOf(self.b.request())
        self.assertTrue(self.b.speaks)
        self.assertEqual(self.b.store.current.epoch, 3)

    def test_outsideCannotBeOpened(self) -> None:
        session = self.protect()
        self.b.outside.open = lambda: failed(ConfigError("tap0 is in use"))
        session.right.lose(PeerLost("no heartbeat"))
        self.assertFalse(self.b.speaks)
        self.assertIn("degraded: the guest could not go on here: tap0 is in use", self.b.why)
        self.b.outside.open = lambda: succeed(None)
        self.successResultOf(self.b.request())
        self.assertTrue(self.b.speaks)

    def test_neighboursAreTold(self) -> None:
        session = self.protect()
        self.a.say(b"\xff" * 6 + b"\x52\x54\0\0\0\x01" + b"\x08\x06" + bytes(20))
        self.advance(0.01)
        told: list[bytes] = []
        self.b.outside.send = told.extend
        session.right.lose(PeerLost("no heartbeat"))
        self.advance(0.01)
        self.assertTrue(any(frame[6:12] == b"\x52\x54\0\0\0\x01" for frame in told))


class StopTests(RoleCase):
    policy = "failover"

    def test_thePrimaryRunsOnUngated(self) -> None:
        session = self.protect()
        self.a.say(b"held")
        self.successResultOf(ensureDeferred(self.b.role.stop()))
        self.assertEqual(session.right.said, ["standby-gone"])
        self.advance(0.01)
        self.assertSpeaks(self.a)
        self.assertEqual(self.a.heard, [b"held"])
        self.assertEqual(self.a.store.current.epoch, 1)
        self.advance(RESYNC_GRACE * 2)
        self.assertEqual(self.a.store.current.epoch, 1)

    def test_duringTheGrace(self) -> None:
        session = self.protect()
        session.right.lose(PeerError("the same instance dialed again"))
        self.successResultOf(ensureDeferred(self.b.role.stop()))
        self.advance(RESYNC_GRACE * 2)
        self.assertFalse(self.b.speaks)
