"""
The writing side of the migration stream: what L{colotx._vmstate_ram} and the readers read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from struct import pack
from typing import Final
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from colotx._vmstate_model import (
    CAPABILITIES,
    CONTINUE,
    EOS,
    IGNORE_SHARED,
    MEM_SIZE,
    PAGE,
    PAGE_SIZE,
    RAM_VERSION,
    STREAM_HEADER,
    VM_COMMAND,
    VM_CONFIGURATION,
    VM_EOF,
    VM_SECTION_END,
    VM_SECTION_FOOTER,
    VM_SECTION_FULL,
    VM_SECTION_PART,
    VM_SECTION_START,
    VM_SUBSECTION,
    VM_VMDESCRIPTION,
    XBZRLE,
    ZERO,
    Pages,
    RamBlock,
    Xbzrle,
    Zeros,
)

PIECE: Final = 256 * 1024
"""Bytes of payload written as one piece, which stay in the processor's cache on their way to a socket."""


class RamWriter:
    """
    The mirror of L{colotx.vmstate.RamReader}: one for the writing side of a connection. Like it, it remembers the
    block of the last record, across sections and checkpoints.

    @ivar sectionId: C{ram}'s section id; any number, in QEMU 2 or 3 as a rule.
    """

    def __init__(self, sectionId: int = 2) -> None:
        self.sectionId = sectionId
        self._last: str | None = None

    def header(self) -> bytes:
        """The magic and version every stream begins with."""
        return STREAM_HEADER

    def configuration(
        self, machine: str, capabilities: Collection[str] = (), uuid: UUID | None = None
    ) -> bytes:
        """The configuration section: machine name, and as subsections what source and destination must share."""
        name = machine.encode()
        section = pack(">BI", VM_CONFIGURATION, len(name)) + name
        if capabilities:
            section += _capabilities(capabilities)
        if uuid is not None:
            section += pack(">B", VM_SUBSECTION) + _counted("configuration/uuid") + pack(">I", 1) + uuid.bytes
        return section

    def enableColo(self) -> bytes:
        """The command that makes the destination a COLO secondary."""
        return pack(">BHH", VM_COMMAND, 8, 0)

    def start(self, blocks: Iterable[RamBlock]) -> bytes:
        """START(ram) with the block list. Either all blocks have a gpa or none (see C{x-ignore-shared})."""
        blocks = tuple(blocks)
        parts = [
            pack(">BI", VM_SECTION_START, self.sectionId),
            _counted("ram"),
            pack(">II", 0, RAM_VERSION),
            pack(">Q", sum(block.length for block in blocks) | MEM_SIZE),
        ]
        for block in blocks:
            parts += [_counted(block.name), pack(">Q", block.length)]
            if block.gpa is not None:
                parts.append(pack(">Q", block.gpa))
        return b"".join(parts) + self._close()

    def part(self, items: Iterable[Pages | Zeros | Xbzrle]) -> Iterator[bytes | memoryview]:
        """A PART(ram) section in pieces. Nothing is written before the iterator is run, and it must be run out."""
        return self._section(VM_SECTION_PART, items)

    def end(self, items: Iterable[Pages | Zeros | Xbzrle]) -> Iterator[bytes | memoryview]:
        """END(ram), the same way. The RAM of a checkpoint is C{end} and C{eof}."""
        return self._section(VM_SECTION_END, items)

    def deviceSection(self, sectionId: int, name: str, instance: int, version: int, payload: bytes) -> bytes:
        """A FULL section: the state of one device."""
        return (
            pack(">BI", VM_SECTION_FULL, sectionId)
            + _counted(name)
            + pack(">II", instance, version)
            + payload
            + pack(">BI", VM_SECTION_FOOTER, sectionId)
        )

    def eof(self) -> bytes:
        """The byte that ends the sections."""
        return bytes((VM_EOF,))

    def vmdesc(self, json: bytes) -> bytes:
        """The description of the device sections, which ends a stream unless the machine suppresses it."""
        return pack(">BI", VM_VMDESCRIPTION, len(json)) + json

    def _close(self) -> bytes:
        return pack(">QBI", EOS, VM_SECTION_FOOTER, self.sectionId)

    def _section(self, kind: int, items: Iterable[Pages | Zeros | Xbzrle]) -> Iterator[bytes | memoryview]:
        yield pack(">BI", kind, self.sectionId)
        for item in items:
            if isinstance(item, Xbzrle):
                header = pack(">Q", item.address | XBZRLE | self._continue(item.block))
                yield header + self._name(item.block) + pack(">BH", 1, len(item.data)) + item.data
            elif len(item.addresses):
                yield from self._bulk(item)
        yield self._close()

    def _bulk(self, item: Pages | Zeros) -> Iterator[bytes | memoryview]:
        payload: NDArray[np.uint8]
        if isinstance(item, Pages):
            kind, payload = PAGE, item.data
        else:
            kind, payload = ZERO, np.full((1, 1), item.fill, np.uint8).repeat(len(item.addresses), axis=0)
        start = 0
        if self._last != item.block:
            start = 1
            header = pack(">Q", int(item.addresses[0]) | kind)
            yield header + self._name(item.block) + payload[0].tobytes()
        size = payload.shape[1]
        step = max(PIECE // size, 1)
        for at in range(start, len(payload), step):
            addresses = item.addresses[at : at + step]
            records = np.empty((len(addresses), 8 + size), np.uint8)
            headers = (addresses | np.uint64(kind | CONTINUE)).astype(">u8")
            records[:, :8] = headers.view(np.uint8).reshape(-1, 8)
            records[:, 8:] = payload[at : at + step]
            yield records.reshape(-1).data

    def _continue(self, block: str) -> int:
        return CONTINUE if self._last == block else 0

    def _name(self, block: str) -> bytes:
        """What names the block in a record; nothing if the last record's is meant."""
        if self._last == block:
            return b""
        self._last = block
        return _counted(block)


def restoreStream(
    configuration: bytes,
    blocks: Sequence[RamBlock],
    contents: Callable[[str], memoryview],
    deviceState: bytes,
    vmdesc: bytes,
    shared: Collection[str] = (),
) -> Iterator[bytes | memoryview]:
    """
    The stream that makes a fresh C{qemu -incoming} of the same machine go on from a checkpoint.

    Pages of zeros of the largest block are left out, since guest RAM begins as zeros; those of the others (firmware,
    ROMs) are sent.

    What the destination must be like with C{shared} (QEMU 7.2): capability C{x-ignore-shared} on, or it says "received
    capability is on"; the backend C{share=on} over a file with the block's content, and named so that the block has
    its old name (C{id=pc.ram}, with C{x-use-canonical-path-for-ramblock-id=off} for machines before 4.1); the gpa
    that is sent for a shared block is compared with its own, which is 0 for a machine's main RAM.

    @param configuration: the configuration section of the initial stream, without C{x-ignore-shared}.
    @param contents: gives the whole content of a block.
    @param deviceState: the device-state blob.
    @param vmdesc: JSON; QEMU reads it only to throw it away, so C{{}} serves. Empty only if the machine suppresses it:
        otherwise QEMU complains, though it goes on.
    @param shared: blocks that the QEMU maps from their image itself (C{x-ignore-shared}): no page of them is sent.
        Their presence changes the grammar: every block of the list carries its gpa, and the configuration names
        the capability, which the destination compares with its own.
    """
    writer = RamWriter()
    if shared:
        configuration += _capabilities([IGNORE_SHARED])
        blocks = [RamBlock(block.name, block.length, block.gpa or 0) for block in blocks]
    yield writer.header() + configuration + writer.start(blocks)
    main = max(blocks, key=lambda block: block.length)
    for block in blocks:
        if block.name not in shared:
            yield from writer.part(_whole(block, contents(block.name), skipZeros=block is main))
    yield from writer.end(())
    yield deviceState
    if vmdesc:
        yield writer.vmdesc(vmdesc)


def _whole(block: RamBlock, content: memoryview, skipZeros: bool) -> Iterator[Pages | Zeros]:
    """The content of a block as events, a few MiB at a time."""
    pages = np.frombuffer(content, np.uint8).reshape(-1, PAGE_SIZE)
    for first in range(0, len(pages), 1024):
        some = pages[first : first + 1024]
        addresses = np.arange(first, first + len(some), dtype=np.uint64) * np.uint64(PAGE_SIZE)
        used = some.view(np.uint64).any(axis=1)
        if not skipZeros and not used.all():
            yield Zeros(block.name, addresses[~used], 0)
        if used.any():
            yield Pages(block.name, addresses[used], some if used.all() else some[used])


def _capabilities(names: Collection[str]) -> bytes:
    head = pack(">B", VM_SUBSECTION) + _counted(CAPABILITIES) + pack(">II", 1, len(names))
    return head + b"".join(_counted(name) for name in names)


def _counted(name: str) -> bytes:
    raw = name.encode()
    return bytes((len(raw),)) + raw
