"""The COLO codec and the connection on it."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import ensureDeferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import (
    ColoError,
    InvalidMessage,
    OversizeError,
    PeerLost,
    PeerTimeout,
    TruncatedError,
    UnexpectedMessage,
)
from colotx.protocol import MAX_BUFFERED, ColoDecoder, ColoMessage, encodeMessage
from colotx.test.wires import connect

M = ColoMessage


class UntilX:
    """A stream that ends with an X."""

    complete = False

    def feed(self, data):
        at = bytes(data).find(b"X")
        if at < 0:
            return [], len(data)
        self.complete = True
        return [], at + 1


def chunked(data: bytes, sizes: list[int]):
    start = 0
    for size in sizes:
        yield data[start : start + size]
        start += size
    yield data[start:]


class EncodeTests(SynchronousTestCase):
    def test_bytesAreQemus(self) -> None:
        self.assertEqual(
            [encodeMessage(m) for m in M if m is not M.VMSTATE_SIZE],
            [struct.pack(">I", n) for n in (0, 1, 2, 3, 5, 6)],
        )
        self.assertEqual(encodeMessage(M.VMSTATE_SIZE, 59000), bytes.fromhex("00000004 000000000000e678"))

    def test_valueBelongsToSizeOnly(self) -> None:
        self.assertRaises(ValueError, encodeMessage, M.VMSTATE_SIZE)
        self.assertRaises(ValueError, encodeMessage, M.VMSTATE_SEND, 1)


class DecoderTests(SynchronousTestCase):
    def fed(self, data: bytes) -> ColoDecoder:
        decoder = ColoDecoder()
        decoder.feed(data)
        return decoder

    def test_everyMessage(self) -> None:
        for message in M:
            self.assertIs(self.fed(struct.pack(">I", message)).nextMessage(), message)

    def test_invalid(self) -> None:
        for number in (7, 8, 2**32 - 1):
            error = self.assertRaises(InvalidMessage, self.fed(struct.pack(">I", number)).nextMessage)
            self.assertIn(f"Invalid message {number}", str(error))

    def test_unexpectedInQemusWords(self) -> None:
        error = self.assertRaises(
            UnexpectedMessage, self.fed(encodeMessage(M.VMSTATE_LOADED)).nextMessage, M.VMSTATE_RECEIVED
        )
        self.assertIn("Unexpected COLO message 6, expected 5", str(error))

    def test_oversize(self) -> None:
        for size in (101, 2**62, 2**64 - 1):
            error = self.assertRaises(
                OversizeError, self.fed(encodeMessage(M.VMSTATE_SIZE, size)).nextSize, 100
            )
            self.assertIn(str(size), str(error))
        self.assertEqual(self.fed(encodeMessage(M.VMSTATE_SIZE, 100)).nextSize(100), 100)

    def test_truncated(self) -> None:
        whole = encodeMessage(M.VMSTATE_SIZE, 5)
        for length in range(1, len(whole)):
            decoder = self.fed(whole[:length])
            self.assertIsNone(decoder.nextSize())
            decoder.end()
            self.assertRaises(TruncatedError, decoder.nextSize)

    def test_endAtBoundary(self) -> None:
        decoder = self.fed(encodeMessage(M.VMSTATE_SEND))
        decoder.end()
        self.assertIs(decoder.nextMessage(), M.VMSTATE_SEND)
        self.assertRaises(PeerLost, decoder.nextMessage)

    def test_endWithinStreamAndBlob(self) -> None:
        decoder = ColoDecoder()
        decoder.end()
        self.assertRaises(TruncatedError, decoder.nextStream, UntilX())
        self.assertRaises(TruncatedError, decoder.nextBytes, 5)

    @settings(max_examples=60, deadline=None)
    @given(
        stream=st.binary(max_size=200).map(lambda b: b.replace(b"X", b"") + b"X"),
        blob=st.binary(max_size=100),
        sizes=st.lists(st.integers(0, 50), max_size=20),
    )
    def test_anyChunking(self, stream: bytes, blob: bytes, sizes: list[int]) -> None:
        """A transaction's bytes, in any chunking, are read as what they are."""
        data = (
            encodeMessage(M.VMSTATE_SEND)
            + stream
            + encodeMessage(M.VMSTATE_SIZE, len(blob))
            + blob
            + encodeMessage(M.CHECKPOINT_REQUEST)
        )
        decoder, reader = ColoDecoder(), UntilX()
        pieces = chunked(data, sizes)
        seen: dict[str, object] = {"stream": b"", "blob": b""}

        def step() -> bool:
            if "send" not in seen:
                found = decoder.nextMessage(M.VMSTATE_SEND)
                return found is not None and seen.setdefault("send", found) is found
            if not reader.complete:
                piece = decoder.nextStream(reader)
                if piece is not None:
                    seen["stream"] += bytes(piece[0])
                return piece is not None
            if "size" not in seen:
                size = decoder.nextSize()
                if size is not None:
                    seen["size"] = size
                return size is not None
            if len(seen["blob"]) < seen["size"]:
                some = decoder.nextBytes(seen["size"] - len(seen["blob"]))
                if some is not None:
                    seen["blob"] += bytes(some)
                return some is not None
            found = decoder.nextMessage()
            return found is not None and seen.setdefault("request", found) is not None

        for piece in pieces:
            decoder.feed(piece)
            while "request" not in seen and step():
                pass
        self.assertEqual((seen["stream"], seen["blob"]), (stream, blob))
        self.assertIs(seen["request"], M.CHECKPOINT_REQUEST)
        self.assertEqual(decoder.buffered, 0)


class ConnectionTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.connection, self.transport = connect(self.clock)

    def waiting(self, coroutine):
        d = ensureDeferred(coroutine)
        self.assertNoResult(d)
        return d

    def test_receive(self) -> None:
        d = self.waiting(self.connection.receiveMessage(M.CHECKPOINT_READY, 5))
        self.connection.dataReceived(b"\0\0")
        self.assertNoResult(d)
        self.connection.dataReceived(b"\0\0")
        self.successResultOf(d)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_timeout(self) -> None:
        d = self.waiting(self.connection.receiveMessage(M.VMSTATE_LOADED, 5))
        self.clock.advance(5)
        self.assertIn("VMSTATE_LOADED within 5 s", str(self.failureResultOf(d, PeerTimeout).value))

    def test_streamTimeoutIsOfProgress(self) -> None:
        async def consume(raw, events):
            pass

        d = self.waiting(self.connection.receiveStream(UntilX(), consume, 5))
        for _ in range(3):
            self.clock.advance(4)
            self.connection.dataReceived(b"abc")
        self.assertNoResult(d)
        self.clock.advance(5)
        self.failureResultOf(d, PeerTimeout)

    def test_streamThenMessage(self) -> None:
        """What follows a stream in the same read is not lost."""
        raw = []
        d = self.waiting(
            self.connection.receiveStream(UntilX(), lambda data, events: raw.append(bytes(data)), 5)
        )
        self.connection.dataReceived(b"..X" + encodeMessage(M.VMSTATE_SIZE, 3) + b"abc")
        self.successResultOf(d)
        self.assertEqual(self.successResultOf(ensureDeferred(self.connection.receiveSize(5))), 3)
        self.assertEqual(self.successResultOf(ensureDeferred(self.connection.receiveBlob(3, 5))), b"abc")
        self.assertEqual(raw, [b"..X"])

    def test_unaskedBytesAreBounded(self) -> None:
        self.connection.dataReceived(bytes(MAX_BUFFERED))
        self.assertFalse(self.transport.paused)
        self.connection.dataReceived(b"\0")
        self.assertTrue(self.transport.paused)
        d = ensureDeferred(self.connection.receiveBlob(MAX_BUFFERED + 1, 5))
        self.assertEqual(len(self.successResultOf(d)), MAX_BUFFERED + 1)
        self.assertFalse(self.transport.paused)

    def test_blobTakesNoMemoryBeforeItComes(self) -> None:
        d = self.waiting(self.connection.receiveBlob(2**40, 5))
        self.clock.advance(5)
        self.failureResultOf(d, PeerTimeout)

    def test_writeWaitsForTheTransport(self) -> None:
        self.transport.producer.pauseProducing()
        d = self.waiting(self.connection.write(b"abc"))
        self.transport.producer.resumeProducing()
        self.successResultOf(d)
        self.assertEqual(self.transport.take(), b"abc")

    def test_writeStalls(self) -> None:
        self.transport.producer.pauseProducing()
        d = self.waiting(self.connection.write(b"abc"))
        self.clock.advance(30)
        self.failureResultOf(d, PeerTimeout)

    def test_twoMessagesAreOneWrite(self) -> None:
        self.connection.sendMessage(M.VMSTATE_RECEIVED, M.VMSTATE_LOADED)
        self.assertEqual(list(self.transport.sent), [bytes.fromhex("0000000500000006")])

    def test_failWakesEverybody(self) -> None:
        told: list[ColoError] = []
        self.connection.whenLost = told.append
        self.transport.producer.pauseProducing()
        reading = self.waiting(self.connection.receiveAny(None))
        writing = self.waiting(self.connection.write(b"abc"))
        error = PeerLost("gone")
        self.connection.fail(error)
        self.assertIs(self.failureResultOf(reading).value, error)
        self.assertIs(self.failureResultOf(writing).value, error)
        self.assertEqual(told, [error])
        self.assertFalse(self.transport.aborted)
        self.assertRaises(PeerLost, self.connection.sendMessage, M.CHECKPOINT_REPLY)

    def test_abort(self) -> None:
        self.connection.abort(PeerLost("gone"))
        self.assertTrue(self.transport.aborted)
        self.failureResultOf(ensureDeferred(self.connection.receiveAny(1)), PeerLost)

    def test_whatCameBeforeTheEndIsStillRead(self) -> None:
        self.connection.dataReceived(encodeMessage(M.VMSTATE_RECEIVED))
        self.connection.connectionLost(Failure(ConnectionDone()))
        self.successResultOf(ensureDeferred(self.connection.receiveMessage(M.VMSTATE_RECEIVED, 1)))
        self.failureResultOf(ensureDeferred(self.connection.receiveMessage(M.VMSTATE_LOADED, 1)), PeerLost)

    def test_oneReceiverAtATime(self) -> None:
        self.waiting(self.connection.receiveAny(None))
        self.failureResultOf(ensureDeferred(self.connection.receiveAny(None)), RuntimeError)

    def test_cancelledReceiverLeavesNothing(self) -> None:
        d = self.waiting(self.connection.receiveAny(7))
        d.addErrback(lambda failure: None)
        d.cancel()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.connection.dataReceived(encodeMessage(M.CHECKPOINT_REQUEST))
        self.assertIs(
            self.successResultOf(ensureDeferred(self.connection.receiveAny(1))), M.CHECKPOINT_REQUEST
        )
