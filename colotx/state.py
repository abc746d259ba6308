"""
What must survive a restart: the generation (epoch), who held it, and whether somebody else may hold a newer one.

One small JSON file, replaced atomically and fsynced, its directory too (rule 5 of the design).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from colotx.errors import StorageError

FILE = "state.json"


@dataclass(frozen=True, slots=True)
class PersistentState:
    """
    @ivar epoch: the generation, above 0; it grows by one with every failover.
    @ivar role: what this host was: C{primary}, C{secondary}, or empty before the first start.
    @ivar protected: the peer held a checkpoint, or ran the guest: after a restart of this daemon it may run it.
    """

    epoch: int = 1
    role: str = ""
    protected: bool = False


class StateStore:
    """The state file of one VM on this host."""

    def __init__(self, directory: str) -> None:
        """
        @param directory: made (0700) when it is missing.
        @raise StorageError: it cannot be made, or the file in it is damaged.
        """
        self._directory = directory
        self._path = os.path.join(directory, FILE)
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            self.current = self._load()
        except OSError as error:
            raise StorageError(f"state-dir {directory} cannot be used: {error.strerror}") from error

    def save(self, state: PersistentState) -> None:
        """
        Store it; when this returns it survives a power cut.

        @raise StorageError: it could not be stored; the state before is still there, here and on disk.
        """
        if state == self.current:
            return
        temporary = f"{self._path}.new"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(asdict(state), file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, self._path)
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise StorageError(f"the epoch could not be stored in {self._path}: {error.strerror}") from error
        self.current = state

    def _load(self) -> PersistentState:
        try:
            with open(self._path, encoding="utf-8") as file:
                values = json.load(file)
            state = PersistentState(int(values["epoch"]), str(values["role"]), bool(values["protected"]))
        except FileNotFoundError:
            return PersistentState()
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self._path} is damaged ({error}); find out which host ran the guest last before you remove it"
            ) from error
        if state.epoch < 1:
            raise StorageError(f"{self._path}: epoch {state.epoch} is none")
        return state
