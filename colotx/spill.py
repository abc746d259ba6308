"""
An unlinked temporary file of equal slots: where buffers go that memory should not hold.

It knows files and errno; it must not know what the buffers mean. The file has no name while it exists (C{O_TMPFILE}
where the file system has it), so nothing is left behind however the process ends.
"""

from __future__ import annotations

import os
import tempfile
from io import FileIO

from colotx.errors import StorageError


class SpillFile:
    """
    Slots of a fixed size in one temporary file. The file is made at the first L{store}, slots are reused, and the
    disk gets its room back as soon as no slot is in use.

    Reads and writes block for as long as the page cache lets them (memory speed, unless the disk cannot keep up).
    """

    def __init__(self, directory: str, slotBytes: int) -> None:
        """
        @param directory: where the file is made; on a disk, not a tmpfs, or nothing is gained.
        @param slotBytes: size of a slot; the largest buffer that L{store} takes.
        """
        self.directory = directory
        self._slotBytes = slotBytes
        self._file: FileIO | None = None
        self._free: list[int] = []
        self._slots = 0

    @property
    def bytes(self) -> int:
        """Disk space in use, in bytes."""
        return (self._slots - len(self._free)) * self._slotBytes

    def store(self, data: memoryview) -> int:
        """
        Write a buffer of at most C{slotBytes}.

        @return: the number of its slot.
        @raise StorageError: no room, or no such directory. The buffer is still the caller's.
        """
        slot = self._free.pop() if self._free else self._slots
        try:
            descriptor = self._descriptor()
            offset, done = slot * self._slotBytes, 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            if slot < self._slots:
                self._free.append(slot)
            raise StorageError(
                f"cannot spill {len(data)} bytes to a temporary file in {self.directory}: {error.strerror}; "
                f"free some room there or name another directory"
            ) from error
        self._slots = max(self._slots, slot + 1)
        return slot

    def load(self, slot: int, into: memoryview, offset: int = 0) -> None:
        """
        Fill C{into} from a slot, from C{offset} bytes in it.

        @raise StorageError: the disk failed.
        """
        position, done = slot * self._slotBytes + offset, 0
        try:
            while done < len(into):
                count = os.preadv(self._descriptor(), [into[done:]], position + done)
                if not count:
                    raise StorageError(f"the temporary file in {self.directory} ended at {position + done}")
                done += count
        except OSError as error:
            raise StorageError(
                f"cannot read back what was spilled in {self.directory}: {error.strerror}"
            ) from error

    def free(self, slot: int) -> None:
        """The contents of C{slot} are needed no more."""
        self._free.append(slot)
        if len(self._free) == self._slots and self._file is not None:
            self._free.clear()
            self._slots = 0
            os.truncate(self._file.fileno(), 0)

    def close(self) -> None:
        """Give everything back. Harmless when closed; a later L{store} starts anew."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self._free.clear()
        self._slots = 0

    def _descriptor(self) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0, dir=self.directory)  # noqa: SIM115
        return self._file.fileno()


__all__ = ["SpillFile"]
