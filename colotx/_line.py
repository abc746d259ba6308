"""
One end of a stream that comes and goes: a connection to somebody, or from somebody, made anew whenever it is lost.

A new client of a listening line B{replaces} the one before, because one that comes back after a crash must not wait
for its own ghost. This module does not know what the bytes mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, maybeDeferred, succeed
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint
from twisted.internet.error import CannotListenError, ConnectError
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from colotx._streamport import removeStaleSocket
from colotx._writenow import writeNow
from colotx.comparesettings import Endpoint
from colotx.errors import ConfigError, StreamError

RETRY = 0.2
"""Seconds between two attempts to connect."""

RETRY_AFTER_GARBAGE = 5.0
"""The same, when the one before ended because nothing made sense."""

CONNECT_TIMEOUT = 5.0
"""Seconds an attempt may take."""

Receiver = Callable[[bytes], object]


@implementer(IPushProducer)
class _Connection(Protocol):
    transport: Any

    def __init__(self, line: Line) -> None:
        self._line = line
        self._receive: Receiver = lambda data: None
        self.writable = True
        self.gone: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        if hasattr(self.transport, "setTcpNoDelay"):
            self.transport.setTcpNoDelay(True)
            self.transport.setTcpKeepAlive(True)
        self.transport.registerProducer(self, True)
        self._receive = self._line._attached(self)

    def dataReceived(self, data: bytes) -> None:
        try:
            self._receive(data)
        except StreamError as error:
            self._line._broken(error)
            self.transport.abortConnection()

    def pauseProducing(self) -> None:
        self.writable = False

    def resumeProducing(self) -> None:
        self.writable = True
        self._line._flush()

    def stopProducing(self) -> None:
        self.writable = False

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._line._detached(self, reason)
        self.gone.callback(None)


class Line:
    """
    The stream at an L{Endpoint}.

    @ivar name: for logs.
    @ivar waiting: bytes that were written and not taken by a connection yet.
    @ivar paused: whether nothing is read.
    """

    log = Logger()
    waiting = 0
    paused = False

    def __init__(
        self,
        reactor: Any,
        name: str,
        endpoint: Endpoint,
        opened: Callable[[], Receiver],
        lost: Callable[[], object],
        relieved: Callable[[], object],
    ) -> None:
        """
        @param opened: called for every new connection; what it returns is given this connection's bytes, and may
            raise L{StreamError} to end it.
        @param lost: called when there is no connection any more.
        @param relieved: called when less is waiting.
        """
        self.name = name
        self._reactor = reactor
        self._endpoint = endpoint
        self._opened = opened
        self._lost = lost
        self._relieved = relieved
        self._connection: _Connection | None = None
        self._queue: deque[bytes] = deque()
        self._stopped = True
        self._garbage = False
        self._listening: Any = None
        self._connecting: Deferred[None] = succeed(None)

    def __str__(self) -> str:
        return f"{self.name} ({self._endpoint})"

    @property
    def connected(self) -> bool:
        """Whether there is another end now."""
        return self._connection is not None

    def start(self) -> None:
        """
        Listen, or begin to connect.

        @raise ConfigError: it is not possible to listen there.
        """
        self._stopped = False
        if not self._endpoint.server:
            self._connect(0)
            return
        place, factory = self._endpoint.place, self._factory()
        try:
            if isinstance(place, str):
                removeStaleSocket(place)
                self._listening = self._reactor.listenUNIX(place, factory, mode=0o600)
            else:
                host = "127.0.0.1" if place.host == "localhost" else place.host
                self._listening = self._reactor.listenTCP(place.port, factory, interface=host)
        except (CannotListenError, OSError) as error:
            reason = error.socketError if isinstance(error, CannotListenError) else error
            raise ConfigError(f"{self}: cannot listen there: {reason}") from error

    async def stop(self) -> None:
        """End the connection and accept no other."""
        self._stopped = True
        self._connecting.cancel()
        listening, self._listening = self._listening, None
        if listening is not None:
            # A port that finds its path removed by somebody else would never finish closing.
            if isinstance(self._endpoint.place, str):
                with suppress(OSError):
                    Path(self._endpoint.place).touch()
            await maybeDeferred(listening.stopListening)
        if self._connection is not None:
            gone = self._connection.gone
            self._connection.transport.abortConnection()
            await gone

    def write(self, data: bytes) -> None:
        """Send it, as soon as somebody is there and takes it. Nothing is dropped: the caller looks at L{waiting}."""
        connection = self._connection
        if connection is not None and connection.writable and not self._queue:
            writeNow(connection.transport, data)
        else:
            self._queue.append(data)
            self.waiting += len(data)

    def pause(self) -> None:
        """Read nothing until L{resume}, whoever is connected."""
        self.paused = True
        if self._connection is not None:
            self._connection.transport.pauseProducing()

    def resume(self) -> None:
        """Read again. Harmless when nothing was paused."""
        if self.paused:
            self.paused = False
            if self._connection is not None:
                self._connection.transport.resumeProducing()

    def _factory(self) -> Factory:
        factory: Factory = Factory.forProtocol(lambda: _Connection(self))
        factory.noisy = False
        return factory

    def _connect(self, delay: float) -> None:
        self._connecting = ensureDeferred(self._tryToConnect(delay))

    async def _tryToConnect(self, delay: float) -> None:
        place = self._endpoint.place
        endpoint: Any
        if isinstance(place, str):
            endpoint = UNIXClientEndpoint(self._reactor, place, timeout=CONNECT_TIMEOUT)  # type: ignore[no-untyped-call]
        else:
            endpoint = HostnameEndpoint(self._reactor, place.host, place.port, timeout=CONNECT_TIMEOUT)
        told = False
        with suppress(CancelledError):
            while True:
                await deferLater(self._reactor, delay)
                try:
                    await endpoint.connect(self._factory())
                    return
                except (ConnectError, OSError) as error:
                    if not told:
                        self.log.info("{line}: nobody there ({error}), trying on", line=self, error=error)
                    told, delay = True, RETRY

    def _attached(self, connection: _Connection) -> Receiver:
        before, self._connection = self._connection, connection
        if before is not None:
            self.log.info("{line}: a new client replaces the one before", line=self)
            before.transport.abortConnection()
            self._lost()
        else:
            self.log.info("{line}: connected", line=self)
        receiver = self._opened()
        if self.paused:
            connection.transport.pauseProducing()
        self._flush()
        return receiver

    def _flush(self) -> None:
        connection = self._connection
        if connection is None or not self._queue:
            return
        while self._queue and connection.writable:
            data = self._queue.popleft()
            self.waiting -= len(data)
            writeNow(connection.transport, data)
        self._relieved()

    def _broken(self, error: StreamError) -> None:
        self._garbage = True
        self.log.error("{line}: disconnected: {error}", line=self, error=error)

    def _detached(self, connection: _Connection, reason: Failure) -> None:
        if connection is not self._connection:
            return
        self._connection = None
        if self._stopped:
            return
        self.log.warn("{line}: connection lost: {reason}", line=self, reason=reason.getErrorMessage())
        self._lost()
        if not self._endpoint.server:
            self._connect(RETRY_AFTER_GARBAGE if self._garbage else RETRY)
            self._garbage = False
