"""
L{colotx.guests.qemu} against a real QEMU: protection, restoring from a checkpoint, and every way to leave it.

The guest checks its own memory all the time and says so on its serial console (see L{colotx.lab.guestimage}).
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import SkipTest, TestCase

from colotx.errors import ColoError, ConfigError, GuestError, GuestLost
from colotx.guests import emulation
from colotx.guests.emulation import oddRamSize
from colotx.guests.passive import PassiveSecondary
from colotx.guests.qemu import QemuGuestFactory, QemuPrimaryGuest, QemuSettings
from colotx.interfaces import RunState
from colotx.lab.guestimage import READY, buildGuest, kernelArguments, qemuArguments, qemuBinary
from colotx.vmstate import CheckpointReader, InitialReader, RamReader

_PATIENCE = 240
"""Seconds the guest has to get on: software emulation on a busy machine is slow."""

_CACHE = Path(__file__).parents[1] / ".cache" / "guest"


class _Standby:
    """
    A sink that keeps what it gets in a passive secondary, as the other host would.

    @ivar serial: what a guest made of it writes its console to.
    """

    def __init__(self, secondary: PassiveSecondary, serial: Path) -> None:
        self.secondary = secondary
        self.serial = serial
        self._ram = RamReader()
        self._initial = InitialReader(self._ram)
        self._checkpoint: CheckpointReader | None = None
        self.bytes = 0
        self.onWrite: Callable[[], Any] = lambda: None

    async def write(self, data: bytes | memoryview) -> None:
        self.bytes += len(data)
        raw = bytes(data)
        if self._checkpoint is None:
            self.secondary.stageInitial(raw, self._initial.feed(raw))
        else:
            self.secondary.stageLive(raw, self._checkpoint.feed(raw)[0])
        self.onWrite()

    async def commitInitial(self) -> None:
        complete = self._initial.complete
        assert complete is not None
        self.secondary.describe(complete.machine, complete.configuration)
        await self.secondary.commit(complete.deviceState)
        await self.secondary.settle()

    def begin(self) -> None:
        self._checkpoint = CheckpointReader(self._ram)


class _Vanished(ColoError):
    """The other host went away."""


class QemuGuestTests(TestCase):
    """A real guest in a real QEMU."""

    timeout = 900

    def setUp(self) -> Any:
        try:
            binary, files = qemuBinary(), buildGuest(_CACHE)
        except ConfigError as error:
            raise SkipTest(str(error)) from error
        # Sockets need short paths.
        directory = tempfile.TemporaryDirectory(prefix="colo-", ignore_cleanup_errors=True)
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.binary = binary
        self.files = files
        self.environment = {} if emulation.kvmUsable() else emulation.environment(_CACHE)
        self.moreArguments: list[str] = []
        self.serials = 0
        self.lost: list[GuestError] = []

    def factory(self) -> tuple[QemuGuestFactory, Path]:
        """A host: a factory of guests, and where their console will be."""
        self.serials += 1
        serial = self.directory / f"serial-{self.serials}"
        kernel = kernelArguments("10.77.0.10/24", patternBytes=1 << 20, pauseMilliseconds=20)
        arguments = [*qemuArguments(self.files, kernel, serial=serial), *self.moreArguments]
        settings = QemuSettings(arguments, str(self.directory), self.binary, environment=self.environment)
        return QemuGuestFactory(reactor, settings), serial

    def standby(self) -> _Standby:
        """A standby on another host, which ends with the test."""
        factory, serial = self.factory()
        secondary = factory.createStandby()
        self.addCleanup(secondary.close)
        return _Standby(secondary, serial)

    async def promoted(self, standby: _Standby) -> QemuPrimaryGuest:
        """The guest made of a standby, launched."""
        guest = self.made(await standby.secondary.promote())
        self.assertIs(guest.runState, RunState.INMIGRATE)
        await guest.launch()
        self.assertIs(guest.runState, RunState.RUNNING)
        self.serial = standby.serial
        return guest

    def made(self, guest: QemuPrimaryGuest) -> QemuPrimaryGuest:
        """A guest that is ended with the test."""
        guest.onLost = self.lost.append
        guest.port.receiver = lambda frames: None
        self.addCleanup(guest.shutdown)
        return guest

    async def booted(self) -> QemuPrimaryGuest:
        """A guest that checks its memory already."""
        factory, self.serial = self.factory()
        guest = self.made(factory.createPrimary())
        await guest.launch()
        await self.until(lambda: READY in self.console() and self.rounds() >= 2, "the guest's boot")
        return guest

    def console(self) -> str:
        """What the guest said."""
        return self.serial.read_text(errors="replace") if self.serial.exists() else ""

    def rounds(self) -> int:
        """The last round of the memory check. Fails if one found a fault."""
        console = self.console()
        self.assertNotIn("CORRUPT", console)
        found = re.findall(r"^colotx: (\d+) ok\r?$", console, re.MULTILINE)
        return int(found[-1]) if found else -1

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition of the guest's console."""
        for _ in range(_PATIENCE * 20):
            if condition():
                return
            await deferLater(reactor, 0.05)
        self.fail(f"{what}: not within {_PATIENCE} s. The guest said: {self.console()[-2000:]}")

    async def goesOn(self, rounds: int = 3) -> None:
        """The guest runs, and finds its memory as it left it."""
        goal = self.rounds() + rounds
        await self.until(lambda: self.rounds() >= goal, f"round {goal} of the memory check")

    async def protected(self, guest: QemuPrimaryGuest) -> _Standby:
        """Make the guest protected. @return: the standby with the initial checkpoint."""
        standby = self.standby()
        await guest.transferInitial(standby)
        self.assertIs(guest.runState, RunState.COLO)
        await standby.commitInitial()
        await guest.start()
        self.assertIs(guest.runState, RunState.RUNNING)
        return standby

    async def checkpoint(self, guest: QemuPrimaryGuest, standby: _Standby) -> float:
        """One checkpoint. @return: the guest's downtime in seconds."""
        began = time.monotonic()
        await guest.stop()
        standby.begin()
        await guest.transferLive(standby)
        blob = await guest.saveDeviceState()
        await standby.secondary.commit(blob)
        await guest.start()
        downtime = time.monotonic() - began
        await standby.secondary.settle()
        return downtime

    def asynchronous(method: Any) -> Any:
        def run(self: Any) -> Any:
            return ensureDeferred(method(self))

        run.__name__, run.__doc__ = method.__name__, method.__doc__
        return run

    @asynchronous
    async def test_restored(self):
        """After 30 checkpoints the last one comes back to life: the counter goes on, no byte is wrong, and again."""
        guest = await self.booted()
        self.assertGreater(guest.ramBytes, 200 << 20)
        standby = await self.protected(guest)
        downtimes = []
        for _ in range(30):
            await deferLater(reactor, 0.05)
            downtimes.append(await self.checkpoint(guest, standby))
        held = self.rounds()
        self.assertEqual(standby.secondary.checkpoint, 31)
        await guest.shutdown()

        began = time.monotonic()
        restored = await self.promoted(standby)
        took = time.monotonic() - began
        print(f" downtime {sorted(downtimes)[15] * 1000:.1f} ms, restored in {took * 1000:.0f} ms", end="")
        await self.until(lambda: self.rounds() >= 0, "life after the restore")
        first = int(re.findall(r"colotx: (\d+) ok", self.console())[0])
        self.assertIn(first, (held, held + 1))
        await self.goesOn()

        again = await self.protected(restored)
        # RAM that was mapped is sent like any other.
        self.assertGreater(again.bytes, standby.bytes // 4)
        await self.checkpoint(restored, again)
        await restored.shutdown()
        await self.promoted(again)
        await self.goesOn()
        self.assertEqual(self.lost, [])

    @asynchronous
    async def test_restoredCold(self):
        """Without a QEMU that waits one is started, and maps the image as well."""
        guest = await self.booted()
        standby = await self.protected(guest)
        waiting = standby.secondary._waiting
        await waiting.shutdown()
        standby.secondary._waiting = None
        await guest.shutdown()
        began = time.monotonic()
        await self.promoted(standby)
        print(f" restored in {(time.monotonic() - began) * 1000:.0f} ms", end="")
        await self.goesOn()

    @asynchronous
    async def test_restoredByCopy(self):
        """With guest RAM that the operator's arguments define, the restore goes by a copy and works."""
        size = oddRamSize(256)
        own = ["-object", f"memory-backend-ram,id=own,size={size}", "-machine", "memory-backend=own"]
        self.moreArguments = ["-m", size, *own]
        guest = await self.booted()
        standby = await self.protected(guest)
        await self.checkpoint(guest, standby)
        held = self.rounds()
        await guest.shutdown()
        await self.promoted(standby)
        await self.goesOn()
        self.assertGreater(self.rounds(), held)

    @asynchronous
    async def test_endProtection(self):
        """Wherever the exchange is, the guest runs on when its protection ends, and can be protected again."""
        guest = await self.booted()

        async def within(wait: Deferred[Any]) -> None:
            """End the protection while something waits for QEMU: the wait fails."""
            await guest.endProtection()
            await self.assertFailure(wait, ColoError)

        async def initially() -> None:
            standby = self.standby()
            begun: Deferred[None] = Deferred()
            standby.onWrite = lambda: begun.called or standby.bytes < 10_000_000 or begun.callback(None)
            wait = guest.transferInitial(standby)
            await begun
            await within(wait)

        async def initialHeld() -> None:
            await guest.transferInitial(self.standby())
            await guest.endProtection()

        async def running() -> None:
            await self.protected(guest)
            await guest.endProtection()

        async def stopping() -> None:
            await self.protected(guest)
            await within(guest.stop())

        async def stopped() -> None:
            await self.protected(guest)
            await guest.stop()
            await guest.endProtection()

        async def transferring() -> None:
            standby = await self.protected(guest)
            await guest.stop()
            standby.begin()
            ended: list[Deferred[None]] = []
            standby.onWrite = lambda: ended or ended.append(guest.endProtection())
            with self.assertRaises(ColoError):
                await guest.transferLive(standby)
            await ended[0]

        async def held() -> None:
            standby = await self.protected(guest)
            await guest.stop()
            standby.begin()
            await guest.transferLive(standby)
            await guest.saveDeviceState()
            await guest.endProtection()

        async def sinkGone() -> None:
            standby = await self.protected(guest)
            await guest.stop()

            class Gone:
                async def write(self, data: object) -> None:
                    raise _Vanished("the link is gone")

            standby.begin()
            with self.assertRaises(_Vanished):
                await guest.transferLive(Gone())
            await guest.endProtection()

        for leave in (initially, initialHeld, running, stopping, stopped, transferring, held, sinkGone):
            began = time.monotonic()
            await leave()
            self.assertIs(guest.runState, RunState.RUNNING, leave.__name__)
            await self.goesOn(1)
            print(f" {leave.__name__} {time.monotonic() - began:.1f} s", end="")
        standby = await self.protected(guest)
        await self.checkpoint(guest, standby)
        await guest.endProtection()
        await guest.endProtection()
        self.assertEqual(self.lost, [])

    @asynchronous
    async def test_killed(self):
        """A QEMU that dies under a checkpoint is reported once, and what waits for it fails."""
        guest = await self.booted()
        standby = await self.protected(guest)
        await self.checkpoint(guest, standby)
        await guest.stop()
        process = guest._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        standby.begin()
        with self.assertRaises((GuestError, CancelledError)):
            await guest.transferLive(standby)
            await guest.saveDeviceState()
            await guest.start()
        await self.until(lambda: bool(self.lost), "the news of QEMU's death")
        self.assertEqual(len(self.lost), 1)
        self.assertIsInstance(self.lost[0], GuestLost)
        self.assertIs(guest.runState, RunState.SHUTDOWN)
        await self.promoted(standby)
        await self.goesOn()

    @asynchronous
    async def test_refused(self):
        """Arguments QEMU does not take come back in its own words."""
        settings = QemuSettings(["-no-such-option"], str(self.directory), self.binary)
        guest = self.made(QemuPrimaryGuest(reactor, settings))
        with self.assertRaisesRegex(GuestLost, "no-such-option"):
            await guest.launch()
        self.assertEqual(self.lost, [])
