"""
The migration capabilities that COLO needs of a QEMU, on either side of the exchange.
"""

from __future__ import annotations

from colotx.guests.qemu_process import QemuProcess

_NOT_WITH_COLO = frozenset(
    {"compress", "multifd", "postcopy-ram", "release-ram", "return-path", "x-ignore-shared"}
)
"""Capabilities that change the stream's grammar, or with which QEMU leaves COLO."""


async def enableColo(process: QemuProcess) -> None:
    """
    Switch x-colo on, and what cannot be with it off. Capabilities that this QEMU does not know are left out.

    @raise colotx.errors.QmpError: QEMU cannot do it.
    """
    known = await process.execute("query-migrate-capabilities")
    wanted = [
        {"capability": entry["capability"], "state": entry["capability"] == "x-colo"}
        for entry in known
        if entry["capability"] == "x-colo" or entry["capability"] in _NOT_WITH_COLO
    ]
    await process.execute("migrate-set-capabilities", {"capabilities": wanted})


__all__ = ["enableColo"]
