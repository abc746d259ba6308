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
from colotx.lab.client import TrafficSettings
from colotx.lab.namespaces import GUEST_ADDRESS, becomePrivileged
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
from colotx.lab.report import RoundResult, line, summary, table
from colotx.lab.running import runToEnd

_TRAFFIC_BEFORE = (2.0, 6.0)
"""Seconds between which the kill comes at random after the client's first byte."""
_CHECKPOINTS_BEFORE = 5
_CHECKPOINTS_LIMIT = 60.0
_AFTER = 3.0
"""Seconds the client goes on after the failover."""


class Demo:
    """
    All rounds of one run.

    @param guest: what to protect.
    @param kill: what to break.
    @param logs: a directory for the rounds' logs.
    """

    def __init__(
        self, reactor: Any, guest: GuestChoice, kill: str, checkpointDelay: int, seed: int, logs: Path
    ) -> None:
        self._reactor = reactor
        self._settings = PairSettings(guest, checkpointDelay)
        self._kill = kill
        self._seed = seed
        self._random = random.Random(seed)
        self._logs = logs
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
        begun = time.monotonic()
        await pair.start()
        self.say(f"{name}: protected after {time.monotonic() - begun:.1f} s")
        await pair.client.start(
            TrafficSettings(
                host=GUEST_ADDRESS.partition("/")[0],
                seed=self._seed + result.number,
                verdictPort=self._settings.guest.verdictPort,
            )
        )
        self.say(f"{name}: the client's connections are open, every byte is checked")
        await self._waitForCheckpoints(pair, result)
        self.say(f"{name}: {result.checkpoints} checkpoints; breaking the primary's {self._kill} now")
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
        self.say(f"{name}: the client saw a pause of {result.outage_ms} ms; {result.lost} bytes lost")

    async def _waitForCheckpoints(self, pair: ProtectedPair, result: RoundResult) -> None:
        until = time.monotonic() + self._random.uniform(*_TRAFFIC_BEFORE)
        first: int | None = None

        async def enough() -> bool:
            nonlocal first
            if await pair.failedOver():
                raise LabError(
                    "the secondary took over before anything was broken (is this machine very busy?)"
                )
            statistics = await pair.daemons["primary"].query("query-colotx-stats")
            result.checkpoints = count = int(statistics["checkpoints"])
            downtime = statistics["phases-ms"]["downtime"]
            result.downtime_p50, result.downtime_p99 = downtime["p50"], downtime["p99"]
            first = count if first is None else first
            return time.monotonic() >= until and count >= first + _CHECKPOINTS_BEFORE

        limit = _CHECKPOINTS_LIMIT + _CHECKPOINTS_BEFORE * self._settings.checkpointDelay / 1000
        await pair.until(f"there were no {_CHECKPOINTS_BEFORE} checkpoints", limit, enough)


def _chooseGuest(wanted: str | None, kill: str, qemu: str) -> GuestChoice:
    if wanted != "memory":
        try:
            return qemuGuest(qemu)
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
    parser.add_argument("--json", action="store_true", help="end with one line of JSON instead of the table")
    parser.add_argument(
        "--checkpoint-delay",
        type=int,
        default=50,
        metavar="MS",
        help="between checkpoints (default: %(default)s)",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep all logs and configurations there")
    parser.add_argument("--seed", type=int, metavar="S", help="repeat a run's random choices")
    parser.add_argument("--qemu", default="", metavar="PATH", help="the QEMU to use")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.checkpoint_delay < 1:
        parser.error("--rounds and --checkpoint-delay must be at least 1")
    return options


async def _main(reactor: Any, options: argparse.Namespace) -> int:
    seed = random.randrange(1 << 20) if options.seed is None else options.seed
    guest = _chooseGuest(options.guest, options.kill, options.qemu)
    logs = options.keep or Path(tempfile.mkdtemp(prefix="colo-demo-"))
    demo = Demo(reactor, guest, options.kill, options.checkpoint_delay, seed, logs)
    demo.say(f"guest {guest.keys['guest']}, checkpoints every {options.checkpoint_delay} ms, seed {seed}")
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
    try:
        becomePrivileged("colotx.lab.demo", argv)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    from twisted.internet import reactor

    return runToEnd(reactor, lambda: _main(reactor, options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
