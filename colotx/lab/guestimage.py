"""
A small Linux guest for demos, tests and benchmarks: Debian's cloud kernel and a busybox in an initramfs.

The set-up (C{scripts/setup}) unpacks the Debian packages below a cache directory; nothing is installed on the host.
This module makes a bootable guest of them. It must not know QMP, the COLO exchange or a reactor.

What the guest serves, over IPv4 and IPv6 (C{guestinit.sh} beside this file is its init):

  - TCP 7: echo.
  - TCP 9: takes everything; tells the MD5 of each L{SINK_BLOCK} bytes, and at the end of the rest, a line each.
  - TCP 13: answers each line with the guest's clock (ns) in a line of L{CLOCK_LINE} bytes: two guests never agree.
  - TCP 19: the bytes of L{numbers} again and again, until the client closes.
  - TCP 1001: one line a connection, C{<round> ok} or C{<round> CORRUPT}: the verdict of the memory check, which
    writes a pattern that depends on the round, verifies it before the next, and never recovers from C{CORRUPT}.

The verdicts also appear on the serial console, and before them a line that starts with L{READY}.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import re
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from colotx.errors import ConfigError
from colotx.guests import emulation

ECHO_PORT = 7
SINK_PORT = 9
CLOCK_PORT = 13
NUMBERS_PORT = 19
VERDICT_PORT = 1001

SINK_BLOCK = 16384
CLOCK_LINE = 37

READY = "colotx: ready"
"""How the line begins that the guest prints when it serves."""

_INIT = Path(__file__).with_name("guestinit.sh")
_SERVICES = Path(__file__).with_name("guestservices.sh")
_MODULES = ("virtio_pci", "virtio_net", "virtio_blk")


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """
    What QEMU needs to boot the guest.

    @ivar kernel: a Linux C{bzImage}.
    @ivar initramfs: a gzipped cpio archive.
    """

    kernel: Path
    initramfs: Path


def qemuBinary() -> str:
    """
    The QEMU to use: C{COLOTX_QEMU} of the environment, else the distribution's.

    @raise ConfigError: there is none.
    """
    wanted = os.environ.get("COLOTX_QEMU") or "qemu-system-x86_64"
    found = shutil.which(wanted)
    if found is None:
        raise ConfigError(
            f"there is no {wanted}: install the package qemu-system-x86, or set COLOTX_QEMU to a QEMU binary"
        )
    return found


def buildGuest(cacheDir: Path | str) -> GuestFiles:
    """
    Make the guest of the unpacked Debian packages in C{cacheDir/root}. The result depends on them alone, to the
    byte, so two hosts with the same packages have the same guest. Takes about 0.2 s.

    @param cacheDir: where the set-up unpacked the packages, and where the initramfs goes.
    @raise ConfigError: a part is missing.
    """
    cache = Path(cacheDir).absolute()
    root = cache / "root"
    kernels = sorted(root.glob("boot/vmlinuz-*"))
    # Debian 13 ships both below /usr.
    busyboxes = [*root.glob("bin/busybox"), *root.glob("usr/bin/busybox")]
    if not kernels or not busyboxes:
        raise ConfigError(f"there is no guest kernel and busybox in {root}: run `make setup`")
    version = kernels[-1].name.removeprefix("vmlinuz-")
    modules = _modules(root, version)
    archive = gzip.compress(_initramfs(busyboxes[0].read_bytes(), modules), compresslevel=6, mtime=0)
    initramfs = cache / f"initramfs-{version}.gz"
    # Another process may be building, or booting, the same guest.
    with tempfile.NamedTemporaryFile(dir=cache, delete=False) as scratch:
        scratch.write(archive)
    Path(scratch.name).replace(initramfs)
    return GuestFiles(kernel=kernels[-1], initramfs=initramfs)


def numbers() -> bytes:
    """What the guest's download service repeats: the numbers 1 to 99999, a line each (588888 bytes)."""
    return b"".join(b"%d\n" % number for number in range(1, 100000))


def kernelArguments(
    address: str | None = None,
    address6: str | None = None,
    patternBytes: int = 0,
    pauseMilliseconds: int = 100,
    firstTcp: bool = True,
) -> str:
    """
    The guest's kernel command line.

    @param address: IPv4 address of its NIC with the prefix length, such as C{10.77.0.10/24}.
    @param address6: the same for IPv6.
    @param patternBytes: size of the memory check's pattern, a multiple of 4096; 0: no memory check, the guest is idle.
    @param pauseMilliseconds: the memory check's rest after a round. Under software emulation a round of 4 MiB itself
        takes about half a second.
    @param firstTcp: whether the guest makes a TCP connection to itself before it is ready. The first one fixes the
        offset of its TCP time stamps; without this a client's connection will be the first.
    @raise ConfigError: the pattern is no number of pages.
    """
    if patternBytes < 0 or patternBytes % 4096:
        raise ConfigError(f"the memory check's pattern must be a multiple of 4096 bytes, not {patternBytes}")
    # The kernel's timer check panics on a busy host; what follows it only shortens the boot, by a second or so.
    words = ["console=ttyS0", "panic=1", "no_timer_check", "quiet", "mitigations=off", "nokaslr"]
    words.append("cryptomgr.notests")
    if address is not None:
        words.append(f"colotx.address={address}")
    if address6 is not None:
        words.append(f"colotx.address6={address6}")
    words += [f"colotx.pattern={patternBytes}", f"colotx.pause={pauseMilliseconds}"]
    if not firstTcp:
        words.append("colotx.firsttcp=0")
    return " ".join(words)


def qemuArguments(
    files: GuestFiles,
    kernelArguments: str,
    ramMebibytes: int = 256,
    serial: Path | str | None = None,
    machine: str = "pc",
) -> list[str]:
    """
    The arguments of a QEMU that boots the guest, without NIC, QMP and COLO, which are colotx's own.

    @param files: from L{buildGuest}.
    @param kernelArguments: from L{kernelArguments}.
    @param ramMebibytes: RAM in MiB, at least 128; under software emulation a little more, see
        L{emulation.oddRamSize}.
    @param serial: a file that gets what the guest prints.
    @param machine: QEMU's machine type.
    """
    accelerator = emulation.acceleratorArguments()
    size = f"{ramMebibytes}M" if "kvm" in accelerator else emulation.oddRamSize(ramMebibytes)
    return [
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none"),
        *("-machine", machine, *accelerator, "-m", size),
        *("-kernel", str(files.kernel), "-initrd", str(files.initramfs), "-append", kernelArguments),
        *("-serial", "none" if serial is None else f"file:{serial}"),
    ]


def _modules(root: Path, version: str) -> dict[str, bytes]:
    """
    The kernel modules the guest needs, in the order of loading. A package that was only unpacked has no
    C{modules.dep}; each module names what it needs itself.

    @param root: the unpacked packages.
    @param version: the kernel's version.
    """
    paths = list(root.glob(f"**/lib/modules/{version}/kernel/**/*.ko*"))
    files = {_moduleName(path.name): path for path in paths}
    inKernel = {
        _moduleName(line.rpartition("/")[2])
        for builtin in root.glob(f"**/lib/modules/{version}/modules.builtin")
        for line in builtin.read_text().split()
    }
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name in inKernel:
            return
        if name not in files:
            raise ConfigError(f"the guest kernel {version} in {root} has no module {name}")
        data = files[name].read_bytes()
        if files[name].suffix == ".xz":
            data = lzma.decompress(data)
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in depends.group(1).decode().split(",") if depends else ():
            if needed:
                add(needed.replace("-", "_"))
        ordered[name] = data

    for name in _MODULES:
        add(name)
    return ordered


def _moduleName(fileName: str) -> str:
    """The kernel takes C{virtio-rng.ko.xz} for C{virtio_rng}."""
    return fileName.partition(".")[0].replace("-", "_")


def _initramfs(busybox: bytes, modules: dict[str, bytes]) -> bytes:
    """The guest's root file system as a cpio archive, not yet compressed."""
    archive = _Cpio()
    for directory in ("bin", "dev", "modules", "proc", "run", "sys"):
        archive.add(directory, stat.S_IFDIR | 0o755)
    # The kernel opens it for init before devtmpfs can be mounted.
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox)
    archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    for name, data in modules.items():
        archive.add(f"modules/{name}", stat.S_IFREG | 0o644, data)
    archive.add("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in modules).encode())
    archive.add("numbers", stat.S_IFREG | 0o644, numbers())
    archive.add("services", stat.S_IFREG | 0o755, _SERVICES.read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, _INIT.read_bytes())
    return archive.finish()


class _Cpio:
    """
    Writer of the "newc" cpio format, the one the Linux kernel unpacks (its documentation:
    C{driver-api/early-userspace/buffer-format}). Times and owners are 0, so equal content gives equal bytes.
    """

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """
        Add an entry.

        @param mode: file type and permissions as in C{st_mode}.
        @param data: the content, or a symbolic link's target.
        @param device: major and minor number of a device node.
        """
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        self._pad()
        self._out.write(data)
        self._pad()

    def finish(self) -> bytes:
        """The whole archive."""
        self.add("TRAILER!!!", 0)
        return self._out.getvalue()

    def _pad(self) -> None:
        self._out.write(b"\0" * (-self._out.tell() % 4))


__all__ = [
    "CLOCK_LINE",
    "CLOCK_PORT",
    "ECHO_PORT",
    "NUMBERS_PORT",
    "READY",
    "SINK_BLOCK",
    "SINK_PORT",
    "VERDICT_PORT",
    "GuestFiles",
    "buildGuest",
    "kernelArguments",
    "numbers",
    "qemuArguments",
    "qemuBinary",
]
