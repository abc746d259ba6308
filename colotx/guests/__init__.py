"""Guests: what colotx protects. C{memory} is embedded, C{qemu} is a real virtual machine."""

from __future__ import annotations

from typing import Any

from colotx.ramcache import CacheLimits, RamCache
from colotx.settings import Settings


def createFactory(settings: Settings, reactor: Any, stateDir: str, runtimeDir: str) -> Any:
    """
    @param stateDir: where what is built once is kept.
    @param runtimeDir: where the sockets of a running guest are, each guest's in a directory of its own.
    @return: the L{colotx.interfaces.IGuestFactory} of the kind the operator chose.
    @raise colotx.errors.ConfigError: the settings cannot work for this kind of guest, or on this machine.
    """
    limits = CacheLimits(settings.stagingMemory, settings.spillDir)
    if settings.guest == "memory":
        from colotx.guests.memory import MemoryGuestFactory, MemorySettings

        return MemoryGuestFactory(
            reactor,
            MemorySettings(
                ramBytes=settings.memorySize,
                address=settings.memoryAddress.partition("/")[0],
                mac=settings.mac,
                dirtyPages=settings.memoryDirty,
            ),
            lambda: RamCache(limits),
        )
    from colotx.guests import emulation
    from colotx.guests.qemu import QemuGuestFactory
    from colotx.guests.qemu_arguments import QemuSettings

    return QemuGuestFactory(
        reactor,
        QemuSettings(
            arguments=settings.qemuArguments,
            runtimeDirectory=runtimeDir,
            binary=settings.qemuBinary,
            nicModel=settings.nicModel,
            mac=settings.mac,
            environment={} if emulation.kvmUsable() else emulation.environment(stateDir),
        ),
        lambda: RamCache(limits),
    )
