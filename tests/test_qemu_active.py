"""
L{colotx.guests.qemu_active} with real QEMUs on both sides, in one process: both kinds of checkpoint process over a unix
socket, input to both VMs, and a promotion at every message boundary. A promoted guest is the primary of the next pair.

The guests check their own memory all the time and say so on their consoles (see L{colotx.lab.guestimage}).
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
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
from twisted.trial.unittest import SkipTest, TestCase
from zope.interface import implementer

from colotx.checkpoint import PrimaryProcess, SecondaryProcess
from colotx.errors import ColoError, ConfigError, FailoverError, GuestError, GuestLost, PeerLost
from colotx.failover import FailoverState
from colotx.guests import emulation
from colotx.guests.qemu import ActiveQemuSecondary, QemuGuestFactory, QemuPrimaryGuest, QemuSettings
from colotx.interfaces import IOutputGate, RunState
from colotx.lab.guestimage import READY, buildGuest, kernelArguments, qemuArguments, qemuBinary
from colotx.protocol import ColoConnection
from colotx.replication import NoReplication
from colotx.statistics import CheckpointStatistics
from colotx.trigger import CheckpointTrigger
from tests.harness import asynchronous

_PATIENCE = 240
"""Seconds the guest has to get on: software emulation on a busy machine is slow."""

_CACHE = Path(__file__).parents[1] / ".cache" / "guest"
_NEWER = Path(__file__).parents[1] / ".cache" / "debian13" / "qemu-system-x86_64"
_MAC, _ADDRESS = "52:54:00:c0:10:03", "10.77.0.10"
_CLIENT_MAC, _CLIENT = "02:00:00:00:00:01", "10.77.0.1"
_DELAY = 300
"""ms between checkpoints: an emulated guest translates its code anew after each load, and gets to say little in 50."""


def pause(seconds: float) -> Deferred[None]:
    return deferLater(reactor, seconds)


class Machine:
    """
    What a guest says: its console, and its answers to pings.

    @ivar guest: the L{QemuPrimaryGuest}, or the L{ActiveQemuSecondary}.
    @ivar answers: the numbers of the pings it answered.
    """

    def __init__(self, guest: Any, serial: Path) -> None:
        self.guest = guest
        self.serial = serial
        self.answers: list[int] = []
        guest.port.receiver = self.said

    def said(self, frames: list[bytes]) -> None:
        for frame in map(Ether, frames):
            if ICMP in frame and frame[ICMP].type == 0:
                self.answers.append(frame[ICMP].seq)

    def console(self) -> str:
        return self.serial.read_text(errors="replace") if self.serial.exists() else ""

    def rounds(self) -> int:
        """The last round of the memory check. Fails if one found a fault."""
        console = self.console()
        assert "CORRUPT" not in console, console[-500:]
        found = re.findall(r"^colotx: (\d+) ok\r?$", console, re.MULTILINE)
        return int(found[-1]) if found else -1


@implementer(IOutputGate)
class OpenGate:
    """No gate: what the guests say is not what is tested here."""

    def closeEpoch(self) -> int:
        return 0

    def release(self, epoch: int) -> None:
        pass

    shut = open = lambda self: None


class NoFailover:
    """A failover service that is never asked."""

    def __init__(self) -> None:
        self.state = FailoverState()

    def loaded(self) -> bool:
        return False


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
        case.hosts += 1
        self.serial = case.directory / f"serial-{case.hosts}"
        kernel = kernelArguments(f"{_ADDRESS}/24", patternBytes=1 << 20, pauseMilliseconds=20)
        arguments = qemuArguments(case.files, kernel, serial=self.serial)
        settings = QemuSettings(
            arguments, str(case.directory), case.binary, mac=_MAC, environment=case.environment
        )
        self.factory = QemuGuestFactory(reactor, settings)


class ActiveSecondaryTests(TestCase):
    """A pair of real guests."""

    timeout = 900

    def setUp(self) -> None:
        try:
            self.binary, self.files = qemuBinary(), buildGuest(_CACHE)
        except ConfigError as error:
            raise SkipTest(str(error)) from error
        # Sockets need short paths.
        directory = tempfile.TemporaryDirectory(prefix="colo-", ignore_cleanup_errors=True)
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.environment = {} if emulation.kvmUsable() else emulation.environment(_CACHE)
        self.hosts = 0
        self.pings = 0
        self.lost: list[GuestError] = []

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > _PATIENCE:
                self.fail(f"{what}: not within {_PATIENCE} s")
            await pause(0.02)

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
        head = Ether(src=_CLIENT_MAC, dst=_MAC) / IP(src=_CLIENT, dst=_ADDRESS)
        who = Ether(src=_CLIENT_MAC, dst="ff:ff:ff:ff:ff:ff")
        # The guest need not ask back: it learns where we are.
        asked = bytes(who / ARP(hwsrc=_CLIENT_MAC, psrc=_CLIENT, pdst=_ADDRESS))
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
        standby.guest = guest
        return took

    @asynchronous
    async def test_lockstep(self):
        """Dozens of checkpoints with both guests at work, then the second one goes on alone."""
        primary = await self.booted()
        standby = self.standby()
        protection, _ = await self.protected(primary, standby)
        for _ in range(5):
            await protection.checkpoints(8)
            await self.ping(primary, standby)
        phases = protection.statistics.describe()["phases-ms"]
        print({name: values["p50"] for name, values in phases.items()}, phases["downtime"])
        await self.goesOn(standby)
        protection.cut()
        print(await protection.over())
        await primary.guest.shutdown()
        print(f" going on after {await self.promoted(standby) * 1000:.1f} ms", end="")
        await self.ping(standby)
        await self.goesOn(standby)
        self.assertEqual(self.lost, [])

    @asynchronous
    async def test_boundaries(self):
        """Wherever the exchange is cut, the second guest goes on, and is the first of the next pair."""
        primary = await self.booted()
        for name, hook in (
            ("between", None),
            ("REPLY", "prepare"),
            ("RAM", "stageLive"),
            ("RECEIVED", "commit"),
            ("LOADED", "settle"),
        ):
            standby = self.standby()
            protection, hooked = await self.protected(primary, standby)
            await protection.checkpoints(3)
            if hook is None:
                await pause(0.1)
                protection.cut()
            else:
                hooked.hooks[hook] = protection.cut
            await protection.over()
            process = standby.guest._current.process
            phase = standby.guest._current.phase
            times: list[tuple[str, float]] = []
            origin = process.onEventHook = None
            began = time.monotonic()
            await primary.guest.shutdown()
            killed = time.monotonic()
            guest = await standby.guest.promote()
            ready = time.monotonic()
            event, execute = guest._event, process.execute

            def watched(name: str, data: Any) -> None:
                times.append((name, time.monotonic() - killed))
                event(name, data)

            async def executed(name: str, *arguments: Any) -> Any:
                answer = await execute(name, *arguments)
                times.append((name, time.monotonic() - killed))
                return answer

            process._onEvent, process.execute = watched, executed
            guest.onLost = self.lost.append
            self.addCleanup(guest.shutdown)
            await guest.launch()
            done = time.monotonic()
            print(name, phase, f"promote {(ready-killed)*1000:.1f} launch {(done-ready)*1000:.1f}", [(n, round(t*1000,1)) for n, t in times])
            standby.guest = guest
            await self.ping(standby)
            await self.goesOn(standby)
            primary = standby
        self.assertEqual(self.lost, [])
