"""
Tests of L{colotx.ramcache}: against a model that applies every event at once to a plain copy, and the promises
(atomic, bounded, sparse, resumable) one by one.
"""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from twisted.trial.unittest import SynchronousTestCase

from colotx import _ramstage
from colotx.errors import StorageError, StreamError
from colotx.ramcache import CacheLimits, RamCache
from colotx.vmstate import (
    PAGE_SIZE,
    Blocks,
    CheckpointReader,
    InitialReader,
    Pages,
    RamBlock,
    RamEnd,
    RamEvent,
    RamReader,
    RamWriter,
    Xbzrle,
    Zeros,
    applyXbzrle,
)

RAM = RamBlock("pc.ram", 40 * PAGE_SIZE)
ROM = RamBlock("pc.rom", 3 * PAGE_SIZE)
BLOCKS = (RAM, ROM)

_seeds = count(1)


def addressesOf(places: Sequence[int]) -> NDArray[np.uint64]:
    return np.array(places, np.uint64) * PAGE_SIZE


def contents(seed: int) -> NDArray[np.uint8]:
    """A page that no other seed has."""
    return np.frombuffer(seed.to_bytes(8, "big") * (PAGE_SIZE // 8), np.uint8)


def pages(places: Sequence[int], block: str = RAM.name) -> Pages:
    """Pages never seen before, with gaps between the rows, as in a stream."""
    rows = np.zeros((len(places), PAGE_SIZE + 8), np.uint8)
    for row in rows:
        row[8:] = contents(next(_seeds))
    return Pages(block, addressesOf(places), rows[:, 8:])


def zeros(places: Sequence[int], fill: int = 0, block: str = RAM.name) -> Zeros:
    return Zeros(block, addressesOf(places), fill)


def delta(place: int, at: int = 100, block: str = RAM.name) -> Xbzrle:
    """Four new bytes at C{at}."""
    data = bytes((0x80 | at & 0x7F, at >> 7, 4)) + next(_seeds).to_bytes(4, "big")
    return Xbzrle(block, place * PAGE_SIZE, data)


class Model:
    """RAM that every event changes at once."""

    def __init__(self, blocks: Iterable[RamBlock] = BLOCKS) -> None:
        self.ram = {block.name: bytearray(block.length) for block in blocks}
        self.dirty: set[tuple[str, int]] = set()

    def copy(self) -> Model:
        other = Model(())
        other.ram = {name: bytearray(ram) for name, ram in self.ram.items()}
        return other

    def apply(self, events: Iterable[RamEvent]) -> None:
        for event in events:
            if isinstance(event, Pages):
                for address, row in zip(event.addresses.tolist(), event.data, strict=True):
                    self._set(event.block, address, row.tobytes())
            elif isinstance(event, Zeros):
                for address in event.addresses.tolist():
                    self._set(event.block, address, bytes([event.fill]) * PAGE_SIZE)
            elif isinstance(event, Xbzrle):
                old = self.ram[event.block][event.address : event.address + PAGE_SIZE]
                self._set(event.block, event.address, applyXbzrle(old, event.data))

    def _set(self, block: str, address: int, page: bytes) -> None:
        self.ram[block][address : address + PAGE_SIZE] = page
        self.dirty.add((block, address // PAGE_SIZE))


class CacheCase(SynchronousTestCase):
    def setUp(self) -> None:
        # Batches of four records, so that a few pages are many batches.
        self.patch(_ramstage, "BATCH", 4)
        self.patch(_ramstage, "BATCH_BYTES", 4 * PAGE_SIZE)
        self.directory = self.mktemp()
        os.mkdir(self.directory)

    def cache(self, batches: int = 1000) -> RamCache:
        """A cache that holds so many batches in memory."""
        cache = RamCache(CacheLimits(batches * 4 * PAGE_SIZE, self.directory))
        self.addCleanup(cache.close)
        return cache

    def committed(self, batches: int = 1000) -> tuple[RamCache, Model]:
        """A cache after an initial stream that filled every second page."""
        cache, model = self.cache(batches), Model()
        events = [Blocks(BLOCKS), pages(range(0, 40, 2)), pages([1], ROM.name), RamEnd()]
        cache.stageInitial(events)
        model.apply(events)
        cache.commit(b"initial")
        return cache, model

    def assertCurrent(self, cache: RamCache, model: Model) -> None:
        for name, ram in model.ram.items():
            self.assertEqual(bytes(cache.image(name)), bytes(ram), name)

    def flush(self, cache: RamCache) -> None:
        for _ in cache.flush():
            pass


places = st.lists(st.integers(0, 39), min_size=1, max_size=12, unique=True)
someEvents = st.lists(
    st.one_of(
        places.map(lambda p: ("pages", p)),
        places.map(sorted).map(lambda p: ("pages", p)),
        places.map(lambda p: ("zeros", p)),
        places.map(lambda p: ("fill", p)),
        places.map(lambda p: ("delta", p[:1])),
        st.just(("rom", [0, 2])),
    ),
    max_size=6,
)
someSteps: st.SearchStrategy[list[tuple[str, list[tuple[str, list[int]]]]]] = st.lists(
    st.one_of(
        st.tuples(st.just("stage"), someEvents),
        st.tuples(st.just("commit"), st.just([])),
        st.tuples(st.just("abandon"), st.just([])),
        st.tuples(st.just("slice"), st.just([])),
        st.tuples(st.just("flush"), st.just([])),
    ),
    max_size=20,
)


def eventOf(kind: str, where: list[int]) -> RamEvent:
    if kind == "pages":
        return pages(where)
    if kind == "delta":
        return delta(where[0])
    if kind == "rom":
        return pages(where, ROM.name)
    return zeros(where, 0x55 if kind == "fill" else 0)


class ModelTests(CacheCase):
    """Every order of every call."""

    @settings(max_examples=150, deadline=None)
    @given(steps=someSteps, batches=st.integers(0, 6))
    def test_anyOrder(self, steps: list[tuple[str, list[tuple[str, list[int]]]]], batches: int) -> None:
        """
        Whatever is staged, committed, abandoned, flushed in parts or not at all: in the end the images are the last
        committed checkpoint, and the bitmap is what it brought.
        """
        cache, committed = self.committed(batches)
        staged = committed.copy()
        for step, recipe in steps:
            if step == "stage":
                events = [eventOf(*part) for part in recipe]
                cache.stage(events)
                staged.apply(events)
            elif step == "commit":
                cache.commit(b"next")
                committed, staged = staged, staged.copy()
            elif step == "abandon":
                cache.abandon()
                staged = committed.copy()
            elif step == "slice":
                next(cache.flush(), None)
            else:
                self.flush(cache)
                self.assertCurrent(cache, committed)
        cache.abandon()
        self.flush(cache)
        self.assertCurrent(cache, committed)
        for block in BLOCKS:
            dirty = {(block.name, int(place)) for place in np.flatnonzero(cache.dirtyBitmap(block.name))}
            self.assertEqual(dirty, {mark for mark in committed.dirty if mark[0] == block.name})
        self.assertEqual(cache.dirtyPages, len(committed.dirty))
        self.assertEqual(cache.statistics().stagedBytes, 0)
        self.assertEqual(cache.statistics().spilledBytes, 0)
        cache.close()

    @settings(max_examples=50, deadline=None)
    @given(recipe=someEvents)
    def test_initial(self, recipe: list[tuple[str, list[int]]]) -> None:
        """The initial stream may bring a page in every way and many times."""
        cache, model = self.cache(), Model()
        events = [Blocks(BLOCKS), *(eventOf(*part) for part in recipe)]
        for event in events:
            cache.stageInitial([event])
        model.apply(events)
        cache.commit(b"state")
        self.assertCurrent(cache, model)
        self.assertEqual(cache.dirtyPages, len(model.dirty))
        self.assertEqual(list(cache.flush()), [])
        cache.close()

    def test_fromTheStream(self) -> None:
        """What QEMU's grammar carries arrives in the images: written by the writer, read by the readers in pieces."""
        writer, ram, cache, model = RamWriter(), RamReader(), self.cache(), Model()
        initial: list[Pages | Zeros] = [
            pages(range(30)),
            zeros(range(30, 40)),
            pages([0, 1, 2], ROM.name),
            pages([7, 9]),
        ]
        stream = b"".join(
            [
                writer.header(),
                writer.configuration("pc"),
                writer.enableColo(),
                writer.start(BLOCKS),
                *writer.part(initial[:2]),
                *writer.end(initial[2:]),
                writer.deviceSection(7, "timer", 0, 2, b"payload"),
                writer.eof(),
                writer.vmdesc(b'{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0}]}'),
            ]
        )
        reader = InitialReader(ram)
        for at in range(0, len(stream), 5000):
            cache.stageInitial(reader.feed(stream[at : at + 5000]))
        assert reader.complete is not None
        cache.commit(reader.complete.deviceState)
        model.apply(initial)
        self.assertCurrent(cache, model)
        self.assertEqual(cache.blocks, BLOCKS)

        live: list[Pages | Zeros | Xbzrle] = [
            pages([3, 4, 5]),
            zeros([7]),
            delta(9),
            pages([2], ROM.name),
            delta(2, 0x700, ROM.name),
        ]
        stream = b"".join([*writer.end(live), writer.eof()])
        checkpoint = CheckpointReader(ram)
        for at in range(0, len(stream), 5000):
            cache.stage(checkpoint.feed(stream[at : at + 5000])[0])
        self.assertTrue(checkpoint.complete)
        self.assertCurrent(cache, model)
        cache.commit(b"blob")
        self.flush(cache)
        model.apply(live)
        self.assertCurrent(cache, model)


class AtomicTests(CacheCase):
    """Nothing is applied before it is whole."""

    def test_stagingTouchesNothing(self) -> None:
        """Images, state, generation and bitmap stay until the commit; the images until the flush."""
        cache, model = self.committed()
        before = cache.statistics()
        cache.stage([pages([0, 2, 4]), zeros([6])])
        self.assertCurrent(cache, model)
        self.assertEqual((cache.deviceState, cache.generation, cache.dirtyPages), (b"initial", 1, 21))
        cache.commit(b"second")
        self.assertCurrent(cache, model)
        self.assertEqual((cache.deviceState, cache.generation, cache.dirtyPages), (b"second", 2, 4))
        self.assertEqual(before.generation, 1)

    def test_eventsAreCopied(self) -> None:
        """The reader may reuse its buffers as soon as the call returns."""
        cache, model = self.committed()
        event = pages([0, 1, 2])
        cache.stage([event])
        model.apply([event])
        event.data[:] = 0xEE
        event.addresses[:] = 0
        cache.commit(b"second")
        self.flush(cache)
        self.assertCurrent(cache, model)

    def test_flushGoesOn(self) -> None:
        """A flush dropped in the middle is finished by the next; two at once do the work of one."""
        cache, model = self.committed()
        events = [pages(range(40))]
        cache.stage(events)
        cache.commit(b"second")
        first, second = cache.flush(), cache.flush()
        self.assertEqual(next(first), 4)
        del first
        self.assertEqual([next(second), next(second)], [4, 4])
        third = cache.flush()
        slices = 3
        for one in (second, third) * 10:
            slices += next(one, 0) // 4
        # The last slice does not yield: there is nothing to breathe for.
        self.assertEqual(slices, 9)
        model.apply(events)
        self.assertCurrent(cache, model)

    def test_deltaWhileFlushing(self) -> None:
        """A delta is against the newest page: staged, else of the last commit that has it, else in the image."""
        cache, model = self.committed()
        rounds: list[list[RamEvent]] = [
            [pages(range(12)), delta(30)],
            [pages([1, 6, 10, 13, 14]), zeros([7, 11], 3)],
            [*map(delta, [1, 5, 6, 6, 7, 10, 11, 13, 30, 39])],
        ]
        for events in rounds:
            cache.stage(events)
            model.apply(events)
            cache.commit(b"next")
            next(cache.flush())
        events = [delta(place, 2000) for place in range(0, 40, 3)]
        cache.stage(events)
        model.apply(events)
        cache.commit(b"last")
        self.flush(cache)
        self.assertCurrent(cache, model)

    def test_malformedDelta(self) -> None:
        """An error in the middle of staging: no commit until it is abandoned, the committed checkpoint untouched."""
        cache, model = self.committed()
        broken = Xbzrle(RAM.name, 0, b"\x00\x00")
        self.assertRaises(StreamError, cache.stage, [pages([0]), broken, pages([1])])
        self.assertRaises(StorageError, cache.commit, b"never")
        self.assertRaises(StorageError, cache.stage, [pages([3])])
        cache.abandon()
        self.assertEqual((cache.deviceState, cache.generation), (b"initial", 1))
        events = [pages([5])]
        cache.stage(events)
        cache.commit(b"second")
        self.flush(cache)
        model.apply(events)
        self.assertCurrent(cache, model)

    def test_unknownBlock(self) -> None:
        """A block that was not in the list."""
        cache, _ = self.committed()
        error = self.assertRaises(StreamError, cache.stage, [pages([0], "vga.vram")])
        self.assertIn("'vga.vram'", str(error))

    def test_otherBlocks(self) -> None:
        """A committed guest does not change its block list; the same list again is fine."""
        cache, model = self.committed()
        cache.stageInitial([Blocks(BLOCKS)])
        self.assertCurrent(cache, model)
        self.assertRaises(StreamError, cache.stageInitial, [Blocks((RAM,))])

    def test_initialOverCommitted(self) -> None:
        """A second initial stream into the same cache is staged, for there is something to protect."""
        cache, model = self.committed()
        events = [Blocks(BLOCKS), pages(range(40))]
        cache.stageInitial(events)
        self.assertCurrent(cache, model)
        cache.commit(b"again")
        self.flush(cache)
        model.apply(events)
        self.assertCurrent(cache, model)

    def test_abandonInitial(self) -> None:
        """An initial stream that broke leaves nothing; another one begins anew."""
        cache = self.cache()
        cache.stageInitial([Blocks(BLOCKS), pages([0, 1])])
        cache.abandon()
        self.assertEqual(cache.blocks, ())
        cache.abandon()
        cache.stageInitial([Blocks(BLOCKS)])
        self.assertCurrent(cache, Model())


class BoundTests(CacheCase):
    """Memory and disk."""

    def test_spill(self) -> None:
        """Beyond the limit, full batches go to a file without a name; order and deltas still hold."""
        cache, model = self.committed(batches=2)
        events = [pages(range(40)), zeros([1, 2]), delta(0), delta(2), pages([7]), delta(7), delta(39)]
        cache.stage(events)
        statistics = cache.statistics()
        self.assertEqual(statistics.stagedBytes, 2 * 4 * PAGE_SIZE)
        self.assertEqual(statistics.spilledBytes, 10 * 4 * PAGE_SIZE)
        self.assertEqual(os.listdir(self.directory), [])
        cache.commit(b"second")
        more = [delta(0), delta(20), zeros([21], 7), delta(21)]
        cache.stage(more)
        self.flush(cache)
        model.apply(events)
        self.assertCurrent(cache, model)
        cache.commit(b"third")
        self.flush(cache)
        model.apply(more)
        self.assertCurrent(cache, model)
        self.assertEqual(cache.statistics().spilledBytes, 0)

    def test_abandonSpilled(self) -> None:
        """Abandoning gives the disk back."""
        cache, _ = self.committed(batches=1)
        cache.stage([pages(range(40))])
        cache.abandon()
        self.assertEqual((cache.statistics().spilledBytes, cache.statistics().stagedBytes), (0, 0))

    def test_diskFull(self) -> None:
        """No room to spill: an error, the committed checkpoint stays, and room later is used."""
        cache, model = self.committed(batches=1)

        def noRoom(*args: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patched = self.patch(os, "pwrite", noRoom)
        self.assertRaises(StorageError, cache.stage, [pages(range(40))])
        self.assertRaises(StorageError, cache.commit, b"never")
        cache.abandon()
        self.flush(cache)
        self.assertCurrent(cache, model)
        self.assertEqual(cache.deviceState, b"initial")
        patched.restore()
        events = [pages(range(40))]
        cache.stage(events)
        cache.commit(b"second")
        self.flush(cache)
        model.apply(events)
        self.assertCurrent(cache, model)

    def test_cannotReadBack(self) -> None:
        """A disk that fails in the middle of a flush: an error, and trying again loses nothing."""
        cache, model = self.committed(batches=1)
        events = [pages(range(40))]
        cache.stage(events)
        cache.commit(b"second")
        next(cache.flush())

        def broken(*args: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patched = self.patch(os, "preadv", broken)
        self.assertRaises(StorageError, self.flush, cache)
        patched.restore()
        self.flush(cache)
        model.apply(events)
        self.assertCurrent(cache, model)

    def test_sparse(self) -> None:
        """Zeros on a page never written take no memory; on one that was, they count."""
        cache = self.cache()
        cache.stageInitial([Blocks(BLOCKS), zeros(range(40))])
        cache.commit(b"")
        cache.stage([zeros(range(40))])
        cache.commit(b"")
        self.flush(cache)
        self.assertEqual(cache.statistics().imageBytes, 0)
        for events in ([pages([3])], [zeros([3, 4])]):
            cache.stage(events)
            cache.commit(b"")
            self.flush(cache)
        self.assertEqual(cache.statistics().imageBytes, PAGE_SIZE)
        self.assertCurrent(cache, Model())

    def test_tooLarge(self) -> None:
        """A guest beyond the limit, or beyond what the host has, is refused with both numbers."""
        small = RamCache(CacheLimits(maxRamBytes=42 * PAGE_SIZE))
        error = self.assertRaises(StorageError, small.configure, BLOCKS)
        self.assertIn(f"{43 * PAGE_SIZE} bytes of RAM and this host may take {42 * PAGE_SIZE}", str(error))
        cache = self.cache()
        self.assertRaises(StorageError, cache.configure, (RamBlock("huge", 1 << 50),))
        self.assertEqual(cache.blocks, ())

    def test_noRoomForImage(self) -> None:
        """A block that cannot be mapped takes those before it along."""
        cache = RamCache(CacheLimits(maxRamBytes=1 << 63))
        gc.collect()
        descriptors = len(os.listdir("/proc/self/fd"))
        self.assertRaises(StorageError, cache.configure, (RAM, RamBlock("huge", 1 << 62)))
        self.assertEqual(cache.blocks, ())
        gc.collect()  # the error's frames, which hold the first image
        self.assertEqual(len(os.listdir("/proc/self/fd")), descriptors)

    def test_buffersComeBack(self) -> None:
        """A steady guest uses the same buffers again; after a burst they go, little by little."""
        cache, _ = self.committed()
        area = cache._area

        def checkpoint(pageCount: int) -> int:
            cache.stage([pages(range(pageCount))])
            cache.commit(b"")
            self.flush(cache)
            return len(area._idle)

        self.assertEqual([checkpoint(40), checkpoint(40)], [10, 10])
        self.assertEqual([checkpoint(4) for _ in range(12)][-1], 1)


class FullBatchTests(SynchronousTestCase):
    """Batches of their real size."""

    def test_laterWins(self) -> None:
        """Pages that come many times in one batch, in no order."""
        cache, model = RamCache(), Model()
        self.addCleanup(cache.close)
        cache.stageInitial([Blocks(BLOCKS)])
        cache.commit(b"")
        events = [pages(np.random.default_rng(seed).permutation(40).tolist()) for seed in range(30)]
        cache.stage(events)
        cache.commit(b"")
        for _ in cache.flush():
            pass
        model.apply(events)
        self.assertEqual(bytes(cache.image(RAM.name)), bytes(model.ram[RAM.name]))


class ImageTests(CacheCase):
    """What a hypervisor sees."""

    def test_path(self) -> None:
        """The image can be opened by its path, and what is written there is seen here."""
        cache, model = self.committed()
        with open(cache.imagePath(RAM.name), "r+b", buffering=0) as image:
            self.assertEqual(image.read(), bytes(model.ram[RAM.name]))
            os.pwrite(image.fileno(), b"written by the guest", PAGE_SIZE)
        self.assertEqual(bytes(cache.image(RAM.name)[PAGE_SIZE : PAGE_SIZE + 20]), b"written by the guest")
        cache.image(RAM.name)[0:5] = b"write"
        self.assertEqual(bytes(cache.image(RAM.name)[:5]), b"write")

    def test_bitmapIsACopy(self) -> None:
        """One bool a page, of the last committed checkpoint."""
        cache, _ = self.committed()
        cache.stage([pages([3]), zeros([5]), delta(2), pages([0], ROM.name)])
        cache.commit(b"second")
        bitmap = cache.dirtyBitmap(RAM.name)
        self.assertEqual((len(bitmap), np.flatnonzero(bitmap).tolist()), (40, [2, 3, 5]))
        bitmap[:] = True
        self.assertEqual(np.flatnonzero(cache.dirtyBitmap(RAM.name)).tolist(), [2, 3, 5])
        self.assertEqual(np.flatnonzero(cache.dirtyBitmap(ROM.name)).tolist(), [0])

    def test_close(self) -> None:
        """A view in somebody's hand stays readable, and goes last; closing twice is harmless."""
        before = len(os.listdir("/proc/self/fd"))
        cache, model = self.committed(batches=1)
        view = cache.image(RAM.name)
        cache.stage([pages(range(40))])
        cache.commit(b"second")
        cache.close()
        cache.close()
        self.assertEqual(bytes(view), bytes(model.ram[RAM.name]))
        self.assertEqual(list(cache.flush()), [])
        del view
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)
