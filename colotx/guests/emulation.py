"""
QEMU under software emulation: whether this machine needs it, and the workarounds it needs.

This is the one place for them. Hosts with KVM use none. Both bugs are described in C{docs/qemu-versions.md}:

  1. The COLO thread waits on a condition with a mutex it does not own, and hangs after a few checkpoints. Cure: a
     preloaded C{pthread_cond_wait} (L{environment}; its source is C{emulation_condwait.c} beside this file).
  2. QEMU before 9.0 loses dirty pages of a RAM block whose length is a multiple of 256 KiB. Cure: an odd length
     (L{oddRamSize}).

This module knows the machine and the compiler. It must not know guests, QMP or sockets, and it needs nothing outside
the standard library, so that the set-up can ask it too.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from colotx.errors import ConfigError

_SOURCE = Path(__file__).with_name("emulation_condwait.c")

_BAD_MULTIPLE_KIB = 256
"""RAM block lengths that are a multiple of this hit the second bug."""


def kvmUsable(device: str = "/dev/kvm", cpuInfo: str = "/proc/cpuinfo", machine: str | None = None) -> bool:
    """
    Whether a stock guest would run under KVM here.

    A C{/dev/kvm} that opens is not enough: some cloud machines offer one on a processor without virtualisation
    extensions, and stock guests do not boot on it.

    @param device: the KVM device.
    @param cpuInfo: the kernel's description of the processor.
    @param machine: the processor's architecture; the running machine's by default.
    """
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    if (machine or platform.machine()) not in ("x86_64", "i386", "i686"):
        return True
    try:
        text = Path(cpuInfo).read_text()
    except OSError:
        return False
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return not {"vmx", "svm"}.isdisjoint(value.split())
    return False


def acceleratorArguments(usable: Callable[[], bool] = kvmUsable) -> list[str]:
    """
    The QEMU arguments that choose the accelerator: KVM where it works, else software emulation.

    @param usable: tells whether KVM works.
    """
    return ["-accel", "kvm" if usable() else "tcg"]


def oddRamSize(mebibytes: int) -> str:
    """
    A value for QEMU's C{-m} next to a wanted size, that avoids the second bug: 256 gives C{262152K}.

    @param mebibytes: the wanted size in MiB.
    @raise ConfigError: no positive size.
    """
    if mebibytes <= 0:
        raise ConfigError(f"a guest cannot have {mebibytes} MiB of RAM; give a positive size")
    return f"{mebibytes * 1024 + 8}K"


def environment(cacheDir: Path | str, compiler: str = "gcc") -> dict[str, str]:
    """
    What to add to the environment of a QEMU under software emulation. Builds the library at first use.

    @param cacheDir: where the built library is kept; made when missing.
    @param compiler: the C compiler to build with.
    @raise ConfigError: there is no compiler, or it failed, or the directory cannot be written.
    """
    library = _buildLibrary(Path(cacheDir), compiler)
    if not {" ", ":"}.isdisjoint(str(library)):
        raise ConfigError(f"the loader cannot preload {library}: choose a path without spaces and colons")
    earlier = os.environ.get("LD_PRELOAD")
    return {"LD_PRELOAD": f"{library}:{earlier}" if earlier else str(library)}


def _buildLibrary(cacheDir: Path, compiler: str) -> Path:
    """Build the preloaded library unless one of the same source is there. Safe for several builders at once."""
    source = _SOURCE.read_bytes()
    library = cacheDir.absolute() / f"colotx-condwait-{hashlib.sha256(source).hexdigest()[:12]}.so"
    if library.exists():
        return library
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"QEMU's software emulation needs a small library, and there is no {compiler} to build it: "
            "install the packages gcc and libc6-dev, or use a host with KVM"
        )
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            subprocess.run(
                [compiler, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(built), str(_SOURCE)],
                check=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=60,
            )
            built.replace(library)
    except subprocess.CalledProcessError as failure:
        words = failure.stderr.decode(errors="replace").strip()
        raise ConfigError(
            f"{compiler} could not build {_SOURCE.name} (are gcc and libc6-dev installed?): {words}"
        ) from failure
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise ConfigError(f"the library for software emulation cannot be built: {failure}") from failure
    return library


__all__ = ["acceleratorArguments", "environment", "kvmUsable", "oddRamSize"]
