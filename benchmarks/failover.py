"""
How long a Linux guest of 256 MB is away when its host dies: what the surviving daemon needs from the moment it knows,
and what a client sees. Each round makes two hosts, protects the guest, and kills one of them. Usage::

    python -m benchmarks.failover [--json] [--rounds 10]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colotx.lab.client import TrafficSettings, isClean
from colotx.lab.namespaces import GUEST_ADDRESS
from colotx.lab.pair import FAILOVER_LIMIT, PairSettings, ProtectedPair, qemuGuest
from colotx.lab.processes import LabError
from colotx.lab.running import runPrivileged
from colotx.statistics import percentile

BEFORE = (1.0, 3.0)
"""Seconds of traffic before the kill, at random between these."""
AFTER = 2.0
CLIENT_LIMIT = 60.0
FIGURES = ("detection_ms", "takeover_ms", "outage_ms", "after_detection_ms")


async def oneRound(reactor: Any, logs: Path) -> dict[str, float]:
    """
    Protect a guest, kill its host.

    @return: milliseconds: C{detection}, from the kill until the survivor knows; C{takeover}, from then until it runs
        the guest; C{outage}, without a byte for the client; and what is left of that after the detection.
    @raise ColoError: something did not come about, or the client lost something.
    """
    guest = qemuGuest()
    async with ProtectedPair(reactor, logs, PairSettings(guest)) as pair:
        await pair.start()
        traffic = TrafficSettings(host=GUEST_ADDRESS.partition("/")[0], verdictPort=guest.verdictPort)
        await pair.client.start(traffic)
        await pair.pause(random.uniform(*BEFORE))
        survivor = pair.daemons["secondary"]
        # Its events come from now on.
        await survivor.query("query-status")
        killed = pair.kill("host")
        pair.client.mark(killed)
        await pair.until("the secondary did not go live", FAILOVER_LIMIT, pair.failedOver)
        facts = (await survivor.query("query-colotx-stats"))["last-failover"]
        await pair.pause(AFTER)
        report = await pair.client.finish(CLIENT_LIMIT)
        if not isClean(report):
            raise LabError(f"the client lost something: {report}")
        known = next((when for _, _, when in survivor.events if when >= killed), None)
        if known is None or facts is None:
            raise LabError("the survivor told of no failover")
        detection = (known - killed) * 1000
        return {
            "detection_ms": detection,
            "takeover_ms": facts["takeover-ms"],
            "outage_ms": report["outage_ms"],
            "after_detection_ms": report["outage_ms"] - detection,
        }


async def measure(reactor: Any, rounds: int) -> dict[str, Any]:
    """@return: the figures; a round that failed is told and counted."""
    found: list[dict[str, float]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="colo-bench-", ignore_cleanup_errors=True) as logs:
        for number in range(1, rounds + 1):
            try:
                found.append(await oneRound(reactor, Path(logs) / str(number)))
                told = ", ".join(f"{name} {value:.0f}" for name, value in found[-1].items())
            except LabError as error:
                failures.append(str(error))
                told = f"FAILED: {error}"
            print(f"  round {number} of {rounds}: {told}", file=sys.stderr, flush=True)
    if not found:
        raise LabError(f"no round succeeded: {failures[-1]}")
    figures = {name: spread([each[name] for each in found]) for name in FIGURES}
    return {"name": "failover", "rounds": len(found), "failed_rounds": failures, **figures}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Of milliseconds."""
    return {
        "p50": round(percentile(values, 0.5), 1),
        "p99": round(percentile(values, 0.99), 1),
        "min": round(min(values), 1),
        "max": round(max(values), 1),
    }


def report(result: dict[str, Any]) -> None:
    """For people."""
    for name in FIGURES:
        print(f"{name:20} " + "  ".join(f"{key} {value}" for key, value in result[name].items()))


async def _main(reactor: Any, options: argparse.Namespace) -> int:
    result = await measure(reactor, options.rounds)
    print(json.dumps(result)) if options.json else report(result)
    return 0


def main(argv: Sequence[str]) -> int:
    """@return: the exit status."""
    parser = argparse.ArgumentParser(description="Outage of a 256 MB Linux guest when its host dies.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=10, help="hosts to kill (default: %(default)s)")
    options = parser.parse_args(argv)
    return runPrivileged("benchmarks.failover", argv, lambda reactor: _main(reactor, options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
