"""
The frames channel of a session: NIC frames of the guest, both ways, cut into epochs.

To an active secondary go the frames that clients sent to the guest, from it come the frames that its own VM said. A
frame is in QEMU's framing (be32 length, C{net/net.c}); a word with the top bit set is a B{mark}: what follows belongs
to the epoch of that number, which is the number of the checkpoint the VMs went on from. So frames and checkpoints
travel on two connections and still cannot be mixed up.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from colotx.errors import ProtocolError

log = Logger()

MAX_FRAME = 65536 + 64
"""Bytes: the largest frame taken, a GSO frame with all its headers."""

HIGH_WATER = 1 << 20
"""Bytes waiting to be sent from which on the sender is asked to hold back."""

LIMIT = 64 << 20
"""Bytes waiting to be sent with which the peer counts as one that does not read."""

_WORD = struct.Struct(">I")
_MARK = 1 << 31
_NUMBERS = _MARK - 1
_PIECE = 1 << 16


def encode(frames: Sequence[bytes]) -> bytes:
    """The frames, each with its length in front."""
    pack = _WORD.pack
    return b"".join([part for frame in frames for part in (pack(len(frame)), frame)])


def encodeMark(epoch: int) -> bytes:
    """@param epoch: counts from 0; only its low 31 bits travel."""
    return _WORD.pack(_MARK | epoch & _NUMBERS)


class EpochDecoder:
    """Cuts the channel's bytes into frames and marks, in any chunking."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[list[bytes] | int]:
        """
        @return: in order: lists of frames (none empty), and the numbers of marks.
        @raise ProtocolError: a length that no frame has. The decoder is of no use afterwards.
        """
        if self._rest:
            data = self._rest + data
        events: list[list[bytes] | int] = []
        frames: list[bytes] = []
        position, last = 0, len(data) - 4
        unpack = _WORD.unpack_from
        while position <= last:
            (word,) = unpack(data, position)
            if word & _MARK:
                if frames:
                    events.append(frames)
                    frames = []
                events.append(word & _NUMBERS)
                position += 4
                continue
            end = position + 4 + word
            if end > last + 4:
                if word > MAX_FRAME:
                    raise ProtocolError(f"a frame of {word} bytes was announced, the limit is {MAX_FRAME}")
                break
            frames.append(data[position + 4 : end])
            position = end
        if frames:
            events.append(frames)
        self._rest = data[position:]
        return events


@implementer(IPushProducer)
class FrameChannel(Protocol):
    """
    The protocol on the frames channel.

    @ivar onFrames: takes lists of frames, never empty, in order.
    @ivar onMark: takes the number of each mark.
    @ivar onCongested: called with True when much waits to be sent, with False when it has left.
    """

    def __init__(self) -> None:
        self.onFrames: Callable[[list[bytes]], object] = _nothing
        self.onMark: Callable[[int], object] = _nothing
        self.onCongested: Callable[[bool], object] = _nothing
        self._decoder = EpochDecoder()
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._writable = True
        self._congested = False
        self._gone = False
        self._broken = False

    # -- Twisted's side

    def connectionMade(self) -> None:
        self._transport.registerProducer(self, True)

    def dataReceived(self, data: bytes) -> None:
        if self._broken:
            return
        try:
            events = self._decoder.feed(data)
        except ProtocolError as error:
            log.error("frames channel: {error}", error=error)
            self._break()
            return
        for event in events:
            if isinstance(event, int):
                self.onMark(event)
            else:
                self.onFrames(event)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._gone = True
        self._queue.clear()
        self._queued = 0
        self._relax()
        self.onFrames = self.onMark = self.onCongested = _nothing

    def pauseProducing(self) -> None:
        """The transport's buffer is full."""
        self._writable = False

    def resumeProducing(self) -> None:
        """The transport takes more."""
        self._writable = True
        self._flush()

    def stopProducing(self) -> None:
        """The transport is gone; C{connectionLost} follows."""
        self._writable = False

    # -- the owner's side

    def send(self, frames: Sequence[bytes]) -> None:
        """Send frames in order; nothing happens when the channel is gone."""
        if frames:
            self._write(encode(frames))

    def mark(self, epoch: int) -> None:
        """What is sent from now on belongs to this epoch."""
        self._write(encodeMark(epoch))

    # -- inside

    def _write(self, data: bytes) -> None:
        if self._gone or self._broken:
            return
        if self._writable and not self._queue:
            self._transport.write(data)
            return
        self._queue.append(data)
        self._queued += len(data)
        if self._queued > LIMIT:
            log.error("frames channel: the peer left {bytes} bytes unread", bytes=self._queued)
            self._break()
        elif self._queued > HIGH_WATER and not self._congested:
            self._congested = True
            self.onCongested(True)

    def _flush(self) -> None:
        while self._queue and self._writable:
            pieces, size = [], 0
            while self._queue and size < _PIECE:
                pieces.append(self._queue.popleft())
                size += len(pieces[-1])
            self._queued -= size
            self._transport.write(b"".join(pieces))
        if self._queued <= HIGH_WATER // 2:
            self._relax()

    def _relax(self) -> None:
        if self._congested:
            self._congested = False
            self.onCongested(False)

    def _break(self) -> None:
        """The session cannot go on without this channel; its end ends it."""
        self._broken = True
        self._queue.clear()
        self._queued = 0
        self._transport.abortConnection()

    @property
    def _transport(self) -> Any:
        # ITransport declares neither the producer API nor abortConnection, which the link's transports have.
        return self.transport


def _nothing(*_: object) -> None:
    pass


__all__ = ["HIGH_WATER", "LIMIT", "MAX_FRAME", "EpochDecoder", "FrameChannel", "encode", "encodeMark"]
