"""
C{colo demo}: protect a guest, break its host at a random moment, show that its clients notice a pause and no more.

Two daemons in two network namespaces, a client in a third, all made for the purpose and removed afterwards; a plain
user gets them in a user namespace.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colotx.errors import ColoError, ConfigError
from colotx.lab.pair import (
    FAILOVER_LIMIT,
    KILLS,
    GuestChoice,
    PairSettings,
    ProtectedPair,
    memoryGuest,
    qemuGuest,
)
from colotx.lab.processes import LabError
from colotx.lab.report import RoundResult, kindsTable, line, summary, table
from colotx.lab.running import runPrivileged

_TRAFFIC_BEFORE = (2.0, 6.0)
"""Seconds between which the kill comes at random after the client's first byte."""
_CHECKPOINTS_BEFORE = {"passive": 5, "active": 2}
_CHECKPOINTS_LIMIT = 60.0
_DELAYS = {"passive": 50, "active": 5000}
"""
ms between checkpoints. With an active secondary output does not wait for them; they are so far apart that every kill
finds connections younger than the last one, which only lock-stepping can save.
"""
NEVER = 24 * 3600 * 1000
"""ms: no checkpoint by the clock in any round."""
_CONNECTIONS = 6
_CHECKS = {"passive": (4 << 20, 100), "active": (256 << 10, 1000)}
"""
Bytes of the guest's memory check, and its rest (ms): that of two emulated guests at once must leave this machine some
time for the rest.
"""
_NEWCOMERS = 12
_NEWCOMER_INTERVAL = 0.1
_LATE_BEFORE = (0.6, 1.5)
"""Seconds between which the kill comes at random after the first connection younger than the last checkpoint."""
_AFTER = 3.0
"""Seconds the client goes on after the failover."""


class Demo:
    """
    All rounds of one run.

    @param settings: what to protect, and how.
    @param kill: what to break.
    @param logs: a directory for the rounds' logs.
    @param firstLate: make the guest's first TCP connection ever after the last checkpoint; such a guest is from
        C{qemuGuest(firstTcp=False)}.
    """

    def __init__(
        self, reactor: Any, settings: PairSettings, kill: str, seed: int, logs: Path, firstLate: bool = False
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._kill = kill
        self._seed = seed
        self._random = random.Random(seed)
        self._logs = logs
        self._firstLate = firstLate
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Tell a user how far it is."""
        print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)

    async def run(self, rounds: int) -> list[RoundResult]:
        """@return: what each round found; one that fails does not keep the next."""
        results = []
        for number in range(1, rounds + 1):
            result = RoundResult(number, self._kill, logs=str(self._logs / f"round-{number}"))
            results.append(result)
            try:
                await self._round(result, f"round {number} of {rounds}")
            except ColoError as error:
                result.problem = str(error)
            if result.problem is not None:
                self.say(f"round {number} of {rounds}: FAILED: {result.problem}; its logs: {result.logs}")
        return results

    async def _round(self, result: RoundResult, name: str) -> None:
        self.say(f"{name}: two hosts, a link, a client; starting the daemons")
        async with ProtectedPair(self._reactor, Path(str(result.logs)), self._settings) as pair:
            try:
                await self._breakAndCheck(pair, result, name)
            except ColoError as error:
                raise LabError(f"{error}; {await pair.describe()}") from error

    async def _breakAndCheck(self, pair: ProtectedPair, result: RoundResult, name: str) -> None:
        active = self._settings.secondary == "active"
        begun = time.monotonic()
        await pair.start(guestFirst=active)
        self.say(f"{name}: protected after {time.monotonic() - begun:.1f} s")
        if self._firstLate:
            await self._lookForCheckpoint(pair, result)
        guest = self._settings.guest
        await pair.client.start(guest.traffic(_CONNECTIONS, self._seed + result.number))
        self.say(f"{name}: the client's connections are open, every byte is checked")
        if not self._firstLate:
            await self._waitForCheckpoints(pair, result)
        if active:
            # Connections that no checkpoint knows, up to the moment of the kill.
            pair.client.open(_NEWCOMERS, _NEWCOMER_INTERVAL)
            await pair.pause(self._random.uniform(*_LATE_BEFORE))
            await self._lookForCheckpoint(pair, result)
        self.say(f"{name}: {result.checkpoints} checkpoints; breaking the primary's {self._kill} now")
        if not active:
            # The answer to a query comes between two checkpoints: move away from there.
            await pair.pause(self._random.uniform(0, 2 * self._settings.checkpointDelay / 1000))
        killed = pair.kill(self._kill)
        pair.client.mark(killed)
        await pair.until("the secondary did not go live", FAILOVER_LIMIT, pair.failedOver)
        result.failover_ms = round((time.monotonic() - killed) * 1000, 1)
        told = [when for _, _, when in pair.daemons["secondary"].events if when >= killed]
        result.detection_ms = round((told[0] - killed) * 1000, 1) if told else None
        self.say(f"{name}: the secondary host runs the guest {result.failover_ms:.0f} ms after that")
        await pair.pause(_AFTER)
        report = await pair.client.finish(60)
        result.take(report)
        if self._firstLate and result.late < result.connections:
            result.problem = result.problem or "a checkpoint came between the first connection and the kill"
        self.say(f"{name}: the client saw a pause of {result.outage_ms} ms; {result.lost} bytes lost")

    async def _waitForCheckpoints(self, pair: ProtectedPair, result: RoundResult) -> None:
        """Return just after one."""
        wanted = _CHECKPOINTS_BEFORE[self._settings.secondary]
        until = time.monotonic() + self._random.uniform(*_TRAFFIC_BEFORE)
        first = await self._lookForCheckpoint(pair, result)

        async def enough() -> bool:
            if await pair.failedOver():
                raise LabError(
                    "the secondary took over before anything was broken (is this machine very busy?)"
                )
            before = result.checkpoints
            count = await self._lookForCheckpoint(pair, result)
            return time.monotonic() >= until and count >= first + wanted and count != before

        limit = _CHECKPOINTS_LIMIT + (wanted + 2) * self._settings.checkpointDelay / 1000
        await pair.until(f"there were no {wanted} checkpoints", limit, enough)

    async def _lookForCheckpoint(self, pair: ProtectedPair, result: RoundResult) -> int:
        """@return: how many there have been."""
        return result.observe(await pair.daemons["primary"].query("query-colotx-stats"), time.monotonic())


def _chooseGuest(
    wanted: str | None, kill: str, qemu: str, secondary: str = "passive", firstLate: bool = False
) -> GuestChoice:
    if firstLate:
        if wanted == "memory":
            raise ConfigError(
                "--first-connection-late needs --guest qemu: the embedded guest has no time stamps"
            )
        return qemuGuest(qemu, patternBytes=0, firstTcp=False)
    if wanted != "memory":
        try:
            return qemuGuest(qemu, *_CHECKS[secondary])
        except ConfigError as error:
            if wanted == "qemu" or qemu or kill == "qemu":
                raise
            print(f"no QEMU guest here, so the embedded guest is shown instead: {error}", flush=True)
    if kill == "qemu":
        raise ConfigError("--kill qemu needs --guest qemu: the embedded guest has no process of its own")
    return memoryGuest()


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="colo demo",
        description="Protect a guest, break its host at a random moment, and check every byte of its clients.",
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="how often (default: %(default)s)")
    parser.add_argument(
        "--guest",
        choices=("qemu", "memory"),
        help="a Linux guest in QEMU (default, if possible) or the embedded one",
    )
    parser.add_argument("--kill", choices=KILLS, default="host", help="what breaks (default: %(default)s)")
    parser.add_argument(
        "--secondary",
        choices=("active", "passive"),
        default="passive",
        help="active: a second guest runs in lock-step; passive: a memory image waits (default: %(default)s)",
    )
    parser.add_argument(
        "--first-connection-late",
        action="store_true",
        help="the guest's first TCP connection ever, which fixes its time stamps, comes after the last checkpoint; "
        "with --secondary active",
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON instead of the table")
    parser.add_argument(
        "--checkpoint-delay",
        type=int,
        metavar="MS",
        help=f"between checkpoints (default: {_DELAYS['passive']}; with an active secondary {_DELAYS['active']})",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep all logs and configurations there")
    parser.add_argument("--seed", type=int, metavar="S", help="repeat a run's random choices")
    parser.add_argument("--qemu", default="", metavar="PATH", help="the QEMU to use")
    options = parser.parse_args(argv)
    if options.first_connection_late and options.secondary != "active":
        parser.error(
            "--first-connection-late needs --secondary active: a passive one knows no such connection"
        )
    if options.checkpoint_delay is None:
        options.checkpoint_delay = NEVER if options.first_connection_late else _DELAYS[options.secondary]
    if options.rounds < 1 or options.checkpoint_delay < 1:
        parser.error("--rounds and --checkpoint-delay must be at least 1")
    return options


async def _main(reactor: Any, options: argparse.Namespace) -> int:
    seed = random.randrange(1 << 20) if options.seed is None else options.seed
    late = options.first_connection_late
    guest = _chooseGuest(options.guest, options.kill, options.qemu, options.secondary, late)
    logs = options.keep or Path(tempfile.mkdtemp(prefix="colo-demo-"))
    settings = PairSettings(guest, options.checkpoint_delay, secondary=options.secondary)
    demo = Demo(reactor, settings, options.kill, seed, logs, late)
    demo.say(
        f"guest {guest.keys['guest']}, {options.secondary} secondary, "
        f"checkpoints every {options.checkpoint_delay} ms, seed {seed}"
    )
    keep = options.keep is not None
    try:
        results = await demo.run(options.rounds)
        failed = any(result.problem is not None for result in results)
        if failed:
            keep = True
            print(f"the logs are kept: {logs}", flush=True)
    finally:
        if not keep:
            shutil.rmtree(logs, ignore_errors=True)
    for result in results:
        result.logs = result.logs if keep else None
    found = summary(results)
    print(table(results))
    print(kindsTable(found))
    print(line(found))
    if options.json:
        print(json.dumps(found), flush=True)
    return 1 if failed else 0


def main(argv: Sequence[str]) -> int:
    """
    C{colo demo}.

    @return: the exit status: 0 only if nothing was lost and every failover happened.
    """
    options = _arguments(argv)
    return runPrivileged("colotx.lab.demo", argv, lambda reactor: _main(reactor, options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
