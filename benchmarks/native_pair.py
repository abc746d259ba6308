"""
The peer of the lock-stepping benchmark: two stock QEMUs that protect a guest with nothing but QEMU's own COLO, as its
C{docs/COLO-FT.txt} and C{docs/colo-proxy.txt} say. The state and the frames go straight over TCP; the primary has
filter-mirror, filter-redirector and colo-compare, the secondary filter-redirector and filter-rewriter.

Where those documents leave a choice, the faster one is taken: the filters' connections have C{nodelay}, the parts of
one process talk over unix sockets, and the guest leaves checksums and segmentation to the host, which every filter
knows of (C{vnet_hdr_support}): a download is four times as fast as without, a round trip the same. This module knows
nothing of colotx's daemons.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from twisted.internet.task import deferLater

from benchmarks.machines import BOOT_LIMIT, CACHE, NEVER
from colotx.guests import emulation
from colotx.lab.guestimage import READY, qemuBinary
from colotx.lab.namespaces import LINK_ADDRESSES, Lab, Namespace
from colotx.lab.processes import LabError, LabProcess
from colotx.qmp import QmpClient, connectQmp

MONITOR = ("-chardev", "socket,id=m2,path=m2,server=on,wait=off", "-mon", "chardev=m2,mode=control")
"""Arguments of every QEMU that is measured: a monitor at C{m2} in its working directory."""
CONSOLE = "serial.log"
"""Where, in the same place, its guest's serial console goes."""

_PORTS = {"mirror": 9003, "compare": 9004, "migration": 9998}
"""TCP ports on the link between the hosts: the input's copy, the secondary's output, and the state."""
_HEADERS = ",vnet_hdr_support=on"
_POLL = 0.05


class Watched:
    """
    A QEMU's monitor, and what its events say of its guest's standstills.

    @ivar directory: QEMU's working directory; a short path.
    @ivar downtimes: when the guest was stopped (seconds since 1970, by QEMU's clock) and for how long (ms).
    """

    def __init__(self, reactor: Any, directory: Path) -> None:
        self._reactor = reactor
        self.directory = directory
        self._qmp: QmpClient | None = None
        self._stopped = 0.0
        self.downtimes: list[tuple[float, float]] = []

    async def connect(self) -> None:
        """@raise colotx.errors.GuestError: there is no monitor."""
        self._qmp = await connectQmp(self._reactor, os.fspath(self.directory / "m2"), BOOT_LIMIT)
        self._qmp.onEvent = self._event

    async def execute(self, command: str, **arguments: object) -> Any:
        """Carry out a QMP command. @raise colotx.errors.GuestError: it failed."""
        assert self._qmp is not None
        return await self._qmp.execute(command, arguments)

    async def booted(self) -> None:
        """Wait until the guest serves. @raise LabError: it does not, in L{BOOT_LIMIT} seconds."""
        console = self.directory / CONSOLE

        async def serves() -> bool:
            return console.exists() and READY in console.read_text(errors="replace")

        await until(self._reactor, f"the guest in {self.directory} does not serve", serves)

    def disconnect(self) -> None:
        """Hang up."""
        if self._qmp is not None:
            self._qmp.close()

    def _event(self, name: str, _: Mapping[str, object], when: float) -> None:
        if name == "STOP":
            self._stopped = when
        elif name == "RESUME" and self._stopped:
            self.downtimes.append((self._stopped, (when - self._stopped) * 1000))


class Qemu:
    """
    A QEMU on a host, its guest's NIC on a TAP.

    @ivar watched: its monitor.
    """

    def __init__(self, reactor: Any, host: Namespace, directory: Path, joinsBridge: bool) -> None:
        """
        @param directory: made for its sockets and logs; a short path.
        @param joinsBridge: its TAP is part of the service LAN.
        """
        self._directory = directory
        directory.mkdir(parents=True)
        self.watched = Watched(reactor, directory)
        self._process = LabProcess(reactor, host, directory / "qemu.log")
        host.ip("tuntap add dev tap0 mode tap vnet_hdr")
        host.ip(f"link set tap0 {'master br0' if joinsBridge else ''} up")

    async def start(self, guest: Sequence[str], further: Sequence[str] = ()) -> None:
        """
        Run it.

        @param guest: the arguments that make the guest, with L{MONITOR}.
        @param further: more of them.
        @raise colotx.errors.GuestError: it does not answer; its log says more.
        """
        variables = {} if emulation.kvmUsable() else emulation.environment(CACHE)
        network = "tap,id=net0,ifname=tap0,script=no,downscript=no,vhost=off,vnet_hdr=on"
        command = [
            qemuBinary(),
            *guest,
            "-netdev",
            network,
            "-device",
            "virtio-net-pci,netdev=net0",
            *further,
        ]
        self._process.start(command, self._directory, **variables)
        await self.watched.connect()

    async def stop(self) -> None:
        """End it."""
        self.watched.disconnect()
        await self._process.stop()


class Unprotected:
    """
    A guest that nothing protects: what there is to lose.

    @ivar lab: where it runs.
    @ivar watched: the monitor of its QEMU.
    """

    def __init__(self, reactor: Any, directory: Path) -> None:
        self.lab = Lab()
        self._qemu = Qemu(reactor, self.lab.hosts["primary"], directory / "primary", joinsBridge=True)
        self.watched = self._qemu.watched

    async def start(self, guest: Sequence[str]) -> None:
        """Wait until the guest serves. @param guest: see L{Qemu.start}."""
        await self._qemu.start(guest)
        await self.watched.booted()

    async def close(self) -> None:
        """End everything."""
        try:
            await self._qemu.stop()
        finally:
            self.lab.close()


class NativePair:
    """
    Two QEMUs on the hosts of a L{Lab} of their own.

    @ivar lab: where they run.
    @ivar watched: the monitor of the primary.
    """

    def __init__(self, reactor: Any, directory: Path) -> None:
        self._reactor = reactor
        self.lab = Lab()
        # A TAP of the secondary's on the LAN would bring its guest the input twice.
        self._primary, self._secondary = (
            Qemu(reactor, host, directory / role, joinsBridge=role == "primary")
            for role, host in self.lab.hosts.items()
        )
        self.watched = self._primary.watched

    async def start(self, guest: Sequence[str]) -> None:
        """Wait until the guest serves and is protected; then no checkpoint is due. @param guest: see L{Qemu.start}."""
        await self._primary.start(guest, _primaryFilters())
        await self._secondary.start(guest, _secondaryFilters())
        primary, secondary = self._primary.watched, self._secondary.watched
        await primary.booted()
        for each in (secondary, primary):
            await each.execute(
                "migrate-set-capabilities", capabilities=[{"capability": "x-colo", "state": True}]
            )
        await primary.execute(
            "migrate-set-parameters", **{"x-checkpoint-delay": NEVER, "max-bandwidth": 2**40}
        )
        uri = f"tcp:{LINK_ADDRESSES['secondary']}:{_PORTS['migration']}"
        await secondary.execute("migrate-incoming", uri=uri)
        await primary.execute("migrate", uri=uri)
        await until(self._reactor, "the native pair does not reach COLO mode", self._isProtected)

    async def setDelay(self, milliseconds: int) -> None:
        """Set x-checkpoint-delay, which also asks for a checkpoint."""
        await self.watched.execute("migrate-set-parameters", **{"x-checkpoint-delay": milliseconds})

    async def close(self) -> None:
        """End everything."""
        try:
            for qemu in (self._primary, self._secondary):
                await qemu.stop()
        finally:
            self.lab.close()

    async def _isProtected(self) -> bool:
        pair = (self._primary.watched, self._secondary.watched)
        modes = [(await each.execute("query-colo-status"))["mode"] for each in pair]
        # The guest stands still until the secondary has its state.
        return modes == ["primary", "secondary"] and bool(self.watched.downtimes)


async def until(reactor: Any, problem: str, condition: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    """Wait for a condition, asking again and again. @raise LabError: C{problem}, after L{BOOT_LIMIT} seconds."""
    deadline = reactor.seconds() + BOOT_LIMIT
    while not await condition():
        if reactor.seconds() > deadline:
            raise LabError(f"{problem} after {BOOT_LIMIT:.0f} s")
        await deferLater(reactor, _POLL)


def _primaryFilters() -> list[str]:
    """Input goes to the guest and to the other host; output goes through the comparison, and what comes out leaves."""
    return [
        *_onLink("mirror0", "mirror", "server=on,wait=off"),
        *_onLink("compare1", "compare", "server=on,wait=off"),
        *("-chardev", "socket,id=compare0,path=compare0,server=on,wait=off"),
        *("-chardev", "socket,id=compare0-0,path=compare0"),
        *("-chardev", "socket,id=out,path=out,server=on,wait=off"),
        *("-chardev", "socket,id=out0,path=out"),
        *("-object", f"filter-mirror,id=m0,netdev=net0,queue=tx,outdev=mirror0{_HEADERS}"),
        *("-object", f"filter-redirector,id=r0,netdev=net0,queue=rx,indev=out{_HEADERS}"),
        *("-object", f"filter-redirector,id=r1,netdev=net0,queue=rx,outdev=compare0{_HEADERS}"),
        *("-object", "iothread,id=iothread1"),
        "-object",
        "colo-compare,id=comp0,primary_in=compare0-0,secondary_in=compare1,outdev=out0,iothread=iothread1"
        + _HEADERS,
    ]


def _secondaryFilters() -> list[str]:
    """Input comes from the other host, output goes there."""
    return [
        *_onLink("red0", "mirror", "reconnect=1"),
        *_onLink("red1", "compare", "reconnect=1"),
        *("-object", f"filter-redirector,id=f1,netdev=net0,queue=tx,indev=red0{_HEADERS}"),
        *("-object", f"filter-redirector,id=f2,netdev=net0,queue=rx,outdev=red1{_HEADERS}"),
        *("-object", f"filter-rewriter,id=rew0,netdev=net0,queue=all{_HEADERS}"),
        *("-incoming", "defer"),
    ]


def _onLink(name: str, port: str, further: str) -> list[str]:
    where = f"host={LINK_ADDRESSES['primary']},port={_PORTS[port]}"
    return ["-chardev", f"socket,id={name},{where},nodelay=on,{further}"]
