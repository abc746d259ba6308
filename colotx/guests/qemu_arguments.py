"""
The command line of a QEMU that colotx starts: the user's arguments, and what colotx adds to them.

Both hosts must build the same machine, so everything here follows from the settings alone, apart from paths and from
the image that a restored guest maps as its RAM. This module knows the syntax of QEMU's options and starts nothing.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from colotx.errors import ConfigError

_SOCKET_PATH_LIMIT = 107
"""Bytes of a unix socket's path (C{sun_path}, without its terminating NUL)."""

_DISPLAY_OPTIONS = frozenset({"-display", "-nographic", "-vnc", "-spice", "-sdl", "-curses"})
_OWN_MEMORY_OPTIONS = frozenset({"-mem-path", "-numa"})
_REFUSED = {
    "-daemonize": "colotx watches the process it started",
    "-incoming": "colotx says when the guest comes from a checkpoint",
    "-qmp": "colotx needs the QMP connection; add a second monitor with -chardev and -mon",
}
"""Options colotx cannot work with, and why."""


@dataclass(frozen=True, slots=True)
class QemuSettings:
    """
    How to start a guest. The two hosts of one guest need the same, apart from binary, directory and environment.

    @ivar arguments: the user's QEMU arguments, with no NIC of the protected network among them.
    @ivar runtimeDirectory: where each guest's sockets get a directory of their own; at most about 80 bytes long.
    @ivar binary: name or path of the QEMU.
    @ivar nicModel: QEMU's device for the protected NIC.
    @ivar mac: its address; QEMU's own default if None.
    @ivar environment: what to add to colotx's own environment.
    @ivar startTimeout: seconds a starting QEMU may take for each step of its start.
    @ivar stopTimeout: seconds a guest may take to stop or to run on.
    """

    arguments: Sequence[str]
    runtimeDirectory: str
    binary: str = "qemu-system-x86_64"
    nicModel: str = "virtio-net-pci"
    mac: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    startTimeout: float = 30.0
    stopTimeout: float = 10.0

    def __post_init__(self) -> None:
        """@raise ConfigError: arguments colotx cannot work with, or a directory too long for sockets."""
        for option in map(_normalised, self.arguments):
            if option in _REFUSED:
                raise ConfigError(f"QEMU argument {option} cannot be used: {_REFUSED[option]}")
        if len(os.fsencode(SocketPaths.under(self.runtimeDirectory).longest)) > _SOCKET_PATH_LIMIT:
            raise ConfigError(
                f"{self.runtimeDirectory}: too long for unix sockets inside it; choose a shorter runtime directory"
            )


@dataclass(frozen=True, slots=True)
class SocketPaths:
    """
    The sockets of one QEMU, in a directory of its own.

    @ivar directory: to be made, for us alone, before QEMU starts, and to be removed after it.
    @ivar qmp: QEMU listens.
    @ivar nic: QEMU listens: the NIC's frames.
    @ivar colo: we listen: the initial stream and the COLO exchange.
    @ivar incoming: QEMU listens: the stream it is restored from.
    """

    directory: str
    qmp: str
    nic: str
    colo: str
    incoming: str

    @classmethod
    def under(cls, base: str) -> SocketPaths:
        """Paths in a fresh directory of C{base}, which is not made yet."""
        directory = os.path.join(base, f"vm-{secrets.token_hex(4)}")
        return cls(directory, *(os.path.join(directory, name) for name in ("qmp", "nic", "colo", "incoming")))

    @property
    def longest(self) -> str:
        """The longest of the paths."""
        return self.incoming


@dataclass(frozen=True, slots=True)
class MappedRam:
    """
    Guest RAM that is a file already.

    @ivar block: the RAM block's name, such as C{pc.ram}.
    @ivar path: of the file that QEMU is to map.
    @ivar length: bytes.
    """

    block: str
    path: str
    length: int


def commandLine(
    settings: QemuSettings, paths: SocketPaths, restoring: bool = False, ram: MappedRam | None = None
) -> list[str]:
    """
    The whole command.

    @param restoring: the guest's state will be fed to it (C{-incoming defer}).
    @param ram: what to use as the guest's main RAM.
    """
    # The kernel ends the guest with us: a daemon that was killed must not leave a guest that nobody watches.
    command = ["setpriv", "--pdeathsig", "KILL", "--", settings.binary, *settings.arguments]
    if _DISPLAY_OPTIONS.isdisjoint(map(_normalised, settings.arguments)):
        command += ["-display", "none"]
    command += ["-qmp", f"unix:{_escaped(paths.qmp)},server=on,wait=off"]
    command += ["-netdev", f"stream,id=colotx,server=on,addr.type=unix,addr.path={_escaped(paths.nic)}"]
    mac = f",mac={settings.mac}" if settings.mac else ""
    command += ["-device", f"{settings.nicModel},netdev=colotx,id=colotx-nic{mac}"]
    if ram is not None:
        # QEMU names a block after its backend, by the full path unless told otherwise; the state names "pc.ram".
        # A second -machine adds to the user's own.
        command += [
            "-object",
            f"memory-backend-file,id={ram.block},size={ram.length},mem-path={_escaped(ram.path)},share=on,"
            "x-use-canonical-path-for-ramblock-id=off",
            "-machine",
            f"memory-backend={ram.block}",
        ]
    if restoring:
        command += ["-incoming", "defer"]
    return command


def ownsMemory(arguments: Sequence[str]) -> bool:
    """Whether the user's arguments say where guest RAM comes from, so that we cannot."""
    return any(
        _normalised(argument) in _OWN_MEMORY_OPTIONS or "memory-backend" in argument for argument in arguments
    )


def _normalised(argument: str) -> str:
    """QEMU takes options with one dash or two."""
    return argument[1:] if argument.startswith("--") else argument


def _escaped(value: str) -> str:
    """A comma in an option's value is written twice."""
    return value.replace(",", ",,")


__all__ = ["MappedRam", "QemuSettings", "SocketPaths", "commandLine", "ownsMemory"]
