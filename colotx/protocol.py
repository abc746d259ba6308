"""
The framed COLO message exchange: a sans-IO codec, and the Twisted protocol on top of it.

The bytes are exactly QEMU's (QEMU-FACTS, "The COLO message exchange"; C{migration/colo.c}): a message is a be32;
VMSTATE_SIZE is followed by a be64; after VMSTATE_SEND comes the RAM part of the migration stream, after the size a
blob of that many bytes. One channel carries all three kinds, and only the order of the exchange tells which is due.
So the decoder does not guess: its owner asks for the next thing by kind (message, size, stream, blob) and gets
C{None} while the bytes are not there yet.

This file knows no role, no guest and no checkpoint; who sends what when is L{colotx.checkpoint}'s.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol as TypingProtocol
from typing import TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime, ITransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from colotx.errors import (
    ColoError,
    InvalidMessage,
    OversizeError,
    PeerLost,
    PeerTimeout,
    TruncatedError,
    UnexpectedMessage,
)
from colotx.vmstate import InitialReader, RamEvent

_T = TypeVar("_T")

MAX_DEVICE_STATE = 256 * 1024 * 1024
"""Default limit of VMSTATE_SIZE's value, bytes. QEMU itself sets none and aborts on 2^62; real blobs are 14-105 KB."""

MAX_BUFFERED = 256 * 1024
"""Bytes a connection keeps that nobody has asked for yet; above it, the transport is paused."""

_MESSAGE = struct.Struct(">I")
_VALUE = struct.Struct(">Q")


class ColoMessage(enum.IntEnum):
    """The seven messages, under their numbers on the wire (C{qapi/migration.json}, COLOMessage)."""

    CHECKPOINT_READY = 0
    CHECKPOINT_REQUEST = 1
    CHECKPOINT_REPLY = 2
    VMSTATE_SEND = 3
    VMSTATE_SIZE = 4
    VMSTATE_RECEIVED = 5
    VMSTATE_LOADED = 6


class StreamReader(TypingProtocol):
    """What reads a self-delimiting stream: L{colotx.vmstate.CheckpointReader} and its like."""

    @property
    def complete(self) -> bool:
        """All of the stream was read."""

    def feed(self, data: bytes | memoryview) -> tuple[Sequence[RamEvent], int]:
        """@return: what was read, and how many bytes of C{data} belong to the stream."""


class WholeStream:
    """Lets an L{InitialReader}, to which every byte up to its end belongs, be read as a L{StreamReader}."""

    def __init__(self, reader: InitialReader) -> None:
        self._reader = reader

    @property
    def complete(self) -> bool:
        """All of the initial stream was read."""
        return self._reader.complete is not None

    def feed(self, data: bytes | memoryview) -> tuple[Sequence[RamEvent], int]:
        """As L{StreamReader.feed}."""
        return self._reader.feed(data), len(data)


Consumer = Callable[[bytes | memoryview, Sequence[RamEvent]], Awaitable[None] | None]
"""Takes the next raw bytes of a stream and what they mean; more is read when its awaitable is done."""


def encodeMessage(message: ColoMessage, value: int | None = None) -> bytes:
    """
    The bytes of a message.

    @param value: for VMSTATE_SIZE, and only for it: the size in bytes, below 2^64.
    @raise ValueError: a value where none belongs, or none where one does.
    """
    if (value is None) == (message is ColoMessage.VMSTATE_SIZE):
        raise ValueError(f"{message.name} {'needs a value' if value is None else 'has no value'}")
    head = _MESSAGE.pack(message)
    return head if value is None else head + _VALUE.pack(value)


class ColoDecoder:
    """
    The receiving half of the codec. Feed it bytes in any chunking; ask it for what is due.

    Memory: what was fed and not asked for (C{buffered}); the owner stops feeding when that is too much.
    """

    def __init__(self) -> None:
        self._chunks: deque[memoryview] = deque()
        self._ended = False
        self._sizePending = False
        self.buffered = 0

    def feed(self, data: bytes | memoryview) -> None:
        """The next bytes of the channel."""
        if data:
            self._chunks.append(memoryview(data))
            self.buffered += len(data)

    def end(self) -> None:
        """The channel ended. What was fed can still be asked for."""
        self._ended = True

    def nextMessage(self, expected: ColoMessage | None = None) -> ColoMessage | None:
        """
        The next message, or None while it is not there.

        @param expected: the only message that may come here; None: any.
        @raise InvalidMessage: 7 or above.
        @raise UnexpectedMessage: another than expected (QEMU's words).
        @raise TruncatedError: the channel ended within a message.
        @raise PeerLost: the channel ended before one.
        """
        head = self._take(_MESSAGE.size, "a COLO message")
        if head is None:
            return None
        (number,) = _MESSAGE.unpack(head)
        try:
            message = ColoMessage(number)
        except ValueError:
            raise InvalidMessage(
                f"Invalid message {number} on the COLO channel: the peer is no COLO peer, or out of step"
            ) from None
        if expected is not None and message is not expected:
            raise UnexpectedMessage(
                f"Unexpected COLO message {number}, expected {int(expected)} ({message.name} for {expected.name})"
            )
        return message

    def nextSize(self, limit: int = MAX_DEVICE_STATE) -> int | None:
        """
        The next VMSTATE_SIZE message and its value in bytes, or None while they are not whole.

        @raise OversizeError: above C{limit}; nothing of that size was allocated.
        """
        if not self._sizePending:
            if self.nextMessage(ColoMessage.VMSTATE_SIZE) is None:
                return None
            self._sizePending = True
        head = self._take(_VALUE.size, "the value of VMSTATE_SIZE", atBoundary=False)
        if head is None:
            return None
        self._sizePending = False
        (size,) = _VALUE.unpack(head)
        if size > limit:
            raise OversizeError(f"a device state of {size} bytes was announced; the limit is {limit}")
        return int(size)

    def nextStream(self, reader: StreamReader) -> tuple[memoryview, Sequence[RamEvent]] | None:
        """
        Feed the next buffered piece to C{reader}; what follows its end stays for the next question.

        @return: the bytes that belonged to the stream and what they mean, or None when there are no bytes.
        @raise colotx.errors.StreamError: the reader's.
        """
        if not self._chunks:
            self._checkEnd("the RAM section", atBoundary=False)
            return None
        chunk = self._chunks.popleft()
        events, consumed = reader.feed(chunk)
        self.buffered -= consumed
        if consumed < len(chunk):
            self._chunks.appendleft(chunk[consumed:])
        return chunk[:consumed], events

    def nextBytes(self, limit: int) -> memoryview | None:
        """Up to C{limit} (at least 1) of the next bytes, without copying, or None when there are none."""
        if not self._chunks:
            self._checkEnd("the device state", atBoundary=False)
            return None
        chunk = self._chunks.popleft()
        if len(chunk) > limit:
            self._chunks.appendleft(chunk[limit:])
            chunk = chunk[:limit]
        self.buffered -= len(chunk)
        return chunk

    def _take(self, size: int, what: str, atBoundary: bool = True) -> bytes | None:
        if self.buffered < size:
            self._checkEnd(what, atBoundary and not self.buffered)
            return None
        self.buffered -= size
        first = self._chunks[0]
        if len(first) > size:
            self._chunks[0] = first[size:]
            return bytes(first[:size])
        taken = bytearray()
        while len(taken) < size:
            chunk = self._chunks.popleft()
            missing = size - len(taken)
            taken += chunk[:missing]
            if len(chunk) > missing:
                self._chunks.appendleft(chunk[missing:])
        return bytes(taken)

    def _checkEnd(self, what: str, atBoundary: bool) -> None:
        if not self._ended:
            return
        if atBoundary:
            raise PeerLost("the COLO channel was closed")
        raise TruncatedError(f"the COLO channel was closed within {what}")


class ColoConnection(Protocol):
    """
    The COLO channel on a Twisted transport: awaitable sending and receiving, one receiver at a time, with
    backpressure both ways. It never reads on while more than L{MAX_BUFFERED} bytes wait unasked for.

    @ivar whenLost: a callable or None, called once with the L{ColoError} that ended the connection.
    """

    def __init__(self, clock: IReactorTime, stallTimeout: float = 30.0) -> None:
        """
        @param clock: for the time-outs.
        @param stallTimeout: seconds the peer may refuse to take what we write.
        """
        self._clock = clock
        self._stallTimeout = stallTimeout
        self._decoder = ColoDecoder()
        self._failed: ColoError | None = None
        self._ended = False
        self._readWaiter: Deferred[None] | None = None
        self._writeWaiters: list[Deferred[None]] = []
        self._readPaused = False
        self._writePaused = False
        self.whenLost: Callable[[ColoError], None] | None = None

    # -- Twisted's side

    def connectionMade(self) -> None:
        assert self.transport is not None
        # mypy: ITransport does not declare the producer API that every stream transport has.
        self.transport.registerProducer(self, True)  # type: ignore[attr-defined]

    def dataReceived(self, data: bytes) -> None:
        self._decoder.feed(data)
        if self._readWaiter is not None:
            waiter, self._readWaiter = self._readWaiter, None
            waiter.callback(None)
        self._balance()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._ended = True
        self._decoder.end()
        lost = self._failed or PeerLost(f"the COLO channel was closed: {reason.getErrorMessage()}")
        if self._readWaiter is not None:
            waiter, self._readWaiter = self._readWaiter, None
            waiter.callback(None)
        self._wakeWriters()
        self._tellLost(lost)

    def pauseProducing(self) -> None:
        """The transport's buffer is full."""
        self._writePaused = True

    def resumeProducing(self) -> None:
        """The transport takes more."""
        self._writePaused = False
        self._wakeWriters()

    def stopProducing(self) -> None:
        """The transport is gone."""
        self._wakeWriters()

    # -- sending

    def sendMessage(self, *messages: ColoMessage, value: int | None = None) -> None:
        """
        Send messages in one write, so that they leave in one segment.

        @param value: the size in bytes, when the last one is VMSTATE_SIZE.
        @raise PeerLost: the channel is gone.
        """
        last = len(messages) - 1
        self._send(b"".join(encodeMessage(m, value if i == last else None) for i, m in enumerate(messages)))

    async def write(self, data: bytes | memoryview) -> None:
        """
        Send raw bytes; returns when the transport takes more.

        @raise PeerLost: the channel is gone.
        @raise PeerTimeout: the peer took nothing for the stall time-out.
        """
        self._send(bytes(data))
        if self._writePaused:
            waiter: Deferred[None] = Deferred()
            self._writeWaiters.append(waiter)
            await self._bounded(waiter, self._stallTimeout, "take what we send")
            self.checkOpen()

    # -- receiving

    async def receiveAny(self, timeout: float | None) -> ColoMessage:
        """The next message, whichever it is. @param timeout: seconds, None to wait until the channel ends."""
        return await self._receive(lambda: self._decoder.nextMessage(), timeout, "send a COLO message")

    async def receiveMessage(self, expected: ColoMessage, timeout: float | None) -> None:
        """
        Wait for one message.

        @param timeout: seconds, None to wait until the channel ends.
        @raise PeerTimeout: it did not come in time.
        """
        await self._receive(lambda: self._decoder.nextMessage(expected), timeout, f"send {expected.name}")

    async def receiveSize(self, timeout: float, limit: int = MAX_DEVICE_STATE) -> int:
        """Wait for VMSTATE_SIZE. @return: its value, bytes."""
        return await self._receive(lambda: self._decoder.nextSize(limit), timeout, "send VMSTATE_SIZE")

    async def receiveStream(self, reader: StreamReader, consumer: Consumer, timeout: float) -> None:
        """
        Read until C{reader} is complete.

        @param consumer: gets raw bytes and events, piece by piece.
        @param timeout: seconds without a single new byte.
        """
        while not reader.complete:
            raw, events = await self._receive(
                lambda: self._decoder.nextStream(reader), timeout, "go on with the RAM stream"
            )
            done = consumer(raw, events)
            if done is not None:
                await done

    async def receiveBlob(self, size: int, timeout: float) -> bytes:
        """
        Read exactly C{size} bytes. Memory grows with what arrives, not with what was announced.

        @param timeout: seconds without a single new byte.
        """
        blob = bytearray()

        def more() -> memoryview | None:
            return self._decoder.nextBytes(size - len(blob))

        while len(blob) < size:
            blob += await self._receive(more, timeout, "go on with the device state")
        return bytes(blob)

    # -- ending

    def fail(self, error: ColoError) -> None:
        """
        Whatever waits, and whatever will, fails with C{error}; the transport stays. Harmless when it is gone already.
        """
        if self._failed is None and not self._ended:
            self._failed = error
        if self._readWaiter is not None:
            waiter, self._readWaiter = self._readWaiter, None
            waiter.callback(None)
        self._wakeWriters()
        self._tellLost(error)

    def abort(self, error: ColoError) -> None:
        """L{fail}, and shut both directions of the transport down at once."""
        self.fail(error)
        if self.transport is not None and not self._ended:
            self.transport.abortConnection()  # type: ignore[attr-defined]

    def checkOpen(self) -> None:
        """@raise ColoError: what ended this connection, if something did."""
        if self._failed is not None:
            raise self._failed
        if self._ended or self.transport is None:
            raise PeerLost("the COLO channel was closed")

    # -- inside

    def _send(self, data: bytes) -> None:
        self.checkOpen()
        transport: ITransport | None = self.transport
        assert transport is not None
        transport.write(data)

    async def _receive(self, ask: Callable[[], _T | None], timeout: float | None, what: str) -> _T:
        if self._readWaiter is not None:
            raise RuntimeError("two receivers on one COLO channel")
        while True:
            if self._failed is not None:
                raise self._failed
            answer = ask()
            if answer is not None:
                self._balance()
                return answer
            waiter: Deferred[None] = Deferred()
            self._readWaiter = waiter
            self._balance()
            try:
                await self._bounded(waiter, timeout, what)
            finally:
                if self._readWaiter is waiter:
                    self._readWaiter = None

    async def _bounded(self, waiter: Deferred[None], timeout: float | None, what: str) -> None:
        if timeout is None:
            await waiter
            return
        late = False

        def expire() -> None:
            nonlocal late
            late = True
            waiter.callback(None)

        timer = self._clock.callLater(timeout, expire)
        try:
            await waiter
        finally:
            if timer.active():
                timer.cancel()
            if waiter in self._writeWaiters:
                self._writeWaiters.remove(waiter)
        if late:
            raise PeerTimeout(f"the peer did not {what} within {timeout:g} s")

    def _tellLost(self, error: ColoError) -> None:
        if self.whenLost is not None:
            callback, self.whenLost = self.whenLost, None
            callback(error)

    def _wakeWriters(self) -> None:
        waiters, self._writeWaiters = self._writeWaiters, []
        for waiter in waiters:
            waiter.callback(None)

    def _balance(self) -> None:
        """Pause the transport while more waits than anybody asked for, resume it when not."""
        if self.transport is None or self._ended:
            return
        tooMuch = self._readWaiter is None and self._decoder.buffered > MAX_BUFFERED
        if tooMuch != self._readPaused:
            self._readPaused = tooMuch
            # mypy: as above.
            (self.transport.pauseProducing if tooMuch else self.transport.resumeProducing)()  # type: ignore[attr-defined]
