"""Tests of L{colotx.guests.passive}: the committed checkpoint survives everything but C{close}."""

from __future__ import annotations

import os

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyClass, verifyObject

from colotx import _ramstage
from colotx.errors import ConfigError, FailoverError, StorageError, StreamError, UnexpectedMessage
from colotx.guests.passive import PassiveSecondary
from colotx.interfaces import CheckpointImage, ISecondaryGuest
from colotx.ramcache import CacheLimits, RamCache
from colotx.test.test_ramcache import BLOCKS, RAM, Model, pages, zeros
from colotx.vmstate import PAGE_SIZE, Blocks, RamBlock, RamEvent, Xbzrle

BATCH = 4


class Guest:
    """What C{restore} makes here: it keeps the image."""

    def __init__(self, image: CheckpointImage) -> None:
        self.machine = image.machine
        self.configuration = image.configuration
        self.deviceState = image.deviceState
        assert isinstance(image.ram, RamCache)
        self.ram = image.ram


class Turns(Clock):
    """A clock that counts turns of the reactor: what is to be called at once is called in the next one."""

    def callLater(self, delay, callable, *args, **kw):
        return super().callLater(max(delay, 1), callable, *args, **kw)


class PassiveCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.patch(_ramstage, "BATCH", BATCH)
        self.patch(_ramstage, "BATCH_BYTES", BATCH * PAGE_SIZE)
        self.clock = Turns()
        self.caches: list[RamCache] = []
        self.guests: list[Guest] = []
        self.secondary = PassiveSecondary(self.clock, self.newCache, self.restore)
        self.addCleanup(self.closeAll)

    def newCache(self) -> RamCache:
        self.caches.append(RamCache(CacheLimits(spillDirectory=os.getcwd())))
        return self.caches[-1]

    def restore(self, image: CheckpointImage) -> Guest:
        self.guests.append(Guest(image))
        return self.guests[-1]

    def closeAll(self) -> None:
        for cache in self.caches:
            cache.close()

    def initial(self, machine: str = "pc-1") -> Model:
        """A whole initial stream, committed and settled."""
        model = Model()
        events: list[RamEvent] = [Blocks(BLOCKS), pages(range(30))]
        self.secondary.stageInitial(b"", events)
        model.apply(events)
        self.secondary.describe(machine, machine.encode())
        self.successResultOf(self.secondary.commit(machine.encode() + b" state"))
        self.successResultOf(self.secondary.settle())
        return model

    def checkpoint(self, model: Model, pageCount: int, deviceState: bytes = b"next") -> None:
        """A whole checkpoint, committed, not settled."""
        self.successResultOf(self.secondary.prepare())
        events: list[RamEvent] = [pages(range(pageCount)), zeros([35])]
        self.secondary.stageLive(b"", events)
        model.apply(events)
        self.successResultOf(self.secondary.commit(deviceState))

    def assertPromoted(self, promoted: Deferred[object], model: Model, deviceState: bytes) -> None:
        guest = self.successResultOf(promoted)
        assert isinstance(guest, Guest)
        self.assertEqual(guest.deviceState, deviceState)
        for name, ram in model.ram.items():
            self.assertEqual(bytes(guest.ram.image(name)), bytes(ram))

    def spin(self, turns: int = 1) -> None:
        """So many turns of the reactor."""
        self.clock.pump([1] * turns)


class ProtectionTests(PassiveCase):
    """Staging, committing, settling."""

    def test_interface(self) -> None:
        """It is a secondary guest, of the passive kind."""
        verifyClass(ISecondaryGuest, PassiveSecondary)
        verifyObject(ISecondaryGuest, self.secondary)
        self.assertEqual((self.secondary.kind, self.secondary.checkpoint), ("passive", 0))

    def test_counts(self) -> None:
        """The initial stream is the first checkpoint."""
        model = self.initial()
        self.assertEqual(self.secondary.checkpoint, 1)
        self.checkpoint(model, 1)
        self.assertEqual(self.secondary.checkpoint, 2)

    def test_settleBreathes(self) -> None:
        """A large checkpoint is applied in slices with other work between them; afterwards the image is current."""
        model = self.initial()
        self.checkpoint(model, 6 * BATCH)
        settled = self.secondary.settle()
        turns = 0
        while not settled.called:
            self.assertEqual(len(self.clock.getDelayedCalls()), 1)
            self.spin()
            turns += 1
        self.successResultOf(settled)
        self.assertEqual(turns, 6)
        self.assertEqual(bytes(self.caches[0].image(RAM.name)), bytes(model.ram[RAM.name]))

    def test_settleSmall(self) -> None:
        """A checkpoint of one slice is settled at once; settling again, or before anything came, is harmless."""
        self.successResultOf(self.secondary.settle())
        model = self.initial()
        self.checkpoint(model, BATCH - 1)
        self.successResultOf(self.secondary.settle())
        self.successResultOf(self.secondary.settle())
        self.assertEqual(bytes(self.caches[0].image(RAM.name)), bytes(model.ram[RAM.name]))

    def test_stageWhileSettling(self) -> None:
        """The next checkpoint may come while the last is applied."""
        model = self.initial()
        self.checkpoint(model, 5 * BATCH)
        first = self.secondary.settle()
        self.spin()
        self.checkpoint(model, 4 * BATCH, b"third")
        second = self.secondary.settle()
        self.spin(20)
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertPromoted(self.secondary.promote(), model, b"third")

    def test_abandon(self) -> None:
        """What was staged is gone, also after an error; the next checkpoint is taken."""
        self.secondary.abandon()
        model = self.initial()
        self.secondary.stageLive(b"", [pages([0, 1])])
        self.secondary.abandon()
        self.assertRaises(StreamError, self.secondary.stageLive, b"", [Xbzrle(RAM.name, 0, b"\x00\x00")])
        self.failureResultOf(self.secondary.commit(b"never"), StorageError)
        self.secondary.abandon()
        self.assertEqual(self.secondary.checkpoint, 1)
        self.checkpoint(model, 3)
        self.assertPromoted(self.secondary.promote(), model, b"next")

    def test_outOfOrder(self) -> None:
        """Checkpoints need a committed initial stream, a commit needs something to commit."""
        self.failureResultOf(self.secondary.commit(b"x"), UnexpectedMessage)
        self.assertRaises(UnexpectedMessage, self.secondary.stageLive, b"", [])
        self.secondary.stageInitial(b"", [Blocks(BLOCKS)])
        self.assertRaises(UnexpectedMessage, self.secondary.stageLive, b"", [])


class ResynchronisationTests(PassiveCase):
    """A second initial stream."""

    def test_replaces(self) -> None:
        """When it is whole it replaces the first, even with other blocks, and the first one's memory goes."""
        self.initial()
        block = RamBlock("other.ram", 5 * PAGE_SIZE)
        model = Model([block])
        events: list[RamEvent] = [Blocks((block,)), pages([0, 4], block.name)]
        self.secondary.stageInitial(b"", events)
        model.apply(events)
        self.secondary.describe("q35", b"q35 configuration")
        self.successResultOf(self.secondary.commit(b"again"))
        self.assertEqual(self.secondary.checkpoint, 2)
        self.assertEqual(self.caches[0].blocks, ())
        self.assertPromoted(self.secondary.promote(), model, b"again")
        self.assertEqual(
            (self.guests[0].machine, self.guests[0].configuration), ("q35", b"q35 configuration")
        )

    def test_broken(self) -> None:
        """When it breaks, whatever was described already, the committed checkpoint is as it was."""
        model = self.initial()
        self.secondary.stageInitial(b"", [Blocks(BLOCKS), pages(range(40))])
        self.secondary.describe("q35", b"other")
        self.assertRaises(UnexpectedMessage, self.secondary.stageLive, b"", [])
        self.secondary.abandon()
        self.assertEqual(self.caches[1].blocks, ())
        self.checkpoint(model, 2)
        self.assertPromoted(self.secondary.promote(), model, b"next")
        self.assertEqual((self.guests[0].machine, self.guests[0].configuration), ("pc-1", b"pc-1"))

    def test_promotedMeanwhile(self) -> None:
        """A failover in the middle of it goes on from the committed checkpoint."""
        model = self.initial()
        self.secondary.stageInitial(b"", [Blocks(BLOCKS), pages(range(40))])
        self.secondary.describe("q35", b"other")
        self.assertPromoted(self.secondary.promote(), model, b"pc-1 state")
        self.assertEqual(self.guests[0].machine, "pc-1")
        self.assertEqual(self.caches[1].blocks, ())

    def test_whileSettling(self) -> None:
        """It may be committed while an old checkpoint is still applied: that work ends."""
        self.checkpoint(self.initial(), 6 * BATCH)
        settled = self.secondary.settle()
        self.spin()
        model = self.initial("pc-2")
        self.spin()
        self.successResultOf(settled)
        self.assertPromoted(self.secondary.promote(), model, b"pc-2 state")


class PromotionTests(PassiveCase):
    """Failover."""

    def test_nothingCommitted(self) -> None:
        """Without a checkpoint there is nothing to go on from."""
        self.failureResultOf(self.secondary.promote(), FailoverError)
        self.secondary.stageInitial(b"", [Blocks(BLOCKS), pages([0])])
        self.failureResultOf(self.secondary.promote(), FailoverError)

    def test_finishesTheFlush(self) -> None:
        """A checkpoint that was committed but never settled is applied first; what is staged is dropped."""
        model = self.initial()
        self.checkpoint(model, 6 * BATCH)
        self.secondary.stageLive(b"", [pages(range(40))])
        promoted = self.secondary.promote()
        self.assertNoResult(promoted)
        self.assertEqual(self.guests, [])
        self.spin(6)
        self.assertPromoted(promoted, model, b"next")

    def test_waitsForSettle(self) -> None:
        """A settle under way is finished, too."""
        model = self.initial()
        self.checkpoint(model, 6 * BATCH)
        settled = self.secondary.settle()
        self.spin()
        promoted = self.secondary.promote()
        self.spin(6)
        self.successResultOf(settled)
        self.assertPromoted(promoted, model, b"next")

    def test_once(self) -> None:
        """From the moment it is promoted it takes nothing more."""
        self.checkpoint(self.initial(), 6 * BATCH)
        promoted = self.secondary.promote()
        for _ in range(2):
            self.failureResultOf(self.secondary.promote(), FailoverError)
            self.failureResultOf(self.secondary.commit(b"late"), FailoverError)
            self.assertRaises(FailoverError, self.secondary.stageLive, b"", [])
            self.assertRaises(FailoverError, self.secondary.stageInitial, b"", [])
            self.secondary.abandon()
            self.spin(6)
        self.successResultOf(promoted)

    def test_restoreFails(self) -> None:
        """The checkpoint stays, and the promotion can be tried again."""
        model = self.initial()

        def refuse(image: CheckpointImage) -> Guest:
            raise ConfigError("no such QEMU")

        self.secondary._restore = refuse
        self.failureResultOf(self.secondary.promote(), ConfigError)
        self.secondary._restore = self.restore
        self.assertPromoted(self.secondary.promote(), model, b"pc-1 state")

    def test_spilledPagesLost(self) -> None:
        """An image that cannot be made current is not promoted."""
        self.checkpoint(self.initial(), 6 * BATCH)

        def broken(*args: object) -> object:
            raise StorageError("cannot read back")

        self.caches[0]._area.contents = broken  # type: ignore[method-assign,assignment]
        self.failureResultOf(self.secondary.settle(), StorageError)
        self.failureResultOf(self.secondary.promote(), StorageError)
        self.assertEqual(self.guests, [])

    def test_close(self) -> None:
        """Everything is freed, but for what a promoted guest has."""
        self.initial()
        self.secondary.stageInitial(b"", [Blocks(BLOCKS)])
        self.successResultOf(self.secondary.close())
        self.successResultOf(self.secondary.close())
        self.assertEqual([cache.blocks for cache in self.caches], [(), ()])
        self.secondary.abandon()
        self.failureResultOf(self.secondary.promote(), FailoverError)
        self.assertRaises(FailoverError, self.secondary.stageInitial, b"", [])

        self.secondary = PassiveSecondary(self.clock, self.newCache, self.restore)
        model = self.initial()
        promoted = self.secondary.promote()
        self.successResultOf(self.secondary.close())
        self.assertPromoted(promoted, model, b"pc-1 state")

    def test_closedWhilePromoting(self) -> None:
        """No guest is made of freed memory."""
        self.checkpoint(self.initial(), 6 * BATCH)
        promoted = self.secondary.promote()
        self.successResultOf(self.secondary.close())
        self.spin()
        self.failureResultOf(promoted, FailoverError)
        self.assertEqual(self.guests, [])
