"""Tests of L{colotx.lab.client}, over connections in memory."""

from __future__ import annotations

import hashlib
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.error import ConnectionDone, ConnectionRefusedError
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ConfigError
from colotx.lab.client import TrafficClient, TrafficSettings, _arguments, isClean, isMemoryIntact
from colotx.lab.conversations import TICK
from colotx.lab.guestimage import SINK_BLOCK, numbers

SETTINGS = TrafficSettings("10.77.0.10", connections=2, rate=3200, window=320, drainTimeout=5.0, seed=3)


class Transport(StringTransport):
    """What conversations want of TCP."""

    halfClosed = False
    paused = False

    def setTcpNoDelay(self, enabled: bool) -> None:
        """Nothing to do in memory."""

    def getHandle(self) -> Any:
        return self

    def setsockopt(self, *option: int) -> None:
        """Nothing to do in memory."""

    def loseWriteConnection(self) -> None:
        self.halfClosed = True

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False


class Run:
    """A client in memory, and the peers of its connections."""

    def __init__(self, settings: TrafficSettings = SETTINGS) -> None:
        self.reactor = MemoryReactorClock()
        self.events: list[dict[str, Any]] = []
        self.client = TrafficClient(self.reactor, settings, self.events.append, self.reactor.seconds)
        self.connecting = ensureDeferred(self.client.connect())
        self.protocols: list[Any] = []
        self.running: Deferred[dict[str, Any]] | None = None

    def accept(self, index: int = -1) -> Any:
        """Accept the newest attempt to connect."""
        factory: Any = self.reactor.tcpClients[index][2]
        protocol = factory.buildProtocol(None)
        protocol.makeConnection(Transport())
        self.protocols.append(protocol._wrappedProtocol)
        return protocol._wrappedProtocol

    def refuse(self) -> None:
        """Refuse the newest attempt to connect."""
        factory: Any = self.reactor.tcpClients[-1][2]
        factory.clientConnectionFailed(None, Failure(ConnectionRefusedError()))

    def start(self) -> Run:
        """Accept all and run."""
        while self.connecting.called is False:
            self.accept()
        self.running = ensureDeferred(self.client.run())
        return self

    def taken(self, index: int) -> bytes:
        """What one connection sent since the last time."""
        data: bytes = self.protocols[index].transport.value()
        self.protocols[index].transport.clear()
        return data

    def echo(self) -> None:
        """Send back everything."""
        for index, protocol in enumerate(self.protocols):
            if data := self.taken(index):
                protocol.dataReceived(data)

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.reactor.advance(TICK)


class TrafficClientTests(SynchronousTestCase):
    def report(self, run: Run) -> dict[str, Any]:
        assert run.running is not None
        run.tick()
        return self.successResultOf(run.running)

    def test_clean(self) -> None:
        """Echoed traffic gives a clean report, which adds up."""
        run = Run().start()
        for _ in range(10):
            run.tick()
            run.echo()
        run.client.drain()
        report = self.report(run)
        self.assertTrue(isClean(report))
        self.assertEqual(report["sent"], report["received"])
        self.assertEqual(report["sent"], sum(one["sent"] for one in report["connections"]))
        # Two connections at 3200 bytes/s for 0.1 s, the first tick at once.
        self.assertEqual(report["sent"], 2 * 32 * 11)

    def test_connectionsDiffer(self) -> None:
        """No connection sends what another one, or another seed, sends."""
        run, other = Run().start(), Run(TrafficSettings("10.77.0.10", connections=1, seed=4)).start()
        first, second = run.taken(0), run.taken(1)
        self.assertNotEqual(first[:16], second[:16])
        self.assertNotEqual(first[:16], other.taken(0)[:16])

    def test_window(self) -> None:
        """Without an echo no more than the window is under way."""
        run = Run().start()
        run.tick(100)
        self.assertEqual(len(run.taken(0)), SETTINGS.window)

    def test_drainWaits(self) -> None:
        """The report comes when the last byte is back, and nothing is sent meanwhile."""
        run = Run().start()
        run.client.drain()
        run.tick(10)
        assert run.running is not None
        self.assertNoResult(run.running)
        run.echo()
        self.assertTrue(isClean(self.report(run)))

    def test_drainTimeout(self) -> None:
        """What is not back in time is lost."""
        run = Run().start()
        run.client.drain()
        run.reactor.advance(SETTINGS.drainTimeout)
        report = self.report(run)
        self.assertEqual(report["lost"], 64)
        self.assertFalse(isClean(report))

    def test_reset(self) -> None:
        """A connection that ends is a loss, even if all its bytes came back, and is not waited for."""
        run = Run().start()
        run.echo()
        run.protocols[0].connectionLost(Failure(ConnectionDone()))
        run.tick(5)
        self.assertEqual(run.taken(0), b"")
        run.client.drain()
        run.echo()
        report = self.report(run)
        self.assertEqual((report["lost"], report["resets"]), (0, 1))
        self.assertFalse(isClean(report))

    def test_resetInDrain(self) -> None:
        """A connection that is gone is not waited for: its bytes are lost."""
        run = Run().start()
        run.protocols[1].dataReceived(run.taken(1))
        run.client.drain()
        run.protocols[0].connectionLost(Failure(ConnectionDone()))
        report = self.report(run)
        self.assertEqual((report["lost"], report["resets"]), (32, 1))

    def test_doubled(self) -> None:
        """Bytes that come twice are found."""
        run = Run().start()
        data = run.taken(0)
        run.protocols[0].dataReceived(data + data)
        run.client.drain()
        run.echo()
        report = self.report(run)
        self.assertEqual((report["doubled"], report["lost"]), (32, 0))
        self.assertFalse(isClean(report))

    def test_outage(self) -> None:
        """The outage is told for all connections, and for each."""
        run = Run().start()
        for _ in range(20):
            run.tick()
            run.echo()
        run.client.mark(run.reactor.seconds())
        run.tick(15)
        run.protocols[0].dataReceived(run.taken(0))
        run.tick(10)
        run.client.drain()
        run.echo()
        report = self.report(run)
        self.assertAlmostEqual(report["outage_ms"], 150.0)
        self.assertEqual([round(one["outage_ms"]) for one in report["connections"]], [150, 250])
        self.assertAlmostEqual(report["usual_gap_ms"]["p99"], 10.0)

    def test_outageWithoutEnd(self) -> None:
        """An outage that did not end lasts until the report."""
        run = Run().start()
        run.client.mark(run.reactor.seconds())
        run.client.drain()
        run.reactor.advance(SETTINGS.drainTimeout)
        self.assertAlmostEqual(self.report(run)["outage_ms"], 5000.0)

    def test_progress(self) -> None:
        """It tells how far it is, twice a second."""
        run = Run().start()
        for _ in range(100):
            run.tick()
            run.echo()
        progress = [event for event in run.events if event["event"] == "progress"]
        self.assertIn(len(progress), (2, 3))
        self.assertEqual(progress[-1]["resets"], 0)

    def test_retriesConnecting(self) -> None:
        """A service that is not there yet is asked again."""
        run = Run()
        run.refuse()
        run.reactor.advance(0.2)
        run.start()
        self.assertEqual(run.events[0]["event"], "connected")

    def test_serviceMissing(self) -> None:
        """A service that never appears is an error that says where."""
        run = Run()
        run.reactor.advance(SETTINGS.connectTimeout + 1)
        run.refuse()
        error = self.failureResultOf(run.connecting, ConfigError)
        self.assertIn("10.77.0.10 port 7", error.getErrorMessage())

    def test_verdicts(self) -> None:
        """The memory check is asked before and after."""
        run = Run(TrafficSettings("10.77.0.10", connections=1, verdictPort=1001))
        run.accept()
        for word in (b"3 ok\n", b"9 CORRUPT\n"):
            reader = run.accept()
            self.assertEqual(run.reactor.tcpClients[-1][1], 1001)
            run.protocols.remove(reader)
            reader.dataReceived(word)
            reader.connectionLost(Failure(ConnectionDone()))
            if run.running is None:
                run.start()
                run.echo()
                run.client.drain()
                run.tick()
        report = self.report(run)
        self.assertEqual(report["memory_check"], ["3 ok", "9 CORRUPT"])
        self.assertFalse(isClean(report))

    def test_hung(self) -> None:
        """A connection that gets nothing for long, and has something due, is hung; nobody waits longer for it."""
        run = Run(TrafficSettings("10.77.0.10", connections=2, drainTimeout=30.0, hungAfter=3.0)).start()
        run.client.drain()
        run.protocols[1].dataReceived(run.taken(1))
        run.tick(298)
        assert run.running is not None
        self.assertNoResult(run.running)
        run.tick(2)
        report = self.report(run)
        self.assertEqual((report["hung"], [one["hung"] for one in report["connections"]]), (1, [True, False]))
        self.assertFalse(isClean(report))

    def test_kindsInTurn(self) -> None:
        """The kinds are opened in turn, and then the same to the other address."""
        run = Run(TrafficSettings("10.77.0.10", "fd77::10", "echo,upload", connections=4)).start()
        opened = [(client[0], client[1]) for client in run.reactor.tcpClients]
        self.assertEqual(opened, [("10.77.0.10", 7), ("10.77.0.10", 9), ("fd77::10", 7), ("fd77::10", 9)])

    def test_unknownKind(self) -> None:
        """A kind that is none is refused."""
        self.assertIn(
            "smalltalk", str(self.assertRaises(ConfigError, TrafficSettings, "h", kinds="echo,smalltalk"))
        )

    def test_newcomers(self) -> None:
        """More connections are opened in time, until the mark."""
        run = Run().start()
        run.client.open(10, 0.1)
        for _ in range(25):
            run.tick()
            if len(run.reactor.tcpClients) > len(run.protocols):
                run.accept()
            run.echo()
        run.client.mark(run.reactor.seconds())
        run.tick(50)
        self.assertEqual(len(run.reactor.tcpClients), 2 + 3)
        run.echo()
        run.client.drain()
        run.echo()
        report = self.report(run)
        self.assertTrue(isClean(report))
        self.assertEqual(len(report["connections"]), 5)

    def test_unopened(self) -> None:
        """A newcomer that finds nobody is a fault; the report waits for one that may still come about."""
        run = Run().start()
        run.client.open(2, 0.01)
        run.tick(2)
        run.echo()
        run.client.drain()
        run.echo()
        run.refuse()
        run.tick(5)
        assert run.running is not None
        self.assertNoResult(run.running)
        run.accept(-2)
        report = self.report(run)
        self.assertEqual((report["unopened"], len(report["connections"])), (1, 3))
        self.assertFalse(isClean(report))


class DownloadTests(SynchronousTestCase):
    def setUp(self) -> None:
        settings = TrafficSettings("10.77.0.10", kinds="download", connections=1, bulkRate=100_000)
        self.run_ = Run(settings).start()
        self.peer = self.run_.protocols[0]
        self.numbers = numbers()
        self.position = 0

    def give(self, length: int) -> None:
        self.peer.dataReceived(self.numbers[self.position : self.position + length])
        self.position += length

    def report(self) -> dict[str, Any]:
        self.run_.tick()
        assert self.run_.running is not None
        return self.successResultOf(self.run_.running)

    def test_clean(self) -> None:
        """It is over when more came than can have been under way, and the report says how much that was."""
        self.give(1000)
        self.run_.client.drain()
        self.give(65_535)
        self.run_.tick()
        assert self.run_.running is not None
        self.assertNoResult(self.run_.running)
        self.give(1)
        report = self.report()
        self.assertTrue(isClean(report))
        self.assertEqual(report["received"], 66_536)

    def test_rate(self) -> None:
        """It takes no more than its rate."""
        self.give(2000)
        self.assertTrue(self.peer.transport.paused)
        self.run_.tick(2)
        self.assertFalse(self.peer.transport.paused)

    def test_lost(self) -> None:
        """A piece that is missing is lost."""
        self.give(100)
        self.position += 51
        self.run_.client.drain()
        self.give(70_000)
        report = self.report()
        self.assertGreaterEqual(report["lost"], 51)
        self.assertFalse(isClean(report))


class UploadTests(SynchronousTestCase):
    def setUp(self) -> None:
        settings = TrafficSettings("10.77.0.10", kinds="upload", connections=1, bulkRate=1_000_000)
        self.run_ = Run(settings).start()
        self.run_.tick(2)
        self.peer = self.run_.protocols[0]
        self.data = self.run_.taken(0)
        self.run_.client.drain()

    def tell(self, *blocks: bytes) -> None:
        for block in blocks:
            self.peer.dataReceived(hashlib.md5(block).hexdigest().encode() + b"\n")

    def report(self) -> dict[str, Any]:
        self.run_.tick()
        assert self.run_.running is not None
        return self.successResultOf(self.run_.running)

    def test_clean(self) -> None:
        """It ends its side, and is over when the rest was told as well; the guest may close then."""
        self.assertTrue(self.peer.transport.halfClosed)
        self.tell(self.data[:SINK_BLOCK], self.data[SINK_BLOCK:])
        self.peer.connectionLost(Failure(ConnectionDone()))
        report = self.report()
        self.assertTrue(isClean(report))
        self.assertEqual((report["sent"], report["received"]), (30_000 // 16 * 16, 30_000 // 16 * 16))

    def test_closedEarly(self) -> None:
        """A guest that closes before it told everything is a loss."""
        self.tell(self.data[:SINK_BLOCK])
        self.peer.connectionLost(Failure(ConnectionDone()))
        report = self.report()
        self.assertEqual((report["lost"], report["resets"]), (len(self.data) - SINK_BLOCK, 1))


class MemoryCheckTests(SynchronousTestCase):
    def test_words(self) -> None:
        """Memory is intact when both words are ok, and the second is not older than the first."""
        cases = {
            ("", ""): True,
            ("3 ok", "3 ok"): True,
            ("3 ok", "12 ok"): True,
            ("12 ok", "3 ok"): False,
            ("3 ok", "5 CORRUPT"): False,
            ("3 ok", ""): False,
            ("3 ok", "no answer in time"): False,
        }
        for words, intact in cases.items():
            self.assertEqual(isMemoryIntact(*words), intact, words)


class ArgumentTests(SynchronousTestCase):
    def test_roundTrip(self) -> None:
        """The command line says the same as the settings it was made of."""
        for settings in (
            SETTINGS,
            TrafficSettings("h", "::1", "upload,echo", 1, 2, 3, 4, 4.5, 5.5, 6.5, 7, 8),
        ):
            self.assertEqual(_arguments(settings.arguments()), settings)
