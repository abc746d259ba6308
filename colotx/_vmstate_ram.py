"""
The RAM sections of a migration stream (C{ram_load} in QEMU's C{migration/ram.c}), read in bulk.

Pages that come in runs are found and handed on by numpy, as views of the caller's buffer. Where kinds of records
alternate, a tight loop notes only where each record begins, and numpy does the rest once a buffer.

This module knows what is inside sections of C{ram}; what comes around them is L{colotx.vmstate}'s.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from colotx._vmstate_model import (
    ADDRESS_MASK,
    CONTINUE,
    EOS,
    MEM_SIZE,
    PAGE,
    PAGE_SIZE,
    RAM_VERSION,
    VM_SECTION_END,
    VM_SECTION_FOOTER,
    VM_SECTION_START,
    XBZRLE,
    ZERO,
    Blocks,
    Limits,
    Pages,
    RamBlock,
    RamEnd,
    RamEvent,
    Xbzrle,
    Zeros,
)
from colotx.errors import StreamError, UnsupportedStream

RECORD_BYTES: Final = 8 + 1 + 255 + PAGE_SIZE + 3
"""No element of a RAM section is larger: header, name with its length, page, and the head of an XBZRLE delta."""

REFUSED: Final = {
    0x01: "FULL, a flag QEMU gave up long ago",
    0x80: "HOOK, that is RDMA",
    0x100: "COMPRESS_PAGE: turn the capability 'compress' off",
    0x200: "MULTIFD_FLUSH: turn the capability 'multifd' off",
}

PAGE_AGAIN: Final = PAGE | CONTINUE
ZERO_AGAIN: Final = ZERO | CONTINUE
PAGE_STRIDE: Final = 8 + PAGE_SIZE
ZERO_STRIDE: Final = 8 + 1

RUN: Final = 8
"""Records of one kind, in a row, that make it worthwhile to look for a run."""

_be64: Final = Struct(">Q")
_be32: Final = Struct(">I")
_be16: Final = Struct(">H")
_u64: Final = np.dtype(">u8")
_ADDRESS: Final = np.uint64(ADDRESS_MASK)
_FLAGS: Final = np.uint64(PAGE_SIZE - 1)
_PAGE: Final = np.uint64(PAGE)


class RamReader:
    """
    What is to be remembered from section to section and from checkpoint to checkpoint of one connection: the
    section's id, the block list, and the block that CONTINUE means. One reader at a time uses it.

    @ivar blocks: the block list, empty before START(ram) was read.
    @ivar sectionId: C{ram}'s section id; None before START(ram).
    @ivar carriesGpa: the block list has a gpa a block (capability C{x-ignore-shared}).
    @ivar inside: a section is begun and its footer not yet read.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.blocks: tuple[RamBlock, ...] = ()
        self.sectionId: int | None = None
        self.carriesGpa = False
        self.inside = False
        self._limits = limits or Limits()
        self._table: dict[bytes, RamBlock] = {}
        self._block: RamBlock | None = None
        self._kind = 0
        self._unlisted = 0
        self._step: Callable[[memoryview, int, list[RamEvent]], int] = self._header

    def read(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        """
        Read a section of C{ram} from C{pos} (at first: its type byte) as far as the bytes go.

        @param events: where to append what was read.
        @return: where reading ended: behind the section if C{inside} is False now, else at an element that is not
            whole.
        @raise StreamError: it is no RAM section, or one that does not fit the block list.
        """
        self.inside = True
        while self.inside:
            step = self._step
            before, pos = pos, step(view, pos, events)
            # Records are read in one go: where they end without a mark, bytes are missing.
            if pos == before or step == self._step == self._records:
                break
        return pos

    def _header(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        start = view[pos] == VM_SECTION_START
        size = 5 if not start else 5 + 1 + view[pos + 5] + 8 if len(view) > pos + 5 else 6
        if len(view) - pos < size:
            return pos
        (sectionId,) = _be32.unpack_from(view, pos + 1)
        if start:
            name = bytes(view[pos + 6 : pos + size - 8])
            if name != b"ram":
                raise UnsupportedStream(
                    f"live section {name!r}: only RAM migrates live here, turn the other off"
                )
            if self.sectionId is not None:
                raise StreamError(f"a second START(ram), section {sectionId}")
            instance, version = (_be32.unpack_from(view, pos + size - back)[0] for back in (8, 4))
            if instance != 0 or version != RAM_VERSION:
                raise StreamError(
                    f"START(ram) of instance {instance}, version {version}; known: 0, {RAM_VERSION}"
                )
            self.sectionId = sectionId
        elif self.sectionId is None:
            raise StreamError(f"section {sectionId} goes on, but START(ram) never came")
        elif sectionId != self.sectionId:
            raise StreamError(f"section {sectionId} goes on, but ram is section {self.sectionId}")
        self._kind = view[pos]
        self._step = self._records
        return pos + size

    def _footer(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        if len(view) - pos < 5:
            return pos
        (sectionId,) = _be32.unpack_from(view, pos + 1)
        if view[pos] != VM_SECTION_FOOTER or sectionId != self.sectionId:
            raise StreamError(
                f"footer 0x{view[pos]:02x} of section {sectionId} where 0x7e of section {self.sectionId} is due"
            )
        if self._kind == VM_SECTION_END:
            events.append(RamEnd())
        self.inside = False
        self._step = self._header
        return pos + 5

    def _list(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        """One entry of the block list."""
        fixed = 16 if self.carriesGpa else 8
        if pos == len(view) or len(view) - pos < 1 + view[pos] + fixed:
            return pos
        at = pos + 1 + view[pos]
        raw = bytes(view[pos + 1 : at])
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise StreamError(f"RAM block name {raw!r} is no UTF-8") from None
        (length,) = _be64.unpack_from(view, at)
        gpa = _be64.unpack_from(view, at + 8)[0] if self.carriesGpa else None
        if not name or raw in self._table:
            raise StreamError(f"RAM block {name!r} is listed twice or has no name")
        if length % PAGE_SIZE or length > self._unlisted:
            raise StreamError(
                f"RAM block {name!r} of {length} bytes: not whole pages, or more than the {self._unlisted} left"
            )
        if len(self._table) == self._limits.blocks:
            raise StreamError(f"more than {self._limits.blocks} RAM blocks")
        self._table[raw] = RamBlock(name, length, gpa)
        self._unlisted -= length
        if not self._unlisted:
            self._listed(events)
        return at + fixed

    def _listed(self, events: list[RamEvent]) -> None:
        self.blocks = tuple(self._table.values())
        events.append(Blocks(self.blocks))
        self._step = self._records

    def _records(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        """
        Page records, until the bytes or the section end. C{places} notes where records of the current block begin;
        each of these overwrites a whole page.
        """
        end = len(view)
        places: list[int] = []
        while end - pos > 8:
            flags = (view[pos + 6] & 0x0F) << 8 | view[pos + 7]
            if flags == PAGE_AGAIN:
                stride = PAGE_STRIDE
            elif flags == ZERO_AGAIN and not view[pos + 8]:
                stride = ZERO_STRIDE
            else:
                self._noted(view, places, events)
                before, pos = pos, self._single(view, pos, flags, events)
                if pos == before or self._step != self._records:
                    return pos
                continue
            if end - pos < stride:
                break
            ahead = pos + RUN * stride + 7
            if ahead < end and view[ahead] == flags:
                addresses = _run(view, pos, stride, flags)
                if len(addresses) >= RUN:
                    self._noted(view, places, events)
                    self._emitRun(view, pos, stride, addresses, events)
                    pos += len(addresses) * stride
                    continue
            places.append(pos)
            pos += stride
        self._noted(view, places, events)
        return pos

    def _noted(self, view: memoryview, places: list[int], events: list[RamEvent]) -> None:
        """Emit the noted records and forget them."""
        if len(places) > 1:
            self._emit(view, np.array(places, np.intp), events)
        elif places:
            self._single(view, places[0], view[places[0] + 7], events)
        places.clear()

    def _emitRun(
        self, view: memoryview, pos: int, stride: int, addresses: NDArray[np.uint64], events: list[RamEvent]
    ) -> None:
        """Records of one kind in a row, as one event."""
        count = len(addresses)
        if not (addresses[1:] > addresses[:-1]).all():
            self._emit(view, np.arange(pos, pos + count * stride, stride), events)
            return
        block = self._blockOf(int(addresses[-1]))
        if stride == ZERO_STRIDE:
            events.append(Zeros(block.name, addresses, 0))
        else:
            data: NDArray[np.uint8] = np.ndarray((count, PAGE_SIZE), np.uint8, view, pos + 8, (stride, 1))
            events.append(Pages(block.name, addresses, data))

    def _emit(self, view: memoryview, places: NDArray[np.intp], events: list[RamEvent]) -> None:
        """
        Whole-page records of the current block, as one event a kind. Of several for one page the last one counts.

        @param places: where the records begin, ascending; at least two.
        """
        headers = _at(view, places)
        addresses = headers & _ADDRESS
        if not (addresses[1:] > addresses[:-1]).all():
            _, first = np.unique(addresses[::-1], return_index=True)
            last = len(addresses) - 1 - first
            places, headers, addresses = places[last], headers[last], addresses[last]
        block = self._blockOf(int(addresses[-1]))
        arePages = (headers & _PAGE).astype(np.bool_)
        zeros = addresses[~arePages]
        if len(zeros):
            events.append(Zeros(block.name, zeros, 0))
        if len(zeros) < len(addresses):
            data = _payloads(view, places[arePages] + 8)
            events.append(Pages(block.name, addresses[arePages], data))

    def _blockOf(self, highest: int) -> RamBlock:
        """The current block, which must reach beyond the page at C{highest}."""
        block = self._block
        if block is None:
            raise StreamError(f"page 0x{highest:x} of the block before, but there was none")
        if highest >= block.length:
            raise StreamError(
                f"page 0x{highest:x} of RAM block {block.name!r}, which ends at 0x{block.length:x}"
            )
        return block

    def _single(self, view: memoryview, pos: int, flags: int, events: list[RamEvent]) -> int:
        """
        A record that does not come in runs: one that names its block, a delta, an unusual fill, a mark.

        @return: where the next record begins, or C{pos}: more bytes are needed.
        """
        header: int = _be64.unpack_from(view, pos)[0]
        address = header - flags
        if flags in (EOS, MEM_SIZE):
            return self._mark(pos, flags, address)
        kind = flags & ~CONTINUE
        if kind not in (ZERO, PAGE, XBZRLE):
            for bit, words in REFUSED.items():
                if flags & bit:
                    raise UnsupportedStream(f"RAM record with flag 0x{bit:x}, {words}")
            raise StreamError(f"RAM record with flags 0x{flags:x} at address 0x{address:x}: no such record")
        at = pos + 8
        block = self._block
        if not flags & CONTINUE:
            name, at = at + 1, at + 1 + view[at]
            if len(view) <= at:
                return pos
            raw = bytes(view[name:at])
            block = self._table.get(raw)
            if block is None:
                raise StreamError(f"page 0x{address:x} of RAM block {raw!r}, which is not in the block list")
        if kind == XBZRLE:
            if len(view) - at < 3:
                return pos
            size = int(_be16.unpack_from(view, at + 1)[0])
            if view[at] != 1 or size > PAGE_SIZE:
                raise StreamError(
                    f"XBZRLE record with mark {view[at]} and {size} bytes; known: 1, a page at most"
                )
            at += 3
        else:
            size = 1 if kind == ZERO else PAGE_SIZE
        if len(view) - at < size:
            return pos
        self._block = block
        name_ = self._blockOf(address).name
        where = np.array([address], np.uint64)
        if kind == ZERO:
            events.append(Zeros(name_, where, view[at]))
        elif kind == PAGE:
            events.append(Pages(name_, where, np.ndarray((1, PAGE_SIZE), np.uint8, view, at)))
        else:
            events.append(Xbzrle(name_, address, bytes(view[at : at + size])))
        return at + size

    def _mark(self, pos: int, flags: int, value: int) -> int:
        """MEM_SIZE, the head of the block list, or EOS, the end of a section's records."""
        if flags == EOS:
            if value:
                raise StreamError(f"EOS record with address 0x{value:x}")
            self._step = self._footer
        else:
            if self._kind != VM_SECTION_START or self.blocks or not value:
                raise StreamError(
                    f"block list of 0x{value:x} bytes: empty, a second one, or not in START(ram)"
                )
            self._unlisted = value
            self._step = self._list
        return pos + 8


def _at(view: memoryview, places: NDArray[np.intp]) -> NDArray[np.uint64]:
    """The be64 at each place."""
    anywhere: NDArray[np.uint64] = np.ndarray((len(view) - 7,), _u64, view, 0, (1,))
    return anywhere[places].astype(np.uint64)


def _payloads(view: memoryview, places: NDArray[np.intp]) -> NDArray[np.uint8]:
    """The page at each place: a view if they are evenly spaced, else gathered."""
    count, first, last = len(places), int(places[0]), int(places[-1])
    step = (last - first) // (count - 1) if count > 1 else PAGE_SIZE
    if first + step * (count - 1) == last and (places[1:] - places[:-1] == step).all():
        return np.ndarray((count, PAGE_SIZE), np.uint8, view, first, (step, 1))
    anywhere: NDArray[np.uint8] = np.ndarray(
        (len(view) - PAGE_SIZE + 1, PAGE_SIZE), np.uint8, view, 0, (1, 1)
    )
    return anywhere[places]


def _run(view: memoryview, pos: int, stride: int, flags: int) -> NDArray[np.uint64]:
    """The addresses of the whole records in a row at C{pos} with these flags (and, of ZERO records, the fill 0)."""
    room = (len(view) - pos) // stride
    size = min(4 * RUN, room)
    while True:
        headers: NDArray[np.uint64] = np.ndarray((size,), _u64, view, pos, (stride,))
        addresses = headers.astype(np.uint64)
        addresses ^= np.uint64(flags)
        other = addresses & _FLAGS
        if stride == ZERO_STRIDE:
            other |= np.ndarray((size,), np.uint8, view, pos + 8, (stride,))
        if other.any():
            return addresses[: (other != 0).argmax()]
        if size == room:
            return addresses
        size = min(4 * size, room)
