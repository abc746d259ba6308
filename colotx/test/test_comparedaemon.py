"""The comparer of its own: records, words, settings, the lines and what joins them. Sockets only where said."""

from __future__ import annotations

import os
import struct
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import ensureDeferred
from twisted.internet.endpoints import UNIXClientEndpoint, UNIXServerEndpoint
from twisted.internet.error import ConnectionLost
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python import usage
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from colotx._line import Line
from colotx._notify import MAX_WORD, WordDecoder, encodeWord
from colotx._records import MAX_RECORD, RecordSplitter
from colotx.comparecontrol import commandTable
from colotx.comparedaemon import CompareDaemon
from colotx.comparesettings import CompareSettings, Endpoint, buildCompareSettings
from colotx.errors import ConfigError, QmpError, StreamError
from colotx.options import Options
from colotx.settings import HostPort
from colotx.test.test_qmp import shortDirectory

ENDPOINTS = ["--primary-in=unix:p", "--secondary-in=tcp:[::1]:9,server", "--outdev=unix:o,server=on"]


def datagram(payload: bytes, port: int = 9) -> bytes:
    """An Ethernet frame with UDP in IPv4."""
    udp = struct.pack(">HHHH", port, port, 8 + len(payload), 0) + payload
    ip = struct.pack(">BBHHHBBH8x", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0)
    return bytes.fromhex("020000000001 020000000002 0800") + ip + udp


def record(frame: bytes, header: int | None = None) -> bytes:
    """@param header: length of a virtio-net header; None: C{vnet_hdr_support} is off."""
    if header is None:
        return struct.pack(">I", len(frame)) + frame
    return struct.pack(">II", header + len(frame), header) + bytes(header) + frame


class RecordSplitterTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.taken: list[tuple[int, bytes]] = []

    def take(self, records: list[bytes], offset: int) -> None:
        self.assertTrue(records)
        self.taken += [(offset, one) for one in records]

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.tuples(st.sampled_from([0, 10, 12]), st.binary(max_size=90)), max_size=20),
        st.booleans(),
        st.integers(1, 150),
    )
    def test_anyChunking(self, frames: Any, vnet: bool, chunk: int) -> None:
        """What comes out is what went in, whole, but for what is empty."""
        self.taken.clear()
        parts = [(header if vnet else None, frame) for header, frame in frames]
        stream = b"".join(record(frame, header) for header, frame in parts)
        splitter = RecordSplitter(self.take, vnet)
        for start in range(0, len(stream), chunk):
            splitter.feed(stream[start : start + chunk])
        expected = [
            (4 if header is None else 8 + header, record(frame, header))
            for header, frame in parts
            if frame or header
        ]
        self.assertEqual(self.taken, expected)

    def test_oneCallForOneRead(self) -> None:
        calls: list[int] = []
        splitter = RecordSplitter(lambda records, offset: calls.append(len(records)), True)
        splitter.feed(record(b"a" * 14, 10) * 100)
        self.assertEqual(calls, [100])

    def test_limit(self) -> None:
        """The longest passes in pieces of 64 KiB; one byte more is refused when its length is there."""
        for vnet, header in ((False, None), (True, 0)):
            self.taken.clear()
            longest = record(bytes(MAX_RECORD), header)
            splitter = RecordSplitter(self.take, vnet)
            splitter.feed(longest[: 1 << 16])
            splitter.feed(longest[1 << 16 :])
            self.assertEqual([one for _, one in self.taken], [longest])
            error = self.assertRaises(
                StreamError, splitter.feed, record(b"good", header) + struct.pack(">II", MAX_RECORD + 1, 0)
            )
            self.assertIn("vnet_hdr_support", str(error))
            self.assertEqual(self.taken[1][1], record(b"good", header))

    def test_headerLongerThanRecord(self) -> None:
        """What a peer without C{vnet_hdr_support} sends looks like this."""
        splitter = RecordSplitter(self.take, True)
        error = self.assertRaises(StreamError, splitter.feed, record(datagram(b"x")))
        self.assertIn("vnet_hdr_support", str(error))
        self.assertEqual(self.taken, [])


class WordTests(SynchronousTestCase):
    def test_bothForms(self) -> None:
        """With C{vnet_hdr_support}, QEMU's form and the plain one; in any chunking."""
        plain = encodeWord(b"COLO_CHECKPOINT")
        qemus = plain[:4] + bytes(4) + plain[4:]
        for vnet, stream in ((False, plain * 2), (True, plain + qemus)):
            decoder = WordDecoder(vnet)
            words = [word for i in range(len(stream)) for word in decoder.feed(stream[i : i + 1])]
            self.assertEqual(words, [b"COLO_CHECKPOINT"] * 2)

    def test_limit(self) -> None:
        self.assertRaises(StreamError, WordDecoder(False).feed, struct.pack(">I", MAX_WORD + 1))


class SettingsTests(SynchronousTestCase):
    def parse(self, *arguments: str) -> Any:
        options = Options()
        options.parseOptions(["--role=compare", *arguments])
        return options.settings

    def test_endpoints(self) -> None:
        for text, endpoint in (
            ("unix:/a/b", Endpoint("/a/b")),
            ("unix:b,server", Endpoint("b", True)),
            ("tcp:127.0.0.1:9003,server=on", Endpoint(HostPort("127.0.0.1", 9003), True)),
            ("tcp:[::1]:9003,server=off", Endpoint(HostPort("::1", 9003))),
        ):
            self.assertEqual(Endpoint.parse(text), endpoint)
            self.assertEqual(Endpoint.parse(str(endpoint)), endpoint)

    def test_noEndpoints(self) -> None:
        for text in ("", "x", "unix:", "unix:a,", "unix:a,wait", "tcp:9", "tcp:a", "tcp:[::1]", "tcp:a:0"):
            error = self.assertRaises(ConfigError, Endpoint.parse, text)
            self.assertNotIn("\n", str(error))
        self.assertIn("107", str(self.assertRaises(ConfigError, Endpoint.parse, "unix:" + "a" * 108)))

    def test_options(self) -> None:
        got = self.parse(*ENDPOINTS, "--compare-timeout=10", "--vnet-hdr-support=on")
        self.assertEqual(got.outdev, Endpoint("o", True))
        self.assertEqual((got.compareTimeout, got.expiredScanCycle, got.maxQueueSize), (10, 1000, 1024))
        self.assertIs(got.vnetHdrSupport, True)
        self.assertIsNone(got.notifyDev)

    def test_refused(self) -> None:
        for arguments, words in (
            ([], "primary-in: must be given"),
            ([*ENDPOINTS, "--outdev=unix:p"], "outdev: unix:p is primary-in already"),
            ([*ENDPOINTS, "--notify-dev=pipe:x"], "notify-dev: 'pipe:x' is no endpoint"),
            ([*ENDPOINTS, "--compare-timeout=0"], "compare-timeout: must be 1 to"),
            ([*ENDPOINTS, "--max-queue-size=many"], "max-queue-size: 'many' is no whole number"),
            ([*ENDPOINTS, "--vnet-hdr-support=maybe"], "vnet-hdr-support: 'maybe' is neither on nor off"),
            ([*ENDPOINTS, "--vm=a/b"], "vm: use letters"),
            ([*ENDPOINTS, "--guest=qemu"], "role compare has no option 'guest'"),
            (["--role=primary", "--outdev=unix:p"], "outdev: only a daemon with --role=compare"),
            (["--role=both"], "primary, secondary, compare"),
        ):
            error = self.assertRaises(usage.UsageError, self.parse, *arguments)
            self.assertIn(words, str(error))
            self.assertNotIn("\n", str(error))
        self.assertIn("string", str(self.assertRaises(ConfigError, buildCompareSettings, {"outdev": 1})))


class MemoryTransport(StringTransport):
    """What a line needs of a transport besides what C{StringTransport} has."""

    def abortConnection(self) -> None:
        self.aborting = True

    aborting = False


class CompareDaemonTests(SynchronousTestCase):
    """All lines listen; the test is every other end."""

    def setUp(self) -> None:
        self.patch(os, "geteuid", lambda: 1000)
        self.directory = shortDirectory(self)
        self.reactor = MemoryReactorClock()
        self.reactor.listenUNIX = self.listen  # type: ignore[method-assign]
        self.factories: dict[str, Factory] = {}
        self.codes: list[int] = []
        self.make()

    def listen(self, path: str, factory: Factory, mode: int) -> Any:
        self.factories[os.path.basename(path)] = factory
        return type("Port", (), {"stopListening": lambda self: None})()

    def make(self, vnet: bool = False, **more: Any) -> None:
        place = self.directory
        names = {"primaryIn": "p", "secondaryIn": "s", "outdev": "o", "notifyDev": "n"}
        endpoints = {field: Endpoint(f"{place}/{name}", True) for field, name in names.items()}
        self.settings = CompareSettings(control=f"{place}/c", vnetHdrSupport=vnet, **endpoints)
        self.daemon = CompareDaemon(
            self.settings, self.reactor, self.codes.append, self.reactor.seconds, **more
        )
        self.daemon.startService()
        self.addCleanup(lambda: self.successResultOf(self.daemon.stopService()))
        self.events: list[tuple[str, Any]] = []
        self.patch(self.daemon._control, "emit", lambda *event: self.events.append(event))

    def connect(self, name: str) -> tuple[Any, MemoryTransport]:
        protocol = self.factories[name].buildProtocol(None)
        transport = MemoryTransport()
        protocol.makeConnection(transport)
        self.addCleanup(lambda: protocol.gone.called or self.lose(protocol))
        return protocol, transport

    def lose(self, protocol: Any) -> None:
        protocol.connectionLost(Failure(ConnectionLost()))

    def test_sameTurn(self) -> None:
        """What the secondary says in the same turn of the reactor is known when the primary's frames are judged."""
        self.make()
        (p, _), (s, _) = map(self.connect, "ps")
        judged: list[str] = []
        for side in ("primary", "secondary"):
            self.patch(self.daemon.comparer, side, lambda records, offset, side=side: judged.append(side))
        p.dataReceived(record(datagram(b"a")))
        s.dataReceived(record(datagram(b"a")))
        self.reactor.advance(0)
        self.assertEqual(judged, ["secondary", "primary"])

    def test_checkpointInTheSameTurn(self) -> None:
        """It covers what was not judged yet."""
        self.make()
        (p, _), (_, out), (n, _) = map(self.connect, "pon")
        p.dataReceived(record(datagram(b"a")))
        n.dataReceived(encodeWord(b"COLO_CHECKPOINT"))
        self.assertEqual(out.value(), record(datagram(b"a")))

    def test_equalLeaves(self) -> None:
        """Records go out as they came in, with and without virtio-net headers, of any length."""
        for header in (None, 0, 12):
            self.make(vnet=header is not None)
            (p, _), (s, _), (_, out) = map(self.connect, "pso")
            frames = b"".join(record(datagram(b"%d" % i), header) for i in range(5))
            p.dataReceived(frames)
            self.reactor.advance(0)
            self.assertEqual(out.value(), b"")
            s.dataReceived(frames)
            self.assertEqual(out.value(), frames)

    def test_words(self) -> None:
        """INIT is answered; a difference asks once; CHECKPOINT lets the primary's out and forgets the other."""
        (p, _), (s, _), (_, out), (n, notify) = map(self.connect, "pson")
        n.dataReceived(encodeWord(b"COLO_USERSPACE_PROXY_INIT"))
        self.assertEqual(notify.value(), encodeWord(b"COLO_COMPARE_GET_XEN_INIT"))
        notify.clear()
        ours = record(datagram(b"a")) + record(datagram(b"b"))
        p.dataReceived(ours)
        self.reactor.advance(0)
        s.dataReceived(record(datagram(b"c")))
        self.assertEqual(notify.value(), encodeWord(b"DO_CHECKPOINT"))
        self.assertEqual(self.events[0][0], "COLOTX_CHECKPOINT_WANTED")
        self.assertEqual(out.value(), b"")
        n.dataReceived(encodeWord(b"COLO_CHECKPOINT"))
        self.assertEqual(out.value(), ours)
        self.assertEqual(self.daemon.describeStatistics()["checkpoints"], 1)
        out.clear()
        notify.clear()
        p.dataReceived(record(datagram(b"c")))
        self.reactor.advance(0)
        self.reactor.advance(2)
        self.assertEqual((out.value(), notify.value()), (b"", b""))

    def test_requestIsRepeated(self) -> None:
        """With every scan, and to one who connects late; not after a checkpoint."""
        (p, _), (_, _) = map(self.connect, "po")
        p.dataReceived(record(datagram(b"a")))
        self.reactor.advance(0)
        self.reactor.pump([1] * 4)
        n, notify = self.connect("n")
        self.assertEqual(notify.value(), encodeWord(b"DO_CHECKPOINT"))
        self.reactor.pump([1] * 2)
        self.assertEqual(notify.value(), encodeWord(b"DO_CHECKPOINT") * 3)
        self.daemon.checkpointDone()
        self.reactor.pump([1] * 2)
        self.assertEqual(notify.value(), encodeWord(b"DO_CHECKPOINT") * 3)

    def test_unknownWord(self) -> None:
        n, notify = self.connect("n")
        n.dataReceived(encodeWord(b"COLO_WHAT"))
        self.assertEqual(notify.value(), b"")
        self.assertFalse(notify.aborting)

    def test_outdevAway(self) -> None:
        """What may leave waits for somebody to take it, in order, whole."""
        (p, _), (s, _) = map(self.connect, "ps")
        for payload in (b"a", b"b"):
            p.dataReceived(record(datagram(payload)))
            self.reactor.advance(0)
            s.dataReceived(record(datagram(payload)))
        self.assertEqual(self.daemon.describeStatus()["why"], "nobody is connected to outdev, notify-dev")
        _, out = self.connect("o")
        self.assertEqual(out.value(), record(datagram(b"a")) + record(datagram(b"b")))
        self.assertEqual(self.daemon.describeStatistics()["waiting-bytes"], 0)

    def test_backpressure(self) -> None:
        """Above the limit the primary is not read; it is again when half of that is gone; nothing is lost."""
        self.make(heldLimit=1000)
        (p, ours), (s, theirs), (_, out) = map(self.connect, "pso")
        out.producer.pauseProducing()
        records = [record(datagram(b"%3d" % i + bytes(97))) for i in range(10)]
        for one in records:
            p.dataReceived(one)
            self.reactor.advance(0)
            s.dataReceived(one)
        self.assertEqual((ours.producerState, theirs.producerState), ("paused", "producing"))
        out.producer.resumeProducing()
        self.assertEqual(ours.producerState, "producing")
        self.assertEqual(out.value(), b"".join(records))

    def test_heldByDifference(self) -> None:
        """The same with frames nobody matches; a checkpoint is asked for, and helps."""
        self.make(heldLimit=1000)
        (p, ours), (_, out), (n, notify) = map(self.connect, "pon")
        records = b"".join(record(datagram(b"%3d" % i + bytes(97))) for i in range(10))
        p.dataReceived(records)
        self.reactor.advance(0)
        self.assertEqual(ours.producerState, "paused")
        self.assertEqual(notify.value(), encodeWord(b"DO_CHECKPOINT"))
        again, anew = self.connect("p")
        self.assertEqual((ours.aborting, anew.producerState), (True, "paused"))
        n.dataReceived(encodeWord(b"COLO_CHECKPOINT"))
        self.assertEqual((out.value(), anew.producerState), (records, "producing"))

    def test_inputLost(self) -> None:
        """A checkpoint is asked for, what is held stays, half a record is forgotten."""
        (p, _), (s, _), (_, out), (n, notify) = map(self.connect, "pson")
        p.dataReceived(record(datagram(b"a")) + b"\0\0")
        self.reactor.advance(0)
        self.lose(p)
        self.assertEqual(notify.value(), encodeWord(b"DO_CHECKPOINT"))
        p, _ = self.connect("p")
        p.dataReceived(record(datagram(b"b")))
        self.reactor.advance(0)
        s.dataReceived(record(datagram(b"a")) + record(datagram(b"b")))
        self.assertEqual(out.value(), record(datagram(b"a")) + record(datagram(b"b")))

    def test_garbage(self) -> None:
        """The one who sends it is disconnected."""
        s, theirs = self.connect("s")
        s.dataReceived(b"\xff" * 8)
        self.assertTrue(theirs.aborting)

    def test_slowNotify(self) -> None:
        """Requests are not piled up for one who does not read."""
        n, notify = self.connect("n")
        notify.producer.pauseProducing()
        self.daemon._wantCheckpoint("test")
        self.reactor.pump([1] * 100)
        notify.producer.resumeProducing()
        self.assertEqual(notify.value(), encodeWord(b"DO_CHECKPOINT"))

    def test_control(self) -> None:
        """QEMU's qom-set on any path; the scan follows at once."""
        table = commandTable(self.daemon)

        def call(name: str, property: str, **more: Any) -> Any:
            return table[name].call({"path": "/objects/comp0", "property": property, **more})

        for name in ("compare_timeout", "expired_scan_cycle", "max_queue_size"):
            call("qom-set", name, value=50)
            self.assertEqual(call("qom-get", name), 50)
        self.assertEqual(call("qom-get", "vnet_hdr_support"), False)
        self.assertEqual(call("qom-get", "outdev"), f"unix:{self.directory}/o,server")
        for name, value, words in (
            ("compare_timeout", 0, "must be 1 to"),
            ("max_queue_size", -1, "must be 1 to"),
            ("vnet_hdr_support", 1, "when the daemon starts"),
            ("colour", 1, "not found"),
        ):
            self.assertIn(words, str(self.assertRaises(QmpError, call, "qom-set", name, value=value)))
        p, _ = self.connect("p")
        _, notify = self.connect("n")
        p.dataReceived(record(datagram(b"a")))
        self.reactor.advance(0)
        self.reactor.pump([0.05] * 3)
        self.assertTrue(notify.value())
        self.assertEqual(table["query-colotx-evidence"].call({})["reasons"], {"time-out": 1})
        self.assertEqual(table["query-colotx-stats"].call({})["held-frames"], 1)
        self.assertEqual(table["query-colotx-status"].call({})["status"], "waiting")
        self.assertTrue(table["query-status"].call({})["running"])
        table["colotx-checkpoint-done"].call({})
        self.assertEqual(self.daemon.comparer.heldFrames, 0)
        table["quit"].call({})
        self.reactor.advance(0)
        self.assertEqual(self.codes, [0])


class _Peer(Protocol):
    data = b""

    def dataReceived(self, data: bytes) -> None:
        self.data += data


class LineTests(TestCase):
    """On real unix sockets."""

    timeout = 20

    def setUp(self) -> None:
        self.path = os.path.join(shortDirectory(self), "s")
        self.received: list[bytes] = []
        self.lost = 0
        self.lines: list[Line] = []
        self.addCleanup(lambda: ensureDeferred(self.stopAll()))

    async def stopAll(self) -> None:
        for line in self.lines:
            await line.stop()

    def line(self, server: bool) -> Line:
        def lost() -> None:
            self.lost += 1

        line = Line(
            reactor,
            "test",
            Endpoint(self.path, server),
            lambda: self.received.append,
            lost,
            lambda: None,
        )
        self.lines.append(line)
        line.start()
        return line

    async def until(self, condition: Any) -> None:
        while not condition():
            await deferLater(reactor, 0.01)

    async def test_clientComesBack(self) -> None:
        """It waits for somebody to listen, and connects again when it lost the connection."""
        line = self.line(server=False)
        line.write(b"early")
        await deferLater(reactor, 0.05)
        peers: list[_Peer] = []

        def build() -> _Peer:
            peers.append(_Peer())
            return peers[-1]

        port = await UNIXServerEndpoint(reactor, self.path).listen(Factory.forProtocol(build))
        await self.until(lambda: peers and peers[0].data == b"early")
        peers[0].transport.loseConnection()
        await self.until(lambda: len(peers) == 2)
        peers[1].transport.write(b"hello")
        await self.until(lambda: self.received == [b"hello"])
        self.assertEqual(self.lost, 1)
        await line.stop()
        await port.stopListening()

    async def test_serverReplaces(self) -> None:
        """A new client replaces the one before; a second listener is told what is wrong."""
        line = self.line(server=True)
        factory = Factory.forProtocol(_Peer)
        first = await UNIXClientEndpoint(reactor, self.path).connect(factory)
        await self.until(lambda: line.connected)
        second = await UNIXClientEndpoint(reactor, self.path).connect(factory)
        await self.until(lambda: self.lost == 1)
        line.write(b"x")
        await self.until(lambda: second.data == b"x")
        self.assertEqual(first.data, b"")
        error = self.assertRaises(ConfigError, self.line, True)
        self.assertIn(self.path, str(error))


class StartTests(TestCase):
    def test_noPlace(self) -> Any:
        """One line in the log, exit code 1."""
        directory = shortDirectory(self)
        codes: list[int] = []
        endpoints = [Endpoint(f"{directory}/{name}", True) for name in "ps"]
        settings = CompareSettings(
            control=f"{directory}/c",
            primaryIn=endpoints[0],
            secondaryIn=endpoints[1],
            outdev=Endpoint(f"{directory}/nowhere/o", True),
        )
        daemon = CompareDaemon(settings, reactor, codes.append, Clock().seconds)
        daemon.startService()
        self.assertEqual(codes, [1])
        return daemon.stopService()
