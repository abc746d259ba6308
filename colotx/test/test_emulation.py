"""Tests for L{colotx.guests.emulation}."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ConfigError
from colotx.guests import emulation

_NO_COMPILER = None if shutil.which("gcc") else "no gcc here to build the library with"

_WAITS = """
import ctypes, sys, threading, time
library = ctypes.CDLL(None)
mutex, condition = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)

def wait():
    return library.pthread_cond_wait(condition, mutex)

# Nobody holds the mutex.
assert wait() == 0
assert library.pthread_mutex_trylock(mutex) == 0, "it was not given back"

# Another thread holds it: the wait must not let go of what is not the caller's, so it lasts until the owner unlocks.
ended = []
waiter = threading.Thread(target=lambda: (wait(), ended.append(time.monotonic())))
waiter.start()
time.sleep(0.1)
assert not ended, "it released another thread's mutex"
unlocked = time.monotonic()
assert library.pthread_mutex_unlock(mutex) == 0
waiter.join(5)
assert ended and ended[0] >= unlocked
assert library.pthread_mutex_trylock(mutex) == 0, "the waiter kept it"

# The caller holds it: the usual wait, ended by a signal only, and with the mutex in hand.
def signal():
    library.pthread_mutex_lock(mutex)
    library.pthread_cond_signal(condition)
    library.pthread_mutex_unlock(mutex)

begin = time.monotonic()
threading.Timer(0.1, signal).start()
assert wait() == 0
assert time.monotonic() - begin >= 0.09, "it woke before the signal"
assert library.pthread_mutex_trylock(mutex) != 0, "it came back without the mutex"
library.pthread_mutex_unlock(mutex)

# Who waits properly, for whatever, is woken by a wait without the mutex: its own wake-up may have come too early.
other = ctypes.create_string_buffer(64)

def sleep():
    library.pthread_mutex_lock(mutex)
    library.pthread_cond_wait(other, mutex)
    library.pthread_mutex_unlock(mutex)

sleeper = threading.Thread(target=sleep, daemon=True)
sleeper.start()
time.sleep(0.1)
assert sleeper.is_alive(), "it woke for nobody"
assert wait() == 0
sleeper.join(5)
assert not sleeper.is_alive(), "it sleeps on"
print("fine", flush=True)
"""


class KvmTests(SynchronousTestCase):
    """L{emulation.kvmUsable} and what follows from it."""

    def usable(self, flags: str | None, machine: str = "x86_64", device: bool = True) -> bool:
        directory = Path(self.mktemp())
        directory.mkdir()
        if device:
            (directory / "kvm").touch()
        if flags is not None:
            (directory / "cpuinfo").write_text(f"processor\t: 0\nbugs\t\t: svm\nflags\t\t: {flags}\n\n")
        return emulation.kvmUsable(str(directory / "kvm"), str(directory / "cpuinfo"), machine)

    def test_processorExtensions(self) -> None:
        """A KVM device counts on a processor with Intel's or AMD's extensions."""
        self.assertTrue(self.usable("fpu vmx sse2"))
        self.assertTrue(self.usable("fpu svm"))

    def test_deviceAlone(self) -> None:
        """A KVM device without them does not, nor with flags that only look like them."""
        self.assertFalse(self.usable("fpu sse2 hypervisor"))
        self.assertFalse(self.usable("fpu svm_lock vmx_other"))
        self.assertFalse(self.usable(None))

    def test_noDevice(self) -> None:
        """Without a device there is no KVM."""
        self.assertFalse(self.usable("fpu vmx", device=False))

    def test_otherArchitecture(self) -> None:
        """Only x86 shows such flags."""
        self.assertTrue(self.usable("fp asimd", machine="aarch64"))
        self.assertFalse(self.usable("fp asimd", machine="aarch64", device=False))

    def test_accelerator(self) -> None:
        """The accelerator follows."""
        self.assertEqual(emulation.acceleratorArguments(lambda: True), ["-accel", "kvm"])
        self.assertEqual(emulation.acceleratorArguments(lambda: False), ["-accel", "tcg"])


class RamSizeTests(SynchronousTestCase):
    """L{emulation.oddRamSize}."""

    def test_neverBad(self) -> None:
        """No size is a multiple of 256 KiB; every size is whole pages and hardly more than wanted."""
        for mebibytes in (1, 64, 128, 255, 256, 1024, 4096):
            size = emulation.oddRamSize(mebibytes)
            kibibytes = int(size.removesuffix("K"))
            self.assertNotEqual(kibibytes % 256, 0)
            self.assertEqual(kibibytes % 8, 0)
            self.assertTrue(0 <= kibibytes - mebibytes * 1024 < 256)

    def test_known(self) -> None:
        """The size that was tried for long."""
        self.assertEqual(emulation.oddRamSize(256), "262152K")

    def test_refused(self) -> None:
        """No RAM is no guest."""
        for mebibytes in (0, -1):
            self.assertRaises(ConfigError, emulation.oddRamSize, mebibytes)


class EnvironmentTests(SynchronousTestCase):
    """L{emulation.environment}: building the library."""

    def setUp(self) -> None:
        self.cache = Path(self.mktemp()).absolute()
        self.patch(os, "environ", {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"})

    def preloaded(self) -> Path:
        return Path(emulation.environment(self.cache)["LD_PRELOAD"])

    def test_builtOnce(self) -> None:
        """The first call builds it, later calls find it, and nothing else stays behind."""
        library = self.preloaded()
        self.assertTrue(library.is_absolute())
        before = library.stat().st_mtime_ns
        self.assertEqual(self.preloaded(), library)
        self.assertEqual(library.stat().st_mtime_ns, before)
        self.assertEqual(list(self.cache.iterdir()), [library])

    test_builtOnce.skip = _NO_COMPILER  # type: ignore[attr-defined]

    def test_noCompilerNeededLater(self) -> None:
        """A library that is there needs no compiler."""
        library = self.preloaded()
        again = emulation.environment(self.cache, compiler="no-such-compiler")
        self.assertEqual(again, {"LD_PRELOAD": str(library)})

    test_noCompilerNeededLater.skip = _NO_COMPILER  # type: ignore[attr-defined]

    def test_keepsOthers(self) -> None:
        """What the user preloads stays preloaded."""
        library = self.preloaded()
        os.environ["LD_PRELOAD"] = "/lib/other.so"
        self.assertEqual(emulation.environment(self.cache), {"LD_PRELOAD": f"{library}:/lib/other.so"})

    test_keepsOthers.skip = _NO_COMPILER  # type: ignore[attr-defined]

    def test_waits(self) -> None:
        """
        The library's wait, in a process of its own: with a mutex nobody holds, with another thread's, and with the
        caller's.
        """
        environment = os.environ | emulation.environment(self.cache)
        result = subprocess.run(
            [sys.executable, "-c", _WAITS], env=environment, capture_output=True, text=True, timeout=20
        )
        self.assertEqual((result.stdout, result.stderr), ("fine\n", ""))

    test_waits.skip = _NO_COMPILER  # type: ignore[attr-defined]

    def test_noCompiler(self) -> None:
        """Without a compiler the error names the packages."""
        error = self.assertRaises(ConfigError, emulation.environment, self.cache, compiler="no-such-compiler")
        self.assertIn("gcc and libc6-dev", str(error))

    def test_compilerFails(self) -> None:
        """A compiler that fails is quoted, and leaves nothing that looks like a library."""
        compiler = self.script("echo no stdio here >&2; exit 1")
        error = self.assertRaises(ConfigError, emulation.environment, self.cache, compiler=compiler)
        self.assertIn("no stdio here", str(error))
        self.assertEqual(list(self.cache.iterdir()), [])

    def test_unwritable(self) -> None:
        """A cache directory that cannot be made is an error of ours."""
        self.cache.touch()
        self.assertRaises(ConfigError, emulation.environment, self.cache, compiler=self.script("exit 0"))

    def test_separatorsInPath(self) -> None:
        """The loader would read two paths, or none, where there is a space or a colon."""
        compiler = self.script('while [ "$1" != -o ]; do shift; done; touch "$2"')
        for name in ("with space", "with:colon"):
            error = self.assertRaises(
                ConfigError, emulation.environment, self.cache / name, compiler=compiler
            )
            self.assertIn("without spaces", str(error))

    def script(self, text: str) -> str:
        path = Path(self.mktemp())
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path.absolute())
