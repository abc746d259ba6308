"""
Migration streams for tests: made by the writer, small, every page telling which it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from struct import pack

import numpy as np
from numpy.typing import NDArray

from colotx.vmstate import (
    PAGE_SIZE,
    InitialComplete,
    InitialReader,
    Pages,
    RamBlock,
    RamEvent,
    RamReader,
    RamWriter,
    Xbzrle,
    Zeros,
)

RAM = RamBlock("pc.ram", 300 * PAGE_SIZE)
ROM = RamBlock("pc.rom", 40 * PAGE_SIZE)
BLOCKS = (RAM, ROM)
VMDESC = json.dumps({"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0}]}).encode()
MACHINE = "pc-i440fx-7.2"
QEMU_CONFIGURATION = bytes.fromhex(
    "070000000d70632d6934343066782d372e32051a636f6e66696775726174696f6e2f6361706162696c697469657300000001"
    "000000010f782d69676e6f72652d736861726564"
)
"""The configuration section of a QEMU 7.2.22 with x-ignore-shared."""

Item = Pages | Zeros | Xbzrle
Image = dict[tuple[str, int], object]


def addressesOf(numbers: Iterable[int]) -> NDArray[np.uint64]:
    return np.array(list(numbers), np.uint64) * np.uint64(PAGE_SIZE)


def pages(block: str, numbers: Sequence[int], seed: int = 0) -> Pages:
    """Pages that tell block, number and seed."""
    data = np.empty((len(numbers), PAGE_SIZE), np.uint8)
    for row, number in zip(data, numbers, strict=True):
        row[:] = np.frombuffer(pack(">IIQ", seed, len(block), number) * (PAGE_SIZE // 16), np.uint8)
    return Pages(block, addressesOf(numbers), data)


def zeros(block: str, numbers: Iterable[int], fill: int = 0) -> Zeros:
    return Zeros(block, addressesOf(numbers), fill)


def applied(events: Iterable[RamEvent], image: Image | None = None) -> Image:
    """What is in each page after the events; a delta remembers what it was applied to."""
    image = {} if image is None else image
    for event in events:
        if isinstance(event, Pages):
            for address, row in zip(event.addresses, event.data, strict=True):
                image[event.block, int(address)] = row.tobytes()
        elif isinstance(event, Zeros):
            image.update({(event.block, int(address)): event.fill for address in event.addresses})
        elif isinstance(event, Xbzrle):
            image[event.block, event.address] = (image.get((event.block, event.address)), event.data)
    return image


def checkpoint(writer: RamWriter, items: Iterable[Item]) -> bytes:
    return b"".join([*writer.end(items), writer.eof()])


def opening(writer: RamWriter, blocks: Sequence[RamBlock] = BLOCKS) -> bytes:
    """An initial stream up to its first PART or END."""
    return writer.header() + writer.configuration(MACHINE) + writer.enableColo() + writer.start(blocks)


def deviceState(payload: bytes = b"now") -> bytes:
    return RamWriter().deviceSection(7, "timer", 0, 2, payload) + b"\0"


def initial(items: Sequence[Item] = (), devices: bytes | None = None, vmdesc: bytes = VMDESC) -> bytes:
    """An initial stream: half of the items in PART, the others in END."""
    writer, half = RamWriter(), len(items) // 2
    return b"".join(
        [
            opening(writer),
            *writer.part(items[:half]),
            *writer.end(items[half:]),
            deviceState() if devices is None else devices,
            writer.vmdesc(vmdesc),
        ]
    )


def pieces(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """The data in pieces of these sizes, the rest at once."""
    at = 0
    for size in sizes:
        yield data[at : at + size]
        at += size
    yield data[at:]


def readInitial(data: bytes, sizes: Iterable[int] = ()) -> tuple[Image, InitialComplete | None]:
    reader, image = InitialReader(RamReader()), Image()
    for piece in pieces(data, sizes):
        applied(reader.feed(piece), image)
    return image, reader.complete


def ramAfter(data: bytes) -> RamReader:
    """The state of RAM sections after this beginning of an initial stream."""
    ram = RamReader()
    InitialReader(ram).feed(data)
    return ram
