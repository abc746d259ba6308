"""Tests for L{colotx.lab.comparepeer}; tests/test_compare_conformance.py has those with processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ConfigError
from colotx.lab.comparepeer import (
    CompareOptions,
    CompareProcess,
    LocalComparer,
    RemoteComparer,
    Seen,
    ourCommand,
    qemuCommand,
)
from colotx.lab.framekit import UDP
from colotx.lab.framekit import Path as Network
from colotx.lab.processes import LabError
from colotx.options import Options

NETWORK = Network(4, bytes([10, 0, 0, 2]), bytes([10, 0, 0, 9]))
A, B = (NETWORK.ip(UDP, NETWORK.withPorts(UDP, 1, 2, data)) for data in (b"a", b"b"))

ECHO = """
import os, selectors, socket
names = ("primary_in", "secondary_in", "outdev", "notify_dev")
listening = {name: socket.socket(socket.AF_UNIX) for name in names}
for name, one in listening.items():
    one.bind(name + ".new")
    one.listen()
for name in names:
    os.rename(name + ".new", name)
ends = {name: one.accept()[0] for name, one in listening.items()}
ready = selectors.DefaultSelector()
for name in ("primary_in", "secondary_in", "notify_dev"):
    ready.register(ends[name], selectors.EVENT_READ, name)
said = 0
while True:
    for key, _ in ready.select():
        data = key.fileobj.recv(65536)
        if not data:
            raise SystemExit
        if key.data == "primary_in":
            ends["outdev"].sendall(data)
        if key.data == "notify_dev":
            said += 1
            words = [b"DO_CHECKPOINT"] * (said == 2) + [b"COLO_COMPARE_GET_XEN_INIT"]
            ends["notify_dev"].sendall(b"".join(len(word).to_bytes(4, "big") + word for word in words))
"""
"""A comparer that lets everything out, and asks for a checkpoint once."""


class CommandTests(SynchronousTestCase):
    """How comparers are started."""

    def test_qemu(self) -> None:
        """All options, and no guest."""
        command = qemuCommand(CompareOptions(1, 2, 3, 12), sys.executable)
        self.assertEqual(command[:3], [sys.executable, "-machine", "none"])
        for word in ("compare_timeout=1", "expired_scan_cycle=2", "max_queue_size=3", "vnet_hdr_support=on"):
            self.assertIn(word, command[-1].split(","))

    def test_noQemu(self) -> None:
        """Said plainly."""
        self.assertRaises(ConfigError, qemuCommand, CompareOptions(), "/nowhere/qemu")

    def test_ours(self) -> None:
        """The daemon understands its options."""
        options = Options()
        command = ourCommand(CompareOptions(1, 2, 3, 12))
        options.parseOptions(command[command.index("colo") + 1 :])
        settings = options.settings
        self.assertEqual(
            (settings.compareTimeout, settings.expiredScanCycle, settings.maxQueueSize), (1, 2, 3)
        )
        self.assertTrue(settings.vnetHdrSupport)


class RemoteTests(SynchronousTestCase):
    """A conversation with a process, with a stand-in for a comparer."""

    def start(self, options: CompareOptions) -> RemoteComparer:
        """@return: the stand-in."""
        process = CompareProcess([sys.executable, "-c", ECHO], Path(self.mktemp()))
        self.assertGreater(process.cpuSeconds(), 0)
        peer = RemoteComparer(process, options)
        self.addCleanup(peer.close)
        return peer

    def test_settle(self) -> None:
        """What left, without the marks; and one request, once."""
        for header in (None, 0, 12):
            peer = self.start(CompareOptions(vnetHeader=header))
            peer.primary([A, B])
            peer.secondary([A])
            self.assertEqual(peer.settle(), Seen((A, B), True))
            self.assertEqual(peer.settle(), Seen((), False))

    def test_ended(self) -> None:
        """A process that ends at once is an error with its last words."""
        command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
        error = self.assertRaises(LabError, CompareProcess, command, Path(self.mktemp()))
        self.assertIn("no such thing", str(error))

    def test_closed(self) -> None:
        """It is gone afterwards."""
        process = CompareProcess([sys.executable, "-c", ECHO], Path(self.mktemp()))
        process.close()
        self.assertRaises(LabError, process.connect, "outdev")
        self.assertRaises(OSError, process.cpuSeconds)
        self.assertTrue(os.path.exists(process.directory / "compare.log"))


class LocalTests(SynchronousTestCase):
    """Ours in this process."""

    def test_comparer(self) -> None:
        """Equal frames leave; others after a checkpoint, which is asked for after the time-out."""
        for header in (None, 12):
            peer = LocalComparer(CompareOptions(vnetHeader=header))
            peer.primary([A, B])
            peer.secondary([A])
            self.assertEqual(peer.settle(), Seen((A,), False))
            peer.wait(2)
            self.assertFalse(peer.settle().asked)
            peer.wait(2)
            self.assertTrue(peer.settle().asked)
            self.assertEqual(peer.checkpoint(), Seen((B,), False))
