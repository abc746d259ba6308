"""
The embedded guest's hardware: RAM that knows which pages were written, a workload that checks it, and a NIC.

Everything the machine is lies in its RAM or in its device state, so one made from a checkpoint goes on exactly. It
is deterministic but for its random service: the same ticks and frames give the same RAM and the same output. It has no
clock; its owner calls L{Machine.tick}, and guest time is the number of ticks.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address

import numpy as np
from numpy.typing import NDArray

from colotx.errors import ConfigError, GuestError
from colotx.guests._nic import Nic
from colotx.guests._tinytcp import SLOT
from colotx.vmstate import PAGE_SIZE, RamWriter

MIN_RAM = 2 << 20
MAX_RAM = 1 << 32

_CONNECTIONS = 32
_TCP_BASE = PAGE_SIZE
_AREA = (_TCP_BASE + _CONNECTIONS * SLOT) // PAGE_SIZE
"""The first page of the memory check's area, which is the rest of the RAM."""
_WORDS = PAGE_SIZE // 8
_STEPS = np.arange(_WORDS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_SPREAD = np.uint64(0xD1342543DE82EF95)

_BOOT = struct.Struct(">8sQQ")
_MAGIC = b"colotxRM"
_CPU = struct.Struct(">QQII")
_NIC = struct.Struct(">6s4s")

DESCRIPTION = json.dumps(
    {
        "page_size": PAGE_SIZE,
        "devices": [
            {"name": name, "instance_id": 0, "vmsd_name": name, "version": 1}
            for name in ("memory/cpu", "memory/nic")
        ],
    },
    separators=(",", ":"),
).encode()
"""The JSON that ends the initial stream: the sections of L{Machine.deviceState}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """
    What an embedded guest is like.

    @ivar ramBytes: its RAM, a multiple of 4096, from 2 MiB to 4 GiB.
    @ivar dirtyPages: pages the memory check verifies and rewrites each tick.
    @ivar tickMs: milliseconds between ticks.
    @ivar mac: its NIC's address.
    @ivar address: its IPv4 address. It needs no netmask and no gateway: it answers to where a frame came from.
    """

    ramBytes: int = 16 << 20
    dirtyPages: int = 4
    tickMs: int = 10
    mac: str = "52:54:00:c0:10:02"
    address: str = "10.77.0.2"

    def __post_init__(self) -> None:
        """@raise ConfigError: no such guest can be."""
        if not MIN_RAM <= self.ramBytes <= MAX_RAM or self.ramBytes % PAGE_SIZE:
            raise ConfigError(
                f"memory guest: RAM of {self.ramBytes} bytes; use a multiple of {PAGE_SIZE} from {MIN_RAM} to {MAX_RAM}"
            )
        room = self.ramBytes // PAGE_SIZE - _AREA
        if not 0 <= self.dirtyPages <= room:
            raise ConfigError(
                f"memory guest: {self.dirtyPages} dirty pages a tick; use 0 to {room} with this RAM"
            )
        if not 1 <= self.tickMs <= 10_000:
            raise ConfigError(f"memory guest: a tick of {self.tickMs} ms; use 1 to 10000")
        if len(self.rawMac) != 6 or self.rawMac[0] & 1 or not any(self.rawMac):
            raise ConfigError(
                f"memory guest: {self.mac!r} is no unicast MAC address such as 52:54:00:12:34:56"
            )
        try:
            IPv4Address(self.address)
        except AddressValueError as error:
            raise ConfigError(f"memory guest: {error}; give an IPv4 address such as 10.77.0.2") from error

    @property
    def rawMac(self) -> bytes:
        """The MAC address in bytes, empty if it is none."""
        try:
            return bytes(int(part, 16) for part in self.mac.split(":") if len(part) == 2)
        except ValueError:
            return b""


class TrackedMemory:
    """RAM, and which of its pages were written since they were last taken."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        """@param content: the RAM, whole pages; it becomes ours."""
        self.pages = content.reshape(-1, PAGE_SIZE)
        self.dirty: NDArray[np.bool_] = np.zeros(len(self.pages), np.bool_)
        self._view = content.data

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of RAM."""
        return bytes(self._view[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """Change bytes of RAM."""
        self._view[offset : offset + len(data)] = data
        self.dirty[offset // PAGE_SIZE : (offset + len(data) - 1) // PAGE_SIZE + 1] = True

    def takeDirty(self) -> NDArray[np.intp]:
        """@return: the numbers of the pages written since this was last called, in rising order."""
        numbers = np.flatnonzero(self.dirty)
        self.dirty[:] = False
        return numbers


class Machine:
    """
    @ivar memory: its L{TrackedMemory}.
    @ivar settings: what it was made with.
    @ivar ticks: how many ticks it lived.
    @ivar writes: how many pages its memory check has written. Each of them was verified before, except the first
        in each page.
    """

    def __init__(
        self, settings: MemorySettings, memory: TrackedMemory, transmit: Callable[[bytes], None]
    ) -> None:
        """A machine just powered on, with RAM of zeros, or one whose state the caller fills in."""
        self.settings = settings
        self.memory = memory
        self.ticks = self.writes = 0
        self._area = memory.pages[_AREA:].view(np.uint64)
        self._nic = Nic(
            settings.rawMac, IPv4Address(settings.address), memory, _TCP_BASE, _CONNECTIONS, transmit
        )

    @classmethod
    def powerOn(cls, settings: MemorySettings, transmit: Callable[[bytes], None]) -> Machine:
        """A fresh one."""
        machine = cls(settings, TrackedMemory(np.zeros(settings.ramBytes, np.uint8)), transmit)
        machine._note()
        return machine

    @classmethod
    def restore(
        cls, content: NDArray[np.uint8], deviceState: bytes, transmit: Callable[[bytes], None]
    ) -> Machine:
        """
        One that goes on from a checkpoint.

        @param content: a copy of its RAM.
        @raise GuestError: RAM and device state are no machine of this kind, or not of the same moment.
        """
        cpu, nic = _splitDeviceState(deviceState)
        ticks, writes, tickMs, dirtyPages = _CPU.unpack(cpu)
        mac, address = _NIC.unpack(nic)
        try:
            settings = MemorySettings(
                ramBytes=len(content),
                dirtyPages=dirtyPages,
                tickMs=tickMs,
                mac=mac.hex(":"),
                address=str(IPv4Address(address)),
            )
        except ConfigError as error:
            raise GuestError(f"the checkpoint is damaged: {error}") from error
        memory = TrackedMemory(content)
        if memory.read(0, _BOOT.size) != _BOOT.pack(_MAGIC, ticks, writes):
            raise GuestError(
                f"the checkpoint is torn: its device state is of tick {ticks} and page write {writes}, its RAM is not"
            )
        machine = cls(settings, memory, transmit)
        machine.ticks, machine.writes = ticks, writes
        return machine

    def deviceState(self) -> bytes:
        """What is not in RAM: FULL sections and EOF, as in QEMU's device-state blob."""
        settings = self.settings
        return _deviceState(
            _CPU.pack(self.ticks, self.writes, settings.tickMs, settings.dirtyPages),
            _NIC.pack(settings.rawMac, IPv4Address(settings.address).packed),
        )

    @property
    def now(self) -> int:
        """Guest time, ms."""
        return self.ticks * self.settings.tickMs

    def receive(self, frames: Iterable[bytes]) -> None:
        """Frames arrive at the NIC."""
        for frame in frames:
            self._nic.receive(frame, self.now)

    def tick(self, network: bool = True) -> None:
        """
        Live for one tick.

        @param network: whether the NIC can send now; retransmissions wait otherwise.
        @raise GuestError: RAM does not hold what was written to it.
        """
        self.ticks += 1
        if self.settings.dirtyPages:
            self._checkMemory(self.settings.dirtyPages)
        self._note()
        if network:
            if self.ticks == 1:
                self._nic.announce()
            self._nic.tick(self.now)

    def _note(self) -> None:
        self.memory.write(0, _BOOT.pack(_MAGIC, self.ticks, self.writes))

    def _checkMemory(self, count: int) -> None:
        """Go on through the area, round and round: verify what the last round wrote, write this round's pattern."""
        size = len(self._area)
        numbers = np.arange(self.writes, self.writes + count, dtype=np.uint64)
        places = (numbers % np.uint64(size)).astype(np.intp)
        expected = _pattern(numbers - np.uint64(size))
        expected[numbers < size] = 0
        wrong = (self._area[places] != expected).any(axis=1)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise GuestError(
                f"memory check failed at tick {self.ticks}: page {_AREA + int(places[first])} does not hold what page "
                f"write {int(numbers[first]) - size} left in it ({int(wrong.sum())} of {count} pages are wrong)"
            )
        self._area[places] = _pattern(numbers)
        self.memory.dirty[_AREA + places] = True
        self.writes += count


def _pattern(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What the page writes of these numbers put into their pages."""
    return (numbers * _SPREAD)[:, np.newaxis] + _STEPS


def _deviceState(cpu: bytes, nic: bytes) -> bytes:
    writer = RamWriter()
    sections = writer.deviceSection(4, "memory/cpu", 0, 1, cpu) + writer.deviceSection(
        5, "memory/nic", 0, 1, nic
    )
    return sections + writer.eof()


def _splitDeviceState(blob: bytes) -> tuple[bytes, bytes]:
    """
    The reverse of L{_deviceState}.

    Names, versions and sizes are all fixed, so whatever differs anywhere but in the payloads is not ours.
    """
    template = _deviceState(bytes(_CPU.size), bytes(_NIC.size))
    cpu = template.index(bytes(_CPU.size) + b"\x7e\0\0\0\4")
    nic = len(template) - _NIC.size - 6
    payloads = blob[cpu : cpu + _CPU.size], blob[nic : nic + _NIC.size]
    if len(blob) != len(template) or _deviceState(*payloads) != blob:
        raise GuestError(
            f"{len(blob)} bytes of device state are not of this version's memory guest: run the same colotx version "
            "on both hosts"
        )
    return payloads
