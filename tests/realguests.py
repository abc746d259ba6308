"""
What tests with real guests in this process share: a guest's console and pings, and the parts that are not tested.

The guests check their own memory all the time and say so on their consoles (see L{colotx.lab.guestimage}).
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scapy.layers.inet import ICMP
from scapy.layers.l2 import Ether
from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.trial.unittest import SkipTest, TestCase
from zope.interface import implementer

from colotx.errors import ConfigError
from colotx.failover import FailoverState
from colotx.guests import emulation
from colotx.guests.qemu import QemuSettings
from colotx.interfaces import IOutputGate
from colotx.lab.guestimage import buildGuest, kernelArguments, qemuArguments, qemuBinary

PATIENCE = 240
"""Seconds for whatever takes long: software emulation on a busy machine is slow."""

MAC, ADDRESS = "52:54:00:c0:10:03", "10.77.0.10"
CLIENT_MAC, CLIENT = "02:00:00:00:00:01", "10.77.0.1"
_CACHE = Path(__file__).parents[1] / ".cache" / "guest"


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


class RealGuestCase(TestCase):
    """Tests that start QEMUs."""

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
        self.hosts = self.pings = 0

    def host(self) -> tuple[QemuSettings, Path]:
        """@return: how to start a QEMU there, and the file of its console."""
        self.hosts += 1
        serial = self.directory / f"serial-{self.hosts}"
        kernel = kernelArguments(f"{ADDRESS}/24", patternBytes=1 << 20, pauseMilliseconds=20)
        arguments = qemuArguments(self.files, kernel, serial=serial)
        settings = QemuSettings(
            arguments, str(self.directory), self.binary, mac=MAC, environment=self.environment
        )
        return settings, serial

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > PATIENCE:
                self.fail(f"{what}: not within {PATIENCE} s")
            await deferLater(reactor, 0.02)
