"""
The primary's buffer for a pipelined checkpoint: the guest writes at memory speed, the link reads at its own.

It knows bytes and their order; it must not know what they mean or where they go. See rule 7 of the design
(answered is not committed): the local guest runs on as soon as its checkpoint is whole in here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from colotx.errors import StorageError
from colotx.spill import SpillSlot, SpillSpace

CHUNK = 256 * 1024
"""Bytes in one buffer, and in the largest piece a pump hands on."""


class BufferPool:
    """
    The memory that the spools of successive checkpoints share. A fresh buffer costs many times more than the copy into
    it (page faults), and that time is the guest's downtime: so buffers are kept, up to the limit, once they were used.
    """

    def __init__(self, limit: int = 64 * 1024 * 1024) -> None:
        """@param limit: bytes that may wait in memory, over all spools; each spool has two L{CHUNK}s besides."""
        self.limit = limit
        self.queued = 0
        self._idle: list[bytearray] = []

    @property
    def exhausted(self) -> bool:
        """No further chunk may wait in memory."""
        return self.queued + CHUNK > self.limit

    def take(self) -> bytearray:
        """A buffer of L{CHUNK} bytes with anything in it."""
        return self._idle.pop() if self._idle else bytearray(CHUNK)

    def give(self, buffer: bytearray) -> None:
        """A buffer is needed no more."""
        if len(self._idle) * CHUNK < self.limit:
            self._idle.append(buffer)


class Spool:
    """
    Bytes in order, from any number of writes to one pump.

    Memory is bounded by the pool: what is beyond goes to an unlinked temporary file. When that has no room either,
    L{full} becomes true and L{write} waits for the pump; nothing is ever lost. Who holds the pump back until the
    checkpoint is whole awaits L{whenReady}, which also fires when the spool is full, and then pumps.

    The waits in here have no time limit of their own: the pump's C{write} and the guest's have, and whichever fails
    calls L{abort}, which ends them all. Every spool must be pumped to its end or aborted, for the pool's sake.

    @ivar size: bytes written so far.
    @ivar full: neither memory nor disk has room; writers wait for the pump.
    """

    _log = Logger()

    def __init__(self, pool: BufferPool, directory: str = "/var/tmp") -> None:
        """
        @param pool: the memory to use; one for all spools of a guest.
        @param directory: where to spill what is beyond.
        """
        self.size = 0
        self.full = False
        self._pool = pool
        self._spill = SpillSpace(directory, CHUNK)
        self._chunks: deque[bytearray | SpillSlot] = deque()  # full ones, oldest first
        self._tail = pool.take()
        self._used = 0
        self._finished = self._warned = False
        self._error: Exception | None = None
        self._waiters: list[Deferred[None]] = []

    async def write(self, data: bytes | memoryview) -> None:
        """
        Append. Returns at once, but for a full spool.

        @raise colotx.errors.ColoError: the spool was aborted, with the error given there.
        """
        if self._finished:
            raise StorageError("bytes after the end of the checkpoint")
        view = memoryview(data).cast("B")
        while True:
            self._check()
            taken = min(len(view), CHUNK - self._used)
            self._tail[self._used : self._used + taken] = view[:taken]
            self._used += taken
            self.size += taken
            view = view[taken:]
            if self._used == CHUNK:
                self._seal()
            self._wake()
            if not self.full and not view:
                return
            while self.full:
                await self._change()

    def finish(self) -> None:
        """Everything is written: the pump ends when it has sent it."""
        self._finished = True
        self._wake()

    def abort(self, error: Exception) -> None:
        """Drop everything. Whatever waits in here, and every later call, raises C{error}. The first error stays."""
        if self._error is None:
            self._error = error
            self._release()
            self._wake()

    async def whenReady(self) -> None:
        """
        Wait until L{finish} was called, or until the spool is full and a pump must run for more to come.

        @raise colotx.errors.ColoError: the spool was aborted.
        """
        self._check()
        while not self._finished and not self.full:
            await self._change()

    async def pump(self, write: Callable[[bytes | memoryview], Awaitable[None]]) -> None:
        """
        Hand everything on in order, in pieces of at most L{CHUNK} bytes; wait for more until L{finish} was called.
        A piece is only valid until C{write} returns. When C{write} fails, the spool is aborted with its error.

        @param write: such as L{colotx.interfaces.Sink.write}.
        @raise colotx.errors.ColoError: the spool was aborted, or C{write} failed.
        """
        try:
            while (piece := self._next()) is not None or not self._finished:
                if piece is None:
                    await self._change()
                    continue
                await write(piece)
                self._check()
                self._recycle(piece)
        except Exception as error:
            self.abort(error)
            raise
        self._release()

    def _seal(self) -> None:
        """The last chunk is full: queue it, in memory or on disk, and begin another."""
        stored: bytearray | SpillSlot = self._tail
        if self._pool.exhausted:
            try:
                stored = self._spill.store(memoryview(self._tail))
            except StorageError as error:
                self.full = True
                if not self._warned:
                    self._warned = True
                    self._log.warn("the guest waits for the link: {reason}", reason=str(error))
        if stored is self._tail:
            self._pool.queued += CHUNK
            self._tail = self._pool.take()
        self._chunks.append(stored)
        self._used = 0

    def _next(self) -> memoryview | None:
        """Take the oldest bytes out of the queue."""
        self._check()
        if self._chunks:
            stored = self._chunks.popleft()
            if isinstance(stored, SpillSlot):
                buffer = self._pool.take()
                self._spill.load(stored, memoryview(buffer))
                self._spill.free(stored)
                return memoryview(buffer)
            self._pool.queued -= CHUNK
            return memoryview(stored)
        if not self._used:
            return None
        buffer, used = self._tail, self._used
        self._tail, self._used = self._pool.take(), 0
        return memoryview(buffer)[:used]

    def _recycle(self, piece: memoryview) -> None:
        buffer = piece.obj
        piece.release()
        assert isinstance(buffer, bytearray)
        self._pool.give(buffer)
        if self.full and not (self._chunks and self._pool.exhausted):
            self.full = False
            self._wake()

    def _release(self) -> None:
        for stored in self._chunks:
            if not isinstance(stored, SpillSlot):
                self._pool.queued -= CHUNK
                self._pool.give(stored)
        self._chunks.clear()
        if self._tail:
            self._pool.give(self._tail)
        self._tail, self._used = bytearray(), 0
        self.full = False
        self._spill.close()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _change(self) -> None:
        waiter: Deferred[None] = Deferred()
        self._waiters.append(waiter)
        await waiter
        self._check()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.called:
                waiter.callback(None)


__all__ = ["CHUNK", "Spool"]
