"""
A kill as the acceptance tests want it: a pair of real daemons in namespaces of their own, a guest, clients that check
every byte, something that breaks, and a judgement. Which kills there are is for the cases.

C{COLOTX_SEED} of the environment repeats a run's random choices.
"""

from __future__ import annotations

import atexit
import os
import random
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from colotx.errors import ColoError
from colotx.lab.client import isClean
from colotx.lab.pair import FAILOVER_LIMIT, GuestChoice, PairSettings, ProtectedPair
from colotx.lab.processes import ClientProcess, LabError
from colotx.lab.report import RoundResult, kindsTable, line, summary, table

SEED = int(os.environ.get("COLOTX_SEED") or random.randrange(1 << 20))

_WARM_UP = (0.2, 1.5)
"""Seconds between which the kill comes at random after the client's first byte; then a moment within a checkpoint."""
_DELAYS = {"passive": (50, 20), "active": (5000, 300)}
"""
ms between checkpoints. Passive: the usual, and so few that many kills come within one. Active: so many that the
newcomers are younger than the last one, and so few that kills come within one.
"""
_BOOT_DELAY = 1000
"""ms between checkpoints until the guest is up: an emulated guest boots slowly enough without many of them."""
_LOOK = 0.05
_CONNECTIONS = 6
_NEWCOMERS = (12, 0.1)
_AFTER = 0.5
"""Seconds of a new client's traffic after the failover; and then as long as a memory check takes."""
_CHECKS_LIMIT = 60.0


class Round:
    """
    One pair, one kill.

    @ivar result: what was found.
    """

    def __init__(
        self, pair: ProtectedPair, settings: PairSettings, result: RoundResult, chance: random.Random
    ) -> None:
        self._active = settings.secondary == "active"
        delays = _DELAYS[settings.secondary]
        self._delay = delays[result.number % len(delays)]
        self._pair = pair
        self._guest = settings.guest
        self._chance = chance
        self.result = result

    async def run(self) -> None:
        """@raise LabError: something that is not the client's finding."""
        pair, result = self._pair, self.result
        await pair.start(guestFirst=self._active)
        await self._memoryChecked("primary")
        await pair.daemons["primary"].query("migrate-set-parameters", **{"x-checkpoint-delay": self._delay})
        result.observe(await pair.daemons["primary"].query("query-colotx-stats"), time.monotonic())
        await pair.client.start(self._guest.traffic(_CONNECTIONS, self._chance.randrange(1 << 20)))
        await self._warmUp()
        killed = pair.kill(result.kill)
        pair.client.mark(killed)
        await pair.until("the secondary did not go live", FAILOVER_LIMIT, pair.failedOver)
        result.failover_ms = round((time.monotonic() - killed) * 1000, 1)
        told = [when for _, _, when in pair.daemons["secondary"].events if when >= killed]
        result.detection_ms = round((told[0] - killed) * 1000, 1) if told else None
        newcomer = await self._newcomer()
        report = await pair.client.finish(60)
        result.take(report)
        result.problem = result.problem or await self._problem(report, newcomer)

    async def _warmUp(self) -> None:
        pair = self._pair
        if self._active:
            pair.client.open(*_NEWCOMERS)
        end = time.monotonic() + self._chance.uniform(*_WARM_UP)
        while time.monotonic() < end:
            statistics = await pair.daemons["primary"].query("query-colotx-stats")
            self.result.observe(statistics, time.monotonic())
            await pair.pause(_LOOK)
        if await pair.failedOver():
            raise LabError("the secondary took over before anything was broken (is this machine very busy?)")
        # The answer to a query comes between two checkpoints: move away from there.
        await pair.pause(self._chance.uniform(0, 0.1))

    async def _newcomer(self) -> Mapping[str, Any]:
        """
        A client that connects after the failover and asks the memory check at its beginning and its end.

        @return: its report.
        """
        client = ClientProcess(reactor, self._pair.lab.client, self._pair.directory / "newcomer")
        try:
            await client.start(self._guest.traffic(1, self._chance.randrange(1 << 20)))
            await self._pair.pause(_AFTER)
            await self._memoryChecked("secondary")
            return await client.finish(60)
        finally:
            await client.stop()

    async def _memoryChecked(self, role: str) -> None:
        """Wait until the guest on this host has checked its memory once more, as its console says."""
        if not self._guest.verdictPort:
            return
        console = self._pair.directory / role / self._guest.console

        def checks() -> int:
            return len(re.findall(rb"colotx: \d+ ", console.read_bytes())) if console.exists() else 0

        wanted = checks() + 1

        async def checked() -> bool:
            return checks() >= wanted

        await self._pair.until("the guest does not check its memory", _CHECKS_LIMIT, checked)

    async def _problem(self, report: Mapping[str, Any], newcomer: Mapping[str, Any]) -> str | None:
        """@return: what is wrong though no client lost a byte, or None."""
        if report["outage_ms"] is None:
            return "no outage was recorded"
        if not isClean(newcomer):
            return f"a client that came after the failover found {newcomer}"
        if self._guest.verdictPort:
            # Each is "<round> ok" (the client judged that): before the kill, and twice after it.
            words = [report["memory_check"][0], *newcomer["memory_check"]]
            before, first, last = (int(word.split()[0]) for word in words)
            if not before <= first < last:
                return f"the guest's memory check does not go on: {words}"
        if self.result.kill == "link":
            # Both hosts live, and one of them must hold what its guest says.
            gate = (await self._pair.daemons["primary"].query("query-colotx-stats"))["gate"]
            if gate != "shut":
                return f"both hosts let a guest speak: the primary's gate is {gate}"
        return None


class KillCase(TestCase):
    """The rounds of one kind of kill; not tests themselves."""

    timeout = 900

    async def kills(self, guest: GuestChoice, kill: str, rounds: int, secondary: str = "passive") -> None:
        """Run the rounds, print what was found, fail if it is not what it must be."""
        title = f"{guest.keys['guest']} guest, {secondary} secondary, kill {kill}"
        chance = random.Random(f"{SEED} {title}")
        settings = PairSettings(guest, _BOOT_DELAY, secondary=secondary)
        results = []
        logs = Path(self.mktemp()).absolute()
        for number in range(1, rounds + 1):
            result = RoundResult(number, kill, logs=str(logs / str(number)))
            results.append(result)
            async with ProtectedPair(reactor, Path(str(result.logs)), settings) as pair:
                # Ctrl-C ends trial without our clauses; closing twice is harmless.
                atexit.register(pair.lab.close)
                try:
                    await Round(pair, settings, result, chance).run()
                except ColoError as error:
                    result.problem = f"{error}; {await pair.describe()}"
        found = summary(results)
        print(f"\n{title}, COLOTX_SEED={SEED}\n{table(results)}\n{kindsTable(found)}\n{line(found)}")
        problems = [f"round {one.number}: {one.problem} ({one.logs})" for one in results if one.problem]
        self.assertEqual(problems, [])
        for name in ("bytes_lost", "bytes_doubled", "bytes_corrupted", "bytes_reordered"):
            self.assertEqual(found[name], 0)
        self.assertEqual((found["connections_lost"], found["connections_hung"]), (0, 0))
        self.assertTrue(all(one.outage_ms and one.sent for one in results), "nothing was measured")
