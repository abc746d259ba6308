"""Tests for L{colotx.lab.guestimage}. That the guest boots is shown by the acceptance tests."""

import gzip
import lzma
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ConfigError
from colotx.guests import emulation
from colotx.lab import guestimage

_VERSION = "6.1.0-1-cloud-amd64"


@dataclass
class Entry:
    """One entry of a cpio archive."""

    mode: int
    data: bytes
    device: tuple[int, int]


def entries(archive: bytes) -> Iterator[tuple[str, Entry]]:
    """Read a "newc" archive, strictly."""
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701", offset
        fields = [int(archive[at : at + 8], 16) for at in range(offset + 6, offset + 110, 8)]
        mode, size, nameSize = fields[1], fields[6], fields[11]
        start = offset + 110
        name = archive[start : start + nameSize]
        assert name[-1:] == b"\0" and b"\0" not in name[:-1]
        start = (start + nameSize + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert start == len(archive)
            return
        yield name[:-1].decode(), Entry(mode, archive[start : start + size], (fields[9], fields[10]))
        offset = (start + size + 3) // 4 * 4


def module(*depends: str) -> bytes:
    """The part of a kernel module that names what it needs."""
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0retpoline=Y\0"


class CpioTests(SynchronousTestCase):
    """The archive writer."""

    @given(
        st.dictionaries(
            st.text("abc/é", min_size=1, max_size=9).map(lambda name: "n" + name),
            st.binary(max_size=9),
            max_size=5,
        )
    )
    def test_roundTrip(self, files: dict[str, bytes]) -> None:
        """Whatever the lengths, a strict reader finds what was written."""
        archive = guestimage._Cpio()
        for name, data in files.items():
            archive.add(name, stat.S_IFREG | 0o644, data)
        self.assertEqual({name: entry.data for name, entry in entries(archive.finish())}, files)


class BuildTests(SynchronousTestCase):
    """L{guestimage.buildGuest} with made-up packages."""

    def setUp(self) -> None:
        self.cache = Path(self.mktemp()).absolute()
        self.put(f"boot/vmlinuz-{_VERSION}", b"kernel")
        self.put("bin/busybox", b"busybox")
        modules = f"lib/modules/{_VERSION}"
        self.put(
            f"{modules}/modules.builtin", b"kernel/lib/crc32.ko\nkernel/drivers/virtio/virtio-anchor.ko\n"
        )
        self.put(f"{modules}/kernel/virtio.ko", module())
        self.put(f"{modules}/kernel/virtio_ring.ko", module("virtio"))
        self.put(f"{modules}/kernel/virtio_pci.ko.xz", lzma.compress(module("virtio_ring", "virtio-anchor")))
        self.put(f"{modules}/kernel/net_failover.ko", module())
        self.put(f"{modules}/kernel/virtio_net.ko", module("net-failover", "virtio_ring", "crc32"))
        self.put(f"{modules}/kernel/virtio-blk.ko", module("virtio_ring"))
        self.put(f"{modules}/kernel/unwanted.ko", module())

    def put(self, path: str, data: bytes) -> None:
        file = self.cache / "root" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def build(self) -> dict[str, Entry]:
        files = guestimage.buildGuest(self.cache)
        self.assertEqual(files.kernel.read_bytes(), b"kernel")
        return dict(entries(gzip.decompress(files.initramfs.read_bytes())))

    def test_moduleOrder(self) -> None:
        """Each module comes after what it needs, once; what is built into the kernel is left out."""
        order = self.build()["modules/order"].data.decode().split()
        self.assertEqual(
            order, ["virtio", "virtio_ring", "virtio_pci", "net_failover", "virtio_net", "virtio_blk"]
        )

    def test_modulesUnpacked(self) -> None:
        """The guest gets modules that its kernel need not decompress."""
        self.assertEqual(self.build()["modules/virtio_pci"].data, module("virtio_ring", "virtio-anchor"))

    def test_files(self) -> None:
        """What init needs is there, as what it must be."""
        found = self.build()
        self.assertEqual(found["bin/busybox"], Entry(stat.S_IFREG | 0o755, b"busybox", (0, 0)))
        self.assertEqual(found["bin/sh"], Entry(stat.S_IFLNK | 0o777, b"busybox", (0, 0)))
        self.assertEqual(found["dev/console"], Entry(stat.S_IFCHR | 0o600, b"", (5, 1)))
        self.assertEqual(found["numbers"].data, guestimage.numbers())
        self.assertTrue(found["init"].data.startswith(b"#!/bin/sh\n"))
        self.assertTrue(found["services"].data.startswith(b"#!/bin/sh\n"))
        self.assertEqual(found["init"].mode, stat.S_IFREG | 0o755)

    def test_same(self) -> None:
        """Two builds are equal to the byte, and nothing else stays behind."""
        first = guestimage.buildGuest(self.cache)
        content = first.initramfs.read_bytes()
        self.assertEqual(guestimage.buildGuest(self.cache), first)
        self.assertEqual(first.initramfs.read_bytes(), content)
        self.assertEqual(set(self.cache.iterdir()), {self.cache / "root", first.initramfs})

    def test_mergedUsr(self) -> None:
        """Later Debian releases ship busybox and the modules below /usr."""
        root = self.cache / "root"
        (root / "usr").mkdir()
        for name in ("bin", "lib"):
            (root / name).rename(root / "usr" / name)
        self.assertIn("virtio_net", self.build()["modules/order"].data.decode().split())

    def test_nothingUnpacked(self) -> None:
        """Without the packages, the error says what to do."""
        error = self.assertRaises(ConfigError, guestimage.buildGuest, self.mktemp())
        self.assertIn("make setup", str(error))

    def test_moduleMissing(self) -> None:
        """A kernel that lacks a driver is refused by name."""
        (self.cache / f"root/lib/modules/{_VERSION}/kernel/net_failover.ko").unlink()
        error = self.assertRaises(ConfigError, guestimage.buildGuest, self.cache)
        self.assertIn("no module net_failover", str(error))


class ArgumentTests(SynchronousTestCase):
    """Command lines."""

    def test_kernel(self) -> None:
        """Only settings that were made reach the guest."""
        words = guestimage.kernelArguments("10.0.0.1/24", "fd00::1/64", 8192, 5).split()
        self.assertEqual(
            [word for word in words if word.startswith("colotx.")],
            [
                "colotx.address=10.0.0.1/24",
                "colotx.address6=fd00::1/64",
                "colotx.pattern=8192",
                "colotx.pause=5",
            ],
        )
        self.assertNotIn("address", guestimage.kernelArguments())
        self.assertNotIn("firsttcp", guestimage.kernelArguments())
        self.assertIn("colotx.firsttcp=0", guestimage.kernelArguments(firstTcp=False).split())

    def test_patternSize(self) -> None:
        """The memory check writes whole pages."""
        for size in (-4096, 1, 4097):
            self.assertRaises(ConfigError, guestimage.kernelArguments, patternBytes=size)

    def arguments(self, accelerator: str, **settings: object) -> list[str]:
        self.patch(emulation, "acceleratorArguments", lambda: ["-accel", accelerator])
        files = guestimage.GuestFiles(Path("/k"), Path("/i"))
        return guestimage.qemuArguments(files, "quiet", **settings)  # type: ignore[arg-type]

    def test_emulated(self) -> None:
        """Software emulation gets the odd RAM size."""
        arguments = self.arguments("tcg", ramMebibytes=128, serial="/log", machine="q35")
        text = " ".join(arguments)
        self.assertIn("-machine q35 -accel tcg -m 131080K", text)
        self.assertIn("-kernel /k -initrd /i -append quiet", text)
        self.assertIn("-serial file:/log", text)

    def test_kvm(self) -> None:
        """KVM gets what was asked for."""
        text = " ".join(self.arguments("kvm"))
        self.assertIn("-accel kvm -m 256M", text)
        self.assertIn("-serial none", text)

    def test_binary(self) -> None:
        """C{COLOTX_QEMU} names the QEMU to use."""
        self.patch(os, "environ", os.environ | {"COLOTX_QEMU": "/bin/sh"})
        self.assertEqual(guestimage.qemuBinary(), "/bin/sh")

    def test_noBinary(self) -> None:
        """A QEMU that is not there is an error that says what to do."""
        self.patch(os, "environ", os.environ | {"COLOTX_QEMU": "/no/such/qemu"})
        error = self.assertRaises(ConfigError, guestimage.qemuBinary)
        self.assertIn("/no/such/qemu", str(error))
        self.assertIn("qemu-system-x86", str(error))
