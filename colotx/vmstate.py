"""
QEMU's migration stream, read and written. Sans-IO: bytes in any chunking go in, events come out, and the other way.

A stream is, in the grammar of QEMU-FACTS (C{migration/savevm.c}; integers are big-endian, [ ] optional, { } repeated)::

    initial    := 5145564d 00000003 config {cmd} START(ram) {PART(ram)} END(ram) {FULL} 00 [vmdesc]
    checkpoint := {PART(ram)} END(ram) 00              then the device state: {FULL} 00, whose size is told apart
    restore    := 5145564d 00000003 config START(ram) {PART(ram)} END(ram) {FULL} 00 [vmdesc]

Readers refuse what COLO does not use by name (L{UnsupportedStream}), and everything else that breaks the grammar
with L{StreamError}; a stream that is cut is one that does not get complete. What they cannot check is what pages and
device sections contain.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Final

from colotx._vmstate_model import (
    CAPABILITIES,
    IGNORE_SHARED,
    PAGE_SIZE,
    STREAM_HEADER,
    VM_COMMAND,
    VM_CONFIGURATION,
    VM_EOF,
    VM_SECTION_END,
    VM_SECTION_FULL,
    VM_SECTION_PART,
    VM_SECTION_START,
    VM_SUBSECTION,
    VM_VMDESCRIPTION,
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
from colotx._vmstate_ram import RECORD_BYTES, RamReader
from colotx._vmstate_write import RamWriter, restoreStream
from colotx.errors import StreamError, UnsupportedStream

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
    "RamWriter",
    "Xbzrle",
    "Zeros",
    "applyXbzrle",
    "checkDeviceState",
    "restoreStream",
]

COMMANDS: Final = {8: "ENABLE_COLO", 11: "SWITCHOVER_START"}
"""MIG_CMD_* that a stream for COLO may hold; neither has data."""
REFUSED_COMMANDS: Final = {
    1: "OPEN_RETURN_PATH: turn the capability 'return-path' off",
    2: "PING: turn the capability 'return-path' off",
    3: "POSTCOPY_ADVISE: turn the capability 'postcopy-ram' off",
    4: "POSTCOPY_LISTEN",
    5: "POSTCOPY_RUN",
    6: "POSTCOPY_RAM_DISCARD",
    7: "PACKAGED, that is postcopy",
    9: "POSTCOPY_RESUME",
    10: "RECV_BITMAP, that is postcopy",
}
VMDESC_START: Final = b'{"'
"""Of the JSON object; its first key is C{page_size} in QEMU 7.2 and C{configuration} in 10.0."""

_be32: Final = Struct(">I")
_command: Final = Struct(">HH")


@dataclass(frozen=True, slots=True)
class InitialComplete:
    """
    What the initial stream says beside RAM.

    @ivar machine: the machine's name, such as C{pc-i440fx-7.2}.
    @ivar configuration: the raw configuration section, from its 07.
    @ivar deviceState: the device sections and the EOF byte: a blob as checkpoints have it.
    @ivar vmdesc: the JSON that describes them; empty with C{suppress-vmdesc=on}.
    @ivar colo: the stream asks its destination to become a COLO secondary (the source has C{x-colo} on).
    """

    machine: str
    configuration: bytes
    deviceState: bytes
    vmdesc: bytes
    colo: bool


def _readCommand(view: memoryview, pos: int) -> tuple[str, int]:
    """
    @return: the command's name and where it ends; no name and C{pos} while it is not whole.
    @raise StreamError: a command that has no place in a stream for COLO.
    """
    if len(view) - pos < 5:
        return "", pos
    command, size = _command.unpack_from(view, pos + 1)
    if command in REFUSED_COMMANDS:
        raise UnsupportedStream(f"command {command}, {REFUSED_COMMANDS[command]}")
    if command not in COMMANDS or size:
        raise StreamError(f"command {command} with {size} bytes: not known")
    return COMMANDS[command], pos + 5


class _Reader(ABC):
    """
    Keeps the beginning of an element that the end of one C{feed} cuts until the next, so that parsers see whole
    elements; all else is parsed where it lies.
    """

    _largest = RECORD_BYTES
    """Bytes: no element that C{_parse} waits for is larger."""

    def __init__(self, ram: RamReader) -> None:
        self._ram = ram
        self._carry = b""

    @abstractmethod
    def _parse(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        """Parse from C{pos} what is whole. @return: where the rest, which is fed again, begins."""

    def _read(self, data: Buffer, events: list[RamEvent]) -> int:
        """@return: where in C{data} parsing ended."""
        view = memoryview(data)
        pos = 0
        if self._carry:
            kept = len(self._carry)
            joined = self._carry + view[: self._largest]
            pos = self._parse(memoryview(joined), 0, events) - kept
            if pos < 0:
                self._carry = joined[pos + kept :]
                return len(view)
        pos = self._parse(view, pos, events)
        self._carry = bytes(view[pos:])
        return pos


class InitialReader(_Reader):
    """
    Reads the initial stream: what a QEMU with C{x-colo} sends before the first checkpoint.

    Nothing delimits its device sections, so the end is found by the vmdesc that follows them: C{00 06 length} and
    JSON up to the very last byte (the source is silent until READY). JSON that lists devices must begin with the
    first device section, so that data of a device is not taken for it.

    @ivar complete: an L{InitialComplete}, once the stream is whole.
    """

    _largest = 20 * 1024
    _maxCapabilities = 64
    _maxCandidates = 64

    def __init__(self, ram: RamReader, limits: Limits | None = None, vmdesc: bool = True) -> None:
        """
        @param vmdesc: False for a machine with C{suppress-vmdesc=on}; then only C{endOfQuiet} completes.
        """
        super().__init__(ram)
        self.complete: InitialComplete | None = None
        self._limits = limits or Limits()
        self._vmdesc = vmdesc
        self._machine = ""
        self._configuration = b""
        self._colo = False
        self._devices = bytearray()
        self._candidates: list[tuple[int, int]] = []
        self._step: Callable[[memoryview, int, list[RamEvent]], int] = self._header

    def feed(self, data: Buffer) -> list[RamEvent]:
        """
        @param data: the next bytes, in any chunking. Not to be changed while the events are in use.
        @return: what they bring, in the order of the stream.
        @raise StreamError: they break the grammar or a limit; the reader is of no use any more.
        """
        events: list[RamEvent] = []
        self._read(data, events)
        return events

    def endOfQuiet(self) -> None:
        """The source was silent for long: if the bytes so far end in EOF, the stream without vmdesc is complete."""
        if not self._vmdesc and self._devices.endswith(b"\0"):
            self._done(len(self._devices), b"")

    def _parse(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        while pos < len(view):
            before, pos = pos, self._step(view, pos, events)
            if pos == before:
                break
        return pos

    def _header(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        end = pos + len(STREAM_HEADER)
        if not STREAM_HEADER.startswith(bytes(view[pos:end])):
            raise StreamError(f"no migration stream of version 3: it begins with {view[pos:end].hex()}")
        if len(view) < end:
            return pos
        self._step = self._machineName
        return end

    def _machineName(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        if view[pos] != VM_CONFIGURATION:
            raise StreamError(f"0x{view[pos]:02x} where the configuration section is due")
        if len(view) - pos < 5:
            return pos
        size = int(_be32.unpack_from(view, pos + 1)[0])
        if size > 255:
            raise StreamError(f"machine name of {size} bytes; the limit is 255")
        end = pos + 5 + size
        if len(view) < end:
            return pos
        self._configuration = bytes(view[pos:end])
        self._machine = self._configuration[5:].decode(errors="backslashreplace")
        self._step = self._subsection
        return end

    def _subsection(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        """A subsection of the configuration. Their length is not told, so those not known here cannot be read."""
        if view[pos] != VM_SUBSECTION:
            self._step = self._section
            return self._section(view, pos, events)
        body = pos + 2 + (view[pos + 1] if len(view) - pos > 1 else 0) + 4
        if len(view) < body:
            return pos
        name = bytes(view[pos + 2 : body - 4])
        capabilities: list[bytes] = []
        if name == b"configuration/target-page-bits":
            end = body + 4
        elif name == b"configuration/uuid":
            end = body + 16
        elif name == CAPABILITIES.encode():
            end = body + 4
            (count,) = _be32.unpack_from(view, body) if len(view) >= end else (0,)
            if count > self._maxCapabilities:
                raise StreamError(
                    f"{count} capabilities in the configuration; the limit is {self._maxCapabilities}"
                )
            for _ in range(count):
                start = end + 1
                end = start + view[end] if len(view) > end else start
                capabilities.append(bytes(view[start:end]))
        else:
            raise StreamError(f"configuration subsection {name!r} is not known")
        if len(view) < end:
            return pos
        self._ram.carriesGpa |= IGNORE_SHARED.encode() in capabilities
        self._configuration += view[pos:end]
        return end

    def _section(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        kind = view[pos]
        if self._ram.inside or kind in (VM_SECTION_START, VM_SECTION_PART, VM_SECTION_END):
            end = self._ram.read(view, pos, events)
            if not self._ram.inside and RamEnd() in events[-1:]:
                self._step = self._deviceState
            return end
        if kind == VM_COMMAND:
            return self._command(view, pos)
        if kind == VM_SECTION_FULL:
            raise UnsupportedStream(
                "device section before the RAM is whole (virtio-mem?): cannot be delimited"
            )
        raise StreamError(f"section type 0x{kind:02x} where RAM sections are due")

    def _command(self, view: memoryview, pos: int) -> int:
        name, end = _readCommand(view, pos)
        self._colo |= name == "ENABLE_COLO"
        return end

    def _deviceState(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        if self.complete is not None:
            raise StreamError(f"{len(view) - pos} bytes behind the end of the initial stream")
        seen = len(self._devices)
        limit = self._limits.deviceState + (self._limits.vmdesc if self._vmdesc else 0)
        if seen + len(view) - pos > limit:
            raise StreamError(f"device state (and vmdesc) without end after {limit} bytes, their limit")
        self._devices += view[pos:]
        if self._devices[0] not in (VM_SECTION_FULL, VM_EOF):
            raise StreamError(f"0x{self._devices[0]:02x} where a device section is due")
        if self._vmdesc:
            self._seek(max(seen - len(VMDESC_START) + 1, 0))
        return len(view)

    def _seek(self, start: int) -> None:
        """Look for the vmdesc. What looks like its head may be data of a device, so each is followed up."""
        devices = self._devices
        while (found := devices.find(VMDESC_START, start)) >= 0:
            start = found + 1
            if found > 5 and devices[found - 6] == VM_EOF and devices[found - 5] == VM_VMDESCRIPTION:
                (size,) = _be32.unpack_from(devices, found - 4)
                if size <= self._limits.vmdesc:
                    self._candidates.append((found, found + size))
        if len(self._candidates) > self._maxCandidates:
            raise StreamError(f"more than {self._maxCandidates} beginnings of a vmdesc")
        for found, end in self._candidates:
            if end > len(devices):
                continue
            named = self._firstDescribed(found, end)
            if named is not None and (named == self._firstDevice() if named else end == len(devices)):
                if end < len(devices):
                    raise StreamError(f"{len(devices) - end} bytes behind the vmdesc")
                self._done(found - 5, bytes(devices[found:end]))
                return
        self._candidates = [known for known in self._candidates if known[1] > len(devices)]

    def _firstDescribed(self, start: int, end: int) -> list[object] | None:
        """Name and instance of the first device in these bytes; nothing if it lists none, None if no vmdesc."""
        try:
            devices = json.loads(self._devices[start:end]).get("devices", [])
            return [value for device in devices[:1] for value in (device["name"], device["instance_id"])]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def _firstDevice(self) -> list[object]:
        """Name and instance of the first device section."""
        if self._devices[0] == VM_EOF:
            return []
        size = self._devices[5]
        name = self._devices[6 : 6 + size].decode(errors="replace")
        return [name, int.from_bytes(self._devices[6 + size : 10 + size], "big")]

    def _done(self, size: int, vmdesc: bytes) -> None:
        blob = bytes(memoryview(self._devices)[:size])
        self.complete = InitialComplete(self._machine, self._configuration, blob, vmdesc, self._colo)
        self._devices.clear()


class CheckpointReader(_Reader):
    """
    Reads the RAM part of one checkpoint. Make a new one for each; what goes on from one to the next is in C{ram}.

    @ivar complete: the RAM part is whole.
    """

    def __init__(self, ram: RamReader) -> None:
        super().__init__(ram)
        self.complete = False
        self._ended = False

    def feed(self, data: Buffer) -> tuple[list[RamEvent], int]:
        """
        @param data: the next bytes, in any chunking. Not to be changed while the events are in use.
        @return: what they bring, in the order of the stream, and how many bytes of C{data} are taken: when
            C{complete} becomes True, the rest belongs to the COLO message exchange; before, all.
        @raise StreamError: they break the grammar; the reader and its L{RamReader} are of no use any more.
        """
        events: list[RamEvent] = []
        if self.complete:
            return events, 0
        pos = self._read(data, events)
        return events, pos if self.complete else len(data)

    def _parse(self, view: memoryview, pos: int, events: list[RamEvent]) -> int:
        while pos < len(view) and not self.complete:
            kind = view[pos]
            if self._ended:
                if kind != VM_EOF:
                    raise StreamError(f"0x{kind:02x} where the end of a checkpoint's RAM is due")
                self.complete = True
                return pos + 1
            if not self._ram.inside and kind == VM_COMMAND:
                # QEMU 10.0 announces the switch-over in every checkpoint.
                name, pos = _readCommand(view, pos)
                if not name:
                    break
                continue
            if not self._ram.inside and kind not in (VM_SECTION_PART, VM_SECTION_END):
                raise StreamError(f"section type 0x{kind:02x} where a checkpoint's RAM is due")
            pos = self._ram.read(view, pos, events)
            if self._ram.inside:
                break
            self._ended = RamEnd() in events[-1:]
        return pos


def checkDeviceState(blob: bytes) -> None:
    """
    See that a checkpoint's blob is sections from its first to its last byte. What is in them only QEMU can tell.

    @raise StreamError: it does not begin with a FULL section, or does not end with a footer and EOF.
    """
    name = blob[6 : 6 + blob[5]] if len(blob) > 6 else b""
    begins = blob[:1] == b"\x04" and bool(name) and name.isascii() and name.decode("ascii").isprintable()
    if not begins or blob[-1:] != b"\x00" or blob[-6:-5] != b"\x7e":
        raise StreamError(
            f"{len(blob)} bytes came as device state, but they are no sections of a migration stream"
        )
