"""
Tests for L{colotx.channel}'s TLS: two ends in memory. What a channel does without TLS is in C{test_session}, what
the handshake refuses in C{test_link}.
"""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from colotx.certificates import Credentials, initAuthority, issue
from colotx.channel import READ_SIZE, WRITE_PIECE, ChannelKind, LinkTransport, clientTLS, serverTLS


class App(Protocol):
    def __init__(self):
        self.pieces = []
        self.lost = None
        self.answer = b""

    @property
    def received(self):
        return b"".join(self.pieces)

    def dataReceived(self, data):
        self.pieces.append(data)
        if self.answer:
            self.transport.write(self.answer)

    def connectionLost(self, reason):
        self.lost = reason.value


class Wire(StringTransport):
    """The transport below TLS; remembers what was asked of it."""

    options: frozenset[tuple[str, bool]] = frozenset()

    def setTcpNoDelay(self, enabled):
        self.options |= {("noDelay", enabled)}

    def setTcpKeepAlive(self, enabled):
        self.options |= {("keepAlive", enabled)}

    def abortConnection(self):
        self.disconnecting = True


class TransportTests(SynchronousTestCase):
    def setUp(self):
        directory = Path(self.mktemp())
        initAuthority(directory)
        credentials = Credentials.load(*issue(directory, ["localhost"], directory))
        clock = Clock()
        server = serverTLS(credentials, Factory.forProtocol(App), clock)
        client = clientTLS(credentials, "localhost", ChannelKind.COLO, Factory.forProtocol(App), clock)
        self.server, self.client = server.buildProtocol(None), client.buildProtocol(None)
        self.app = self.server.wrappedProtocol
        self.server.makeConnection(Wire())
        self.client.makeConnection(Wire())

    def carry(self, size=READ_SIZE):
        """Carry bytes in pieces of C{size} until none move."""
        moved = True
        while moved:
            moved = False
            for source, target in (self.client, self.server), (self.server, self.client):
                data = source.transport.value()
                source.transport.clear()
                for start in range(0, len(data), size):
                    target.dataReceived(data[start : start + size])
                    moved = True

    def test_socketOptions(self):
        for end in self.server, self.client:
            self.assertEqual(end.transport.options, {("noDelay", True), ("keepAlive", True)})
            self.assertEqual(end.transport.bufferSize, READ_SIZE)

    def test_handshake(self):
        """TLS 1.3 and ALPN, with both certificates."""
        self.carry()
        for end in self.server, self.client:
            self.assertEqual(end.getHandle().get_protocol_version_name(), "TLSv1.3")
            self.assertEqual(end.negotiatedProtocol, ChannelKind.COLO.value)
            self.assertIsNotNone(end.getPeerCertificate())

    def test_writeBeforeHandshake(self):
        """What is written early leaves after the handshake, in order."""
        self.client.write(b"a" * 100000)
        self.client.write(b"b")
        self.carry(1000)
        self.client.write(b"c")
        self.carry()
        self.assertEqual(self.app.received, b"a" * 100000 + b"bc")

    def test_largePieces(self):
        """
        The reason for L{LinkTransport}: one read of the socket is one delivery, and one write is one write. Fails
        when Twisted stops calling the methods it replaces.
        """
        self.carry()
        writes = []
        self.patch(self.client.transport, "write", writes.append)
        self.client.write(bytes(200 * 1024))
        self.assertEqual(len(writes), 1)
        self.server.dataReceived(writes[0])
        self.assertEqual([len(piece) for piece in self.app.pieces], [200 * 1024])

    def test_replaced(self):
        """Twisted still has the methods that L{LinkTransport} replaces."""
        for name in "_write", "_flushSendBIO", "_flushReceiveBIO", "_bufferedWrite", "_tlsShutdownFinished":
            self.assertTrue(callable(getattr(TLSMemoryBIOProtocol, name)))
        self.assertTrue(issubclass(LinkTransport, TLSMemoryBIOProtocol))

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.integers(0, 3 * WRITE_PIECE), max_size=4),
        st.sampled_from([100, 16384, 65536, READ_SIZE, 10**7]),
        st.booleans(),
    )
    def test_anySizes(self, sizes, read, early):
        """Bytes arrive as they were written, whatever the sizes."""
        self.setUp()
        if not early:
            self.carry()
        expected = b""
        for number, size in enumerate(sizes):
            data = bytes([number + 1]) * size
            expected += data
            self.client.write(data)
        self.carry(read)
        self.assertEqual(self.app.received, expected)

    def test_closeDelivers(self):
        """What was written before a close arrives before it, and can still be answered."""
        self.carry()
        self.app.answer = b"answer"
        self.client.write(b"last words")
        self.client.loseConnection()
        self.carry(10**6)
        self.assertEqual(self.app.received, b"last words")
        self.assertEqual(self.client.wrappedProtocol.received, b"answer")
        self.assertTrue(self.server.transport.disconnecting)
        self.server.connectionLost(Failure(ConnectionDone()))
        self.assertIsInstance(self.app.lost, ConnectionDone)

    def test_abort(self):
        """After an abort nothing more is delivered."""
        self.carry()
        self.client.write(b"late")
        self.server.abortConnection()
        self.carry()
        self.assertEqual(self.app.received, b"")
        self.server.write(b"ignored")

    def test_cut(self):
        """An end without TLS's good-bye is a lost connection."""
        self.carry()
        self.server.connectionLost(Failure(ConnectionLost()))
        self.assertIsInstance(self.app.lost, ConnectionLost)
        self.server.write(b"ignored")

    def test_corruption(self):
        """A flipped byte ends the connection; nothing of its record is delivered."""
        self.carry()
        self.client.write(b"x" * 1000)
        wire = bytearray(self.client.transport.value())
        wire[500] ^= 1
        self.client.transport.clear()
        self.server.dataReceived(bytes(wire))
        self.assertEqual(self.app.received, b"")
        self.assertTrue(self.server.transport.disconnecting)
        self.server.connectionLost(Failure(ConnectionDone()))
        self.assertIsInstance(self.app.lost, SSL.Error)
