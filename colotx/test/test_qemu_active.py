"""Tests of L{colotx.guests.qemu_active} and its parts, with fake QEMUs."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from colotx.errors import FailoverError, GuestError, GuestLost, GuestTimeout, UnexpectedMessage
from colotx.guests.qemu import ActiveQemuSecondary, QemuGuestFactory, QemuPrimaryGuest, QemuSettings
from colotx.interfaces import IActiveSecondary, IFramePort, IPrimaryGuest, RunState
from colotx.test.fakeqemu import FakeQemu, FakeReactor, blob

SOURCE = FakeQemu(FakeReactor(), None, [], None)
"""Makes the bytes a primary's QEMU would send."""
INITIAL = SOURCE.initial()
LIVE = SOURCE.live()
FRAME = b"\xff" * 60


class ActiveCase(SynchronousTestCase):
    """A secondary on a host of fake QEMUs."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.lost: list[GuestError] = []
        # "true" is there on every machine; nothing is started.
        self.settings = QemuSettings(
            ["-m", "1G"],
            os.path.relpath(self.mktemp()),
            binary="true",
            environment={"LD_PRELOAD": "x.so"},
            startTimeout=30,
            stopTimeout=10,
        )
        self.secondary = QemuGuestFactory(self.reactor, self.settings).createStandby("active")
        assert isinstance(self.secondary, ActiveQemuSecondary)
        self.secondary.onLost = self.lost.append

    @property
    def qemu(self) -> FakeQemu:
        """The last QEMU started."""
        return self.reactor.qemus[-1]

    def done(self, waiting: Any, seconds: float = 0.0) -> Any:
        """The result of something, after C{seconds}."""
        waiting = ensureDeferred(waiting)
        self.reactor.settle(seconds)
        return self.successResultOf(waiting)

    def failed(self, waiting: Any, kind: type[Exception], seconds: float = 0.0) -> Exception:
        """The error of something, after C{seconds}."""
        waiting = ensureDeferred(waiting)
        self.reactor.settle(seconds)
        return self.failureResultOf(waiting, kind).value

    def synchronised(self) -> ActiveQemuSecondary:
        """A secondary whose guest runs."""
        half = len(INITIAL) // 2
        for piece in (INITIAL[:half], INITIAL[half:]):
            self.done(self.secondary.stageInitial(piece, []))
        self.secondary.describe("pc", b"")
        self.done(self.secondary.commit(blob(0)))
        self.done(self.secondary.settle())
        return self.secondary

    def stopped(self) -> ActiveQemuSecondary:
        """A secondary whose guest stands still for a checkpoint."""
        secondary = self.synchronised()
        self.done(secondary.prepare())
        return secondary

    def staged(self) -> ActiveQemuSecondary:
        """A secondary that has the RAM of a checkpoint."""
        secondary = self.stopped()
        self.done(secondary.stageLive(LIVE, []))
        return secondary

    def promoted(self, seconds: float = 0.0) -> QemuPrimaryGuest:
        """The guest made of it, which runs."""
        guest = self.done(self.secondary.promote(), seconds)
        guest.onLost = self.lost.append
        self.assertIs(guest.runState, RunState.INMIGRATE)
        self.done(guest.launch())
        self.assertIs(guest.runState, RunState.RUNNING)
        self.assertEqual(self.qemu.status, "running")
        return guest


class ExchangeTests(ActiveCase):
    """The exchange, when QEMU behaves."""

    def test_interfaces(self):
        """The interfaces are kept."""
        verifyObject(IActiveSecondary, self.secondary)
        verifyObject(IFramePort, self.secondary.port)
        self.synchronised()
        verifyObject(IFramePort, self.secondary._nic)
        verifyObject(IPrimaryGuest, self.promoted())

    def test_started(self):
        """QEMU is started by the first byte, with COLO and nothing that cannot be with it; then its guest runs."""
        self.assertEqual(self.reactor.qemus, [])
        self.assertFalse(self.secondary.promotable)
        self.synchronised()
        self.assertEqual(self.qemu.command[-2:], ["-incoming", "defer"])
        self.assertEqual(self.qemu.environment["LD_PRELOAD"], "x.so")
        self.assertTrue(self.qemu.capabilities["x-colo"])
        self.assertFalse(self.qemu.capabilities["multifd"])
        self.assertEqual(bytes(self.qemu.incoming), INITIAL)
        self.assertEqual(self.qemu.status, "running")
        self.assertTrue(self.secondary.promotable)
        self.assertEqual(self.secondary.checkpoint, 1)

    def test_checkpoints(self):
        """Checkpoint after checkpoint: stopped, RAM as it came, the device state, and on it goes."""
        secondary = self.synchronised()
        for number in range(1, 4):
            self.done(secondary.prepare())
            self.assertEqual(self.qemu.status, "colo")
            for piece in (LIVE[:10], LIVE[10:]):
                self.done(secondary.stageLive(piece, []))
            self.done(secondary.commit(blob(number)))
            self.done(secondary.settle())
            self.assertEqual(self.qemu.status, "running")
            self.assertEqual(self.qemu.loads[-1], blob(number))
            self.assertEqual(secondary.checkpoint, number + 1)
        self.assertEqual(len(self.qemu.loads), 3)

    def test_frames(self):
        """The guest's frames come out, frames for it reach it; before there is one they are dropped."""
        came: list[bytes] = []
        port = self.secondary.port
        port.receiver = came.extend
        port.send([FRAME])
        port.drain()
        port.pause()
        port.resume()
        self.assertFalse(port.congested)
        self.done(port.open())
        self.synchronised()
        nic = self.secondary._current.port
        nic.receiver([FRAME])
        self.assertEqual(came, [FRAME])
        sent: list[Any] = []
        nic.send = sent.extend
        port.send([FRAME])
        self.assertEqual(sent, [FRAME])

    def test_translation(self):
        """What was learned of connections is forgotten at each load, before the guest runs from it."""
        resets: list[str] = []
        self.secondary.port.checkpointLoaded = lambda: resets.append(self.qemu.status)
        self.staged()
        self.assertEqual(len(resets), 1)
        self.done(self.secondary.commit(blob(1)))
        self.assertEqual(resets[1:], ["colo"])

    def test_outOfOrder(self):
        """What cannot come is refused."""
        for early in (self.secondary.prepare, self.secondary.settle):
            self.assertRaises(UnexpectedMessage, early)
        self.failed(self.secondary.stageLive(LIVE, []), UnexpectedMessage)
        self.failed(self.secondary.commit(blob(0)), UnexpectedMessage)
        self.synchronised()
        self.failed(self.secondary.commit(blob(1)), GuestError)
        self.failed(self.secondary.stageLive(LIVE, []), GuestError)


class PromotionTests(ActiveCase):
    """Going on, wherever the exchange is."""

    def test_nothing(self):
        """Before the first checkpoint there is nothing, also when much of it arrived."""
        self.failed(self.secondary.promote(), FailoverError)
        self.done(self.secondary.stageInitial(INITIAL[:50], []))
        self.failed(self.secondary.promote(), FailoverError)
        self.secondary.abandon()
        self.reactor.settle()
        self.assertFalse(self.qemu.alive)

    def test_running(self):
        """Between two checkpoints the guest never stands still."""
        self.synchronised()
        guest = self.promoted()
        self.assertEqual(self.qemu.named("x-colo-lost-heartbeat"), [])
        self.assertIs(guest.port, self.secondary.port)
        self.assertFalse(self.secondary.promotable)
        self.failed(self.secondary.promote(), FailoverError)

    def test_cut(self):
        """A checkpoint that was not whole does not matter."""
        for steps in range(3):
            self.setUp()
            self.stopped()
            if steps > 0:
                self.done(self.secondary.stageLive(LIVE[: len(LIVE) // 2], []))
            if steps > 1:
                self.done(self.secondary.stageLive(LIVE[len(LIVE) // 2 :], []))
            self.secondary.abandon()
            self.secondary.abandon()
            self.assertTrue(self.secondary.promotable)
            self.promoted()
            self.assertEqual(self.qemu.loads, [])

    def test_aware(self):
        """What QEMU was told before the cut could stop the guest yet: it goes on only after that."""
        self.synchronised()
        self.qemu.silent.add("reply")
        waiting = self.secondary.prepare()
        promoting = self.secondary.promote()
        self.failureResultOf(waiting, GuestError)
        self.assertNoResult(promoting)
        self.assertEqual(self.qemu.named("cont"), [])
        self.reactor.settle()
        self.done(self.successResultOf(promoting).launch())
        self.assertEqual(self.qemu.status, "running")

    def test_unaware(self):
        """A QEMU that does not say that it noticed is not waited for for ever."""
        self.stopped()
        self.qemu.event = lambda name, **data: None  # type: ignore[method-assign]
        promoting = self.secondary.promote()
        self.reactor.settle(9)
        self.assertNoResult(promoting)
        self.done(promoting, 1.5)

    def test_loading(self):
        """A load under way is finished first, whether or not it was settled, and is what the guest goes on from."""
        for settled in (False, True):
            self.setUp()
            secondary = self.staged()
            self.qemu.silent.add("loaded")
            self.done(secondary.commit(blob(1)))
            settling = secondary.settle() if settled else None
            secondary.abandon()
            self.assertTrue(secondary.promotable)
            promoting = secondary.promote()
            self.reactor.settle(1)
            self.assertNoResult(promoting)
            self.qemu.run()
            self.qemu.tell(b"\0\0\0\6")
            self.reactor.settle()
            if settling is not None:
                self.successResultOf(settling)
            self.done(self.successResultOf(promoting).launch())

    def test_committing(self):
        """A promotion between the last byte and RECEIVED waits, too."""
        secondary = self.staged()
        self.qemu.silent |= {"received", "loaded"}
        committing = secondary.commit(blob(1))
        promoting = secondary.promote()
        self.reactor.settle(1)
        self.assertNoResult(committing)
        self.assertNoResult(promoting)
        self.qemu.run()
        self.qemu.tell(b"\0\0\0\5\0\0\0\6")
        self.reactor.settle()
        self.successResultOf(committing)
        self.successResultOf(promoting)

    def test_protectedAgain(self):
        """The promoted guest leaves COLO when it is protected, and is a primary like any other."""

        class Sink:
            async def write(self, data: bytes | memoryview) -> None:
                pass

        self.synchronised()
        guest = self.promoted()
        for _ in range(2):
            self.done(guest.transferInitial(Sink()))
            self.done(guest.start())
            self.assertEqual(self.qemu.status, "running")
            self.done(guest.stop())
            self.done(guest.transferLive(Sink()))
            self.done(guest.saveDeviceState())
            self.done(guest.start())
            ending = guest.endProtection()
            self.done(ending, 0.5)
        names = [name for name, _ in self.qemu.commands]
        self.assertLess(names.index("x-colo-lost-heartbeat"), names.index("migrate"))
        self.done(guest.shutdown())
        self.assertFalse(self.qemu.alive)
        self.assertEqual(self.lost, [])

    def test_diesAfterwards(self):
        """The promoted guest's death is its own, before it was launched and after."""
        self.synchronised()
        secondaryLost: list[GuestError] = []
        self.secondary.onLost = secondaryLost.append
        self.promoted()
        self.qemu.die("the end")
        self.reactor.settle()
        self.assertEqual((len(self.lost), secondaryLost), (1, []))
        self.setUp()
        self.synchronised()
        guest = self.done(self.secondary.promote())
        self.qemu.die("the end")
        self.failed(guest.launch(), GuestLost)
        self.assertEqual(self.lost, [])

    def test_closedMeanwhile(self):
        """A secondary that is closed while it is promoted gives nothing away."""
        secondary = self.staged()
        self.qemu.silent.add("loaded")
        self.done(secondary.commit(blob(1)))
        promoting = secondary.promote()
        self.reactor.settle()
        closing = secondary.close()
        self.reactor.settle(5)
        self.failureResultOf(promoting, FailoverError)
        self.successResultOf(closing)
        self.assertFalse(self.qemu.alive)


class FaultTests(ActiveCase):
    """A QEMU with bad manners."""

    def test_failedLoad(self):
        """A guest whose load failed never goes on, and the reason is told."""
        secondary = self.staged()
        self.qemu.failingRestore = "load device state failed"
        outcome: list[Any] = []
        secondary.commit(blob(1)).addCallback(lambda _: secondary.settle()).addBoth(outcome.append)
        self.reactor.settle()
        self.assertIsInstance(outcome[0].value, GuestError)
        self.assertFalse(secondary.promotable)
        error = self.failed(secondary.promote(), FailoverError)
        self.assertIn("last load failed", str(error))
        self.assertIn("load device state failed", str(error))
        self.assertEqual(self.qemu.named("cont"), [])
        self.assertEqual(self.lost, [])

    def test_neverLoaded(self):
        """Neither does one that nothing is heard of."""
        for silent in ("received", "loaded"):
            self.setUp()
            secondary = self.staged()
            self.qemu.silent |= {silent, "loaded"}
            outcome: list[Any] = []
            loading = secondary.commit(blob(1))
            loading.addCallback(lambda _: self.secondary.settle()).addBoth(outcome.append)
            self.reactor.settle(29)
            self.assertEqual(outcome, [])
            self.reactor.settle(1.5)
            self.assertIsInstance(outcome[0].value, GuestTimeout)
            self.assertFalse(secondary.promotable)
            self.failed(secondary.promote(), FailoverError)

    def test_neverStops(self):
        """One that does not stop in time fails the checkpoint, and can still go on."""
        secondary = self.synchronised()
        self.qemu.silent.add("reply")
        waiting = secondary.prepare()
        self.reactor.settle(9)
        self.assertNoResult(waiting)
        self.failed(waiting, GuestTimeout, 1.5)
        secondary.abandon()
        self.promoted()

    def test_neverReady(self):
        """An initial state that is not loaded in time is none."""
        self.reactor.prepare = lambda qemu: qemu.silent.add("ready")
        self.done(self.secondary.stageInitial(INITIAL, []))
        committing = self.secondary.commit(blob(0))
        self.reactor.settle(29)
        self.assertNoResult(committing)
        self.failed(committing, GuestTimeout, 1.5)
        self.assertFalse(self.secondary.promotable)
        self.failed(self.secondary.promote(), FailoverError)

    def test_diesStandingBy(self):
        """Its death is told once, and what waits for it fails; so does the promotion."""
        secondary = self.synchronised()
        self.qemu.die("segmentation fault")
        self.reactor.settle()
        (error,) = self.lost
        self.assertIn("segmentation fault", str(error))
        self.assertFalse(secondary.promotable)
        self.failed(secondary.prepare(), GuestLost)
        self.assertIn("segmentation fault", str(self.failed(secondary.promote(), FailoverError)))
        secondary.abandon()
        self.done(secondary.close())
        self.assertEqual(len(self.lost), 1)

    def test_diesAnywhere(self):
        """The same within a checkpoint."""
        for step in ("prepare", "stageLive", "commit"):
            self.setUp()
            secondary = self.staged() if step == "commit" else self.synchronised()
            self.qemu.silent |= {"reply", "received", "loaded"}
            if step == "stageLive":
                self.qemu.silent.discard("reply")
                self.done(secondary.prepare())
                self.qemu.die()
                self.failed(secondary.stageLive(LIVE, []), GuestLost)
            else:
                waiting = secondary.prepare() if step == "prepare" else secondary.commit(blob(1))
                self.reactor.settle()
                self.qemu.die()
                self.failed(waiting, GuestLost)
            self.assertEqual(len(self.lost), 1)
            self.failed(secondary.promote(), FailoverError)

    def test_shutsDown(self):
        """A guest that shuts itself down is lost, too."""
        self.synchronised()
        self.qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        self.reactor.settle()
        self.assertIn("guest-shutdown", str(self.lost[0]))
        self.failed(self.secondary.promote(), FailoverError)

    def test_doesNotStart(self):
        """A QEMU that does not start fails the transfer with its own words, and is no loss."""
        self.reactor.prepare = lambda qemu: setattr(qemu, "failing", "-foo: invalid option")
        error = self.failed(self.secondary.stageInitial(INITIAL, []), GuestLost)
        self.assertIn("invalid option", str(error))
        self.secondary.abandon()
        self.assertEqual(self.lost, [])
        self.reactor.prepare = lambda qemu: None
        self.synchronised()

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(["reply", "received", "loaded"]), st.binary(min_size=1, max_size=20))
    def test_garbage(self, instead, garbage):
        """
        Whatever QEMU says instead of its part: the wait ends, and the guest is promoted only if it was not loading or
        said that it had loaded.
        """
        self.setUp()
        secondary = self.staged() if instead != "reply" else self.synchronised()
        self.qemu.silent |= {instead, "loaded"}
        waiting: Deferred[Any] = secondary.prepare() if instead == "reply" else secondary.commit(blob(1))
        waiting.addCallback(lambda _: secondary.settle() if instead != "reply" else None)
        self.reactor.settle()
        self.qemu.tell(garbage)
        self.reactor.settle(62)
        outcome: list[Any] = []
        waiting.addBoth(outcome.append)
        self.assertEqual(len(outcome), 1)
        promoting = secondary.promote()
        self.reactor.settle(11)
        if instead == "reply" or outcome[0] is None:
            self.successResultOf(promoting)
        else:
            self.failureResultOf(promoting, FailoverError)


class SynchronisedAnewTests(ActiveCase):
    """A new initial transfer after an earlier life."""

    def test_replaced(self):
        """The new QEMU counts from its first commit on; then the old one is ended. The port stays the same."""
        secondary = self.synchronised()
        port, first = secondary.port, self.qemu
        came: list[bytes] = []
        port.receiver = came.extend
        secondary.abandon()
        self.done(secondary.stageInitial(INITIAL, []))
        self.assertEqual(len(self.reactor.qemus), 2)
        self.assertTrue(first.alive)
        self.done(secondary.commit(blob(0)))
        self.reactor.settle(1)
        self.assertFalse(first.alive)
        self.assertIs(secondary.port, port)
        secondary._current.port.receiver([FRAME])
        self.assertEqual(came, [FRAME])
        self.assertEqual(self.lost, [])
        self.done(secondary.settle())
        self.done(secondary.prepare())
        self.assertEqual(self.qemu.status, "colo")
        self.assertEqual(len(os.listdir(self.settings.runtimeDirectory)), 1)

    def test_oldOneGoesOn(self):
        """Until then the old one is what goes on, and the new one is ended."""
        self.synchronised()
        first = self.qemu
        self.secondary.abandon()
        self.done(self.secondary.stageInitial(INITIAL[:-1], []))
        second = self.qemu
        self.assertTrue(self.secondary.promotable)
        guest = self.done(self.secondary.promote())
        self.done(guest.launch())
        self.reactor.settle(1)
        self.assertEqual((first.alive, second.alive, first.status), (True, False, "running"))

    def test_newOneDies(self):
        """A new one that dies fails its transfer only."""
        self.synchronised()
        self.secondary.abandon()
        self.done(self.secondary.stageInitial(INITIAL[:-1], []))
        self.qemu.die()
        self.failed(self.secondary.stageInitial(INITIAL[-1:], []), GuestLost)
        self.assertEqual(self.lost, [])
        self.secondary.abandon()
        self.assertTrue(self.secondary.promotable)

    def test_closed(self):
        """Everything ends with it, and nothing is taken any more."""
        self.synchronised()
        self.secondary.abandon()
        self.done(self.secondary.stageInitial(INITIAL[:-1], []))
        self.done(self.secondary.close(), 1)
        self.assertEqual([qemu.alive for qemu in self.reactor.qemus], [False, False])
        self.assertEqual(os.listdir(self.settings.runtimeDirectory), [])
        self.assertEqual(self.lost, [])
        self.failed(self.secondary.stageInitial(INITIAL, []), FailoverError)
        self.failed(self.secondary.promote(), FailoverError)
        self.assertFalse(self.secondary.promotable)
