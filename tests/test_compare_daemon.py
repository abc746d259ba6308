"""
The comparer of its own between real QEMU processes: what C{filter-mirror} and C{filter-redirector} send is compared,
and what leaves is taken back by a C{filter-redirector}.

A QEMU with no machine stands for a host: what comes in at its port C{guest} passes its filters and goes nowhere else;
what the comparer gives it goes out at its port C{outside}.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from colotx._qmp_blocking import BlockingQmp
from colotx.lab.guestimage import qemuBinary

PROJECT = str(Path(__file__).parents[1])
LIMIT = 20.0


def datagram(payload: bytes) -> bytes:
    udp = struct.pack(">HHHH", 9, 9, 8 + len(payload), 0) + payload
    ip = struct.pack(">BBHHHBBH8x", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0)
    return bytes.fromhex("020000000001 020000000002 0800") + ip + udp


class Words:
    """A connection that says and hears lengths and bytes."""

    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + LIMIT
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(os.fspath(path))
                break
            except OSError:
                self.socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.socket.settimeout(LIMIT)
        self._file = self.socket.makefile("rb")

    def say(self, word: bytes) -> None:
        self.socket.sendall(struct.pack(">I", len(word)) + word)

    def hear(self) -> bytes:
        (length,) = struct.unpack(">I", self._file.read(4))
        return self._file.read(length)

    def isSilent(self, seconds: float) -> bool:
        self.socket.settimeout(seconds)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(LIMIT)
        return False

    def close(self) -> None:
        self._file.close()
        self.socket.close()


class RealFiltersTests(SynchronousTestCase):
    def setUp(self) -> None:
        if shutil.which(qemuBinary()) is None:
            raise SkipTest("there is no QEMU")
        self.directory = Path(tempfile.mkdtemp(prefix="colotx-"))
        self.addCleanup(shutil.rmtree, self.directory)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with open(self.directory / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": PROJECT},
            )
        self.addCleanup(process.wait, LIMIT)
        self.addCleanup(process.terminate)
        return process

    def connect(self, name: str) -> Words:
        try:
            words = Words(self.directory / name)
        except OSError as error:
            logs = "".join(path.read_text() for path in self.directory.glob("*.log"))
            self.fail(f"{name}: {error}\n{logs}")
        self.addCleanup(words.close)
        return words

    def daemon(self, vnet: str) -> None:
        self.start(
            "daemon",
            sys.executable,
            *("-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile="),
            *("colo", "--role=compare", "--control=control", f"--vnet-hdr-support={vnet}"),
            *("--primary-in=unix:primary_in,server", "--secondary-in=unix:secondary_in"),
            *("--outdev=unix:outdev", "--notify-dev=unix:notify,server", "--compare-timeout=20000"),
        )

    def qemu(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        arguments = ["-machine", "none", "-nodefaults", "-display", "none", "-monitor", "none"]
        for hub, port in enumerate(("guest", "outside")):
            arguments += [
                *("-netdev", f"stream,id={port},server=on,addr.type=unix,addr.path={name}.{port}"),
                *("-netdev", f"hubport,id=hub-{port},hubid={hub},netdev={port}"),
            ]
        return self.start(name, qemuBinary(), *arguments, *more)

    def primary(self, vnet: str) -> subprocess.Popen[bytes]:
        """What its guest says goes to the comparer; what comes from there goes outside."""
        support = f"vnet_hdr_support={vnet}"
        return self.qemu(
            "primary",
            *("-chardev", "socket,id=mirror0,path=primary_in,reconnect=1"),
            *("-chardev", "socket,id=out0,path=outdev,server=on,wait=off"),
            *("-object", f"filter-mirror,id=m0,netdev=guest,queue=tx,outdev=mirror0,{support}"),
            # With nobody in the hub that takes it, a frame would wait there, and those behind it.
            *(
                "-chardev",
                "null,id=nowhere",
                "-object",
                "filter-redirector,id=n0,netdev=guest,queue=tx,outdev=nowhere",
            ),
            *("-object", f"filter-redirector,id=r0,netdev=outside,queue=rx,indev=out0,{support}"),
        )

    def secondary(self, vnet: str) -> subprocess.Popen[bytes]:
        return self.qemu(
            "secondary",
            *("-chardev", "socket,id=red0,path=secondary_in,server=on,wait=off"),
            *(
                "-object",
                f"filter-redirector,id=r1,netdev=guest,queue=tx,outdev=red0,vnet_hdr_support={vnet}",
            ),
        )

    def checkCompare(self, vnet: str) -> None:
        self.daemon(vnet)
        qemu = self.primary(vnet)
        self.secondary(vnet)
        ours, theirs = self.connect("primary.guest"), self.connect("secondary.guest")
        outside, notify = self.connect("primary.outside"), self.connect("notify")
        with BlockingQmp(os.fspath(self.directory / "control")) as qmp:
            self.until(lambda: self.ask(qmp, "query-colotx-status")["status"] == "comparing")
            notify.say(b"COLO_USERSPACE_PROXY_INIT")
            self.assertEqual(notify.hear(), b"COLO_COMPARE_GET_XEN_INIT")

            # What both say leaves, in order, as it was, and not before both said it.
            frames = [datagram(b"%d" % i + bytes(20 * i)) for i in range(50)]
            for frame in frames:
                ours.say(frame)
            self.until(lambda: self.ask(qmp, "query-colotx-stats")["held-frames"] == len(frames))
            self.assertTrue(outside.isSilent(0.1))
            for frame in frames:
                theirs.say(frame)
            self.assertEqual([outside.hear() for _ in frames], frames)
            self.assertTrue(notify.isSilent(0.1))

            # What differs waits for the checkpoint that is asked for.
            ours.say(datagram(b"one"))
            theirs.say(datagram(b"two"))
            self.assertEqual(notify.hear(), b"DO_CHECKPOINT")
            self.assertTrue(outside.isSilent(0.1))
            notify.say(b"COLO_CHECKPOINT")
            self.assertEqual(outside.hear(), datagram(b"one"))

            # A limit set the way QEMU's is.
            for name in ("compare_timeout", "expired_scan_cycle"):
                qmp.execute("qom-set", {"path": "/objects/comp0", "property": name, "value": 100})
            ours.say(datagram(b"three"))
            self.until(lambda: "time-out" in self.ask(qmp, "query-colotx-evidence")["reasons"])
            self.assertEqual(notify.hear(), b"DO_CHECKPOINT")
            notify.say(b"COLO_CHECKPOINT")
            self.assertEqual(outside.hear(), datagram(b"three"))

            # A host dies and is replaced.
            qemu.kill()
            qemu.wait(LIMIT)
            for name in ("primary.guest", "primary.outside"):
                (self.directory / name).unlink()
            self.until(lambda: self.ask(qmp, "query-colotx-status")["status"] == "waiting")
            self.primary(vnet)
            ours, outside = self.connect("primary.guest"), self.connect("primary.outside")
            self.until(lambda: self.ask(qmp, "query-colotx-status")["status"] == "comparing")
            notify.say(b"COLO_CHECKPOINT")
            self.until(lambda: self.ask(qmp, "query-colotx-status")["checkpoint-wanted"] is None)
            ours.say(datagram(b"four"))
            theirs.say(datagram(b"four"))
            self.assertEqual(outside.hear(), datagram(b"four"))

    def ask(self, qmp: BlockingQmp, command: str) -> Any:
        return qmp.execute(command)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.02)

    def test_plain(self) -> None:
        self.checkCompare("off")

    def test_vnetHeader(self) -> None:
        """QEMU sends the length of a virtio-net header and expects one."""
        self.checkCompare("on")
