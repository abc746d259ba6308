"""The frames channel: framing, marks, and a peer that does not read."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ProtocolError
from colotx.frames import HIGH_WATER, LIMIT, MAX_FRAME, EpochDecoder, FrameChannel, encode, encodeMark
from colotx.test.wires import PipeTransport

EVENTS = st.lists(
    st.one_of(st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.integers(0, 2**31 - 1))
)


def joined(events):
    """Neighbouring lists as one: where a list ends depends on the chunks."""
    result = []
    for event in events:
        if result and isinstance(event, list) and isinstance(result[-1], list):
            result[-1] = result[-1] + event
        else:
            result.append(event)
    return result


class DecoderTests(SynchronousTestCase):
    @given(EVENTS, st.integers(1, 50))
    @settings(max_examples=100, deadline=None)
    def test_anyChunking(self, events, size) -> None:
        data = b"".join(encodeMark(event) if isinstance(event, int) else encode(event) for event in events)
        decoder = EpochDecoder()
        seen = []
        for start in range(0, len(data), size):
            seen += decoder.feed(data[start : start + size])
        self.assertEqual(joined(seen), joined(events))

    @given(st.lists(st.binary(max_size=64), max_size=8))
    @settings(max_examples=100, deadline=None)
    def test_anyBytes(self, chunks) -> None:
        decoder = EpochDecoder()
        try:
            for chunk in chunks:
                decoder.feed(chunk)
        except ProtocolError:
            pass

    def test_tooLong(self) -> None:
        self.assertEqual(EpochDecoder().feed(struct.pack(">I", MAX_FRAME)), [])
        with self.assertRaisesRegex(ProtocolError, str(MAX_FRAME + 1)):
            EpochDecoder().feed(struct.pack(">I", MAX_FRAME + 1))


class ChannelTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.channel, self.transport = FrameChannel(), PipeTransport()
        self.channel.makeConnection(self.transport)
        self.congested: list[bool] = []
        self.channel.onCongested = self.congested.append

    def test_order(self) -> None:
        other = FrameChannel()
        seen: list[object] = []
        other.onFrames, other.onMark = seen.append, seen.append
        other.makeConnection(PipeTransport())
        self.channel.send([b"a", b"b"])
        self.channel.mark(7)
        self.channel.send([])
        self.channel.send([b"c"])
        other.dataReceived(self.transport.take())
        self.assertEqual(seen, [[b"a", b"b"], 7, [b"c"]])

    def test_garbageEndsIt(self) -> None:
        self.channel.dataReceived(b"\x7f\xff\xff\xff")
        self.assertTrue(self.transport.aborted)
        self.channel.send([b"x"])
        self.channel.dataReceived(b"more")
        self.assertEqual(self.transport.take(), b"")

    def test_peerDoesNotRead(self) -> None:
        self.channel.pauseProducing()
        frame = bytes(65536)
        while not self.congested:
            self.channel.send([frame])
        self.assertEqual(self.transport.take(), b"")
        self.channel.resumeProducing()
        self.assertEqual(self.congested, [True, False])
        self.assertGreater(len(self.transport.take()), HIGH_WATER)

    def test_peerNeverReads(self) -> None:
        self.channel.pauseProducing()
        frame = bytes(65536)
        for _ in range(LIMIT // len(frame) + 1):
            self.channel.send([frame])
        self.assertTrue(self.transport.aborted)

    def test_lossReleasesTheSender(self) -> None:
        self.channel.pauseProducing()
        while not self.congested:
            self.channel.send([bytes(65536)])
        self.channel.connectionLost()
        self.assertEqual(self.congested, [True, False])
        self.channel.send([b"x"])
