"""The state file: what was saved is there after a power cut, and what was not saved did not happen."""

from __future__ import annotations

import json
import os
from dataclasses import replace

from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import StorageError
from colotx.state import FILE, PersistentState, StateStore


class StateTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = os.path.join(self.mktemp(), "vm")
        self.path = os.path.join(self.directory, FILE)

    def write(self, text: str) -> None:
        os.makedirs(self.directory, exist_ok=True)
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(text)

    def test_firstStart(self) -> None:
        store = StateStore(self.directory)
        self.assertEqual(store.current, PersistentState(1, "", False))
        self.assertEqual(os.stat(self.directory).st_mode & 0o777, 0o700)
        self.assertEqual(os.listdir(self.directory), [])

    def test_savedIsFoundAgain(self) -> None:
        state = PersistentState(7, "primary", True)
        store = StateStore(self.directory)
        store.save(state)
        self.assertEqual(store.current, state)
        self.assertEqual(StateStore(self.directory).current, state)
        self.assertEqual(os.listdir(self.directory), [FILE])

    def test_fileThenDirectoryAreSynced(self) -> None:
        """The new content is durable before the name points at it, the name before C{save} returns."""
        did: list[str] = []
        rename, fsync = os.rename, os.fsync
        self.patch(os, "rename", lambda old, new: (did.append("rename"), rename(old, new)))

        def noted(fd):
            did.append("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
            fsync(fd)

        self.patch(os, "fsync", noted)
        StateStore(self.directory).save(PersistentState(2))
        self.assertEqual(did, ["file", "rename", "directory"])

    def test_sameAgainIsNotWritten(self) -> None:
        """A reconnecting peer must not wear the disk."""
        store = StateStore(self.directory)
        store.save(PersistentState(2))
        self.patch(os, "fsync", lambda fd: self.fail("written again"))
        store.save(PersistentState(2))

    def test_failureLeavesTheStateBefore(self) -> None:
        before = PersistentState(3, "secondary", False)
        store = StateStore(self.directory)
        store.save(before)

        def full(fd):
            raise OSError(28, "No space left on device")

        for step in ("fsync", "rename"):
            with self.subTest(step):
                patch = self.patch(os, step, lambda *arguments: full(0))
                error = self.assertRaises(StorageError, store.save, replace(before, epoch=4))
                patch.restore()
                self.assertIn("No space left", str(error))
                self.assertIn(self.path, str(error))
                self.assertEqual(store.current, before)
                self.assertEqual(StateStore(self.directory).current, before)

    def test_leftoverOfACutSaveIsIgnored(self) -> None:
        StateStore(self.directory).save(PersistentState(2))
        with open(f"{self.path}.new", "w", encoding="utf-8") as file:
            file.write('{"epoch": 3')
        store = StateStore(self.directory)
        self.assertEqual(store.current.epoch, 2)
        store.save(PersistentState(4))
        self.assertEqual(StateStore(self.directory).current.epoch, 4)

    def test_damagedFileStopsTheDaemon(self) -> None:
        """An epoch that is guessed could be one that was used already."""
        good = {"epoch": 2, "role": "primary", "protected": False}
        for text in (
            "",
            "{",
            "[]",
            "7",
            '{"epoch": 2}',
            json.dumps(good | {"epoch": "two"}),
            json.dumps(good | {"epoch": None}),
        ):
            with self.subTest(text):
                self.write(text)
                error = self.assertRaises(StorageError, StateStore, self.directory)
                self.assertIn("which host ran the guest last", str(error))
        self.write(json.dumps(good | {"epoch": 0}))
        self.assertIn("epoch 0", str(self.assertRaises(StorageError, StateStore, self.directory)))

    def test_notText(self) -> None:
        os.makedirs(self.directory)
        with open(self.path, "wb") as file:
            file.write(b"\xff\xfe")
        self.assertRaises(StorageError, StateStore, self.directory)

    def test_directoryCannotBeMade(self) -> None:
        os.makedirs(os.path.dirname(self.directory))
        with open(self.directory, "w", encoding="utf-8"):
            pass
        error = self.assertRaises(StorageError, StateStore, self.directory)
        self.assertIn(self.directory, str(error))
