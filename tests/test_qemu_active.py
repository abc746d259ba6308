"""
L{colotx.guests.qemu_active} with real QEMUs on both sides, in one process: both kinds of checkpoint process over a unix
socket, input to both VMs, and a promotion at every message boundary. A promoted guest is the primary of the next pair.

The guests check their own memory all the time and say so on their consoles (see L{colotx.lab.guestimage}).
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from scapy.layers.inet import ICMP, IP
from scapy.layers.l2 import ARP, Ether
from twisted.internet import reactor
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.trial.unittest import SkipTest

from colotx.checkpoint import PrimaryProcess, SecondaryProcess
from colotx.errors import ColoError, FailoverError, GuestError, GuestLost, PeerLost
from colotx.guests.qemu import QemuGuestFactory, QemuPrimaryGuest
from colotx.guests.qemu_follower import Phase
from colotx.guests.qemu_process import QemuProcess
from colotx.interfaces import RunState
from colotx.lab.guestimage import READY
from colotx.protocol import ColoConnection, ColoMessage
from colotx.replication import NoReplication
from colotx.statistics import CheckpointStatistics
from colotx.trigger import CheckpointTrigger
from tests.harness import asynchronous
from tests.realguests import (
    ADDRESS,
    CLIENT,
    CLIENT_MAC,
    MAC,
    Machine,
    NoFailover,
    OpenGate,
    RealGuestCase,
)

_NEWER = Path(__file__).parents[1] / ".cache" / "debian13" / "qemu-system-x86_64"
_DELAY = 300
"""ms between checkpoints: an emulated guest translates its code anew after each load, and gets to say little in 50."""


def pause(seconds: float) -> Deferred[None]:
    return deferLater(reactor, seconds)


class Hooked:
    """
    A secondary guest with something that happens at one boundary.

    @ivar hooks: by the name of a method: called when it was called, before its caller goes on.
    """

    def __init__(self, guest: Any) -> None:
        self._guest = guest
        self.hooks: dict[str, Callable[[], Any]] = {}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._guest, name)
        if name not in ("stageInitial", "stageLive", "prepare", "commit", "settle"):
            return method

        async def call(*arguments: Any) -> None:
            await method(*arguments)
            if name in self.hooks:
                self.hooks[name]()

        return lambda *arguments: ensureDeferred(call(*arguments))


class Protection:
    """
    One protection: both processes and the wire between them.

    @ivar statistics: of the primary's checkpoints.
    @ivar ended: fires when both are over, with the two errors.
    """

    def __init__(self, primary: QemuPrimaryGuest, secondary: Hooked, directory: Path) -> None:
        self._path = str(directory / "wire")
        self._primary, self._secondary = primary, secondary
        self.wires = [ColoConnection(reactor), ColoConnection(reactor)]
        self.statistics = CheckpointStatistics()

    async def begin(self) -> None:
        """Until the initial checkpoint is held."""
        listening = reactor.listenUNIX(self._path, Factory.forProtocol(lambda: self.wires[0]))
        await UNIXClientEndpoint(reactor, self._path).connect(Factory.forProtocol(lambda: self.wires[1]))
        while self.wires[0].transport is None:
            await pause(0.01)
        await listening.stopListening()
        committed: Deferred[None] = Deferred()
        process = PrimaryProcess(
            reactor,
            self._primary,
            OpenGate(),
            NoReplication(),
            NoFailover(),
            CheckpointTrigger(reactor, _DELAY),
            self.statistics,
            makeSpool=None,
            onCommitted=lambda record: committed.called or committed.callback(None),
        )
        receiving = SecondaryProcess(reactor, self._secondary, NoReplication(), NoFailover())
        self.outcomes = [
            ensureDeferred(self._outcome(process.run(self.wires[0]))),
            ensureDeferred(self._outcome(receiving.run(self.wires[1]))),
        ]

        def told(error: ColoError) -> ColoError:
            if not committed.called:
                committed.errback(error)
            return error

        for outcome in self.outcomes:
            outcome.addCallback(told)
        await committed

    async def _outcome(self, running: Awaitable[None]) -> ColoError:
        try:
            await running
        except ColoError as error:
            return error
        raise AssertionError("it ended without an error")

    async def checkpoints(self, number: int) -> None:
        """Let some happen."""
        goal = self.statistics.checkpoints + number
        while self.statistics.checkpoints < goal:
            assert not self.outcomes[0].called, self.outcomes[0].result
            assert not self.outcomes[1].called, self.outcomes[1].result
            await pause(0.01)

    def cut(self) -> None:
        """The link dies."""
        for wire in self.wires:
            wire.abort(PeerLost("the link is gone"))

    async def over(self) -> list[ColoError]:
        """Both processes have ended. @return: their errors."""
        return [await outcome for outcome in self.outcomes]


class Host:
    """Where one guest is: its factory and its console."""

    def __init__(self, case: ActiveSecondaryTests) -> None:
        settings, self.serial = case.host()
        self.factory = QemuGuestFactory(reactor, settings)


class ActiveSecondaryTests(RealGuestCase):
    """A pair of real guests."""

    def setUp(self) -> None:
        super().setUp()
        self.lost: list[GuestError] = []
        self.took: dict[str, float] = {}

    async def booted(self) -> Machine:
        """A guest that checks its memory already."""
        host = Host(self)
        guest = host.factory.createPrimary()
        guest.onLost = self.lost.append
        self.addCleanup(guest.shutdown)
        machine = Machine(guest, host.serial)
        await guest.launch()
        await self.until(lambda: READY in machine.console() and machine.rounds() >= 2, "the guest's boot")
        return machine

    def standby(self) -> Machine:
        """A secondary that has nothing yet."""
        host = Host(self)
        secondary = host.factory.createStandby("active")
        secondary.onLost = self.lost.append
        self.addCleanup(secondary.close)
        return Machine(secondary, host.serial)

    async def protected(self, primary: Machine, standby: Machine) -> tuple[Protection, Hooked]:
        """Both in step."""
        hooked = Hooked(standby.guest)
        protection = Protection(primary.guest, hooked, self.directory)
        self.addCleanup(protection.cut)
        await protection.begin()
        return protection, hooked

    async def ping(self, *machines: Machine) -> None:
        """
        The same frames for all of these machines until each has answered. A checkpoint may take what a secondary is
        about to say, for the primary has said it already.
        """
        head = Ether(src=CLIENT_MAC, dst=MAC) / IP(src=CLIENT, dst=ADDRESS)
        who = Ether(src=CLIENT_MAC, dst="ff:ff:ff:ff:ff:ff")
        # The guest need not ask back: it learns where we are.
        asked = bytes(who / ARP(hwsrc=CLIENT_MAC, psrc=CLIENT, pdst=ADDRESS))
        first = self.pings + 1
        for _ in range(100):
            self.pings += 1
            ping = bytes(head / ICMP(type=8, id=7, seq=self.pings) / b"hello")
            for machine in machines:
                machine.guest.port.send([asked, ping])
            await pause(0.1)
            if all(m.answers and m.answers[-1] >= first for m in machines):
                return
        self.fail(f"no answers to pings {first} to {self.pings}: {[m.answers[-5:] for m in machines]}")

    async def goesOn(self, machine: Machine, rounds: int = 2) -> None:
        """The guest runs, and finds its memory as it left it."""
        goal = machine.rounds() + rounds
        await self.until(lambda: machine.rounds() >= goal, f"round {goal} of the memory check")

    async def promoted(self, standby: Machine) -> float:
        """Make the standby the guest. @return: seconds it took."""
        began = time.monotonic()
        guest = await standby.guest.promote()
        guest.onLost = self.lost.append
        self.addCleanup(guest.shutdown)
        await guest.launch()
        took = time.monotonic() - began
        self.assertIs(guest.runState, RunState.RUNNING)
        self.assertTrue((await guest._process.execute("query-status"))["running"])
        standby.guest = guest
        return took

    async def handedOver(self, primary: Machine, standby: Machine, what: str) -> Machine:
        """The primary is dead, the standby goes on. @return: the standby."""
        await primary.guest.shutdown()
        self.took[what] = await self.promoted(standby)
        await self.ping(standby)
        await self.goesOn(standby)
        return standby

    async def ram(self, process: QemuProcess) -> bytes:
        """@return: a digest of the guest's RAM."""
        path = self.directory / "ram"
        size = (await process.execute("query-memory-size-summary"))["base-memory"]
        await process.execute("pmemsave", {"val": 0, "size": size, "filename": str(path)}, 60)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        path.unlink()
        return digest

    @asynchronous
    async def test_lockstep(self):
        """Dozens of checkpoints with both guests at work, then the second one goes on alone."""
        primary, standby = await self.booted(), self.standby()
        protection, _ = await self.protected(primary, standby)
        for _ in range(5):
            await protection.checkpoints(8)
            await self.ping(primary, standby)
        downtime: Any = protection.statistics.describe()["phases-ms"]
        print(f" downtime {downtime['downtime']['p50']:.0f} ms at the median", end="")
        await self.goesOn(standby)
        protection.cut()
        await protection.over()
        await self.handedOver(primary, standby, "between")
        print(f", going on after {self.took['between'] * 1000:.1f} ms", end="")
        self.assertEqual(self.lost, [])

    @asynchronous
    async def test_boundaries(self):
        """Wherever the exchange is cut, the second guest goes on, and is the first of the next pair."""
        primary = await self.booted()
        for name, hook, phase in (
            ("between", "", Phase.CUT),
            ("REPLY", "prepare", Phase.CUT),
            ("RAM", "stageLive", Phase.CUT),
            ("RECEIVED", "commit", Phase.LOADING),
            ("LOADED", "settle", Phase.CUT),
        ):
            standby = self.standby()
            protection, hooked = await self.protected(primary, standby)
            await protection.checkpoints(3)
            if hook:
                hooked.hooks[hook] = protection.cut
            else:
                protection.cut()
            await protection.over()
            self.assertIs(standby.guest._current.phase, phase)
            primary = await self.handedOver(primary, standby, name)
        print("", ", ".join(f"{name} {took * 1000:.1f} ms" for name, took in self.took.items()), end="")
        self.assertEqual(self.lost, [])

    @asynchronous
    async def test_untouched(self):
        """
        A checkpoint of which QEMU got a part, up to the last byte but one, changes not a byte of the guest's RAM, and
        the guest goes on from its own state.
        """
        primary = await self.booted()
        primary = await self.cutShort(primary, "RAM", None)
        for name, share in (("SIZE", 0.0), ("half the blob", 0.5), ("all but a byte", 1.0)):
            primary = await self.cutShort(primary, name, share)
        self.assertEqual(self.lost, [])

    async def cutShort(self, primary: Machine, name: str, share: float | None) -> Machine:
        """
        Give a standby's QEMU a part of a checkpoint.

        @param share: of the device state; None: a part of the RAM.
        @return: the standby, gone on.
        """
        standby = self.standby()
        protection, _ = await self.protected(primary, standby)
        await protection.checkpoints(2)
        follower = standby.guest._current
        prepare, live = follower.stop, follower.live
        reached: Deferred[None] = Deferred()
        gone: Deferred[None] = Deferred()
        own: list[bytes] = []

        async def stop() -> None:
            await prepare()
            own.append(await self.ram(follower.process))

        async def loadPart(deviceState: bytes, committing: object) -> None:
            follower._connection.sendMessage(ColoMessage.VMSTATE_SIZE, value=len(deviceState))
            await follower._connection.write(deviceState[: int(share * (len(deviceState) - 1))])
            reached.callback(None)
            await gone

        async def passHalf(raw: bytes | memoryview) -> None:
            await live(raw[: len(raw) // 2])
            reached.callback(None)
            await gone

        follower.stop = stop
        if share is None:
            follower.live = passHalf
        else:
            follower.load = loadPart
        await reached
        # QEMU takes it all before the link dies.
        await pause(0.2)
        standby.guest.abandon()
        self.assertEqual([await self.ram(follower.process)], own, name)
        await self.handedOver(primary, standby, name)
        gone.callback(None)
        protection.cut()
        await protection.over()
        return standby

    @asynchronous
    async def test_failedLoad(self):
        """A guest whose last load failed never goes on; the primary's does."""
        primary, standby = await self.booted(), self.standby()
        protection, _ = await self.protected(primary, standby)
        await protection.checkpoints(2)
        follower = standby.guest._current
        load = follower.load

        async def corrupted(deviceState: bytes, committing: Callable[[], None]) -> None:
            await load(deviceState.replace(b"i8254", b"i8255"), committing)

        follower.load = corrupted
        errors = await protection.over()
        self.assertIsInstance(errors[1], GuestError)
        self.assertFalse(standby.guest.promotable)
        with self.assertRaisesRegex(FailoverError, "QEMU left COLO"):
            await standby.guest.promote()
        await self.ping(primary)
        await self.goesOn(primary)
        self.assertEqual(self.lost, [])

    @asynchronous
    async def test_killed(self):
        """The second guest's death is told once, whatever the exchange does, and a fresh one takes its place."""
        primary, standby = await self.booted(), self.standby()
        protection, _ = await self.protected(primary, standby)
        await protection.checkpoints(2)
        os.kill(standby.guest._current.process.pid, signal.SIGKILL)
        await self.until(lambda: bool(self.lost), "the news of its death")
        protection.cut()
        await protection.over()
        self.assertEqual([type(error) for error in self.lost], [GuestLost])
        self.assertFalse(standby.guest.promotable)
        with self.assertRaisesRegex(FailoverError, "QEMU ended"):
            await standby.guest.promote()
        await self.goesOn(primary)
        self.lost.clear()

        protection, _ = await self.protected(primary, standby)
        await protection.checkpoints(2)
        protection.cut()
        await protection.over()
        await self.handedOver(primary, standby, "afresh")
        self.assertEqual(self.lost, [])

    @asynchronous
    async def test_synchronisedAnew(self):
        """Until a new initial transfer is whole the guest of the one before can go on; then it is gone."""
        primary, standby = await self.booted(), self.standby()
        protection, _ = await self.protected(primary, standby)
        await protection.checkpoints(2)
        protection.cut()
        await protection.over()
        first = standby.guest._current.process

        protection, _ = await self.protected(primary, standby)
        self.assertIsNot(standby.guest._current.process, first)
        await first.whenEnded(10)
        with self.assertRaises(GuestLost):
            await first.execute("query-status")
        await protection.checkpoints(2)
        protection.cut()
        await protection.over()
        second = standby.guest._current.process

        hooked = Hooked(standby.guest)
        protection = Protection(primary.guest, hooked, self.directory)
        self.addCleanup(protection.cut)
        received = []

        def arrived() -> None:
            received.append(1)
            if len(received) == 100:
                protection.cut()

        hooked.hooks["stageInitial"] = arrived
        with self.assertRaises(ColoError):
            await protection.begin()
        await protection.over()
        self.assertIs(standby.guest._current.process, second)
        await self.handedOver(primary, standby, "while synchronising")
        self.assertEqual(self.lost, [])

    @asynchronous
    async def test_newer(self):
        """The same with the QEMU of Debian 13."""
        if not _NEWER.exists():
            print(f" (no {_NEWER.name} of Debian 13 here)", end="")
            raise SkipTest(f"there is no {_NEWER}: scripts/setup can bring it")
        self.binary = str(_NEWER)
        primary = await self.booted()
        for name in ("prepare", "commit"):
            standby = self.standby()
            protection, hooked = await self.protected(primary, standby)
            await protection.checkpoints(10)
            await self.ping(primary, standby)
            hooked.hooks[name] = protection.cut
            await protection.over()
            primary = await self.handedOver(primary, standby, name)
        print("", ", ".join(f"{name} {took * 1000:.1f} ms" for name, took in self.took.items()), end="")
        self.assertEqual(self.lost, [])
