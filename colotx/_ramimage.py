"""The image of one RAM block: a sparse memfd that a hypervisor can map, and the writing of pages into it."""

from __future__ import annotations

import mmap
import os
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from colotx.errors import StorageError
from colotx.vmstate import PAGE_SIZE, RamBlock

Bytes: TypeAlias = NDArray[np.uint8]
Numbers: TypeAlias = NDArray[np.int64]
Rows: TypeAlias = NDArray[np.int16]

_RUN = 8
"""Pages a run must have on average to be worth a copy of its own: runs are several times faster than a scatter."""


class RamImage:
    """
    One block's RAM.

    @ivar first: the number its first page has in the cache.
    @ivar end: the number after its last page's.
    @ivar pages: the contents, one row a page.
    """

    def __init__(self, block: RamBlock, first: int) -> None:
        """@raise StorageError: no room."""
        self.block = block
        self.first = first
        self.end = first + block.length // PAGE_SIZE
        try:
            self._descriptor = os.memfd_create("colotx-ram", os.MFD_CLOEXEC)
        except OSError as error:
            raise StorageError(f"no memory file for RAM block {block.name}: {error.strerror}") from error
        try:
            os.ftruncate(self._descriptor, block.length)
            self.map = mmap.mmap(self._descriptor, block.length)
        except (OSError, OverflowError, ValueError) as error:
            os.close(self._descriptor)
            raise StorageError(
                f"no room for RAM block {block.name} of {block.length} bytes: {error}"
            ) from error
        self.pages: Bytes = np.frombuffer(self.map, np.uint8).reshape(-1, PAGE_SIZE)
        self._written: NDArray[np.bool_] = np.zeros(len(self.pages), np.bool_)

    @property
    def path(self) -> str:
        """Where another process of this user can open it."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return os.fstat(self._descriptor).st_blocks * 512

    def copy(self, places: Numbers, data: Bytes, rows: Rows | None = None) -> None:
        """
        Write pages.

        @param places: page numbers in this block, none twice.
        @param data: contents, one row a page.
        @param rows: which row for which place; None: all of them in order.
        """
        if not len(places):
            return
        self._written[places] = True
        steps = np.diff(places) != 1
        if rows is not None:
            gaps = np.diff(rows) != 1
            if not gaps.any():
                data = data[rows[0] : rows[-1] + 1]
                rows = None
            else:
                steps |= gaps
        breaks = np.flatnonzero(steps) + 1
        if rows is None and len(places) < _RUN * len(breaks):
            self.pages[places] = data
            return
        # Never gather rows first: the fresh memory that takes costs more than copying them one by one.
        starts = [0, *breaks.tolist()]
        for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
            place, row = int(places[start]), start if rows is None else int(rows[start])
            self.pages[place : place + end - start] = data[row : row + end - start]

    def fill(self, places: Numbers, fills: Rows) -> None:
        """
        Fill pages with one byte value each. Zeros on a page never written are skipped: they would only take memory.

        @param places: page numbers in this block, none twice.
        """
        needed = self._written[places] | (fills != 0)
        places = places[needed]
        if len(places):
            self._written[places] = True
            self.pages[places] = fills[needed].astype(np.uint8)[:, np.newaxis]

    def close(self) -> None:
        """Give the memory back when the last view of it is gone."""
        os.close(self._descriptor)
