"""
Taking a QEMU out of COLO, wherever it is in it, so that its guest runs.

A QEMU whose peer vanished within a checkpoint waits for ever, its guest frozen in run state C{colo}, until somebody
tells it to go on (QEMU-FACTS). This module says the right word for each state of its migration, by QMP alone.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.task import deferLater

from colotx.errors import GuestTimeout, QmpError
from colotx.guests.qemu_process import QemuProcess

_POLL_FIRST, _POLL_LAST = 0.002, 0.05
"""Seconds between two looks at QEMU: at first and at most."""

_STUCK = 1.0
"""Seconds after which it gets stronger words."""

_OVER = frozenset({"none", "completed", "failed", "cancelled"})
"""States of a migration that will not stop the guest any more."""


async def release(reactor: Any, process: QemuProcess, timeout: float) -> None:
    """
    See that the guest runs and no migration is under way. The COLO channel must be closed already.

    With it closed, an initial migration fails by itself. C{migrate_cancel} is the last resort: if COLO begins just
    then, its thread waits for a failover that QEMU will not take a request for.

    @param timeout: seconds for all of it.
    @raise GuestTimeout: QEMU could not be brought to it.
    """
    began = reactor.seconds()
    pause, before = _POLL_FIRST, ""
    while True:
        migration = (await process.execute("query-migrate")).get("status", "none")
        elapsed = reactor.seconds() - began
        if migration == "colo":
            # One that was seen once may be so young that its thread forgets the request.
            if before == "colo":
                await _tolerant(process, "x-colo-lost-heartbeat")
        elif (await process.execute("query-status"))["running"]:
            if migration in _OVER:
                return
            if elapsed > _STUCK:
                await _tolerant(process, "migrate_cancel")
        elif elapsed > _STUCK:
            await _tolerant(process, "cont")
        if elapsed > timeout:
            raise GuestTimeout(f"QEMU does not leave COLO: its migration is {migration!r}")
        await deferLater(reactor, pause)
        pause, before = min(2 * pause, _POLL_LAST), migration


async def _tolerant(process: QemuProcess, command: str) -> None:
    """Run a command that QEMU may find superfluous."""
    try:
        await process.execute(command)
    except QmpError:
        return


__all__ = ["release"]
