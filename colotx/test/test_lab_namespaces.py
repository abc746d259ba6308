"""Tests of L{colotx.lab.namespaces} without privileges: the commands are recorded, not run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ConfigError
from colotx.lab import namespaces
from colotx.lab.namespaces import Lab, Namespace, becomePrivileged


class Recorded(SynchronousTestCase):
    """Commands go to C{self.commands}; those that contain C{self.failing} fail."""

    def setUp(self) -> None:
        self.commands: list[str] = []
        self.failing = "\n"
        self.directory = self.mktemp()
        os.mkdir(self.directory)
        self.patch(namespaces, "_run", self.run_)
        self.patch(namespaces, "_NETNS", Path(self.directory))

    def run_(self, command: Sequence[str], batch: str = "") -> None:
        text = " ".join(command)
        self.commands += [f"{text}: {line}" for line in batch.splitlines()] or [text]
        if self.failing in self.commands[-1]:
            raise ConfigError("failed")
        match list(command):
            case ["ip", "netns", "add", name]:
                open(os.path.join(self.directory, name), "w").close()
            case ["ip", "netns", "del", name]:
                os.unlink(os.path.join(self.directory, name))


class LabTests(Recorded):
    def test_removesAll(self) -> None:
        """All that was made is removed, under names with our process' id."""
        with Lab() as lab:
            names = os.listdir(self.directory)
            self.assertEqual(len(names), 3)
            self.assertTrue(all(name.startswith(f"colo{os.getpid()}-") for name in names))
            self.assertEqual(set(lab.hosts), {"primary", "secondary"})
        self.assertEqual(os.listdir(self.directory), [])
        lab.close()

    def test_fresh(self) -> None:
        """Two labs of one process do not share names."""
        with Lab() as one, Lab() as other:
            self.assertNotEqual(one.client.name, other.client.name)

    def test_failsHalfWay(self) -> None:
        """A lab that cannot be made leaves nothing behind."""
        self.failing = "type veth"
        self.assertRaises(ConfigError, Lab)
        self.assertEqual(os.listdir(self.directory), [])

    def test_oneStays(self) -> None:
        """A namespace that cannot be removed does not keep the others."""
        lab = Lab()
        self.failing = f"del {lab.client.name}"
        self.assertRaises(ConfigError, lab.close)
        self.assertEqual(os.listdir(self.directory), [lab.client.name])

    def test_link(self) -> None:
        """Cutting and mending the link touches the link alone, on both hosts."""
        with Lab() as lab:
            self.commands.clear()
            lab.cutLink()
            lab.mendLink()
            self.assertEqual(
                [command.partition(": ")[2] for command in self.commands],
                ["link set link0 down"] * 2 + ["link set link0 up"] * 2,
            )

    def test_killsInside(self) -> None:
        """Closing ends what runs inside, and only that."""
        inside, outside = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
        self.addCleanup(outside.wait)
        self.addCleanup(outside.kill)
        namespace = Namespace("test")
        self.patch(Namespace, "processes", lambda _: [inside.pid] if inside.poll() is None else [])
        namespace.close()
        self.assertEqual(inside.wait(), -9)
        self.assertIs(outside.poll(), None)


class CommandTests(SynchronousTestCase):
    def test_failure(self) -> None:
        """A command that fails is told with its own words; one that is missing with its package."""
        error = self.assertRaises(ConfigError, namespaces._run, ["sh", "-c", "echo because >&2; exit 3"])
        self.assertIn("because", str(error))
        error = self.assertRaises(ConfigError, namespaces._run, ["there-is-no-such-command"])
        self.assertIn("iproute2", str(error))

    def test_processes(self) -> None:
        """A namespace knows its processes: here, this process in the one it is in."""
        namespace = Namespace.__new__(Namespace)
        namespace.name = "net"
        self.patch(namespaces, "_NETNS", Path("/proc/self/ns"))
        self.assertIn(os.getpid(), namespace.processes())


class PrivilegeTests(Recorded):
    def setUp(self) -> None:
        super().setUp()
        self.executed: list[Any] = []
        self.patch(os, "execvp", lambda file, arguments: self.executed.append(arguments))
        self.patch(os, "environ", dict(os.environ))
        os.environ.pop(namespaces._INSIDE, None)

    def test_enough(self) -> None:
        """Who may do it already stays as it is."""
        self.patch(namespaces, "isPrivileged", lambda: True)
        becomePrivileged("m", [])
        self.assertEqual((self.executed, self.commands), ([], []))

    def test_becomes(self) -> None:
        """A plain user's process is replaced by one in a user namespace, with its arguments, and marked."""
        self.patch(namespaces, "isPrivileged", lambda: False)
        becomePrivileged("some.module", ["--rounds", "3"])
        (command,) = self.executed
        self.assertEqual(command[0], "unshare")
        self.assertEqual(command[-4:], ["-m", "some.module", "--rounds", "3"])
        self.executed.clear()
        self.commands.clear()
        becomePrivileged("some.module", ["--rounds", "3"])
        self.assertEqual(self.executed, [])
        self.assertEqual(self.commands, [f"mount -t tmpfs colotx-lab {self.directory}"])

    def test_forbidden(self) -> None:
        """Where that is forbidden the user is told what to do."""
        self.patch(namespaces, "isPrivileged", lambda: False)
        self.failing = "unshare"
        error = self.assertRaises(ConfigError, becomePrivileged, "m", [])
        self.assertIn("sudo", str(error))
        self.assertEqual(self.executed, [])
