"""
A protected guest in the lab: two daemons, their certificates and configurations, and the ways to break them.

The harness of the demonstration and of the acceptance tests: it makes, waits, breaks and cleans up; what must be true
afterwards is for its users to say.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from colotx.certificates import initAuthority, issue
from colotx.errors import ColoError, ConfigError, GuestError
from colotx.lab.client import TrafficSettings
from colotx.lab.conversations import KINDS
from colotx.lab.guestimage import (
    READY,
    VERDICT_PORT,
    buildGuest,
    kernelArguments,
    qemuArguments,
    qemuBinary,
)
from colotx.lab.namespaces import GUEST_ADDRESS, GUEST_ADDRESS6, LINK_ADDRESSES, Lab
from colotx.lab.processes import ClientProcess, DaemonProcess, LabError
from colotx.settings import DEFAULT_PORT

KILLS = ("host", "qemu", "daemon", "link")
"""What can be broken: daemon and QEMU at once, only the QEMU, only the daemon, the link between the hosts."""

PROTECTED_LIMIT = 180.0
"""Seconds from the start of the daemons until the guest is protected; software emulation boots slowly."""
FAILOVER_LIMIT = 30.0
_POLL = 0.02
_CONSOLE = "serial.log"
_GUEST_CACHE = Path(__file__).parents[2] / ".cache" / "guest"


@dataclass(frozen=True, slots=True)
class GuestChoice:
    """
    The guest of a pair.

    @ivar keys: the configuration keys that describe it, the same on both hosts.
    @ivar verdictPort: the guest's port for the word of its memory check; 0: it has none.
    @ivar kinds: of connection it serves, see L{TrafficSettings}.
    @ivar address6: its IPv6 address; empty: it has none.
    @ivar console: the file below a host's directory that gets what it prints, C{READY} when it serves; empty: it
        prints nothing, and serves at once.
    """

    keys: Mapping[str, object]
    verdictPort: int
    kinds: str = "echo"
    address6: str = ""
    console: str = ""

    @property
    def host(self) -> str:
        """Its IPv4 address."""
        return GUEST_ADDRESS.partition("/")[0]

    def traffic(self, connections: int, seed: int) -> TrafficSettings:
        """@return: all it can be asked for, at rates that two emulated guests can bear on two cores."""
        return TrafficSettings(
            host=self.host,
            host6=self.address6.partition("/")[0],
            kinds=self.kinds,
            connections=connections,
            rate=16_000,
            bulkRate=64_000,
            seed=seed,
            verdictPort=self.verdictPort,
        )


def memoryGuest() -> GuestChoice:
    """The embedded guest."""
    return GuestChoice({"guest": "memory", "memory-address": GUEST_ADDRESS}, 0)


def qemuGuest(
    binary: str = "", patternBytes: int = 4 << 20, pauseMilliseconds: int = 100, firstTcp: bool = True
) -> GuestChoice:
    """
    A Linux guest that checks its own memory.

    @param binary: the QEMU; empty: C{COLOTX_QEMU} of the environment, else the distribution's.
    @param patternBytes: how much memory it checks; 0: none, and nobody asks.
    @param pauseMilliseconds: see L{kernelArguments}, as for C{firstTcp}.
    @raise ConfigError: a part is missing.
    """
    if binary and shutil.which(binary) is None:
        raise ConfigError(f"there is no QEMU {binary}")
    files = buildGuest(_GUEST_CACHE)
    kernel = kernelArguments(GUEST_ADDRESS, GUEST_ADDRESS6, patternBytes, pauseMilliseconds, firstTcp)
    # Relative: the working directories of the daemons differ, the arguments must not.
    arguments = qemuArguments(files, kernel, serial=_CONSOLE)
    keys = {"guest": "qemu", "qemu-binary": binary or qemuBinary(), "qemu-arguments": arguments}
    return GuestChoice(
        keys,
        verdictPort=VERDICT_PORT if patternBytes else 0,
        kinds=",".join(KINDS),
        address6=GUEST_ADDRESS6,
        console=_CONSOLE,
    )


@dataclass(frozen=True, slots=True)
class PairSettings:
    """
    @ivar checkpointDelay: ms.
    @ivar heartbeatLimit: ms; the daemons' own default.
    @ivar secondary: the kind of secondary.
    @ivar both: further configuration keys of both daemons.
    """

    guest: GuestChoice = field(default_factory=memoryGuest)
    checkpointDelay: int = 50
    heartbeatLimit: int = 300
    secondary: str = "passive"
    both: Mapping[str, object] = field(default_factory=dict)


class ProtectedPair:
    """
    Two daemons in a L{Lab} of their own, and a client's place. Use it as C{async with}.

    @ivar lab: the namespaces.
    @ivar daemons: by role.
    @ivar client: not started.
    @ivar directory: logs and configurations, one directory each for C{primary}, C{secondary} and C{client}.
    """

    def __init__(self, reactor: Any, directory: Path, settings: PairSettings) -> None:
        self._reactor = reactor
        self.directory = directory.absolute()
        self._settings = settings
        with contextlib.ExitStack() as made:
            # Sockets need short paths, whatever the directory of the logs.
            state = tempfile.TemporaryDirectory(prefix="colo-", ignore_cleanup_errors=True)
            self._state = Path(made.enter_context(state))
            self.lab = made.enter_context(Lab())
            self.client = ClientProcess(reactor, self.lab.client, self.directory / "client")
            initAuthority(self._state / "ca")
            self.daemons = {role: self._daemon(role) for role in LINK_ADDRESSES}
            self._made = made.pop_all()

    def _daemon(self, role: str) -> DaemonProcess:
        address = LINK_ADDRESSES[role]
        (peer,) = (other for name, other in LINK_ADDRESSES.items() if name != role)
        state = self._state / role
        ca, certificate, key = issue(self._state / "ca", [address], state / "tls")
        keys: dict[str, object] = {
            "role": role,
            "vm": "demo",
            "state-dir": str(state),
            "control": str(state / "control"),
            "listen": f"{address}:{DEFAULT_PORT}",
            "peer": f"{peer}:{DEFAULT_PORT}",
            "ca": str(ca),
            "certificate": str(certificate),
            "key": str(key),
            "checkpoint-delay": self._settings.checkpointDelay,
            "heartbeat-limit": self._settings.heartbeatLimit,
            "secondary": self._settings.secondary,
            # When the link dies both hosts live, and only one may go on: the one that can be told from here.
            "on-lost-peer": "failover" if role == "secondary" else "hold",
            "outside": "tap:colo0,bridge=br0",
            **self._settings.guest.keys,
            **self._settings.both,
        }
        return DaemonProcess(self._reactor, self.lab.hosts[role], self.directory / role, keys)

    async def start(self, guestFirst: bool = False) -> None:
        """
        Start both daemons and wait until the guest is protected.

        @param guestFirst: the secondary's only when the guest serves: it boots faster alone.
        @raise LabError: it is not, in L{PROTECTED_LIMIT}, or a daemon ended.
        """
        if guestFirst:
            await self.serve()
        else:
            self.daemons["secondary"].start()
            self.daemons["primary"].start()
        await self.protect()

    async def serve(self) -> None:
        """
        Start the primary alone, and wait until its guest serves.

        @raise LabError: it does not, in L{PROTECTED_LIMIT}, or the daemon ended.
        """
        self.daemons["primary"].start()
        await self.until("the guest does not serve", PROTECTED_LIMIT, self.isServing)

    async def protect(self) -> None:
        """
        Start the secondary, if it does not run, and wait until the guest is protected.

        @raise LabError: it is not, in L{PROTECTED_LIMIT}, or a daemon ended.
        """
        if not self.daemons["secondary"].process.pid:
            self.daemons["secondary"].start()
        await self.until("the guest is not protected", PROTECTED_LIMIT, self.isProtected)

    async def isServing(self) -> bool:
        """@return: whether the primary's guest has said so. @raise LabError: the daemon ended."""
        primary = self.daemons["primary"]
        status = await primary.query("query-status")
        if not self._settings.guest.console:
            return bool(status["status"] == "running")
        console = primary.directory / self._settings.guest.console
        return console.exists() and READY.encode() in console.read_bytes()

    async def isProtected(self) -> bool:
        """@return: whether either host may die now, in the primary's words. @raise LabError: a daemon ended."""
        states = [await daemon.query("query-colotx-status") for daemon in self.daemons.values()]
        return all(state["status"] == "protected" for state in states)

    async def until(
        self, problem: str, limit: float, condition: Callable[[], Coroutine[Any, Any, bool]]
    ) -> None:
        """
        Wait for a condition, asking again and again.

        @raise LabError: C{problem}, after C{limit} seconds.
        """
        deadline = time.monotonic() + limit
        last = ""
        while time.monotonic() < deadline:
            try:
                if await condition():
                    return
            except GuestError as error:
                last = f": {error}"
            await self.pause(_POLL)
        raise LabError(f"{problem} after {limit:.0f} s{last} (see {self.directory})")

    def pause(self, seconds: float) -> Deferred[None]:
        """@return: a Deferred that fires later."""
        return deferLater(self._reactor, seconds)

    def kill(self, what: str) -> float:
        """
        Break something of the primary's: one of L{KILLS}.

        @return: when, seconds of C{time.monotonic}.
        """
        daemon = self.daemons["primary"].process.pid
        inside = self.lab.hosts["primary"].processes()
        victims = {
            "host": inside,
            "qemu": [pid for pid in inside if pid != daemon],
            "daemon": [daemon],
            "link": [],
        }[what]
        now = time.monotonic()
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if what == "link":
            self.lab.cutLink()
        return now

    async def failedOver(self) -> bool:
        """@return: whether the secondary's host runs the guest, and not as a secondary."""
        daemon = self.daemons["secondary"]
        colo = await daemon.query("query-colo-status")
        guest = await daemon.query("query-status")
        return bool(
            colo["last-mode"] == "secondary" and colo["mode"] != "secondary" and guest["status"] == "running"
        )

    async def describe(self) -> str:
        """@return: what the daemons say of the protection now, or that they have ended."""
        words = []
        for role, daemon in self.daemons.items():
            try:
                state = await daemon.query("query-colotx-status")
                words.append(f"{role} {state['status']} ({state['why']})")
            except ColoError as error:
                words.append(f"{role}: {error}")
        return "; ".join(words)

    async def close(self) -> None:
        """End everything and remove it; the logs stay. Never fails half-way."""
        try:
            for stop in (self.client.stop, *(daemon.stop for daemon in self.daemons.values())):
                with contextlib.suppress(Exception):
                    await stop()
        finally:
            self._made.close()

    async def __aenter__(self) -> ProtectedPair:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()
