"""
The RAM cache: a guest's RAM on the standby host, where a checkpoint is staged, committed at once, then applied.

It knows blocks, pages and checkpoints; it must not know the peer, the reactor or what a guest is. Rule 3 of the design
(nothing applied before it is whole) is kept here: the images only ever change from one whole checkpoint to the next,
and while they change, the pages still to be written are held until they are.

Pages have one number over all blocks (in the order of the block list), so that what is staged is flat columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from colotx._ramimage import Bytes, RamImage
from colotx._ramstage import BATCH, Batch, StagedCheckpoint, StagingArea
from colotx.errors import StorageError, StreamError
from colotx.vmstate import PAGE_SIZE, Blocks, Pages, RamBlock, RamEvent, Xbzrle, Zeros, applyXbzrle

_PAGE_SHIFT = PAGE_SIZE.bit_length() - 1


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """
    What a cache may take.

    @ivar stagingMemory: bytes of page copies held in memory besides the images; more goes to C{spillDirectory}.
    @ivar spillDirectory: a directory on a disk.
    @ivar maxRamBytes: the largest guest taken, bytes; None: what the host has available when the guest arrives.
    """

    stagingMemory: int = 256 * 1024 * 1024
    spillDirectory: str = "/var/tmp"
    maxRamBytes: int | None = None


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """
    @ivar ramBytes: the length of all blocks.
    @ivar imageBytes: memory the images take; a page that was always zero takes none.
    @ivar stagedBytes: buffers of page copies in memory, staged or not yet applied.
    @ivar spilledBytes: the same on disk.
    @ivar generation: checkpoints committed.
    @ivar dirtyPages: pages the last of them brought.
    """

    ramBytes: int
    imageBytes: int
    stagedBytes: int
    spilledBytes: int
    generation: int
    dirtyPages: int


class RamCache:
    """
    The RAM of one guest, as of its last committed checkpoint.

    Memory: the images (sparse: at most the guest's RAM), C{stagingMemory} for what is staged or committed and not yet
    applied (16 bytes a record on top of it), and 4 bytes a page, 12 with XBZRLE. What is beyond is spilled to disk.

    Order of calls: L{stageInitial} until the initial stream is whole, L{commit}; then for each checkpoint L{stage},
    L{commit}, and L{flush} to its end, now or while the next is staged. After an error L{abandon} what is staged.
    Addresses in events are the reader's business and not checked again.

    @ivar deviceState: the device-state blob of the last committed checkpoint.
    @ivar generation: how many checkpoints were committed.
    """

    def __init__(self, limits: CacheLimits | None = None) -> None:
        self._limits = limits or CacheLimits()
        self._area = StagingArea(self._limits.stagingMemory, self._limits.spillDirectory)
        self._images: dict[str, RamImage] = {}
        self._pageCount = 0
        self._staged = StagedCheckpoint(0)
        self._dirty = self._staged.dirty
        self._pending: deque[StagedCheckpoint] = deque()
        self._broken: Exception | None = None
        self.deviceState = b""
        self.generation = 0

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        """The guest's RAM blocks."""
        return tuple(image.block for image in self._images.values())

    def image(self, name: str) -> memoryview:
        """A whole block, writable. It is the current checkpoint's when L{flush} is exhausted."""
        return memoryview(self._images[name].map)

    def imagePath(self, name: str) -> str:
        """A path under which another process of this user can open the image until this cache is closed."""
        return self._images[name].path

    @property
    def dirtyPages(self) -> int:
        """How many pages the last committed checkpoint brought."""
        return int(np.count_nonzero(self._dirty))

    def dirtyBitmap(self, name: str) -> NDArray[np.bool_]:
        """Which pages of a block the last committed checkpoint brought: a copy, one bool a page."""
        image = self._images[name]
        return self._dirty[image.first : image.end].copy()

    def statistics(self) -> CacheStatistics:
        """What the cache takes now."""
        return CacheStatistics(
            ramBytes=self._pageCount * PAGE_SIZE,
            imageBytes=sum(image.bytes for image in self._images.values()),
            stagedBytes=self._area.residentBytes,
            spilledBytes=self._area.spilledBytes,
            generation=self.generation,
            dirtyPages=self.dirtyPages,
        )

    def configure(self, blocks: tuple[RamBlock, ...]) -> None:
        """
        Make empty images for a guest with these blocks. Once something is committed, only the same blocks will do.

        @raise StorageError: no room, or a larger guest than C{maxRamBytes}.
        @raise StreamError: other blocks than those of the committed checkpoint.
        """
        if self.generation:
            if blocks != self.blocks:
                raise StreamError("the guest's RAM blocks changed: end its protection and start it again")
            return
        self._dropImages()
        total = sum(block.length for block in blocks)
        limit = _availableMemory() if self._limits.maxRamBytes is None else self._limits.maxRamBytes
        if total > limit:
            raise StorageError(
                f"the guest has {total} bytes of RAM and this host may take {limit}: free memory or raise the limit"
            )
        try:
            for block in blocks:
                image = self._images[block.name] = RamImage(block, self._pageCount)
                self._pageCount = image.end
        except StorageError:
            self._dropImages()
            raise
        self._staged = StagedCheckpoint(self._pageCount)

    def stageInitial(self, events: Iterable[RamEvent]) -> None:
        """
        Take events of the initial stream. Before the first commit there is nothing to protect, and they go straight
        into the images.

        @raise StorageError: as L{configure} and L{stage}.
        @raise StreamError: as L{configure} and L{stage}.
        """
        self._take(events, direct=not self.generation)

    def stage(self, events: Iterable[RamEvent]) -> None:
        """
        Take events of a checkpoint, in order; what comes later wins. Copies what it keeps.

        @raise StorageError: no room to spill. What is staged cannot be committed; what is committed stays.
        @raise StreamError: an unknown block, or a malformed delta. The same.
        """
        self._take(events, direct=False)

    def abandon(self) -> None:
        """Drop what is staged since the last commit; before the first one, the images too. Never fails."""
        for batch in self._staged.batches:
            self._area.letGo(batch)
        self._broken = None
        if self.generation:
            self._staged = StagedCheckpoint(self._pageCount)
        else:
            self._dropImages()

    def commit(self, deviceState: bytes) -> None:
        """
        What is staged becomes the current checkpoint, at once, however large it is.

        @raise StorageError: staging had failed; C{abandon} it.
        """
        self._checkWhole()
        if self._staged.batches:
            self._pending.append(self._staged)
        self._area.expect(len(self._staged.batches))
        self._dirty = self._staged.dirty
        self._staged = StagedCheckpoint(self._pageCount)
        self.deviceState = deviceState
        self.generation += 1

    def flush(self) -> Iterator[int]:
        """
        Apply what is committed to the images. Yields the number of records of a slice (2 MiB at most, about a
        millisecond) between this and the next. Exhausted: the images are the current checkpoint. It may be dropped and
        begun again.

        @raise StorageError: spilled pages cannot be read back; trying again loses nothing.
        """
        while self._pending:
            checkpoint = self._pending[0]
            batch = checkpoint.batches[checkpoint.applied]
            self._apply(batch)
            checkpoint.applied += 1
            self._area.letGo(batch)
            if checkpoint.applied == len(checkpoint.batches):
                self._pending.popleft()
            if self._pending:
                yield batch.count

    def close(self) -> None:
        """Free everything. Views of images stay valid as long as somebody holds them. Harmless when closed."""
        self._pending.clear()
        self._area.close()
        self._dropImages()

    def _take(self, events: Iterable[RamEvent], direct: bool) -> None:
        self._checkWhole()
        try:
            for event in events:
                if isinstance(event, Pages):
                    self._put(event.block, event.addresses, event.data, 0, direct)
                elif isinstance(event, Zeros):
                    self._put(event.block, event.addresses, None, event.fill, direct)
                elif isinstance(event, Xbzrle):
                    page = applyXbzrle(self._newest(event.block, event.address), event.data)
                    data = np.frombuffer(page, np.uint8).reshape(1, PAGE_SIZE)
                    self._put(event.block, np.array([event.address], np.uint64), data, 0, direct)
                elif isinstance(event, Blocks):
                    self.configure(event.blocks)
        except Exception as error:
            self._broken = error
            raise

    def _put(
        self, block: str, addresses: NDArray[np.uint64], data: Bytes | None, fill: int, direct: bool
    ) -> None:
        image = self._image(block)
        places = (addresses >> _PAGE_SHIFT).astype(np.int64)
        if not direct:
            self._area.append(self._staged, places + image.first, data, fill)
            return
        self._staged.dirty[places + image.first] = True
        if data is None:
            image.fill(places, np.full(len(places), fill, np.int16))
        else:
            image.copy(places, data)

    def _newest(self, block: str, address: int) -> bytes:
        """A page as it is with everything that came before now."""
        image = self._image(block)
        place = address >> _PAGE_SHIFT
        for checkpoint in chain((self._staged,), reversed(self._pending)):
            if (found := checkpoint.find(image.first + place)) is not None:
                return self._area.page(*found)
        return bytes(image.pages[place].data)

    def _apply(self, batch: Batch) -> None:
        numbers, rows = batch.newest()
        data = self._area.contents(batch)
        images = tuple(self._images.values())
        start = 0
        for image, end in zip(images, np.searchsorted(numbers, [image.end for image in images]), strict=True):
            places, here = numbers[start:end] - image.first, rows[start:end]
            stored = here >= 0
            image.copy(places[stored], data, here[stored])
            image.fill(places[~stored], ~here[~stored])
            start = end

    def _image(self, block: str) -> RamImage:
        try:
            return self._images[block]
        except KeyError:
            raise StreamError(f"a page of the unknown RAM block {block!r}") from None

    def _checkWhole(self) -> None:
        if self._broken is not None:
            raise StorageError(f"the checkpoint is not whole: {self._broken}")

    def _dropImages(self) -> None:
        for image in self._images.values():
            image.close()
        self._images.clear()
        self._pageCount = 0
        self._staged = StagedCheckpoint(0)


def _availableMemory() -> int:
    """Bytes this host can give to new images (C{MemAvailable} of C{/proc/meminfo})."""
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise StorageError("/proc/meminfo does not tell the available memory: set the largest guest to take")


__all__ = ["BATCH", "CacheLimits", "CacheStatistics", "RamCache"]
