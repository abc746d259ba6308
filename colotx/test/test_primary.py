"""
The primary's role. Every expectation is one of: exactly one guest speaks, or none does until somebody decides.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.defer import fail as failed

from colotx.errors import FailoverError, GuestError, GuestTimeout, PeerError, PeerLost, StorageError
from colotx.failover import FailoverStatus
from colotx.interfaces import ColoMode, RunState
from colotx.primary import DEATH_KNELL
from colotx.role import RESYNC_GRACE
from colotx.state import PersistentState, StateStore
from colotx.test.rolekit import RoleCase, Session


class JudgeTests(RoleCase):
    def setUp(self) -> None:
        super().setUp()
        self.a.store.save(PersistentState(3, "primary", False))
        self.start()

    def test_secondaryOfThisEpochOrBefore(self) -> None:
        for epoch in (1, 3):
            self.assertIsNone(self.a.role.judge(self.b.hello(epoch=epoch)))

    def test_secondPrimary(self) -> None:
        self.assertIn("second primary", self.a.role.judge(self.b.hello(role="primary", epoch=3)))

    def test_peerOfALaterEpoch(self) -> None:
        """Somebody went on after us: our guest is a ghost."""
        self.assertIn("stale epoch", self.a.role.judge(self.b.hello(epoch=4)))

    def test_refusalIsSeenInTheStatus(self) -> None:
        self.a.role.refused("stale epoch")
        self.assertEqual(self.a.why, "unprotected: a session was refused: stale epoch")

    def test_strangerRefusedWhileProtected(self) -> None:
        """The refusal of somebody else does not change what protects us."""
        self.connect()
        self.advance(0.05)
        self.a.role.refused("a stranger")
        self.assertIn("protected: the secondary holds", self.a.why)


class StartTests(RoleCase):
    def test_firstStart(self) -> None:
        self.start()
        self.assertSpeaks(self.a)
        self.assertIn("no secondary", self.a.why)

    def test_guestDoesNotStart(self) -> None:
        self.a.role.guest.launch = lambda: failed(GuestError("no such machine"))
        self.failureResultOf(self.a.start(), GuestError)
        self.assertSpeaks()

    def coldStart(self) -> None:
        self.a.store.save(PersistentState(1, "primary", True))
        self.start()
        self.advance(1)
        self.assertIs(self.a.role.runState, RunState.PRELAUNCH)

    def test_coldStartLaunchesNothing(self) -> None:
        self.coldStart()
        self.assertSpeaks()
        self.assertIn("degraded: when this daemon stopped", self.a.why)

    def test_coldStartUntilASecondaryConnects(self) -> None:
        self.coldStart()
        self.connect()
        self.assertSpeaks(self.a)
        self.advance(0.05)
        self.assertIn("protected", self.a.why)

    def test_coldStartUntilTheOperatorSaysSo(self) -> None:
        self.coldStart()
        self.successResultOf(self.a.request())
        self.assertSpeaks(self.a)
        self.assertEqual(self.a.store.current, PersistentState(2, "primary", False))

    def test_coldStartAndThePeerRunsIt(self) -> None:
        """Refused by the other primary: still nothing runs here."""
        self.coldStart()
        self.a.role.refused("both daemons are primary")
        self.assertSpeaks()
        self.assertIn("nothing runs here", self.a.why)

    def test_formerSecondaryStartsAsPrimary(self) -> None:
        """It knows that the other host ran the guest last."""
        self.protect()
        self.assertTrue(StateStore(self.b.store._directory).current.protected)

    def slowLaunch(self) -> Deferred[None]:
        launched: Deferred[None] = Deferred()
        launch = self.a.role.guest.launch
        self.a.role.guest.launch = lambda: launched.addCallback(lambda _: launch())
        return launched

    def test_takenOverWhileLaunching(self) -> None:
        """The peer's operator was faster: our guest is up, and mute."""
        self.coldStart()
        launched = self.slowLaunch()
        session = self.connect()
        session.left.receive({"type": "taken-over", "reason": "operator"})
        session.cut()
        launched.callback(None)
        self.assertSpeaks()
        self.assertTrue(self.a.store.current.protected)

    def test_linkLostWhileLaunching(self) -> None:
        self.coldStart()
        launched = self.slowLaunch()
        self.connect().cut()
        launched.callback(None)
        self.advance(0.05)
        self.assertSpeaks(self.a)
        self.connect()
        self.advance(0.05)
        self.assertIn("protected", self.a.why)

    def test_launchFailsThenWorks(self) -> None:
        """For whatever reason it did not start: nothing is protected before it has."""
        self.coldStart()
        launch = self.a.role.guest.launch
        self.a.role.guest.launch = lambda: failed(GuestError("no memory"))
        self.connect()
        self.advance(DEATH_KNELL * 2)
        self.assertSpeaks()
        self.assertIn("no memory", self.a.why)
        self.failureResultOf(self.a.request(), GuestError)
        self.assertSpeaks()
        self.assertIs(self.a.role.failover.state.status, FailoverStatus.NONE)
        self.a.role.guest.launch = launch
        self.successResultOf(self.a.request())
        self.assertSpeaks(self.a)


class GateTests(RoleCase):
    def test_openWhileTheInitialStateIsOnItsWay(self) -> None:
        self.start()
        self.connect()
        self.assertIn("resyncing", self.a.why)
        self.assertSpeaks(self.a)

    def test_heldUntilCovered(self) -> None:
        """In order, exactly once, none before its checkpoint."""
        self.protect()
        for n in range(5):
            self.a.say(b"said %d" % n)
        self.assertEqual(self.a.heard, [])
        self.advance(0.2)
        self.assertEqual(self.a.heard, [b"said %d" % n for n in range(5)])

    def test_nothingLeavesUncoveredThroughAHold(self) -> None:
        session = self.protect()
        self.a.say(b"before")
        session.cut()
        self.a.say(b"after")
        self.advance(RESYNC_GRACE * 2)
        self.assertEqual(self.a.heard, [])
        self.assertIs(self.a.role.runState, RunState.RUNNING)
        self.successResultOf(self.a.request())
        self.assertEqual(self.a.heard, [b"before", b"after"])
        self.assertSpeaks(self.a)

    def test_exposureThatCannotBeStored(self) -> None:
        """The next start would not know that the peer can go on: so the peer never gets the last piece."""
        self.breakStore(self.a)
        self.start()
        self.connect()
        self.advance(0.05)
        self.assertEqual(self.b.role.standby.checkpoint, 0)
        self.assertIs(self.a.role.mode, ColoMode.NONE)
        self.assertSpeaks(self.a)
        self.assertIn("no space left", self.a.why)

    def test_addressesReachThePeer(self) -> None:
        self.protect()
        self.a.say(b"\xff" * 6 + b"\x52\x54\0\0\0\x01" + b"\x08\x06" + bytes(20))
        self.advance(0.01)
        self.assertEqual([seen.mac.hex() for seen in self.b.role.addresses.sightings][-1], "525400000001")


class HoldTests(RoleCase):
    """--on-lost-peer=hold."""

    def test_secondaryDies(self) -> None:
        self.protect().cut()
        self.assertSpeaks()
        self.assertIn("degraded: output is held", self.a.why)
        self.assertEqual(self.a.exits, [{"mode": "primary", "reason": "error"}])
        self.assertIs(self.a.role.mode, ColoMode.PRIMARY)

    def test_aSecondaryThatIsBackEndsTheHold(self) -> None:
        self.protect().cut()
        self.a.say(b"held")
        self.connect()
        self.assertEqual(self.a.heard, [b"held"])
        self.advance(0.05)
        self.assertIn("protected", self.a.why)
        self.assertEqual(self.a.store.current.epoch, 1)

    def test_operator(self) -> None:
        self.protect().cut()
        self.successResultOf(self.a.request())
        self.assertSpeaks(self.a)
        self.assertIn("unprotected: alone in epoch 2", self.a.why)
        self.assertEqual(self.a.exits[-1], {"mode": "primary", "reason": "request"})
        self.failureResultOf(self.a.request(), FailoverError)

    def test_operatorWhileTheSecondaryLives(self) -> None:
        """Told that it is over, it does not go on, now or later."""
        self.protect()
        self.successResultOf(self.a.request())
        self.advance(RESYNC_GRACE * 2)
        self.assertSpeaks(self.a)
        self.assertIn("older than what the primary said", self.b.why)

    def test_protectedAgainAfterAFailover(self) -> None:
        self.protect().cut()
        self.successResultOf(self.a.request())
        self.connect()
        self.advance(0.05)
        self.assertIn("protected", self.a.why)
        self.assertEqual(self.b.store.current.epoch, 2)
        self.assertSpeaks()
        self.advance(0.5)

    def test_epochIsStoredBeforeAnythingLeaves(self) -> None:
        self.protect().cut()
        self.a.say(b"held")
        epochs: list[int] = []
        send = self.a.outside.send
        self.a.role.gate._deliver = lambda frames: (
            epochs.append(StateStore(self.a.store._directory).current.epoch),
            send(frames),
        )
        self.successResultOf(self.a.request())
        self.assertEqual(epochs, [2])

    def test_epochThatCannotBeStored(self) -> None:
        self.protect().cut()
        self.breakStore(self.a)
        self.failureResultOf(self.a.request(), StorageError)
        self.assertSpeaks()
        self.assertEqual(self.a.store.current.epoch, 1)
        self.assertIs(self.a.role.failover.state.status, FailoverStatus.NONE)

    def test_nothingToFailOverFrom(self) -> None:
        self.start()
        self.failureResultOf(self.a.request(), FailoverError)
        self.assertSpeaks(self.a)


class FailoverPolicyTests(RoleCase):
    """--on-lost-peer=failover."""

    policy = "failover"

    def test_secondaryDies(self) -> None:
        session = self.protect()
        self.a.say(b"held")
        session.left.lose(PeerLost("no heartbeat"))
        self.assertEqual(self.a.heard, [b"held"])
        self.assertIn("alone in epoch 2 (on-lost-peer=failover)", self.a.why)
        self.assertTrue(self.a.speaks)

    def test_secondaryDiesWithinACheckpoint(self) -> None:
        session = self.protect()
        self.a.role.trigger.notify("test")
        self.clock.advance(0.001)
        session.left.lose(PeerLost("no heartbeat"))
        self.advance(0.01)
        self.assertTrue(self.a.speaks)

    def test_secondaryDiesDuringTheInitialTransfer(self) -> None:
        """It could not go on from anything: no epoch is spent."""
        self.start()
        self.connect().cut()
        self.advance(0.01)
        self.assertSpeaks(self.a)
        self.assertEqual(self.a.store.current.epoch, 1)
        self.assertIn("the secondary holds no checkpoint", self.a.why)

    def test_epochThatCannotBeStored(self) -> None:
        session = self.protect()
        self.breakStore(self.a)
        session.left.lose(PeerLost("no heartbeat"))
        self.advance(RESYNC_GRACE * 2)
        self.assertFalse(self.a.speaks)
        self.assertEqual(self.a.exits, [{"mode": "primary", "reason": "error"}])


class ResyncTests(RoleCase):
    """A fault that is no death."""

    policy = "failover"

    def fault(self, reason: str = "disk full") -> Session:
        """The secondary cannot go on with this session, and says so."""
        session = self.protect()
        session.right.send({"type": "resync", "reason": reason})
        session.right.close(reason)
        self.b.role._session = None  # its own part is test_secondary's
        session.flush()
        return session

    def test_heldForTheGrace(self) -> None:
        self.fault()
        self.a.say(b"held")
        self.advance(RESYNC_GRACE - 0.1)
        self.assertFalse(self.a.speaks)
        self.assertIn("the secondary wants a new session: disk full", self.a.why)

    def test_thenThePeerCountsAsLost(self) -> None:
        self.fault()
        self.advance(RESYNC_GRACE + 0.1)
        self.assertTrue(self.a.speaks)
        self.assertEqual(self.a.store.current.epoch, 2)

    def test_newSessionInTime(self) -> None:
        self.fault()
        self.advance(0.1)
        self.connect()
        self.advance(RESYNC_GRACE * 2)
        self.assertIn("protected", self.a.why)
        self.assertEqual(self.a.store.current.epoch, 1)

    def test_byeBeforeTheGuestIsOutOfColo(self) -> None:
        """A real guest takes a while to leave COLO mode; the peer's good-bye meanwhile is no death."""
        left: Deferred[None] = Deferred()
        endProtection = self.a.role.guest.endProtection
        self.a.role.guest.endProtection = lambda: left.addCallback(lambda _: endProtection())
        self.fault()
        left.callback(None)
        self.assertFalse(self.a.speaks)
        self.assertEqual(self.a.store.current.epoch, 1)
        self.advance(RESYNC_GRACE + 0.1)
        self.assertTrue(self.a.speaks)

    def test_newSessionBeforeTheGuestIsOutOfColo(self) -> None:
        """The old protection must not end the new one's."""
        left: Deferred[None] = Deferred()
        guest = self.a.role.guest
        endProtection = guest.endProtection
        session = self.protect()
        guest.endProtection = lambda: left.addCallback(lambda _: endProtection())
        session.cut(PeerError("the same instance dialed again"))
        guest.endProtection = endProtection
        self.connect()
        self.advance(0.05)
        self.assertEqual(self.b.role.standby.checkpoint, 1)
        self.assertFalse(self.a.speaks)
        left.callback(None)
        self.advance(0.5)
        self.assertIn("protected", self.a.why)
        self.assertGreater(self.b.role.standby.checkpoint, 3)

    def test_operatorDuringTheGrace(self) -> None:
        self.fault()
        self.successResultOf(self.a.request())
        self.assertTrue(self.a.speaks)
        self.advance(RESYNC_GRACE * 2)
        self.assertEqual(self.a.store.current.epoch, 2)

    def test_guestDiesDuringTheGrace(self) -> None:
        self.fault()
        self.a.role.guest.onLost(GuestError("crashed"))
        self.advance(RESYNC_GRACE * 2)
        self.assertFalse(self.a.role.gate.isOpen)

    def test_faultOnThisSide(self) -> None:
        """The guest does not stop in time: the peer is told, and stays a secondary."""
        session = self.protect()
        self.a.role.guest.stop = lambda: failed(GuestTimeout("it does not stop"))
        self.a.role.trigger.notify("test")
        self.advance(DEATH_KNELL * 2)
        self.assertEqual(session.left.said[-1], "resync")
        self.assertSpeaks()
        del self.a.role.guest.stop
        self.connect()
        self.advance(RESYNC_GRACE * 2)
        self.assertIn("protected", self.a.why)
        self.assertIn("protected", self.b.why)

    def test_bugInAProtection(self) -> None:
        """Even an error nobody thought of ends the session, not the service."""
        session = self.protect()
        self.a.role.guest.stop = lambda: failed(ZeroDivisionError("oops"))
        self.a.role.trigger.notify("test")
        self.advance(0.01)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(session.left.said[-1], "resync")
        self.assertIsNotNone(session.left.error)
        del self.a.role.guest.stop
        self.connect()
        self.advance(RESYNC_GRACE * 2)
        self.assertIn("protected", self.a.why)


class PeerSaysTests(RoleCase):
    policy = "failover"

    def test_standbyGone(self) -> None:
        """An orderly stop of the secondary: the guest speaks freely, now and at the next start."""
        session = self.protect()
        self.a.say(b"held")
        session.right.send({"type": "standby-gone", "reason": "stop"})
        session.right.close("stop")
        session.flush()
        self.assertEqual(self.a.heard, [b"held"])
        self.assertEqual(self.a.store.current, PersistentState(1, "primary", False))
        self.assertIn("unprotected", self.a.why)

    def takenOver(self) -> None:
        self.assertFalse(self.a.speaks)
        self.advance(RESYNC_GRACE * 2)
        self.assertFalse(self.a.speaks)
        self.assertTrue(self.a.store.current.protected)
        self.assertEqual(self.a.store.current.epoch, 1)
        self.assertIn("degraded: output is held", self.a.why)

    def test_takenOver(self) -> None:
        session = self.protect()
        session.left.receive({"type": "taken-over", "reason": "operator"})
        session.cut()
        self.takenOver()

    def test_takenOverDuringTheInitialTransfer(self) -> None:
        """From an old checkpoint, by an operator's word: this guest falls silent all the same."""
        self.start()
        session = self.connect()
        self.assertSpeaks(self.a)
        session.left.receive({"type": "taken-over", "reason": "operator"})
        session.cut()
        self.takenOver()

    def test_takenOverIsOverWhenItIsASecondaryAgain(self) -> None:
        session = self.protect()
        session.left.receive({"type": "taken-over", "reason": "operator"})
        session.cut(PeerError("the same instance dialed again"))
        self.connect()
        self.advance(RESYNC_GRACE * 2)
        self.assertIn("protected", self.a.why)

    def test_unknownMessage(self) -> None:
        session = self.protect()
        session.left.receive({"type": "from the future"})
        session.left.receive({})
        self.advance(0.2)
        self.assertIn("protected", self.a.why)


class GuestLostTests(RoleCase):
    def test_thePeerIsTold(self) -> None:
        session = self.protect()
        self.a.say(b"last words")
        self.a.role.guest.shutdown()
        self.a.role.guest.onLost(GuestError("crashed"))
        self.assertEqual(session.left.said[-1], "guest-lost")
        self.assertIn("the guest died: crashed", self.a.why)
        self.assertTrue(self.a.hungUp)
        self.advance(0.1)
        self.assertSpeaks(self.b)
        self.assertEqual(self.a.heard, [])

    def test_noBodyToTell(self) -> None:
        self.start()
        self.a.role.guest.shutdown()
        self.a.role.guest.onLost(GuestError("crashed"))
        self.assertSpeaks()
        self.failureResultOf(self.a.request(), FailoverError)
        self.a.role.refused("both daemons are primary")
        self.assertIn("the guest died", self.a.why)


class StopTests(RoleCase):
    def test_handsOver(self) -> None:
        """With hold, too: it is no silence, it is word that the guest is dead."""
        session = self.protect()
        self.a.say(b"held")
        stopped = ensureDeferred(self.a.role.stop())
        self.advance(0.1)
        self.successResultOf(stopped)
        self.assertIn("guest-lost", session.left.said)
        self.assertEqual(self.a.heard, [])
        self.assertSpeaks(self.b)
        self.assertEqual(self.b.store.current.epoch, 2)
        self.assertTrue(self.a.store.current.protected)
