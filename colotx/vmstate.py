"""QEMU's migration stream: sans-IO reader and writer. Signatures first; bodies follow."""

from __future__ import annotations

from dataclasses import dataclass

from colotx._vmstate_model import (
    PAGE_SIZE,
    Blocks,
    Buffer,
    Limits,
    Pages,
    RamBlock,
    RamEnd,
    RamEvent,
    Xbzrle,
    Zeros,
    applyXbzrle,
)

__all__ = [
    "PAGE_SIZE",
    "Blocks",
    "CheckpointReader",
    "InitialComplete",
    "InitialReader",
    "Limits",
    "Pages",
    "RamBlock",
    "RamEnd",
    "RamEvent",
    "RamReader",
    "Xbzrle",
    "Zeros",
    "applyXbzrle",
]


class RamReader:
    """State of the RAM sections that outlives one reader: block list, block of the last record, section id."""

    blocks: tuple[RamBlock, ...] = ()


@dataclass(frozen=True, slots=True)
class InitialComplete:
    machine: str
    configuration: bytes
    deviceState: bytes
    vmdesc: bytes
    colo: bool


class InitialReader:
    complete: InitialComplete | None = None

    def __init__(self, ram: RamReader, limits: Limits | None = None, vmdesc: bool = True) -> None:
        raise NotImplementedError

    def feed(self, data: Buffer) -> list[RamEvent]:
        raise NotImplementedError


class CheckpointReader:
    complete: bool = False

    def __init__(self, ram: RamReader) -> None:
        raise NotImplementedError

    def feed(self, data: Buffer) -> tuple[list[RamEvent], int]:
        raise NotImplementedError
