"""
What L{colotx.vmstate}'s readers tell and its writer takes: blocks, events, limits and the constants of the wire.

Everything is a value. The grammar these come from is that of C{migration/ram.c} and C{migration/savevm.c} in QEMU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from colotx.errors import StreamError

Buffer: TypeAlias = bytes | bytearray | memoryview

PAGE_SIZE: Final = 4096
"""Bytes of a page in the stream: the target page, whatever backs it on the host."""

ADDRESS_MASK: Final = ~(PAGE_SIZE - 1) & (2**64 - 1)

# The low bits of a record's be64 (RAM_SAVE_FLAG_* in migration/ram.c).
ZERO: Final = 0x02
MEM_SIZE: Final = 0x04
PAGE: Final = 0x08
EOS: Final = 0x10
CONTINUE: Final = 0x20
XBZRLE: Final = 0x40

# The byte a section begins with (QEMU_VM_* in migration/savevm.h).
VM_EOF: Final = 0x00
VM_SECTION_START: Final = 0x01
VM_SECTION_PART: Final = 0x02
VM_SECTION_END: Final = 0x03
VM_SECTION_FULL: Final = 0x04
VM_SUBSECTION: Final = 0x05
VM_VMDESCRIPTION: Final = 0x06
VM_CONFIGURATION: Final = 0x07
VM_COMMAND: Final = 0x08
VM_SECTION_FOOTER: Final = 0x7E

STREAM_HEADER: Final = bytes.fromhex("5145564d00000003")
RAM_VERSION: Final = 4
CAPABILITIES: Final = "configuration/capabilities"
IGNORE_SHARED: Final = "x-ignore-shared"


@dataclass(frozen=True, slots=True)
class RamBlock:
    """
    A block of guest memory, as the START(ram) section lists it.

    @ivar name: such as C{pc.ram} or C{0000:00:02.0/vga.vram}; at most 255 bytes in UTF-8.
    @ivar length: bytes, a multiple of L{PAGE_SIZE}.
    @ivar gpa: the block's address in its container, which only streams with C{x-ignore-shared} carry.
    """

    name: str
    length: int
    gpa: int | None = None


@dataclass(frozen=True, slots=True)
class RamEvent:
    """Base of what a reader makes of RAM sections. Events come in the order of the stream."""


@dataclass(frozen=True, slots=True)
class Blocks(RamEvent):
    """The block list of START(ram). It comes before every page."""

    blocks: tuple[RamBlock, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pages(RamEvent):
    """
    Whole pages of one block. No address comes twice in one event, but a later event may bring it again.

    The arrays may be read-only views into the reader's or the caller's buffer: valid until the next C{feed}.

    @ivar block: the block's name.
    @ivar addresses: C{(n,)} bytes from the start of the block, multiples of L{PAGE_SIZE}, within the block.
    @ivar data: C{(n, PAGE_SIZE)}; the rows are contiguous, from row to row there may be a gap.
    """

    block: str
    addresses: NDArray[np.uint64]
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Zeros(RamEvent):
    """Pages of one block filled with one byte value (in practice 0). Addresses as in L{Pages}."""

    block: str
    addresses: NDArray[np.uint64]
    fill: int


@dataclass(frozen=True, slots=True)
class Xbzrle(RamEvent):
    """
    One page as a delta to the page the receiver has (everything before this event applied).

    @ivar data: the encoded delta, see L{applyXbzrle}.
    """

    block: str
    address: int
    data: bytes


@dataclass(frozen=True, slots=True)
class RamEnd(RamEvent):
    """The END(ram) section and its footer are read: the RAM of this checkpoint is whole."""


@dataclass(frozen=True, slots=True)
class Limits:
    """
    What a reader lets a stream ask for, so that no peer makes it take memory without bound.

    @ivar blocks: RAM blocks in the list.
    @ivar deviceState: bytes of device sections in the initial stream.
    @ivar vmdesc: bytes of the JSON description.
    """

    blocks: int = 1024
    deviceState: int = 256 * 2**20
    vmdesc: int = 16 * 2**20


def applyXbzrle(old: Buffer, data: Buffer) -> bytes:
    """
    Decode an XBZRLE delta (C{migration/xbzrle.c}): { run of unchanged bytes, run of new bytes }, the lengths in
    LEB128 of at most two bytes.

    @param old: the page as it is, L{PAGE_SIZE} bytes.
    @param data: the delta.
    @return: the page as it becomes.
    @raise StreamError: the delta is cut, empty in a run, or reaches beyond the page.
    """
    page = bytearray(old)
    at = place = 0
    while at < len(data):
        unchanged, at = _leb128(data, at)
        if not unchanged and place:
            raise StreamError(f"XBZRLE delta with an empty unchanged run at byte {at} of {len(data)}")
        count, at = _leb128(data, at)
        if not count:
            raise StreamError(f"XBZRLE delta with an empty changed run at byte {at} of {len(data)}")
        place += unchanged
        if place + count > len(page) or at + count > len(data):
            raise StreamError(
                f"XBZRLE delta: {count} bytes for offset {place} of a {len(page)}-byte page, "
                f"{len(data) - at} bytes left"
            )
        page[place : place + count] = data[at : at + count]
        place += count
        at += count
    return bytes(page)


def _leb128(data: Buffer, at: int) -> tuple[int, int]:
    """The number at C{at}, and where the next thing begins."""
    encoded = data[at : at + 2]
    if encoded and encoded[0] < 0x80:
        return encoded[0], at + 1
    if len(encoded) < 2 or encoded[1] >= 0x80:
        raise StreamError(f"XBZRLE delta with a broken run length at byte {at} of {len(data)}")
    return (encoded[0] & 0x7F) | encoded[1] << 7, at + 2
