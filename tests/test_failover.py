"""
Kill the primary at random moments; nobody may lose, or see twice, a byte.

C{COLOTX_KILLS} sets how many rounds with a QEMU guest there are.
"""

from __future__ import annotations

import os

from colotx.lab.pair import memoryGuest
from tests.harness import asynchronous, needPrivileges, needQemuGuest
from tests.kills import KillCase

KILLS = int(os.environ.get("COLOTX_KILLS") or 20)
MEMORY_KILLS = 5


def shares(kills: int) -> dict[str, int]:
    """@return: how many rounds of each kind: hosts mostly."""
    few = (kills + 3) // 7
    return {"host": max(kills - 3 * few, 0), "qemu": few, "daemon": few, "link": few}


class QemuKillTests(KillCase):
    """A Linux guest in QEMU that checks its own memory."""

    def setUp(self) -> None:
        needPrivileges()
        self.guest = needQemuGuest()

    @asynchronous
    async def test_host(self) -> None:
        """Daemon and QEMU die together, as with the power."""
        await self.kills(self.guest, "host", shares(KILLS)["host"])

    @asynchronous
    async def test_qemu(self) -> None:
        """Only the QEMU dies; its daemon says so."""
        await self.kills(self.guest, "qemu", shares(KILLS)["qemu"])

    @asynchronous
    async def test_daemon(self) -> None:
        """Only the daemon dies; its QEMU must not speak on."""
        await self.kills(self.guest, "daemon", shares(KILLS)["daemon"])

    @asynchronous
    async def test_link(self) -> None:
        """The link dies; both hosts live, one goes on."""
        await self.kills(self.guest, "link", shares(KILLS)["link"])


class MemoryKillTests(KillCase):
    """The embedded guest, which lives in its daemon."""

    @asynchronous
    async def test_host(self) -> None:
        """Daemon and guest die together."""
        needPrivileges()
        await self.kills(memoryGuest(), "host", MEMORY_KILLS)
