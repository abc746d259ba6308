"""
Page records that wait: batches of copies in the order of the stream, in memory up to a limit and then on disk.

It knows page numbers (over all blocks) and bytes; it must not know images or blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from colotx._ramimage import Bytes, Numbers, Rows
from colotx.spill import SpillSlot, SpillSpace
from colotx.vmstate import PAGE_SIZE

BATCH = 512
"""Page records staged together, spilled together and applied in one slice: at most 2 MiB of pages."""

BATCH_BYTES = BATCH * PAGE_SIZE


@dataclass(slots=True, eq=False)
class Batch:
    """
    Up to L{BATCH} page records in the order of the stream.

    @ivar data: the buffer of page copies; None before the first, once it is on disk, and when let go.
    @ivar count: how many records there are.
    @ivar stored: how many of them have a row in C{data}.
    @ivar slot: where it is on disk, or None.
    @ivar numbers: of each record, whose page it is.
    @ivar rows: of each record, its row in C{data}, or C{~fill}.
    """

    data: Bytes | None = None
    count: int = 0
    stored: int = 0
    slot: SpillSlot | None = None
    numbers: Numbers = field(default_factory=lambda: np.empty(BATCH, np.int64))
    rows: Rows = field(default_factory=lambda: np.empty(BATCH, np.int16))

    def newest(self) -> tuple[Numbers, Rows]:
        """The records sorted by page, of each page only the one that came last."""
        order = np.argsort(self.numbers[: self.count], kind="stable")
        numbers, rows = self.numbers[order], self.rows[order]
        last = np.append(numbers[1:] != numbers[:-1], True)
        return numbers[last], rows[last]


class StagedCheckpoint:
    """
    The batches of one checkpoint. They are applied, and then let go, from the first to the last.

    @ivar dirty: a bool a page: whether it came.
    @ivar applied: how many batches are in the images.
    """

    def __init__(self, pages: int) -> None:
        self.dirty: NDArray[np.bool_] = np.zeros(pages, np.bool_)
        self.batches: list[Batch] = []
        self.applied = 0
        self._index: Numbers | None = None
        self._indexed = 0

    def find(self, number: int) -> tuple[Batch, int] | None:
        """
        The newest record of a page that is not in the images, and its place in the batch. Only XBZRLE asks, so the
        index is made at the first question and catches up at the next.
        """
        if not self.dirty[number] or not self.batches:
            return None
        if self._index is None:
            self._index = np.zeros(len(self.dirty), np.int64)
        count = (len(self.batches) - 1) * BATCH + self.batches[-1].count
        if self._indexed < count:
            for position in range(self._indexed // BATCH, len(self.batches)):
                batch, start = self.batches[position], max(0, self._indexed - position * BATCH)
                places = np.arange(start, batch.count) + (position * BATCH + 1)
                np.maximum.at(self._index, batch.numbers[start : batch.count], places)
            self._indexed = count
        position, record = divmod(int(self._index[number]) - 1, BATCH)
        return (self.batches[position], record) if position >= self.applied else None


class StagingArea:
    """
    The memory and the disk that staged checkpoints live in.

    @ivar resident: batches whose buffer is in memory.
    """

    def __init__(self, memory: int, directory: str) -> None:
        """
        @param memory: bytes of page copies to hold; the last batch of a checkpoint may come on top.
        @param directory: where to spill the rest.
        """
        self.resident = 0
        self._limit = max(1, memory // BATCH_BYTES)
        self._spill = SpillSpace(directory, BATCH_BYTES)
        self._idle: list[Bytes] = []
        self._keep = 1
        self._scratch: Bytes | None = None

    @property
    def residentBytes(self) -> int:
        """Bytes of buffers in memory that hold something."""
        return self.resident * BATCH_BYTES

    @property
    def spilledBytes(self) -> int:
        """Bytes on disk."""
        return self._spill.bytes

    def append(
        self, checkpoint: StagedCheckpoint, numbers: Numbers, data: Bytes | None, fill: int = 0
    ) -> None:
        """
        Add records, copying what they hold.

        @param numbers: whose pages.
        @param data: their contents, one row a page; None: every byte is C{fill}.
        @raise StorageError: no room on disk.
        """
        checkpoint.dirty[numbers] = True
        done = 0
        while done < len(numbers):
            batch = self._room(checkpoint.batches)
            start, count = batch.count, min(len(numbers) - done, BATCH - batch.count)
            batch.numbers[start : start + count] = numbers[done : done + count]
            if data is None:
                batch.rows[start : start + count] = ~fill
            else:
                if batch.data is None:
                    batch.data = self._buffer()
                stored = batch.stored
                batch.data[stored : stored + count] = data[done : done + count]
                batch.rows[start : start + count] = np.arange(stored, stored + count)
                batch.stored += count
            batch.count += count
            done += count

    def contents(self, batch: Batch) -> Bytes:
        """
        The rows of a batch; valid until the next call, if they come from disk.

        @raise StorageError: it cannot be read back.
        """
        if batch.data is not None:
            return batch.data
        if self._scratch is None:
            self._scratch = np.empty((BATCH, PAGE_SIZE), np.uint8)
        if batch.slot is not None:
            self._spill.load(batch.slot, self._scratch[: batch.stored].data.cast("B"))
        return self._scratch

    def page(self, batch: Batch, record: int) -> bytes:
        """The page of one record. @raise StorageError: it cannot be read back."""
        row = int(batch.rows[record])
        if row < 0:
            return bytes([~row]) * PAGE_SIZE
        if batch.data is not None:
            return bytes(batch.data[row].data)
        assert batch.slot is not None
        page = bytearray(PAGE_SIZE)
        self._spill.load(batch.slot, memoryview(page), row * PAGE_SIZE)
        return bytes(page)

    def letGo(self, batch: Batch) -> None:
        """Its contents are needed no more."""
        if batch.data is not None:
            self._retire(batch.data)
            batch.data = None
        elif batch.slot is not None:
            self._spill.free(batch.slot)
            batch.slot = None

    def expect(self, batches: int) -> None:
        """A checkpoint took so many batches: keep buffers for the next. What is above is freed little by little."""
        self._keep = max(1, batches, self._keep * 3 // 4)

    def close(self) -> None:
        """Give memory and disk back."""
        self._idle.clear()
        self._scratch = None
        self._spill.close()

    def _room(self, batches: list[Batch]) -> Batch:
        """The batch to append to: the last one, or a new one, for which a full one may have to leave memory."""
        if batches and batches[-1].count < BATCH:
            return batches[-1]
        if batches and self.resident >= self._limit:
            last = batches[-1]
            if last.data is not None:
                last.slot = self._spill.store(last.data[: last.stored].data.cast("B"))
                self._retire(last.data)
                last.data = None
        batches.append(Batch())
        return batches[-1]

    def _buffer(self) -> Bytes:
        self.resident += 1
        return self._idle.pop() if self._idle else np.empty((BATCH, PAGE_SIZE), np.uint8)

    def _retire(self, buffer: Bytes) -> None:
        # A fresh buffer costs many times more than the copy into it (page faults).
        self.resident -= 1
        if len(self._idle) < self._keep:
            self._idle.append(buffer)
        elif len(self._idle) > self._keep:
            self._idle.pop()
