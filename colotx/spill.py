"""
Unlinked temporary files of equal slots: where buffers go that memory should not hold.

This module knows files and errno; it must not know what the buffers mean. The files have no name while they exist
(C{O_TMPFILE} where the file system has it), so nothing is left behind however the process ends.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from io import FileIO

from colotx.errors import StorageError

FILE_BYTES = 64 * 1024 * 1024
"""Size of one file. A file goes as a whole, and the kernel needs some milliseconds for as much as this."""


@dataclass(slots=True, eq=False)
class _File:
    """@ivar free: the slots of it that are not in use."""

    raw: FileIO
    free: list[int]


@dataclass(frozen=True, slots=True)
class SpillSlot:
    """Where L{SpillSpace.store} put a buffer."""

    file: _File
    number: int


class SpillSpace:
    """
    Slots of a fixed size in temporary files, which are made as they are needed. Slots are reused, and the disk gets
    its room back as soon as no slot of a file is in use.

    Reads and writes block for as long as the page cache lets them (memory speed, unless the disk cannot keep up).
    """

    def __init__(self, directory: str, slotBytes: int) -> None:
        """
        @param directory: where the files are made; on a disk, not a tmpfs, or nothing is gained.
        @param slotBytes: size of a slot; the largest buffer that L{store} takes.
        """
        self.directory = directory
        self._slotBytes = slotBytes
        self._slots = max(1, FILE_BYTES // slotBytes)
        self._files: list[_File] = []

    @property
    def bytes(self) -> int:
        """Disk space in use, in bytes."""
        return sum(self._slots - len(file.free) for file in self._files) * self._slotBytes

    def store(self, data: memoryview) -> SpillSlot:
        """
        Write a buffer of at most C{slotBytes}.

        @raise StorageError: no room, or no such directory. The buffer is still the caller's.
        """
        try:
            slot = self._take()
        except OSError as error:
            raise self._noRoom(data, error) from error
        position, done = slot.number * self._slotBytes, 0
        try:
            while done < len(data):
                done += os.pwrite(slot.file.raw.fileno(), data[done:], position + done)
        except OSError as error:
            self.free(slot)
            raise self._noRoom(data, error) from error
        return slot

    def load(self, slot: SpillSlot, into: memoryview, offset: int = 0) -> None:
        """
        Fill C{into} from a slot, from C{offset} bytes in it.

        @raise StorageError: the disk failed.
        """
        position, done = slot.number * self._slotBytes + offset, 0
        try:
            while done < len(into):
                count = os.preadv(slot.file.raw.fileno(), [into[done:]], position + done)
                if not count:
                    raise StorageError(f"a temporary file in {self.directory} ended at {position + done}")
                done += count
        except OSError as error:
            raise StorageError(
                f"cannot read back what was spilled in {self.directory}: {error.strerror}"
            ) from error

    def free(self, slot: SpillSlot) -> None:
        """The contents of C{slot} are needed no more."""
        file = slot.file
        file.free.append(slot.number)
        if len(file.free) == self._slots:
            self._files.remove(file)
            file.raw.close()

    def close(self) -> None:
        """Give everything back. Harmless when closed; a later L{store} starts anew."""
        for file in self._files:
            file.raw.close()
        self._files.clear()

    def _take(self) -> SpillSlot:
        for file in self._files:
            if file.free:
                break
        else:
            raw = tempfile.TemporaryFile(buffering=0, dir=self.directory)  # noqa: SIM115
            file = _File(raw, list(reversed(range(self._slots))))
            self._files.append(file)
        return SpillSlot(file, file.free.pop())

    def _noRoom(self, data: memoryview, error: OSError) -> StorageError:
        return StorageError(
            f"cannot spill {len(data)} bytes to a temporary file in {self.directory}: {error.strerror}; "
            f"free some room there or name another directory"
        )


__all__ = ["SpillSlot", "SpillSpace"]
