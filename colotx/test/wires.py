"""In-memory COLO channels for tests: two ends, or one end and a script. Nothing moves until C{flush}."""

from __future__ import annotations

from collections import deque

from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from colotx.protocol import ColoConnection


class PipeTransport:
    """One end of a pipe: what is written waits in C{sent} until somebody carries it."""

    disconnecting = False

    def __init__(self) -> None:
        self.sent: deque[bytes] = deque()
        self.producer = None
        self.paused = False
        self.aborted = False
        self.closed = False

    def write(self, data: bytes) -> None:
        assert isinstance(data, bytes)
        if not self.closed:
            self.sent.append(data)

    def registerProducer(self, producer, streaming) -> None:
        assert streaming
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def abortConnection(self) -> None:
        self.aborted = self.closed = True

    def loseConnection(self) -> None:
        self.closed = True

    def take(self) -> bytes:
        """All that was written."""
        data = b"".join(self.sent)
        self.sent.clear()
        return data


def connect(clock: Clock) -> tuple[ColoConnection, PipeTransport]:
    """A connection and its transport; the test plays the peer."""
    connection, transport = ColoConnection(clock), PipeTransport()
    connection.makeConnection(transport)
    return connection, transport


class WirePair:
    """Two connections and the wire between them."""

    def __init__(self, clock: Clock) -> None:
        self.left, self.leftTransport = connect(clock)
        self.right, self.rightTransport = connect(clock)

    def flush(self) -> int:
        """Carry until nothing moves any more. @return: bytes carried."""
        carried, moved = 0, True
        while moved:
            moved = False
            for source, target, sink in (
                (self.leftTransport, self.rightTransport, self.right),
                (self.rightTransport, self.leftTransport, self.left),
            ):
                if source.sent and not target.paused and not target.closed:
                    data = source.sent.popleft()
                    carried += len(data)
                    moved = True
                    sink.dataReceived(data)
        return carried

    def cut(self) -> None:
        """Both ends lose the connection; what was on its way is lost."""
        for connection in (self.left, self.right):
            connection.connectionLost(Failure(ConnectionDone()))

    def end(self) -> None:
        """Deliver the ends of transports that were aborted."""
        if self.leftTransport.aborted or self.rightTransport.aborted:
            for connection in (self.left, self.right):
                connection.connectionLost(Failure(ConnectionAborted()))
