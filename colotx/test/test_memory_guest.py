"""
Tests of L{colotx.guests.memory}: run control and port, the migration stream, and the kernel's own TCP as a client of a
guest that is killed and goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess

from scapy.layers.l2 import ARP, Ether
from twisted.internet import reactor
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import DatagramProtocol, Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import SkipTest, SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from colotx.errors import ConfigError, GuestError
from colotx.gate import OutputGate
from colotx.guests._tinytcp import RING
from colotx.guests.memory import MemoryGuestFactory, MemorySettings
from colotx.guests.memory_primary import MACHINE
from colotx.interfaces import (
    IFramePort,
    IGuestFactory,
    IPrimaryGuest,
    ISecondaryGuest,
    RunState,
)
from colotx.ports import TapPort
from colotx.test.test_ports import ownNetwork
from colotx.vmstate import CheckpointReader, InitialReader, RamReader

SMALL = MemorySettings(ramBytes=4 << 20)
HOST, GUEST = "10.77.0.1", "10.77.0.2"


class Pieces:
    """A sink that keeps what it is given, and can be made to wait."""

    def __init__(self):
        self.data = bytearray()
        self.gate: Deferred[None] | None = None

    async def write(self, data):
        if self.gate is not None:
            await self.gate
        self.data += data


class Protection:
    """The shortest way from a primary guest to its standby, with no wire between."""

    def __init__(self, guest, standby):
        self.guest, self.standby = guest, standby
        self.ram = RamReader()

    async def initial(self):
        """The initial transfer; the guest is left stopped."""
        sink = Pieces()
        await self.guest.transferInitial(sink)
        reader = InitialReader(self.ram)
        self.standby.stageInitial(sink.data, reader.feed(bytes(sink.data)))
        done = reader.complete
        self.standby.describe(done.machine, done.configuration)
        await self.commit(done.deviceState)

    async def capture(self):
        """Stop the guest and take a checkpoint. @return: RAM part and device state."""
        await self.guest.stop()
        self.guest.port.drain()
        sink = Pieces()
        await self.guest.transferLive(sink)
        return bytes(sink.data), await self.guest.saveDeviceState()

    async def stage(self, data):
        reader = CheckpointReader(self.ram)
        events, consumed = reader.feed(data)
        assert (reader.complete, consumed) == (True, len(data))
        self.standby.stageLive(data, events)

    async def commit(self, deviceState):
        await self.standby.commit(deviceState)
        await self.standby.settle()


class GuestTests(SynchronousTestCase):
    """On a clock of the test's own."""

    def setUp(self):
        self.clock = Clock()
        self.factory = MemoryGuestFactory(self.clock, SMALL)
        self.guest = self.factory.createPrimary()
        self.addCleanup(self.guest.shutdown)
        self.out = []
        self.guest.port.receiver = self.out.extend

    def run_(self, awaitable):
        """Let a coroutine run, with all the turns of the reactor it wants, but no time passing."""
        running = ensureDeferred(awaitable)
        self.clock.pump([0] * 50)
        return self.successResultOf(running)

    def ticks(self, count):
        self.clock.pump([SMALL.tickMs / 1000 + 1e-9] * count)

    def arpRequest(self):
        return bytes(Ether(src="02:00:00:00:00:01", dst="ff:ff:ff:ff:ff:ff") / ARP(psrc=HOST, pdst=GUEST))

    def test_interfaces(self):
        """They are what they claim."""
        verifyObject(IGuestFactory, self.factory)
        verifyObject(IPrimaryGuest, self.guest)
        verifyObject(IFramePort, self.guest.port)
        standby = self.factory.createStandby()
        verifyObject(ISecondaryGuest, standby)
        self.successResultOf(standby.close())

    def test_runControl(self):
        """It lives only while it runs."""
        self.ticks(3)
        self.assertEqual((self.guest.machine.ticks, self.guest.runState), (0, RunState.PRELAUNCH))
        self.successResultOf(self.guest.launch())
        self.ticks(3)
        self.successResultOf(self.guest.stop())
        self.successResultOf(self.guest.stop())
        self.ticks(3)
        self.assertEqual((self.guest.machine.ticks, self.guest.runState), (3, RunState.COLO))
        self.successResultOf(self.guest.start())
        self.successResultOf(self.guest.start())
        self.ticks(3)
        self.assertEqual((self.guest.machine.ticks, self.guest.runState), (6, RunState.RUNNING))
        self.successResultOf(self.guest.shutdown())
        self.successResultOf(self.guest.start())
        self.assertEqual((self.clock.getDelayedCalls(), self.guest.runState), ([], RunState.SHUTDOWN))

    def test_operatorsPause(self):
        """Paused by the operator it stays so, whatever a checkpoint or the end of a protection does."""
        self.successResultOf(self.guest.launch())
        self.ticks(3)
        self.successResultOf(self.guest.pause())
        for step in [self.guest.stop, self.guest.start, self.guest.endProtection]:
            self.successResultOf(step())
            self.ticks(3)
            self.assertEqual((self.guest.machine.ticks, self.guest.runState), (3, RunState.PAUSED))
        self.successResultOf(self.guest.unpause())
        self.ticks(3)
        self.assertEqual((self.guest.machine.ticks, self.guest.runState), (6, RunState.RUNNING))

    def test_announcesItself(self):
        """The first thing it sends after power-on is a gratuitous ARP."""
        self.successResultOf(self.guest.launch())
        self.ticks(2)
        self.assertEqual(len(self.out), 1)
        self.assertEqual(self.out[0][28:32], bytes([10, 77, 0, 2]))

    def test_stoppedNothingPasses(self):
        """Frames wait while it is stopped or paused, and are answered afterwards; never at once."""
        port = self.guest.port
        self.successResultOf(self.guest.launch())
        self.successResultOf(self.guest.stop())
        port.send([self.arpRequest()])
        self.clock.advance(0)
        self.assertEqual(self.out, [])
        port.pause()
        self.successResultOf(self.guest.start())
        self.clock.advance(0)
        port.drain()
        self.assertEqual(self.out, [])
        port.resume()
        self.assertEqual(self.out, [])
        self.clock.advance(0)
        self.assertEqual(len(self.out), 1)

    def test_ring(self):
        """What is beyond the ring, or too large, is dropped and counted."""
        self.guest.port.send([self.arpRequest()] * 600)
        self.assertTrue(self.guest.port.congested)
        self.guest.port.send([self.arpRequest()] * 500 + [bytes(2000)])
        self.assertEqual(self.guest.port.dropped, 600 + 500 - 1024 + 1)
        self.successResultOf(self.guest.launch())
        self.clock.pump([0] * 20)
        self.assertEqual(len(self.out), 1024)
        self.assertFalse(self.guest.port.congested)

    def test_crash(self):
        """A failing memory check ends the guest loudly."""
        lost = []
        self.guest.onLost = lost.append
        self.successResultOf(self.guest.launch())
        self.guest.machine.memory.pages[-1, 9] = 1
        self.ticks(400)
        self.assertEqual(self.guest.runState, RunState.SHUTDOWN)
        self.assertIn("memory check failed", str(lost[0]))
        self.assertEqual((len(lost), self.clock.getDelayedCalls()), (1, []))

    def protect(self):
        self.successResultOf(self.guest.launch())
        self.ticks(50)
        protection = Protection(self.guest, self.factory.createStandby())
        self.addCleanup(protection.standby.close)
        self.run_(protection.initial())
        return protection

    def assertAlike(self, one, two):
        self.assertTrue((one.machine.memory.pages == two.machine.memory.pages).all())
        self.assertEqual(one.machine.deviceState(), two.machine.deviceState())

    def test_checkpoints(self):
        """Promoted after any checkpoint, the standby is the guest at that checkpoint, and goes on as it would."""
        protection = self.protect()
        self.assertEqual(self.guest.runState, RunState.COLO)
        for _ in range(5):
            self.successResultOf(self.guest.start())
            self.ticks(7)
            data, blob = self.run_(protection.capture())
            self.assertLess(len(data), 40 * 4200)
            self.run_(protection.stage(data))
            self.run_(protection.commit(blob))
        ticks = self.guest.machine.ticks
        promoted = self.run_(self.promote(protection))
        self.addCleanup(promoted.shutdown)
        self.assertEqual(promoted.runState, RunState.PRELAUNCH)
        self.assertAlike(self.guest, promoted)
        for guest in (self.guest, promoted):
            self.successResultOf(guest.start())
        self.ticks(400)
        self.assertEqual(promoted.machine.ticks, ticks + 400)
        self.assertAlike(self.guest, promoted)

    async def promote(self, protection):
        return await protection.standby.promote()

    def test_uncommittedIsForgotten(self):
        """What was only staged is not what a promotion goes on from."""
        protection = self.protect()
        ticks = self.guest.machine.ticks
        self.successResultOf(self.guest.start())
        self.ticks(3)
        data, _ = self.run_(protection.capture())
        self.run_(protection.stage(data))
        promoted = self.run_(self.promote(protection))
        self.addCleanup(promoted.shutdown)
        self.assertEqual(promoted.machine.ticks, ticks)
        self.successResultOf(promoted.launch())
        self.ticks(400)
        self.assertEqual(promoted.runState, RunState.RUNNING)

    def test_initialWhileRunning(self):
        """During the initial transfer the guest lives; its stream is whole all the same."""
        self.successResultOf(self.guest.launch())
        sink = Pieces()
        sink.gate = Deferred()
        transfer = self.guest.transferInitial(sink)
        self.ticks(100)
        self.assertEqual((self.guest.machine.ticks, self.guest.runState), (100, RunState.RUNNING))
        gate, sink.gate = sink.gate, None
        gate.callback(None)
        self.clock.pump([SMALL.tickMs / 1000] * 10)
        self.successResultOf(transfer)
        self.assertEqual(self.guest.runState, RunState.COLO)
        reader = InitialReader(RamReader())
        reader.feed(bytes(sink.data))
        self.assertEqual(reader.complete.machine, MACHINE)

    def test_endProtection(self):
        """A transfer that hangs is broken off, and the guest runs on; it can be protected anew."""
        for part in ["transferInitial", "transferLive"]:
            self.successResultOf(self.guest.launch())
            if part == "transferLive":
                self.successResultOf(self.guest.stop())
            sink = Pieces()
            sink.gate = Deferred()
            transfer = getattr(self.guest, part)(sink)
            self.assertNoResult(transfer)
            self.successResultOf(self.guest.endProtection())
            self.failureResultOf(transfer, GuestError)
            self.assertEqual(self.guest.runState, RunState.RUNNING)
        self.successResultOf(self.guest.endProtection())
        self.protect()

    def test_sinkFails(self):
        """The sink's error is the transfer's."""

        class Full:
            async def write(self, data):
                raise ConfigError("full")

        self.failureResultOf(self.guest.transferInitial(Full()), ConfigError)

    def test_foreignImage(self):
        """A checkpoint of another machine is refused by name."""
        protection = self.protect()
        protection.standby.describe("pc-i440fx-7.2", b"")
        self.run_(protection.commit(self.guest.machine.deviceState()))
        error = self.failureResultOf(protection.standby.promote(), GuestError).value
        self.assertIn("pc-i440fx-7.2", str(error))


class EchoClient(Protocol):
    """Keeps what comes back."""

    def __init__(self):
        self.got = bytearray()
        self.lost: Deferred[None] = Deferred()

    def dataReceived(self, data):
        self.got += data

    def connectionLost(self, reason):
        self.lost.callback(None)


class UdpClient(DatagramProtocol):
    """The same without a connection."""

    def __init__(self):
        self.got = []

    def datagramReceived(self, datagram, address):
        self.got.append(datagram)


class KernelTests(TestCase):
    """The kernel's TCP talks to the guest through a TAP, in a network namespace of the test's own."""

    timeout = 120

    def setUp(self):
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            raise SkipTest("needs /dev/net/tun")
        network = ownNetwork()
        network.__enter__()
        self.addCleanup(network.__exit__, None, None, None)
        with contextlib.suppress(OSError), open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as knob:
            knob.write("1")
        self.factory = MemoryGuestFactory(reactor, MemorySettings(ramBytes=4 << 20, address=GUEST))
        self.tap = TapPort(reactor, "colotap0")
        self.addCleanup(self.tap.close)

    async def start(self):
        await self.tap.open()
        subprocess.run(["ip", "addr", "add", f"{HOST}/24", "dev", "colotap0"], check=True)
        guest = self.factory.createPrimary()
        self.addCleanup(guest.shutdown)
        self.wire(guest, self.tap.send)
        await guest.launch()
        return guest

    def wire(self, guest, outward):
        self.tap.receiver = guest.port.send
        guest.port.receiver = outward

    async def connect(self):
        endpoint = TCP4ClientEndpoint(reactor, GUEST, 7, timeout=5)
        client = await endpoint.connect(Factory.forProtocol(EchoClient))
        self.addCleanup(client.transport.abortConnection)
        return client

    async def until(self, condition, seconds=60):
        deadline = reactor.seconds() + seconds
        while not condition():
            if reactor.seconds() > deadline:
                raise AssertionError(f"not within {seconds} s")
            await deferLater(reactor, 0.002)

    async def test_echo(self):
        """Several connections at once, byte for byte, closed in good order."""
        await self.start()
        data = [random.Random(n).randbytes(200_000) for n in range(4)]
        clients = [await self.connect() for _ in data]
        for client, text in zip(clients, data, strict=True):
            client.transport.write(text)
        for client, text in zip(clients, data, strict=True):
            await self.until(lambda client=client, text=text: len(client.got) >= len(text))
            self.assertEqual(bytes(client.got), text)
            client.transport.loseConnection()
            await client.lost

    async def test_pingAndUdp(self):
        """ping(8) and UDP, largest datagram included."""
        await self.start()
        client = UdpClient()
        listening = reactor.listenUDP(0, client, interface=HOST)
        self.addCleanup(listening.stopListening)
        sent = [b"", b"x", bytes(1472)]
        for datagram in sent:
            client.transport.write(datagram, (GUEST, 7))
        await self.until(lambda: len(client.got) == 3)
        self.assertEqual(client.got, sent)

    async def test_lossyNetwork(self):
        """With frames lost, doubled and out of order in both directions the stream is still whole."""
        guest = await self.start()
        chance = random.Random(7)

        def worsen(deliver):
            def send(frames):
                frames = [frame for frame in frames if chance.random() > 0.03]
                frames += [frame for frame in frames if chance.random() < 0.03]
                if chance.random() < 0.1:
                    chance.shuffle(frames)
                deliver(frames)

            return send

        self.tap.receiver = worsen(guest.port.send)
        guest.port.receiver = worsen(self.tap.send)
        client = await self.connect()
        data = random.Random(1).randbytes(100_000)
        client.transport.write(data)
        await self.until(lambda: len(client.got) >= len(data))
        self.assertEqual(bytes(client.got), data)

    async def test_slowReader(self):
        """A client that does not read closes its window, and the guest's; all comes when it reads again."""
        await self.start()
        client = await self.connect()
        client.transport.pauseProducing()
        data = random.Random(1).randbytes(1_500_000)
        client.transport.write(data)
        await deferLater(reactor, 0.3)
        client.transport.resumeProducing()
        await self.until(lambda: len(client.got) >= len(data))
        self.assertEqual(bytes(client.got), data)

    async def test_killAndGoOn(self):
        """
        Output leaves only up to committed checkpoints; the guest dies at a random moment with output held, the
        standby goes on, and the client's stream is whole: nothing lost, nothing doubled. Several times over on
        one connection.
        """
        guest = await self.start()
        client = await self.connect()
        data = random.Random(1).randbytes(3_000_000)
        client.transport.write(data)
        for life in range(3):
            guest = await self.liveAndDie(guest, random.Random(life), client)
        await self.until(lambda: len(client.got) >= len(data))
        self.assertEqual(bytes(client.got), data)
        client.transport.loseConnection()
        await client.lost

    async def liveAndDie(self, guest, chance, client):
        """One protected life of a guest. @return: who goes on."""
        gate = OutputGate(self.tap.send, lambda reason: None, lambda throttle: None)
        self.wire(guest, gate.hold)
        standby = self.factory.createStandby()
        self.addCleanup(standby.close)
        protection = Protection(guest, standby)
        await protection.initial()
        gate.shut()
        gate.release(gate.closeEpoch())
        for _ in range(chance.randrange(3, 8)):
            await guest.start()
            await deferLater(reactor, chance.random() * 0.01)
            data, blob = await protection.capture()
            epoch = gate.closeEpoch()
            await guest.start()
            await deferLater(reactor, chance.random() * 0.005)
            await protection.stage(data)
            await protection.commit(blob)
            gate.release(epoch)
        had = len(client.got)
        await self.until(lambda: gate.statistics.heldFrames)
        await guest.shutdown()
        promoted = await standby.promote()
        self.addCleanup(promoted.shutdown)
        self.wire(promoted, self.tap.send)
        await promoted.launch()
        # More than the guest's own ring holds: so the client's retransmission got through. Killing at each of them
        # would only show how the kernel's retransmission timer doubles.
        await self.until(lambda: len(client.got) > had + RING)
        return promoted
