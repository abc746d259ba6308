"""
The other COLO: colotx as one half of a pair whose other half is a real QEMU, with no second colotx between.

Its COLO channel is connected straight to our checkpoint process; whoever is at QEMU's end is driven by QMP alone, as
QEMU's own C{COLO-FT.txt} has it. The guest checks its own memory all the time (see L{colotx.lab.guestimage}).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

from scapy.layers.inet import ICMP, IP
from scapy.layers.l2 import ARP, Ether
from twisted.internet import reactor
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater

from colotx.checkpoint import PrimaryProcess, SecondaryProcess
from colotx.errors import ColoError, PeerError, PeerLost
from colotx.guests.qemu import QemuGuestFactory, QemuSettings
from colotx.guests.qemu_arguments import SocketPaths
from colotx.guests.qemu_capabilities import enableColo
from colotx.guests.qemu_process import QemuProcess
from colotx.lab.guestimage import READY
from colotx.ports import StreamPort
from colotx.protocol import ColoConnection
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

_DELAY = 100
"""ms between checkpoints."""
_CHECKPOINTS = 36

_BEHIND = 10
"""Rounds of the memory check that a guest may do between two checkpoints; since the first one it did many more."""


class BareQemu:
    """
    A QEMU that nobody but the test leads, by QMP.

    @ivar port: its NIC.
    """

    def __init__(self, settings: QemuSettings) -> None:
        self.paths = SocketPaths.under(settings.runtimeDirectory)
        self.process = QemuProcess(reactor, settings, self.paths, lambda error: None, lambda name, data: None)
        self.port = StreamPort(reactor, self.paths.nic)

    async def start(self, incoming: bool = False) -> None:
        await self.process.start(restoring=incoming)
        await self.port.open()
        await enableColo(self.process)

    async def isRunning(self) -> bool:
        return bool((await self.process.execute("query-status"))["running"])

    def end(self) -> Deferred[None]:
        async def end() -> None:
            await self.port.close()
            await self.process.end()

        return ensureDeferred(end())


class OtherColoTests(RealGuestCase):
    """Half a pair."""

    async def works(self, machine: Machine) -> None:
        """The guest answers, and finds its memory as it left it."""
        self.pings += 1
        number = self.pings
        who = Ether(src=CLIENT_MAC, dst="ff:ff:ff:ff:ff:ff")
        asked = who / ARP(hwsrc=CLIENT_MAC, psrc=CLIENT, pdst=ADDRESS)
        head = Ether(src=CLIENT_MAC, dst=MAC) / IP(src=CLIENT, dst=ADDRESS)
        machine.guest.port.send([bytes(asked), bytes(head / ICMP(type=8, id=7, seq=number) / b"hello")])
        await self.until(lambda: number in machine.answers, f"an answer to ping {number}")
        await self.until(lambda: machine.rounds() >= 0, "a word of the memory check")
        goal = machine.rounds() + 2
        await self.until(lambda: machine.rounds() >= goal, f"round {goal} of the memory check")

    async def booted(self, machine: Machine) -> None:
        await self.until(lambda: READY in machine.console() and machine.rounds() >= 2, "the guest's boot")

    def outcome(self, running: Awaitable[None]) -> Deferred[ColoError]:
        """@return: what ended a checkpoint process."""

        async def wait() -> ColoError:
            try:
                await running
            except ColoError as error:
                return error
            raise AssertionError("it ended without an error")

        return ensureDeferred(wait())

    async def while_(self, outcome: Deferred[ColoError], count: Callable[[], int], what: str) -> None:
        """Dozens of checkpoints."""

        def done() -> bool:
            if outcome.called:
                self.fail(f"{what} ended after {count()} checkpoints: {outcome.result}")
            return count() > _CHECKPOINTS

        began = time.monotonic()
        await self.until(done, f"{_CHECKPOINTS} checkpoints")
        print(f" {_CHECKPOINTS} checkpoints in {time.monotonic() - began:.1f} s", end="")

    async def qemuIsPrimary(self, kind: str) -> None:
        """A real QEMU is protected by our secondary, and killed."""
        settings, serial = self.host()
        qemu = BareQemu(settings)
        self.addCleanup(qemu.end)
        primary = Machine(qemu, serial)
        await qemu.start()
        await self.booted(primary)

        standbySettings, standbySerial = self.host()
        secondary = QemuGuestFactory(reactor, standbySettings).createStandby(kind)
        self.addCleanup(secondary.close)
        wire = ColoConnection(reactor)
        path = str(self.directory / "wire")
        listening = reactor.listenUNIX(path, Factory.forProtocol(lambda: wire))
        self.addCleanup(listening.stopListening)
        process = SecondaryProcess(reactor, secondary, NoReplication(), NoFailover())
        await qemu.process.execute("migrate-set-parameters", {"x-checkpoint-delay": _DELAY})
        await qemu.process.execute("migrate", {"uri": f"unix:{path}"})
        await self.until(lambda: wire.transport is not None, "QEMU's connection")
        outcome = self.outcome(process.run(wire))
        await self.while_(outcome, lambda: secondary.checkpoint, "our secondary")
        await self.works(primary)
        had = primary.rounds()

        began = time.monotonic()
        os.kill(qemu.process.pid, signal.SIGKILL)
        self.assertIsInstance(await outcome, PeerError)
        guest: Any = await secondary.promote()
        self.addCleanup(guest.shutdown)
        standby = Machine(guest, standbySerial)
        await guest.launch()
        print(f", going on after {(time.monotonic() - began) * 1000:.0f} ms", end="")
        await self.works(standby)
        # It goes on from the last checkpoint, not from an old one.
        self.assertGreater(standby.rounds(), had - _BEHIND)

    @asynchronous
    async def test_qemuPrimaryPassive(self):
        """A QEMU is made of the checkpoints that a real QEMU primary sent."""
        await self.qemuIsPrimary("passive")

    @asynchronous
    async def test_qemuPrimaryActive(self):
        """A QEMU follows a real QEMU primary, and goes on."""
        await self.qemuIsPrimary("active")

    @asynchronous
    async def test_qemuSecondary(self):
        """Our primary sends its checkpoints to a real QEMU secondary, which goes on when it is told to."""
        settings, serial = self.host()
        guest = QemuGuestFactory(reactor, settings).createPrimary()
        self.addCleanup(guest.shutdown)
        primary = Machine(guest, serial)
        await guest.launch()
        await self.booted(primary)

        otherSettings, otherSerial = self.host()
        qemu = BareQemu(otherSettings)
        self.addCleanup(qemu.end)
        standby = Machine(qemu, otherSerial)
        await qemu.start(incoming=True)
        await qemu.process.execute("migrate-incoming", {"uri": f"unix:{qemu.paths.incoming}"})
        wire = ColoConnection(reactor)
        await UNIXClientEndpoint(reactor, qemu.paths.incoming).connect(Factory.forProtocol(lambda: wire))
        statistics = CheckpointStatistics()
        process = PrimaryProcess(
            reactor,
            guest,
            OpenGate(),
            NoReplication(),
            NoFailover(),
            CheckpointTrigger(reactor, _DELAY),
            statistics,
            makeSpool=None,
        )
        outcome = self.outcome(process.run(wire))
        await self.while_(outcome, lambda: statistics.checkpoints, "our primary")
        await self.works(primary)
        had = primary.rounds()

        await guest.shutdown()
        wire.abort(PeerLost("the primary's host is gone"))
        self.assertIsInstance(await outcome, ColoError)
        began = time.monotonic()
        await qemu.process.execute("x-colo-lost-heartbeat")
        while not await qemu.isRunning():
            self.assertLess(time.monotonic() - began, 10, "the QEMU secondary does not go on")
            await deferLater(reactor, 0.002)
        print(f", going on after {(time.monotonic() - began) * 1000:.0f} ms", end="")
        await self.works(standby)
        self.assertGreater(standby.rounds(), had - _BEHIND)
