"""
Tests of L{colotx.guests.memory_active}: a second machine that runs, is made to be the first one by each checkpoint, and
goes on alone from where it is.
"""

from __future__ import annotations

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether
from twisted.internet.defer import ensureDeferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from colotx.errors import FailoverError, GuestError, UnexpectedMessage
from colotx.guests.memory import MemoryGuestFactory, MemorySettings
from colotx.guests.memory_primary import MemoryPrimaryGuest
from colotx.interfaces import IActiveSecondary, IFramePort, IPrimaryGuest, RunState
from colotx.test.test_memory_guest import Protection

SMALL = MemorySettings(ramBytes=4 << 20)
TICK = SMALL.tickMs / 1000 + 1e-9


class ActiveProtection(Protection):
    """With the steps of an active secondary."""

    async def capture(self):
        await self.standby.prepare()
        return await super().capture()


class ActiveTests(SynchronousTestCase):
    """On a clock of the test's own."""

    def setUp(self):
        self.clock = Clock()
        self.factory = MemoryGuestFactory(self.clock, SMALL)
        self.guest = self.factory.createPrimary()
        self.addCleanup(lambda: self.guest.shutdown())
        self.standby = self.factory.createStandby("active")
        self.addCleanup(self.standby.close)
        self.said, self.standbySaid = [], []
        self.guest.port.receiver = self.said.extend
        self.standby.port.receiver = self.standbySaid.extend

    def run_(self, awaitable):
        running = ensureDeferred(awaitable)
        self.clock.pump([0] * 50)
        return self.successResultOf(running)

    def ticks(self, count):
        self.clock.pump([TICK] * count)

    def protect(self):
        """A protection after its initial transfer, both machines running."""
        self.successResultOf(self.guest.launch())
        self.ticks(50)
        protection = ActiveProtection(self.guest, self.standby)
        self.run_(protection.initial())
        self.successResultOf(self.guest.start())
        return protection

    def checkpoint(self, protection):
        data, blob = self.run_(protection.capture())
        self.run_(protection.stage(data))
        self.run_(protection.commit(blob))

    def input_(self, *frames):
        """The same frames for both, and a turn to answer them."""
        for port in (self.guest.port, self.standby.port):
            port.send([bytes(frame) for frame in frames])
        self.clock.pump([0] * 3)

    def packet(self, layer):
        return Ether(src="02:00:00:00:00:01", dst=SMALL.mac) / IP(src="10.77.0.1", dst=SMALL.address) / layer

    def assertAlike(self):
        one, two = self.guest.machine, self.standby.guest.machine
        self.assertEqual(one.deviceState(), two.deviceState())
        self.assertTrue((one.memory.pages == two.memory.pages).all())

    def test_interfaces(self):
        """What it is, and what it makes."""
        verifyObject(IActiveSecondary, self.standby)
        verifyObject(IFramePort, self.standby.port)
        self.protect()
        promoted = self.successResultOf(self.standby.promote())
        self.addCleanup(promoted.shutdown)
        verifyObject(IPrimaryGuest, promoted)

    def test_lockStep(self):
        """Both live through the same input, and say the same; each checkpoint makes them one again."""
        protection = self.protect()
        for number in range(5):
            self.ticks(3 + number)
            self.input_(self.packet(UDP(sport=9, dport=7) / bytes([number])))
            self.checkpoint(protection)
            self.assertAlike()
            self.assertEqual(self.standby.guest.runState, RunState.RUNNING)
            self.successResultOf(self.guest.start())
        self.assertEqual(len(self.said), 6)  # the announcement too
        self.assertEqual(self.said[1:], self.standbySaid)
        self.assertEqual(self.standby.checkpoint, 6)

    def test_ownWritesAreUndone(self):
        """What only the machine here wrote is overwritten by the next checkpoint, pages the primary left alone too."""
        protection = self.protect()
        self.standby.port.send([bytes(self.packet(TCP(sport=9, dport=7, flags="S")))])
        self.clock.pump([0] * 3)
        for _ in range(40):  # here more than there
            self.standby.guest.machine.tick()
        self.checkpoint(protection)
        self.assertAlike()
        self.successResultOf(self.guest.start())
        self.ticks(800)
        self.assertEqual(self.standby.guest.runState, RunState.RUNNING)

    def test_connectionsOfTheCheckpoint(self):
        """A connection that only the primary saw is one of both after a checkpoint."""
        protection = self.protect()
        self.guest.port.send([bytes(self.packet(TCP(sport=9, dport=7, flags="S", seq=5)))])
        self.clock.pump([0] * 3)
        synAck = Ether(self.said[-1])[TCP]
        self.checkpoint(protection)
        self.successResultOf(self.guest.start())
        answer = TCP(sport=9, dport=7, flags="PA", seq=6, ack=synAck.seq + 1) / b"hello"
        self.input_(self.packet(answer))
        self.assertEqual(self.said[-1], self.standbySaid[-1])
        self.assertEqual(bytes(Ether(self.said[-1])[TCP].payload)[:5], b"hello")

    def test_theyDiverge(self):
        """The random service, and initial sequence numbers of connections opened a tick apart, which are translated."""
        self.protect()
        self.input_(self.packet(UDP(sport=9, dport=17)))
        self.assertNotEqual(self.said[-1], self.standbySaid[-1])
        self.standby.guest.machine.tick()
        self.input_(self.packet(TCP(sport=9, dport=7, flags="S", seq=5)))
        first, second = (Ether(said[-1])[TCP].seq for said in (self.said, self.standbySaid))
        self.assertNotEqual(first, second)
        # From the client's first word on both speak of the same numbers, also after a failover.
        self.input_(self.packet(TCP(sport=9, dport=7, flags="A", seq=6, ack=first + 1)))
        self.input_(self.packet(TCP(sport=9, dport=7, flags="PA", seq=6, ack=first + 1) / b"hello"))
        self.assertEqual(self.said[-1], self.standbySaid[-1])
        promoted = self.successResultOf(self.standby.promote())
        self.addCleanup(promoted.shutdown)
        self.successResultOf(promoted.launch())
        promoted.port.send(
            [bytes(self.packet(TCP(sport=9, dport=7, flags="PA", seq=11, ack=first + 6) / b"you"))]
        )
        self.clock.pump([0] * 3)
        answer = Ether(self.standbySaid[-1])[TCP]
        self.assertEqual((answer.seq, bytes(answer.payload)[:3]), (first + 6, b"you"))

    def test_stopsForACheckpoint(self):
        """From REQUEST until the load is done it stands still. Input of before is covered by the checkpoint."""
        protection = self.protect()
        self.successResultOf(self.standby.prepare())
        ticks = self.standby.guest.machine.ticks
        self.standby.port.send([bytes(self.packet(UDP(sport=9, dport=7) / b"late"))])
        self.ticks(5)
        self.assertEqual((self.standby.guest.machine.ticks, self.standbySaid), (ticks, []))
        self.checkpoint(protection)
        self.ticks(5)
        self.assertEqual(self.standbySaid, [])
        self.assertGreater(self.standby.guest.machine.ticks, ticks)

    def test_abandonedInputIsKept(self):
        """What waits for a machine that was stopped and goes on alone is still answered."""
        self.protect()
        self.successResultOf(self.standby.prepare())
        self.standby.port.send([bytes(self.packet(UDP(sport=9, dport=7) / b"late"))])
        self.standby.abandon()
        promoted = self.successResultOf(self.standby.promote())
        self.addCleanup(promoted.shutdown)
        self.successResultOf(promoted.launch())
        self.clock.pump([0] * 3)
        self.assertEqual(len(self.standbySaid), 1)

    def test_promotedWhileItRuns(self):
        """It goes on from what it is, not from the checkpoint, and needs nothing for it."""
        self.protect()
        self.ticks(9)
        live = self.standby.guest
        ticks = live.machine.ticks
        promoted = self.successResultOf(self.standby.promote())
        self.addCleanup(promoted.shutdown)
        self.assertIs(promoted.runState, RunState.COLO)
        self.successResultOf(promoted.launch())
        self.assertIs(promoted, live)
        self.assertIs(promoted.port, self.standby.port)
        self.assertEqual((promoted.machine.ticks, promoted.runState), (ticks, RunState.RUNNING))
        self.successResultOf(self.standby.close())
        self.ticks(400)
        self.assertEqual((promoted.machine.ticks, promoted.runState), (ticks + 400, RunState.RUNNING))
        self.failureResultOf(self.standby.promote(), FailoverError)

    def test_promotedInEveryStateOfACheckpoint(self):
        """
        A checkpoint that is not whole is forgotten, and it goes on from its own state; from the commit on it goes on
        from the checkpoint.
        """
        for steps in range(4):
            self.setUp()
            protection = self.protect()
            self.ticks(4)
            own = self.standby.guest.machine.ticks
            self.ticks(0)
            self.guest.machine.tick()
            self.successResultOf(self.standby.prepare())
            if steps >= 1:
                data, blob = self.run_(protection.capture())
                self.run_(protection.stage(data))
            if steps == 2:
                self.standby.abandon()
            if steps == 3:
                self.successResultOf(self.standby.commit(blob))
            promoted = self.run_(self.promote())
            self.addCleanup(promoted.shutdown)
            self.assertEqual(promoted.machine.ticks, own + (steps == 3))
            self.successResultOf(promoted.launch())
            self.ticks(800)
            self.assertEqual(promoted.runState, RunState.RUNNING)

    async def promote(self):
        return await self.standby.promote()

    def test_promotedWhileItLoads(self):
        """A load under way is finished first."""
        protection = self.protect()
        self.ticks(4)
        data, blob = self.run_(protection.capture())
        self.run_(protection.stage(data))
        self.successResultOf(self.standby.commit(blob))
        settling, promoting = self.standby.settle(), self.standby.promote()
        self.assertNoResult(promoting)
        self.clock.pump([0] * 20)
        self.successResultOf(settling)
        promoted = self.successResultOf(promoting)
        self.addCleanup(promoted.shutdown)
        self.assertEqual(promoted.machine.deviceState(), blob)

    def test_synchronisedAnew(self):
        """Another guest's initial transfer replaces the machine, of whatever size it is."""
        self.protect()
        other = MemoryPrimaryGuest.fresh(self.clock, MemorySettings(ramBytes=5 << 20))
        self.successResultOf(other.launch())
        self.ticks(7)
        protection = ActiveProtection(other, self.standby)
        old = self.standby.guest
        self.run_(protection.initial())
        self.assertIsNot(self.standby.guest, old)
        self.assertEqual(old.runState, RunState.SHUTDOWN)
        self.guest.shutdown()
        self.guest = other
        self.assertAlike()
        self.successResultOf(other.start())
        self.ticks(30)
        self.checkpoint(protection)
        self.assertAlike()
        promoted = self.successResultOf(self.standby.promote())
        self.addCleanup(promoted.shutdown)

    def test_neverCommitted(self):
        """There is nothing to go on from, nothing to load, and nothing to stop."""
        self.assertFalse(self.standby.promotable)
        self.successResultOf(self.standby.prepare())
        self.failureResultOf(self.standby.settle(), UnexpectedMessage)
        self.failureResultOf(self.standby.promote(), FailoverError)

    def test_failedLoad(self):
        """A damaged checkpoint is never gone on from; a new initial transfer heals it."""
        protection = self.protect()
        self.ticks(4)
        data, blob = self.run_(protection.capture())
        self.run_(protection.stage(data))
        self.successResultOf(self.standby.commit(blob[:40] + b"\xff" + blob[41:]))
        settling = self.standby.settle()
        self.clock.pump([0] * 20)
        self.failureResultOf(settling, GuestError)
        self.assertFalse(self.standby.promotable)
        self.failureResultOf(self.standby.prepare(), GuestError)
        error = self.failureResultOf(self.standby.promote(), FailoverError).value
        self.assertIn("could not be loaded", str(error))
        self.run_(ActiveProtection(self.guest, self.standby).initial())
        self.assertTrue(self.standby.promotable)
        self.assertAlike()

    def test_crash(self):
        """A machine that crashed while it stood by is told at the next checkpoint and at a failover."""
        self.protect()
        self.standby.guest.machine.memory.pages[-1, 9] ^= 1
        self.ticks(800)
        self.assertEqual(self.standby.guest.runState, RunState.SHUTDOWN)
        self.assertFalse(self.standby.promotable)
        self.assertIn("crashed", str(self.failureResultOf(self.standby.prepare(), GuestError).value))
        self.assertIn("crashed", str(self.failureResultOf(self.standby.promote(), FailoverError).value))

    def test_closed(self):
        """Nothing is left running, also when it is closed in the middle of a load."""
        for contents in (0, 1):  # loaded in one slice, and in several
            self.setUp()
            protection = self.protect()
            self.guest.machine.memory.pages[:, 99] = contents
            self.guest.machine.memory.dirty[:] = True
            data, blob = self.run_(protection.capture())
            self.run_(protection.stage(data))
            self.successResultOf(self.standby.commit(blob))
            settling = self.standby.settle()
            self.assertNoResult(settling)
            self.successResultOf(self.standby.close())
            self.successResultOf(self.guest.shutdown())
            self.clock.pump([0] * 20)
            self.failureResultOf(settling, FailoverError)
            self.assertEqual(self.clock.getDelayedCalls(), [])
            self.failureResultOf(self.standby.promote(), FailoverError)
