"""
Kill the primary of a pair in lock-step at random moments, with connections that are younger than the last checkpoint;
nobody may lose, or see twice, a byte, and none may hang.

C{COLOTX_ACTIVE_KILLS} sets how many hosts of a QEMU guest are killed, and C{COLOTX_FIRST_LATE} how many of those
whose first TCP connection comes after the last checkpoint; the other kills follow from the first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from twisted.internet import reactor

from colotx.lab.demo import NEVER, Demo
from colotx.lab.guestimage import CLOCK_PORT, ECHO_PORT
from colotx.lab.pair import GuestChoice, PairSettings, ProtectedPair, memoryGuest
from colotx.lab.report import line, summary, table
from colotx.lab.roundtrip import measureFrom
from tests.harness import asynchronous, needPrivileges, needQemuGuest
from tests.kills import SEED, KillCase

HOSTS = int(os.environ.get("COLOTX_ACTIVE_KILLS") or 10)
OTHERS = max(1, HOSTS // 5)
FIRST_LATE = int(os.environ.get("COLOTX_FIRST_LATE") or 5)
MEMORY_KILLS = 3


class ActiveQemuKillTests(KillCase):
    """Two Linux guests in lock-step."""

    timeout = 1800

    def setUp(self) -> None:
        needPrivileges()
        self.guest = needQemuGuest()

    @asynchronous
    async def test_host(self) -> None:
        """Daemon and QEMU die together, as with the power."""
        await self.kills(self.guest, "host", HOSTS, "active")

    @asynchronous
    async def test_qemu(self) -> None:
        """Only the QEMU dies; its daemon says so."""
        await self.kills(self.guest, "qemu", OTHERS, "active")

    @asynchronous
    async def test_daemon(self) -> None:
        """Only the daemon dies; its QEMU must not speak on."""
        await self.kills(self.guest, "daemon", OTHERS, "active")

    @asynchronous
    async def test_link(self) -> None:
        """The link dies; both hosts live, one goes on."""
        await self.kills(self.guest, "link", OTHERS, "active")

    @asynchronous
    async def test_firstConnectionLate(self) -> None:
        """
        The guest's first TCP connection, which fixes the offset of its time stamps, comes after the last checkpoint, so
        the two guests' differ: after the kill no connection hangs.
        """
        settings = PairSettings(needQemuGuest(patternBytes=0, firstTcp=False), NEVER, secondary="active")
        demo = Demo(reactor, settings, "host", SEED, Path(self.mktemp()).absolute(), firstLate=True)
        results = await demo.run(FIRST_LATE)
        found = summary(results)
        print(f"\nCOLOTX_SEED={SEED}\n{table(results)}\n{line(found)}")
        self.assertEqual([one.problem for one in results if one.problem], [])
        self.assertEqual(found["connections_late"], found["connections"])


class ActiveMemoryKillTests(KillCase):
    """Two embedded guests in lock-step."""

    @asynchronous
    async def test_host(self) -> None:
        """Daemon and guest die together."""
        needPrivileges()
        await self.kills(memoryGuest(), "host", MEMORY_KILLS, "active")


class WorkloadTests(KillCase):
    """What lock-stepping makes of guests that say the same, and of guests that do not."""

    def setUp(self) -> None:
        needPrivileges()
        self.guest = needQemuGuest(patternBytes=0)

    def pair(self, guest: GuestChoice) -> ProtectedPair:
        """No checkpoint comes by the clock."""
        return ProtectedPair(
            reactor, Path(self.mktemp()).absolute(), PairSettings(guest, NEVER, secondary="active")
        )

    @asynchronous
    async def test_identical(self) -> None:
        """Guests that say the same need no checkpoint in ten seconds, and their clients hardly wait longer."""
        async with self.pair(self.guest) as pair:
            host, log = self.guest.host, pair.directory / "meter.log"
            await pair.serve()
            alone = await measureFrom(reactor, pair.lab.client, log, host, ECHO_PORT, 3)
            await pair.protect()
            # A neighbour's question, and the like, may still have been on its way.
            await measureFrom(reactor, pair.lab.client, log, host, ECHO_PORT, 1)
            before = await pair.daemons["primary"].query("query-colotx-stats")
            both = await measureFrom(reactor, pair.lab.client, log, host, ECHO_PORT, 10)
            after = await pair.daemons["primary"].query("query-colotx-stats")
            print(
                f"\nround trip, median: alone {alone.p50} ms, in lock-step {both.p50} ms, p99 {both.p99} ms"
            )
            self.assertEqual(after["checkpoints"], before["checkpoints"])
            self.assertEqual(after["early-checkpoints"], before["early-checkpoints"])
            self.assertGreater(both.count, 100)

    @asynchronous
    async def test_diverging(self) -> None:
        """The output of guests that never say the same flows by checkpoints, and the evidence names who costs them."""
        async with self.pair(self.guest) as pair:
            host, log = self.guest.host, pair.directory / "meter.log"
            await pair.serve()
            await pair.protect()
            found = await measureFrom(reactor, pair.lab.client, log, host, CLOCK_PORT, 5, diverging=True)
            primary = pair.daemons["primary"]
            statistics = await primary.query("query-colotx-stats")
            evidence = await primary.query("query-colotx-evidence")
            print(
                f"\n{found.count} answers in 5 s, median {found.p50} ms, early checkpoints "
                f"{statistics['early-checkpoints']}; {json.dumps(evidence['flows'])}"
            )
            self.assertGreater(found.count, 5)
            self.assertGreater(statistics["early-checkpoints"], 5)
            self.assertIn(f"{host}:{CLOCK_PORT}", evidence["flows"][0]["flow"])
