"""Writing at once, on real sockets."""

from __future__ import annotations

import socket

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase, TestCase

from colotx._writenow import writeNow


class Client(Protocol):
    def __init__(self) -> None:
        self.gone: Deferred[None] = Deferred()

    def connectionLost(self, reason) -> None:
        self.gone.callback(None)


class SocketTests(TestCase):
    def setUp(self) -> None:
        ours, self.other = socket.socketpair()
        self.other.setblocking(False)
        self.client = Client()
        ours.setblocking(False)
        # The reactor gets a descriptor of its own.
        reactor.adoptStreamConnection(ours.fileno(), socket.AF_UNIX, Factory(self.client))
        ours.close()
        self.transport = self.client.transport

    def tearDown(self) -> Deferred[None]:
        self.other.close()
        self.transport.abortConnection()
        return self.client.gone

    def test_atOnce(self) -> None:
        writeNow(self.transport, b"frame")
        self.assertEqual(self.other.recv(100), b"frame")

    async def test_orderIsKept(self) -> None:
        data = bytes(range(256)) * 4096
        for start in range(0, len(data), 65536):
            writeNow(self.transport, data[start : start + 65536])
        writeNow(self.transport, b"end")
        read = b""
        while not read.endswith(b"end"):
            try:
                read += self.other.recv(1 << 20)
            except BlockingIOError:
                turn: Deferred[None] = Deferred()
                reactor.callLater(0, turn.callback, None)
                await turn
        self.assertEqual(read, data + b"end")

    def test_lost(self) -> Deferred[None]:
        """It is told as with any other write."""
        self.other.close()
        writeNow(self.transport, b"frame")
        self.assertFalse(self.client.gone.called)
        return self.client.gone


class Factory:
    """Makes the one protocol."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol

    def doStart(self) -> None:
        pass

    def doStop(self) -> None:
        pass

    def buildProtocol(self, address) -> Protocol:
        return self.protocol


class OtherTransportTests(SynchronousTestCase):
    def test_written(self) -> None:
        transport = StringTransport()
        writeNow(transport, b"frame")
        self.assertEqual(transport.value(), b"frame")
