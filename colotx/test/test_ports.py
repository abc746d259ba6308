"""Tests of L{colotx.ports}."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
import subprocess
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SkipTest, SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from colotx import _tapport
from colotx._portbase import HIGH_WATER, MAX_FRAME, QUEUE_LIMIT
from colotx.errors import ConfigError, GuestLost, GuestTimeout, StreamError
from colotx.interfaces import IFramePort
from colotx.ports import (
    FrameDecoder,
    ListeningStreamPort,
    NullPort,
    StreamPort,
    TapPort,
    encodeFrame,
    parseOutside,
)


class FrameDecoderTests(SynchronousTestCase):
    """QEMU's stream framing."""

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.binary(max_size=200), max_size=20), st.integers(1, 50))
    def test_anyChunking(self, frames, chunk):
        """Whatever the chunks, the frames that come out are those that went in, without the empty ones."""
        stream = b"".join(map(encodeFrame, frames))
        decoder, out = FrameDecoder(), []
        for start in range(0, len(stream), chunk):
            out += decoder.feed(stream[start : start + chunk])
        self.assertEqual(out, [frame for frame in frames if frame])

    def test_limit(self):
        """A frame of exactly the limit passes, one byte more is refused as soon as its length is there."""
        frame = bytes(MAX_FRAME)
        self.assertEqual(FrameDecoder().feed(encodeFrame(frame)), [frame])
        error = self.assertRaises(StreamError, FrameDecoder().feed, struct.pack(">I", MAX_FRAME + 1))
        self.assertIn(str(MAX_FRAME), str(error))


class ParseOutsideTests(SynchronousTestCase):
    """The operator's word for the outside."""

    def test_kinds(self):
        """Each kind gives its port."""
        clock = MemoryReactorClock()
        self.assertIsInstance(parseOutside("none")(clock), NullPort)
        self.assertIsInstance(parseOutside("unix:/run/x.sock")(clock), ListeningStreamPort)
        tap = parseOutside("tap:vm0,bridge=br0")(clock)
        self.assertEqual((tap.name, tap.bridge), ("vm0", "br0"))
        self.assertIsNone(parseOutside("tap:vm0")(clock).bridge)

    def test_refused(self):
        """Everything else is refused, with the forms that are right."""
        for wrong in [
            "",
            "tap",
            "tap:",
            "unix:",
            "tap:a,bridge=",
            "tap:a,brigde=b",
            "none:",
            "udp:1",
            "tap:a,",
        ]:
            error = self.assertRaises(ConfigError, parseOutside, wrong)
            self.assertIn("tap:NAME", str(error), wrong)
        for name in ["a" * 16, "a b", "a/b", "..", "tap%d", "tap:a,bridge=x y"]:
            self.assertRaises(ConfigError, parseOutside, f"tap:{name}")

    def test_longPath(self):
        """A path that no unix socket can have is refused at once."""
        error = self.assertRaises(ConfigError, parseOutside("unix:/" + "x" * 107), MemoryReactorClock())
        self.assertIn("107", str(error))


class NullPortTests(SynchronousTestCase):
    """Nothing in, nothing out."""

    def test_port(self):
        """Everything can be done, and what is sent is counted."""
        port = NullPort()
        verifyObject(IFramePort, port)
        self.successResultOf(port.open())
        port.send([b"a", b"b"])
        port.pause()
        port.resume()
        port.drain()
        self.assertEqual(port.dropped, 2)
        self.successResultOf(port.close())


async def until(condition):
    """Wait, at most 10 s, for a condition that the real reactor brings about."""
    for _ in range(2000):
        if condition():
            return
        await deferLater(reactor, 0.005)
    raise AssertionError("the condition did not come true within 10 s")


class StreamPortTests(TestCase):
    """Both sides of a unix socket, on the real reactor."""

    def setUp(self):
        self.path = self.mktemp()
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        self.path = os.path.relpath(self.path)
        self.server = ListeningStreamPort(reactor, self.path)
        self.client = StreamPort(reactor, self.path, timeout=1.0)
        self.addCleanup(self.server.close)
        self.addCleanup(self.client.close)
        self.atServer, self.atClient = [], []
        self.server.receiver = self.atServer.extend
        self.client.receiver = self.atClient.extend

    async def connect(self):
        await self.server.open()
        await self.client.open()
        await until(lambda: self.server.connected)

    async def test_bothWays(self):
        """Frames of all sizes go both ways, in order."""
        verifyObject(IFramePort, self.client)
        verifyObject(IFramePort, self.server)
        await self.connect()
        frames = [bytes([n % 256]) * (n * 97 % 9000 + 1) for n in range(300)] + [bytes(MAX_FRAME)]
        self.client.send(frames)
        self.server.send(frames[::-1])
        await until(lambda: len(self.atServer) == len(self.atClient) == len(frames))
        self.assertEqual(self.atServer, frames)
        self.assertEqual(self.atClient, frames[::-1])

    async def test_connectRetries(self):
        """The client may come before the server."""
        opening = self.client.open()
        await deferLater(reactor, 0.02)
        self.assertFalse(opening.called)
        await self.server.open()
        await opening

    async def test_connectGivesUp(self):
        """With nobody there, opening fails when its time is over, naming the path."""
        self.client.timeout = 0.1
        error = await self.assertFailure(self.client.open(), GuestTimeout)
        self.assertIn(self.path, str(error))

    async def test_closeWhileConnecting(self):
        """Closing ends a connect under way, and its Deferred."""
        opening = self.client.open()
        await self.client.close()
        self.assertTrue(opening.called)

    async def test_pauseHoldsTheSenderBack(self):
        """Paused, nothing is read; all of it comes, in order, after resume."""
        await self.connect()
        self.client.pause()
        frames = [struct.pack(">I", n) * 300 for n in range(2000)]
        self.server.send(frames)
        await deferLater(reactor, 0.05)
        self.assertEqual(self.atClient, [])
        self.assertTrue(self.server.congested)
        self.client.resume()
        await until(lambda: len(self.atClient) == len(frames))
        self.assertEqual(self.atClient, frames)
        self.assertFalse(self.server.congested)
        self.assertEqual(self.server.dropped, 0)

    async def test_drainWhilePaused(self):
        """What has arrived in the socket is delivered before drain returns, and what follows joins on to it."""
        await self.connect()
        self.client.pause()
        self.server.send([b"one", b"two"])
        self.server._connection.transport.write(encodeFrame(b"three")[:6])
        await deferLater(reactor, 0.01)
        self.client.drain()
        self.assertEqual(self.atClient, [b"one", b"two"])
        self.server._connection.transport.write(encodeFrame(b"three")[6:])
        self.client.resume()
        await until(lambda: len(self.atClient) == 3)
        self.assertEqual(self.atClient[2], b"three")

    async def test_pauseOutlivesTheConnection(self):
        """A port that was paused stays so when its other end comes anew."""
        await self.connect()
        self.client.pause()
        await self.server.close()
        self.client.resume()
        await until(lambda: not self.client.connected)
        self.client.pause()
        await self.server.open()
        await until(lambda: self.client.connected and self.server.connected)
        self.server.send([b"x"])
        await deferLater(reactor, 0.02)
        self.assertEqual(self.atClient, [])
        self.client.resume()
        await until(lambda: self.atClient)

    async def test_reconnectGivesUp(self):
        """When the guest's NIC does not come back, the owner is told once."""
        await self.connect()
        lost: Deferred[object] = Deferred()
        self.client.onLost = lost.callback
        self.client.timeout = 0.1
        await self.server.close()
        self.assertIsInstance(await lost, GuestLost)

    async def test_queueLimit(self):
        """Beyond the limit frames are refused and counted; the first ones all arrive."""
        await self.connect()
        self.client.pause()
        frame = bytes(60000)
        count = QUEUE_LIMIT // len(frame) + 100
        for _ in range(count):
            self.server.send([frame])
        self.assertGreater(self.server.dropped, 0)
        self.assertTrue(self.server.congested)
        self.assertGreater(QUEUE_LIMIT, HIGH_WATER)
        self.client.resume()
        await until(lambda: len(self.atClient) + self.server.dropped == count)

    async def test_nobodyConnected(self):
        """Without another end frames are dropped, and counted."""
        await self.server.open()
        self.server.send([b"a"] * 3)
        self.server.pause()
        self.server.drain()
        self.server.resume()
        self.assertEqual(self.server.dropped, 3)

    async def test_nobodyReceives(self):
        """Frames that arrive with no receiver are counted."""
        await self.connect()
        self.server.receiver = None
        self.client.send([b"a"])
        await until(lambda: self.server.dropped == 1)

    async def test_newClientReplaces(self):
        """The newest client is the one that counts."""
        await self.connect()
        self.client.onLost = lambda error: None
        self.client._closing = True  # the first one must not come back and replace the second
        second = StreamPort(reactor, self.path)
        self.addCleanup(second.close)
        got = []
        second.receiver = got.extend
        await second.open()
        await until(lambda: not self.client.connected)
        self.server.send([b"hello"])
        await until(lambda: got)

    async def test_garbageFromTheGuest(self):
        """A client that is sent garbage breaks for good: no endless reconnects."""
        await self.connect()
        lost = []
        self.client.onLost = lost.append
        self.server._connection.transport.write(b"\xff" * 8)
        await until(lambda: lost and not self.client.connected)
        self.assertIsInstance(lost[0], StreamError)
        await deferLater(reactor, 0.1)
        self.assertFalse(self.client.connected)

    async def test_garbageFoundByDrain(self):
        """Garbage is also found by drain, which ends."""
        await self.connect()
        lost = []
        self.client.onLost = lost.append
        self.client.pause()
        self.server._connection.transport.write(b"\xff" * 200000)
        await deferLater(reactor, 0.01)
        self.client.drain()
        self.assertEqual(len(lost), 1)

    async def test_garbageFromAClient(self):
        """A server throws out a client that sends garbage, and takes the next."""
        await self.server.open()
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(self.path)
                peer.sendall(encodeFrame(b"good") + b"\xff" * 8)
                await until(lambda: not self.server.connected and self.server._listening)
                await deferLater(reactor, 0.01)
        self.assertIsNone(self.server.onLost)

    async def test_staleSocket(self):
        """A socket file left by a killed process is no obstacle, a living listener is."""
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(self.path)
        await self.server.open()
        error = await self.assertFailure(ListeningStreamPort(reactor, self.path).open(), ConfigError)
        self.assertIn(self.path, str(error))
        await self.client.open()

    async def test_otherFileStays(self):
        """What is no socket is not removed to make room for one, though connecting to it is refused too."""
        path = self.mktemp()
        with open(path, "w") as file:
            file.write("precious")
        await self.assertFailure(ListeningStreamPort(reactor, path).open(), ConfigError)
        with open(path) as file:
            self.assertEqual(file.read(), "precious")

    async def test_listenErrors(self):
        """A directory that does not exist is a clear error."""
        error = await self.assertFailure(ListeningStreamPort(reactor, "no/such/dir").open(), ConfigError)
        self.assertIn("no/such/dir", str(error))


class TapErrorTests(SynchronousTestCase):
    """What can go wrong when a TAP device is made."""

    def failing(self, name, number):
        """Patch a function of the module's to fail with an errno."""
        error = OSError(number, os.strerror(number))
        self.patch(_tapport, name, mock.Mock(side_effect=error))

    def message(self, port):
        return str(self.failureResultOf(port.open(), ConfigError).value)

    def test_noDevice(self):
        """Without /dev/net/tun: load the module."""
        self.patch(_tapport.os, "open", mock.Mock(side_effect=OSError(errno.ENOENT, "No such file")))
        self.assertIn("kernel module 'tun'", self.message(TapPort(Clock(), "vm0")))

    def test_hints(self):
        """Each errno of TUNSETIFF has its advice, and no descriptor is left open."""
        before = set(os.listdir("/proc/self/fd"))
        for number, word in [
            (errno.EPERM, "CAP_NET_ADMIN"),
            (errno.EBUSY, "another process"),
            (errno.EINVAL, "no single-queue TAP"),
            (errno.ENOMEM, "Cannot allocate"),
        ]:
            fake = mock.Mock(side_effect=OSError(number, os.strerror(number)))
            self.patch(_tapport.fcntl, "ioctl", fake)
            if os.access("/dev/net/tun", os.R_OK | os.W_OK):
                self.assertIn(word, self.message(TapPort(Clock(), "vm0")))
        self.assertEqual(set(os.listdir("/proc/self/fd")), before)

    def test_closed(self):
        """A port that is not open counts what it is given, and closes without complaint."""
        port = TapPort(Clock(), "vm0")
        verifyObject(IFramePort, port)
        port.send([b"x"])
        port.pause()
        port.resume()
        port.drain()
        self.assertEqual(port.dropped, 1)
        self.successResultOf(port.close())


@contextlib.contextmanager
def ownNetwork():
    """The calling thread in a network namespace of its own, so that nothing on the machine is touched."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    if _libc().unshare(0x40000000):
        os.close(home)
        raise SkipTest("needs the right to make a network namespace")
    try:
        yield
    finally:
        _libc().setns(home, 0)
        os.close(home)


def _libc():
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


class PlainReactor(Clock):
    """Remembers who wants to read and write, like the real one, but the test does the polling."""

    def __init__(self):
        super().__init__()
        self.readers, self.writers = set(), set()
        self.addReader, self.removeReader = self.readers.add, self.readers.discard
        self.addWriter, self.removeWriter = self.writers.add, self.writers.discard


class TapPortTests(SynchronousTestCase):
    """A real TAP device, in a namespace of its own."""

    def setUp(self):
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            raise SkipTest("needs /dev/net/tun")
        network = ownNetwork()
        network.__enter__()
        self.addCleanup(network.__exit__, None, None, None)
        self.reactor = PlainReactor()
        self.port = TapPort(self.reactor, "colotap0")
        self.addCleanup(self.port.close)
        self.got = []
        self.port.receiver = self.got.append

    def rawSocket(self):
        """The kernel's side of the device."""
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.addCleanup(raw.close)
        raw.bind(("colotap0", 0))
        raw.settimeout(2)
        return raw

    def openQuietly(self):
        """Open it without the kernel's own IPv6 chatter on it."""
        with contextlib.suppress(OSError), open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as knob:
            knob.write("1")
        self.successResultOf(self.port.open())
        self.port.drain()
        self.got.clear()

    def frame(self, n):
        return b"\xff" * 6 + b"\x02\0\0\0\0\x01\x88\xb5" + struct.pack(">I", n) + bytes(50)

    def test_bothWays(self):
        """Frames pass both ways; at most 64 are read in a turn, and drain takes all."""
        self.openQuietly()
        raw = self.rawSocket()
        for n in range(200):
            raw.send(self.frame(n))
        self.port.doRead()
        self.assertEqual(list(map(len, self.got)), [64])
        self.port.pause()
        self.assertNotIn(self.port, self.reactor.readers)
        self.port.drain()
        self.assertEqual(list(itertools.chain(*self.got)), [self.frame(n) for n in range(200)])
        self.port.resume()
        self.assertIn(self.port, self.reactor.readers)
        self.port.send([self.frame(1000), b"too short"])
        received = []
        while self.frame(1000) not in received:  # the socket also hears what it sent itself
            received.append(raw.recv(2000))
        self.assertEqual(self.port.dropped, 1)

    def test_queue(self):
        """What the device does not take now waits, and goes out in order when it does."""
        self.openQuietly()
        raw = self.rawSocket()
        write = self.patch(self.port, "_write", lambda frame: False)
        self.port.send([self.frame(1)])
        self.port.send([self.frame(2)])
        self.assertIn(self.port, self.reactor.writers)
        big = bytes(60000)
        self.port.send([big] * 20)
        self.assertTrue(self.port.congested)
        self.port.send([big] * 280)
        self.assertGreater(self.port.dropped, 0)
        write.restore()
        self.port.doWrite()
        self.assertFalse(self.port.congested)
        self.assertNotIn(self.port, self.reactor.writers)
        self.assertEqual([raw.recv(2000), raw.recv(2000)], [self.frame(1), self.frame(2)])

    def test_bridgeAndMtu(self):
        """It joins the bridge and gets the MTU; doing it again with what is already so is fine."""
        subprocess.run(["ip", "link", "add", "colobr0", "type", "bridge"], check=True)
        subprocess.run(["ip", "tuntap", "add", "dev", "colotap0", "mode", "tap"], check=True)
        for _ in range(2):
            port = TapPort(self.reactor, "colotap0", bridge="colobr0", mtu=1400)
            self.successResultOf(port.open())
            shown = subprocess.run(
                ["ip", "link", "show", "colotap0"], check=True, capture_output=True, text=True
            )
            self.assertIn("master colobr0", shown.stdout)
            self.assertIn("mtu 1400", shown.stdout)
            self.assertIn("UP", shown.stdout)
            self.successResultOf(port.close())

    def test_errors(self):
        """Name in use, bridge missing, no bridge, no TAP: each says so, and leaves no device behind."""
        self.successResultOf(self.port.open())

        def message(port):
            return str(self.failureResultOf(port.open(), ConfigError).value)

        self.assertIn("another process", message(TapPort(self.reactor, "colotap0")))
        self.assertIn("no such bridge", message(TapPort(self.reactor, "colotap1", bridge="nobr")))
        self.assertIn("no bridge", message(TapPort(self.reactor, "colotap1", bridge="colotap0")))
        for bridge in ["colobr1", "colobr2"]:
            subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
        subprocess.run(["ip", "tuntap", "add", "dev", "colotap2", "mode", "tap"], check=True)
        subprocess.run(["ip", "link", "set", "colotap2", "master", "colobr1"], check=True)
        self.assertIn("another bridge", message(TapPort(self.reactor, "colotap2", bridge="colobr2")))
        self.assertIn("no single-queue TAP", message(TapPort(self.reactor, "lo")))
        shown = subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout
        self.assertNotIn("colotap1", shown)

    def test_deviceGone(self):
        """When somebody deletes the device, the owner is told, and the port is closed."""
        self.openQuietly()
        lost = []
        self.port.onLost = lost.append
        subprocess.run(["ip", "link", "del", "colotap0"], check=True)
        self.port.doRead()
        self.assertEqual(len(lost), 1)
        self.assertEqual(self.reactor.readers, set())
        self.assertEqual(self.port.fileno(), -1)
