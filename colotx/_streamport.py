"""
Frame ports on unix sockets, in the framing of QEMU's C{-netdev stream}.

The client's side is for a guest's NIC, the listening side for the outside. This module does not know what is in
a frame.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, fail, succeed
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.error import CannotListenError, ConnectError
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from colotx._portbase import HIGH_WATER, MAX_FRAME, QUEUE_LIMIT, BasePort
from colotx._writenow import writeNow
from colotx.errors import ConfigError, GuestLost, GuestTimeout, StreamError
from colotx.interfaces import IFramePort

log = Logger()

_PIECE = 1 << 16
_LENGTH = struct.Struct(">I")


class FrameDecoder:
    """Cut QEMU's stream framing (C{net/stream.c}) into frames, in any chunking."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """
        @return: the frames that became complete; those of length zero are left out.
        @raise StreamError: a length above L{MAX_FRAME}. The decoder is of no use afterwards.
        """
        buffer = self._buffer
        buffer += data
        frames = []
        position, end = 0, len(buffer)
        while end - position >= 4:
            (length,) = _LENGTH.unpack_from(buffer, position)
            if length > MAX_FRAME:
                raise StreamError(f"a frame of {length} bytes was announced, the limit is {MAX_FRAME}")
            following = position + 4 + length
            if following > end:
                break
            if length:
                frames.append(bytes(buffer[position + 4 : following]))
            position = following
        del buffer[:position]
        return frames


def encodeFrame(frame: bytes) -> bytes:
    """The frame with its length in front."""
    return _LENGTH.pack(len(frame)) + frame


@implementer(IPushProducer)
class _FrameProtocol(Protocol):
    """One connection of a stream port: decoder, sending queue, pausing in both directions."""

    transport: Any

    def __init__(self, port: _StreamPort) -> None:
        self._port = port
        self._decoder = FrameDecoder()
        self._queue: deque[bytes] = deque()
        self.queued = 0
        self._writable = True
        self._broken = False
        self._waiting: list[Deferred[None]] = []

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)
        self._port._attached(self)

    def dataReceived(self, data: bytes) -> None:
        try:
            frames = self._decoder.feed(data)
        except StreamError as error:
            self._broken = True
            self.transport.abortConnection()
            self._port._broken(self, error)
        else:
            self._port._deliver(frames)

    def readDry(self) -> None:
        # The transport only reads when the reactor says so, and not at all while paused: read its socket here.
        # An end of file or an error shows again when the reactor reads, and is handled there.
        while not self._broken:
            try:
                data = self.transport.socket.recv(_PIECE)
            except OSError:
                return
            if not data:
                return
            self.dataReceived(data)

    def write(self, frames: Sequence[bytes]) -> int:
        """@return: how many frames were refused."""
        refused = 0
        for frame in frames:
            if self.queued + len(frame) + 4 > QUEUE_LIMIT:
                refused += 1
            else:
                self._queue.append(encodeFrame(frame))
                self.queued += len(frame) + 4
        self._flush()
        return refused

    def _flush(self) -> None:
        # The transport's own buffer is not ours to measure: it gets a piece only while it asks for more.
        while self._queue and self._writable:
            piece, size = [], 0
            while self._queue and size < _PIECE:
                piece.append(self._queue.popleft())
                size += len(piece[-1])
            self.queued -= size
            writeNow(self.transport, b"".join(piece))

    def pauseProducing(self) -> None:
        self._writable = False

    def resumeProducing(self) -> None:
        self._writable = True
        self._flush()

    def stopProducing(self) -> None:
        self._writable = False

    def shutDown(self) -> Deferred[None]:
        """Close, with what was not sent yet thrown away. @return: fires when the connection is gone."""
        gone: Deferred[None] = Deferred()
        self._waiting.append(gone)
        self.transport.abortConnection()
        return gone

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._port._detached(self, len(self._queue))
        for gone in self._waiting:
            gone.callback(None)


class _StreamPort(BasePort):
    """The half of a stream port that does not care who connected to whom."""

    def __init__(self, reactor: Any, path: str) -> None:
        self._reactor = reactor
        self._path = path
        self._connection: _FrameProtocol | None = None
        self._paused = False
        self._closing = False
        if len(os.fsencode(path)) > 107:
            raise ConfigError(
                f"{path}: a unix socket's path has at most 107 bytes; choose a shorter directory"
            )

    def __str__(self) -> str:
        return f"unix:{self._path}"

    @property
    def congested(self) -> bool:
        return self._connection is not None and self._connection.queued > HIGH_WATER

    @property
    def connected(self) -> bool:
        """Whether there is another end now."""
        return self._connection is not None

    def send(self, frames: Sequence[bytes]) -> None:
        if self._connection is None:
            self._drop(len(frames), "nobody is connected")
        elif refused := self._connection.write(frames):
            self._drop(refused, f"the other end does not read, {QUEUE_LIMIT} bytes are waiting for it")

    def pause(self) -> None:
        self._paused = True
        if self._connection is not None:
            self._connection.transport.pauseProducing()

    def resume(self) -> None:
        self._paused = False
        if self._connection is not None:
            self._connection.transport.resumeProducing()

    def drain(self) -> None:
        if self._connection is not None:
            self._connection.readDry()

    def _factory(self) -> Factory:
        return Factory.forProtocol(lambda: _FrameProtocol(self))

    def _attached(self, connection: _FrameProtocol) -> None:
        self._connection = connection
        if self._paused:
            connection.transport.pauseProducing()

    def _detached(self, connection: _FrameProtocol, unsent: int) -> None:
        if connection is self._connection:
            self._connection = None
        if unsent:
            self._drop(unsent, "the other end closed the connection")

    def _broken(self, connection: _FrameProtocol, error: StreamError) -> None:
        raise NotImplementedError


@implementer(IFramePort)
class StreamPort(_StreamPort):
    """
    The client of a guest's NIC. QEMU keeps the NIC when the connection drops, so a lost one is made anew.

    @ivar timeout: seconds for which connecting is tried, at L{open} and after a loss, every 50 ms.
    """

    def __init__(self, reactor: Any, path: str, timeout: float = 10.0) -> None:
        super().__init__(reactor, path)
        self.timeout = timeout
        self._connecting: Deferred[None] | None = None

    def open(self) -> Deferred[None]:
        """@raise GuestTimeout: nobody listened on the socket in time."""
        self._closing = False
        self._connecting = ensureDeferred(self._connect())
        return self._connecting

    async def _connect(self) -> None:
        endpoint: Any = UNIXClientEndpoint(self._reactor, self._path, timeout=self.timeout)  # type: ignore[no-untyped-call]
        deadline = self._reactor.seconds() + self.timeout
        while True:
            try:
                await endpoint.connect(self._factory())
                return
            except ConnectError as error:
                if self._reactor.seconds() >= deadline:
                    raise GuestTimeout(
                        f"{self._path}: no connection to the guest's NIC within {self.timeout:g} s: {error}"
                    ) from error
            await deferLater(self._reactor, 0.05)

    def close(self) -> Deferred[None]:
        self._closing = True
        if self._connecting is not None:
            self._connecting.addErrback(lambda failure: None)
            self._connecting.cancel()
        return succeed(None) if self._connection is None else self._connection.shutDown()

    def _detached(self, connection: _FrameProtocol, unsent: int) -> None:
        super()._detached(connection, unsent)
        if self._closing:
            return
        log.info("{port}: connection lost, trying to connect again", port=self)
        self._connecting = ensureDeferred(self._connect())
        self._connecting.addErrback(self._gaveUp)

    def _gaveUp(self, failure: Any) -> None:
        if not failure.check(CancelledError):
            self._fail(GuestLost(f"the guest's NIC is gone: {failure.getErrorMessage()}"))

    def _broken(self, connection: _FrameProtocol, error: StreamError) -> None:
        # A guest's NIC that sends garbage once will do it again: connecting anew could go on for ever.
        self._closing = True
        self._fail(error)


@implementer(IFramePort)
class ListeningStreamPort(_StreamPort):
    """
    A stream port others connect to, one at a time: a new client B{replaces} the one before, because one that
    comes back after a crash must not wait for its own ghost. Frames sent while nobody is connected are
    dropped, as on an unplugged cable, and counted.
    """

    def __init__(self, reactor: Any, path: str) -> None:
        super().__init__(reactor, path)
        self._listening: Any = None

    def open(self) -> Deferred[None]:
        """@raise ConfigError: the socket cannot be made, or somebody else listens on it."""
        self._closing = False
        try:
            removeStaleSocket(self._path)
            self._listening = self._reactor.listenUNIX(self._path, self._factory(), mode=0o600)
        except (CannotListenError, OSError) as error:
            return fail(ConfigError(f"{self._path}: cannot listen on this unix socket: {error}"))
        return succeed(None)

    def close(self) -> Deferred[None]:
        self._closing = True
        return ensureDeferred(self._close())

    async def _close(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            await listening.stopListening()
        if self._connection is not None:
            await self._connection.shutDown()

    def _attached(self, connection: _FrameProtocol) -> None:
        before = self._connection
        super()._attached(connection)
        if before is not None:
            log.info("{port}: a new client replaces the one before", port=self)
            before.transport.abortConnection()

    def _broken(self, connection: _FrameProtocol, error: StreamError) -> None:
        log.error("{port}: client disconnected: {error}", port=self, error=error)


def removeStaleSocket(path: str) -> None:
    """Remove a socket nobody listens on, left behind by a process that was killed."""
    if not Path(path).is_socket():
        # Connecting to any other file is refused, too.
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            return
