"""Tests of L{colotx.spool} and L{colotx.spill}: order, bounds, and what happens when there is no room."""

from __future__ import annotations

import errno
import os

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.trial.unittest import SynchronousTestCase

from colotx import spill
from colotx.errors import GuestLost, PeerLost, StorageError
from colotx.spill import SpillSlot, SpillSpace
from colotx.spool import CHUNK, BufferPool, Spool


class SlowSink:
    """A sink that takes a piece when told to."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.pending: Deferred[None] | None = None

    async def write(self, data: bytes | memoryview) -> None:
        self.pieces.append(bytes(data))
        self.pending = Deferred()
        await self.pending

    def take(self) -> None:
        pending, self.pending = self.pending, None
        assert pending is not None
        pending.callback(None)

    def takeAll(self) -> None:
        while self.pending is not None:
            self.take()

    @property
    def received(self) -> bytes:
        return b"".join(self.pieces)


class QuickSink(SlowSink):
    """A sink that takes everything at once."""

    async def write(self, data: bytes | memoryview) -> None:
        self.pieces.append(bytes(data))


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes in which a displaced or repeated chunk shows."""
    return b"".join((n + seed).to_bytes(8, "big") for n in range(size // 8 + 1))[:size]


def noRoom(*args: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class SpoolCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = self.mktemp()
        os.mkdir(self.directory)

    def spool(self, chunks: int = 256) -> Spool:
        self.pool = BufferPool(chunks * CHUNK)
        return Spool(self.pool, self.directory)

    def write(self, spool: Spool, data: bytes) -> Deferred[None]:
        return ensureDeferred(spool.write(data))


class OrderTests(SpoolCase):
    """What goes in comes out."""

    def test_pumpAfterFinish(self) -> None:
        """Everything written before comes in order, in pieces of at most a chunk."""
        spool, sink, data = self.spool(), QuickSink(), pattern(3 * CHUNK + 5)
        self.successResultOf(self.write(spool, data))
        spool.finish()
        self.successResultOf(ensureDeferred(spool.pump(sink.write)))
        self.assertEqual(sink.received, data)
        self.assertEqual([len(piece) for piece in sink.pieces], [CHUNK, CHUNK, CHUNK, 5])
        self.assertEqual(spool.size, len(data))

    def test_smallWritesAreJoined(self) -> None:
        """Ten thousand records of 9 bytes leave as one piece."""
        spool, sink = self.spool(), QuickSink()
        for n in range(10000):
            self.successResultOf(self.write(spool, n.to_bytes(9, "big")))
        spool.finish()
        self.successResultOf(ensureDeferred(spool.pump(sink.write)))
        self.assertEqual(len(sink.pieces), 1)
        self.assertEqual(sink.received, b"".join(n.to_bytes(9, "big") for n in range(10000)))

    def test_pumpWhileWriting(self) -> None:
        """A pump that begins early waits for more, and what is written while it is busy goes as one piece."""
        spool, sink = self.spool(), SlowSink()
        pumped = ensureDeferred(spool.pump(sink.write))
        self.successResultOf(self.write(spool, b"a"))
        for byte in (b"b", b"c", b"d"):
            self.successResultOf(self.write(spool, byte))
        self.assertEqual(sink.pieces, [b"a"])
        sink.take()
        self.assertEqual(sink.pieces, [b"a", b"bcd"])
        sink.take()
        self.assertNoResult(pumped)
        spool.finish()
        self.successResultOf(pumped)

    def test_empty(self) -> None:
        """A spool without bytes ends at once."""
        spool, sink = self.spool(), QuickSink()
        spool.finish()
        self.successResultOf(ensureDeferred(spool.pump(sink.write)))
        self.assertEqual(sink.pieces, [])

    def test_writeAfterFinish(self) -> None:
        """Bytes after the end are an error, not a loss."""
        spool = self.spool()
        spool.finish()
        self.failureResultOf(self.write(spool, b"x"), StorageError)

    @settings(max_examples=25, deadline=None)
    @given(
        sizes=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 3 * CHUNK)), max_size=8),
        takes=st.lists(st.integers(0, 3), min_size=8, max_size=8),
        chunks=st.integers(0, 4),
    )
    def test_anyInterleaving(self, sizes: list[int], takes: list[int], chunks: int) -> None:
        """Whatever the sizes, the memory and the pace of the sink: the same bytes."""
        self.pool = BufferPool(chunks * CHUNK)
        spool, sink = Spool(self.pool, self.directory), SlowSink()
        written: list[bytes] = []
        pumped = ensureDeferred(spool.pump(sink.write))
        for size, take in zip(sizes, takes, strict=False):
            written.append(pattern(size, len(written) << 32))
            self.successResultOf(self.write(spool, written[-1]))
            for _ in range(take):
                if sink.pending is not None:
                    sink.take()
        spool.finish()
        sink.takeAll()
        self.successResultOf(pumped)
        self.assertEqual(sink.received, b"".join(written))
        self.assertEqual(self.pool.queued, 0)


class BoundTests(SpoolCase):
    """Memory, then disk, then the writer waits."""

    def test_spills(self) -> None:
        """What is beyond the memory goes to a file that has no name, and comes back in order."""
        spool, sink, data = self.spool(chunks=2), QuickSink(), pattern(7 * CHUNK + 100)
        self.successResultOf(self.write(spool, data))
        self.assertEqual(self.pool.queued, 2 * CHUNK)
        self.assertFalse(spool.full)
        self.assertEqual(os.listdir(self.directory), [])
        self.assertEqual(spool._spill.bytes, 5 * CHUNK)
        spool.finish()
        self.successResultOf(ensureDeferred(spool.pump(sink.write)))
        self.assertEqual(sink.received, data)
        self.assertEqual(spool._spill.bytes, 0)

    def test_poolIsShared(self) -> None:
        """Two spools of one guest share the bound, and the second uses the first one's buffers."""
        first = self.spool(chunks=2)
        second = Spool(self.pool, self.directory)
        self.successResultOf(self.write(first, pattern(2 * CHUNK)))
        self.successResultOf(self.write(second, pattern(CHUNK)))
        self.assertEqual(self.pool.queued, 2 * CHUNK)
        self.assertEqual(second._spill.bytes, CHUNK)
        first.finish()
        self.successResultOf(ensureDeferred(first.pump(QuickSink().write)))
        self.assertEqual(self.pool.queued, 0)
        buffers = {id(buffer) for buffer in self.pool._idle}
        third = Spool(self.pool, self.directory)
        self.assertIn(id(third._tail), buffers)

    def test_poolIsBounded(self) -> None:
        """Buffers beyond the limit are not kept."""
        pool = BufferPool(2 * CHUNK)
        for _ in range(5):
            pool.give(bytearray(CHUNK))
        self.assertEqual(len(pool._idle), 2)

    def test_noRoom(self) -> None:
        """With memory and disk full the writer waits until the pump has drained enough; nothing is lost."""
        self.patch(os, "pwrite", noRoom)
        spool, sink, data = self.spool(chunks=2), SlowSink(), pattern(6 * CHUNK + 1)
        written = self.write(spool, data)
        self.assertNoResult(written)
        self.assertTrue(spool.full)
        self.assertEqual(spool.size, 3 * CHUNK)
        pumped = ensureDeferred(spool.pump(sink.write))
        for _ in range(2):
            sink.take()
        self.assertNoResult(written)
        sink.takeAll()
        self.successResultOf(written)
        self.assertFalse(spool.full)
        spool.finish()
        sink.takeAll()
        self.successResultOf(pumped)
        self.assertEqual(sink.received, data)
        self.assertEqual(self.pool.queued, 0)

    def test_diskFullsUp(self) -> None:
        """Chunks that come back from the disk make no room in memory: its bound holds, to a chunk."""
        store, slots = SpillSpace.store, 3

        def fullAfterThree(file: SpillSpace, data: memoryview) -> SpillSlot:
            if file.bytes >= slots * CHUNK:
                raise StorageError("no room")
            return store(file, data)

        self.patch(SpillSpace, "store", fullAfterThree)
        spool, sink, data = self.spool(chunks=2), SlowSink(), pattern(20 * CHUNK)
        written = self.write(spool, data)
        slots = 0
        pumped = ensureDeferred(spool.pump(sink.write))
        while sink.pending is not None and not written.called:
            self.assertLessEqual(self.pool.queued, 3 * CHUNK)
            sink.take()
        self.successResultOf(written)
        spool.finish()
        sink.takeAll()
        self.successResultOf(pumped)
        self.assertEqual(sink.received, data)

    def test_noRoomBecauseOfAnother(self) -> None:
        """A spool that is empty is not full, even when another one holds all the memory."""
        self.patch(os, "pwrite", noRoom)
        other = self.spool(chunks=1)
        self.successResultOf(self.write(other, pattern(CHUNK)))
        spool, sink, data = Spool(self.pool, self.directory), SlowSink(), pattern(3 * CHUNK)
        written = self.write(spool, data)
        self.assertNoResult(written)
        pumped = ensureDeferred(spool.pump(sink.write))
        sink.takeAll()
        self.successResultOf(written)
        spool.finish()
        sink.takeAll()
        self.successResultOf(pumped)
        self.assertEqual(sink.received, data)

    def test_whenReady(self) -> None:
        """It fires at the end, or when a full spool needs a pump."""
        spool = self.spool()
        ready = ensureDeferred(spool.whenReady())
        self.successResultOf(self.write(spool, b"x"))
        self.assertNoResult(ready)
        spool.finish()
        self.successResultOf(ready)

        self.patch(os, "pwrite", noRoom)
        spool = self.spool(chunks=0)
        ready = ensureDeferred(spool.whenReady())
        written = self.write(spool, pattern(CHUNK))
        self.successResultOf(ready)
        spool.abort(PeerLost("gone"))
        self.failureResultOf(written, PeerLost)


class FailureTests(SpoolCase):
    """Whatever waits is told."""

    def test_abort(self) -> None:
        """Pump, writers and waiters all get the error; so does who comes later; the memory is given back."""
        self.patch(os, "pwrite", noRoom)
        spool, sink = self.spool(chunks=1), SlowSink()
        written = self.write(spool, pattern(4 * CHUNK))
        pumped = ensureDeferred(spool.pump(sink.write))
        spool.abort(GuestLost("QEMU died"))
        self.failureResultOf(written, GuestLost)
        sink.take()
        self.failureResultOf(pumped, GuestLost)
        self.failureResultOf(self.write(spool, b"x"), GuestLost)
        self.failureResultOf(ensureDeferred(spool.whenReady()), GuestLost)
        self.assertEqual(self.pool.queued, 0)

    def test_abortWhileWaiting(self) -> None:
        """A pump that waits for more, and a waiter for the end."""
        spool = self.spool()
        pumped = ensureDeferred(spool.pump(QuickSink().write))
        ready = ensureDeferred(spool.whenReady())
        spool.abort(GuestLost("QEMU died"))
        self.failureResultOf(pumped, GuestLost)
        self.failureResultOf(ready, GuestLost)

    def test_firstErrorStays(self) -> None:
        """A later abort changes nothing."""
        spool = self.spool()
        spool.abort(GuestLost("first"))
        spool.abort(PeerLost("second"))
        self.failureResultOf(self.write(spool, b"x"), GuestLost)

    def test_abortAfterTheEnd(self) -> None:
        """Harmless: the pool's buffers are whole."""
        spool = self.spool()
        spool.finish()
        self.successResultOf(ensureDeferred(spool.pump(QuickSink().write)))
        spool.abort(PeerLost("gone"))
        self.assertEqual({len(buffer) for buffer in self.pool._idle}, {CHUNK})

    def test_sinkFails(self) -> None:
        """A sink's error ends the pump with it, and the writers that wait."""
        self.patch(os, "pwrite", noRoom)
        spool = self.spool(chunks=1)
        written = self.write(spool, pattern(4 * CHUNK))

        async def lost(data: bytes | memoryview) -> None:
            raise PeerLost("the link is gone")

        self.failureResultOf(ensureDeferred(spool.pump(lost)), PeerLost)
        self.failureResultOf(written, PeerLost)

    def test_cancelledWriter(self) -> None:
        """A writer that gave up does not stop the others from being told."""
        self.patch(os, "pwrite", noRoom)
        spool, sink = self.spool(chunks=1), SlowSink()
        written = self.write(spool, pattern(4 * CHUNK))
        written.addErrback(lambda failure: None)
        written.cancel()
        self.successResultOf(written)
        pumped = ensureDeferred(spool.pump(sink.write))
        sink.takeAll()
        spool.finish()
        sink.takeAll()
        self.successResultOf(pumped)
        self.assertEqual(sink.received, pattern(2 * CHUNK))


class SpillSpaceTests(SpoolCase):
    """The temporary files."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(spill, "FILE_BYTES", 64)
        self.space = SpillSpace(self.directory, 16)

    def test_slotsAreReused(self) -> None:
        """No more slots than are in use at once; what is in the others stays."""
        slots = [self.space.store(memoryview(pattern(16, n << 32))) for n in range(3)]
        self.space.free(slots[1])
        again = self.space.store(memoryview(b"new"))
        self.assertEqual(again, slots[1])
        into = bytearray(16)
        self.space.load(slots[2], memoryview(into))
        self.assertEqual(into, pattern(16, 2 << 32))
        into = bytearray(2)
        self.space.load(again, memoryview(into), 1)
        self.assertEqual(into, b"ew")
        self.assertEqual(self.space.bytes, 48)

    def test_filesGo(self) -> None:
        """The files have no names, and each goes as soon as nothing in it is needed."""
        before = len(os.listdir("/proc/self/fd"))
        slots = [self.space.store(memoryview(pattern(16, n << 32))) for n in range(9)]
        self.assertEqual((len(os.listdir("/proc/self/fd")) - before, self.space.bytes), (3, 144))
        self.assertEqual(os.listdir(self.directory), [])
        for slot in slots[:4]:
            self.space.free(slot)
        self.assertEqual((len(os.listdir("/proc/self/fd")) - before, self.space.bytes), (2, 80))
        into = bytearray(16)
        for n in range(4, 9):
            self.space.load(slots[n], memoryview(into))
            self.assertEqual(into, pattern(16, n << 32))
        self.space.close()
        self.space.close()
        self.assertEqual((len(os.listdir("/proc/self/fd")) - before, self.space.bytes), (0, 0))
        self.space.free(self.space.store(memoryview(b"anew")))

    def test_shortWrites(self) -> None:
        """A write or read that does a part is gone on with."""
        whole, read = os.pwrite, os.preadv
        self.patch(os, "pwrite", lambda fd, data, offset: whole(fd, data[:5], offset))
        self.patch(os, "preadv", lambda fd, into, offset: read(fd, [into[0][:3]], offset))
        into = bytearray(16)
        self.space.load(self.space.store(memoryview(pattern(16))), memoryview(into))
        self.assertEqual(into, pattern(16))

    def test_diskFull(self) -> None:
        """The error names the directory and what to do; a slot in hand is not lost."""
        first, second = (self.space.store(memoryview(byte * 16)) for byte in (b"a", b"b"))
        self.space.free(first)
        with open("/dev/full", "r+b", buffering=0) as full:
            first.file.raw, real = full, first.file.raw
            error = self.assertRaises(StorageError, self.space.store, memoryview(b"c" * 16))
            first.file.raw = real
        self.assertIn(f"{self.directory}: No space left on device; free some room", str(error))
        self.assertEqual(self.space.store(memoryview(b"c" * 16)), first)
        into = bytearray(16)
        self.space.load(second, memoryview(into))
        self.assertEqual(into, b"b" * 16)

    def test_noDirectory(self) -> None:
        """A directory that is not there is an error of the store, not of the constructor."""
        space = SpillSpace(os.path.join(self.directory, "missing"), 16)
        error = self.assertRaises(StorageError, space.store, memoryview(b"x"))
        self.assertIn("No such file or directory", str(error))

    def test_cut(self) -> None:
        """A file that is shorter than it was, and a disk that fails, are errors."""
        slot = self.space.store(memoryview(b"x" * 16))
        os.truncate(slot.file.raw.fileno(), 3)
        self.assertRaises(StorageError, self.space.load, slot, memoryview(bytearray(16)))

        def broken(*args: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        self.patch(os, "preadv", broken)
        self.assertRaises(StorageError, self.space.load, slot, memoryview(bytearray(16)))
