"""Tests of L{colotx.lab.shaper}: the schedule on a clock, the relay once over real sockets."""

from __future__ import annotations

import random
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase, TestCase

from colotx.lab.shaper import Flow, LinkSettings, Shaper, Wire

SLOW = LinkSettings(bandwidth=8e6, delay=0.020, queue=10_000)
"""A byte a microsecond, 20 ms away."""


class Rig:
    """A flow between two transports in memory, on a clock of steps of 0.1 ms."""

    def __init__(self, settings: LinkSettings = SLOW) -> None:
        self.clock = Clock()
        self.wire = Wire(self.clock, settings)
        self.flow, self.source, self.target = self.another()

    def another(self) -> tuple[Flow, StringTransport, StringTransport]:
        """One more connection over the same wire."""
        flow, source, target = Flow(self.wire), StringTransport(), StringTransport()
        flow.connect(source, target)
        return flow, source, target

    def advance(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.0001)):
            self.clock.advance(0.0001)


class FlowTests(SynchronousTestCase):
    def test_delay(self) -> None:
        """A byte arrives after the delay, and not before."""
        rig = Rig()
        rig.flow.feed(b"x")
        rig.advance(0.0199)
        self.assertEqual(rig.target.value(), b"")
        rig.advance(0.0003)
        self.assertEqual(rig.target.value(), b"x")

    def test_bandwidth(self) -> None:
        """Bytes arrive at the bandwidth, smoothly, in order and unchanged."""
        rig = Rig()
        data = random.Random(1).randbytes(30_000)
        rig.flow.feed(data)
        for elapsed in (0.010, 0.020, 0.029):
            rig.advance(0.020 + elapsed - rig.clock.seconds())
            self.assertApproximates(len(rig.target.value()), elapsed * 1e6, 1500)
        rig.advance(0.002)
        self.assertEqual(rig.target.value(), data)

    def test_lateTimers(self) -> None:
        """Timers that are late do not slow the link down."""
        rig = Rig()
        for _ in range(100):
            rig.flow.feed(bytes(10_000))
            rig.clock.advance(0.0105)
        rig.clock.advance(0.1)
        self.assertEqual(len(rig.target.value()), 1_000_000)

    def test_shared(self) -> None:
        """Connections share the bandwidth."""
        rig = Rig()
        other, _, target = rig.another()
        for flow in (rig.flow, other):
            flow.feed(bytes(10_000))
        rig.advance(0.030)
        self.assertApproximates(len(rig.target.value()) + len(target.value()), 10_000, 1500)
        rig.advance(0.011)
        self.assertEqual(len(target.value()), 10_000)

    def test_holdsBack(self) -> None:
        """A sender that is faster than the link is held back, and let go on when there is room."""
        rig = Rig()
        rig.flow.feed(bytes(SLOW.limit))
        self.assertEqual(rig.source.producerState, "producing")
        rig.flow.feed(bytes(5_000))
        self.assertEqual(rig.source.producerState, "paused")
        rig.advance(0.030)
        self.assertEqual(rig.source.producerState, "producing")

    def test_blockedTarget(self) -> None:
        """What the far end does not take is kept, and holds the sender back."""
        rig = Rig()
        rig.flow.pauseProducing()
        rig.flow.feed(bytes(SLOW.limit + 1))
        rig.advance(0.2)
        self.assertEqual((rig.target.value(), rig.source.producerState), (b"", "paused"))
        rig.flow.resumeProducing()
        self.assertEqual(len(rig.target.value()), SLOW.limit + 1)
        self.assertEqual(rig.source.producerState, "producing")

    def test_beforeConnected(self) -> None:
        """Bytes that come before the far end is there wait for it."""
        rig = Rig()
        flow, target = Flow(rig.wire), StringTransport()
        flow.feed(b"early")
        rig.advance(0.1)
        flow.connect(StringTransport(), target)
        self.assertEqual(target.value(), b"early")

    def test_end(self) -> None:
        """The end of a connection travels behind its last byte, as slowly."""
        rig = Rig()
        rig.flow.feed(b"last")
        rig.flow.end()
        rig.advance(0.019)
        self.assertFalse(rig.target.disconnecting)
        rig.advance(0.002)
        self.assertEqual((rig.target.value(), rig.target.disconnecting), (b"last", True))

    def test_targetGone(self) -> None:
        """When the far end is gone nothing is kept, and no timer is left."""
        rig = Rig()
        rig.flow.feed(bytes(5_000))
        rig.flow.stopProducing()
        self.assertEqual(rig.clock.getDelayedCalls(), [])

    def test_stall(self) -> None:
        """A stalled direction delivers nothing until it goes on; then what is overdue comes at once."""
        rig = Rig()
        rig.wire.stalled = True
        rig.flow.feed(b"waits")
        rig.advance(1.0)
        self.assertEqual(rig.target.value(), b"")
        rig.wire.stalled = False
        rig.flow.deliver()
        self.assertEqual(rig.target.value(), b"waits")

    def test_unlimited(self) -> None:
        """Without bandwidth and delay everything arrives at once."""
        rig = Rig(LinkSettings())
        rig.flow.feed(bytes(500_000))
        self.assertEqual(len(rig.target.value()), 500_000)


class Talker(Protocol):
    """Collects; fires when it has enough, and when it ends."""

    transport: Any

    def __init__(self, connected: Deferred[Talker] | None = None) -> None:
        self._connected = connected
        self.got = b""
        self.wanted = 0
        self.enough: Deferred[None] = Deferred()
        self.ended: Deferred[str] = Deferred()

    def connectionMade(self) -> None:
        if self._connected is not None:
            self._connected.callback(self)

    def until(self, size: int) -> Deferred[None]:
        self.wanted, self.enough = size, Deferred()
        self.dataReceived(b"")
        return self.enough

    def dataReceived(self, data: bytes) -> None:
        self.got += data
        if self.wanted and len(self.got) >= self.wanted:
            self.wanted = 0
            self.enough.callback(None)

    def connectionLost(self, reason: Any = None) -> None:
        self.ended.callback(reason.getErrorMessage())


class ShaperTests(TestCase):
    async def relayed(self, settings: LinkSettings) -> tuple[Shaper, Talker, Talker]:
        """A shaper on loopback, and the two ends of a connection through it."""
        from twisted.internet import reactor as installed

        reactor: Any = installed
        accepted: Deferred[Talker] = Deferred()

        class Accepting(Factory):
            noisy = False

            def buildProtocol(self, address: Any) -> Talker:
                return Talker(accepted)

        behind = reactor.listenTCP(0, Accepting(), interface="127.0.0.1")
        self.addCleanup(behind.stopListening)
        shaper = Shaper(reactor, settings, settings)
        port = shaper.listen("127.0.0.1", 0, "127.0.0.1", behind.getHost().port)
        client = await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), Talker())
        server = await accepted
        self.addCleanup(self.close, shaper, client, server)
        return shaper, client, server

    async def close(self, shaper: Shaper, *ends: Talker) -> None:
        await shaper.close()
        for end in ends:
            await end.ended

    async def test_relays(self) -> None:
        """Bytes pass both ways, unchanged, and no faster than the link."""
        from twisted.internet import reactor

        _, client, server = await self.relayed(LinkSettings(bandwidth=80e6, delay=0.010))
        data = random.Random(2).randbytes(1_000_000)
        begun = reactor.seconds()
        client.transport.write(data)
        await server.until(len(data))
        self.assertEqual(server.got, data)
        # 100 ms for the bytes, 10 ms for the way; a busy machine may take longer, never shorter.
        self.assertGreater(reactor.seconds() - begun, 0.105)
        server.transport.write(b"back")
        await client.until(4)

    async def test_closes(self) -> None:
        """When one end closes, so does the other."""
        _, client, server = await self.relayed(LinkSettings(delay=0.005))
        client.transport.write(b"bye")
        client.transport.loseConnection()
        self.assertIn("closed cleanly", await server.ended)
        self.assertEqual(server.got, b"bye")

    async def test_cut(self) -> None:
        """A cut resets both ends, whatever is under way."""
        shaper, client, server = await self.relayed(LinkSettings(delay=0.020))
        server.transport.write(b"x")
        await client.until(1)
        client.transport.write(bytes(1000))
        shaper.cut()
        for end in (client, server):
            self.assertNotIn("closed cleanly", await end.ended)
