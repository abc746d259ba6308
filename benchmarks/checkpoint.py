"""
What checkpoints cost: the guest's downtime, and how many a second there can be, with a real Linux guest in QEMU.

Three machines run at once and are measured in turns, window by window: QEMU alone with a peer that answers at once
(B{bare}), two daemons on loopback (B{pair}), and two daemons over a link of 100 Mbit/s and 20 ms each way (B{slow}).
The others stand still meanwhile. Downtime is the time between QEMU's own events STOP and RESUME, by its own clock,
so nothing of ours is in it that the guest does not suffer. Usage::

    python -m benchmarks.checkpoint [--json] [--windows 8] [--seconds 3] [--rate-seconds 20]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.machines import CACHE, Bare, Broken, Machine, Pair
from colotx.errors import ColoError
from colotx.lab.guestimage import buildGuest
from colotx.statistics import percentile

SLOW = (100.0, 20.0)
"""Mbit/s and ms each way."""

WORKLOADS = {"idle": 0, "dirtying": 1 << 20}
"""What the guest does: bytes it checks and writes anew, again and again."""

DELAYS = {"idle": 100, "dirtying": 500}
"""x-checkpoint-delay (ms): what is dirtied in one must fit through the slow link in one, or its checkpoints grow."""

RATE_DELAY = 50
SETTLE = 1.0
"""Seconds at the beginning of a window that do not count."""


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def window(machine: Machine, delay: int, seconds: float) -> list[tuple[float, float]]:
    """@return: the checkpoints of so many seconds: when the guest was stopped, and for how many ms."""
    machine.wake(delay)
    time.sleep(SETTLE)
    begin = time.time()
    time.sleep(seconds)
    end = time.time()
    machine.rest()
    return [known for known in machine.monitor.downtimes if begin <= known[0] < end]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Of milliseconds."""
    if not values:
        raise Broken("there were no checkpoints")
    return {
        "n": len(values),
        "p50": round(percentile(values, 0.5), 3),
        "p99": round(percentile(values, 0.99), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def downtimes(machines: Sequence[Machine], delay: int, windows: int, seconds: float) -> dict[str, Any]:
    """Measure in turns."""
    found: dict[str, list[float]] = {machine.name: [] for machine in machines}
    for number in range(windows):
        # Another one begins each time, so that nobody always follows the same.
        turn = number % len(machines)
        for machine in (*machines[turn:], *machines[:turn]):
            found[machine.name] += [downtime for _, downtime in window(machine, delay, seconds)]
        medians = {name: spread(values)["p50"] for name, values in found.items()}
        say(f"  window {number + 1} of {windows}: medians so far, ms: {medians}")
    figures = {name: spread(values) for name, values in found.items()}
    return {
        "delay_ms": delay,
        "downtime_ms": figures,
        "pair_to_bare": round(figures["pair"]["p50"] / figures["bare"]["p50"], 2),
        "slow_to_fast": round(figures["slow"]["p50"] / figures["pair"]["p50"], 2),
        "phases_ms": {
            machine.name: machine.query("query-colotx-stats")["phases-ms"]
            for machine in machines
            if isinstance(machine, Pair)
        },
    }


def rate(machine: Machine, seconds: float) -> dict[str, float]:
    """
    @return: checkpoints a second, from the first stop of the guest to the last, so that none is counted by half. What
        it stood still for at either end of the window counts, beyond a period that may be due there.
    """
    stops = [when for when, _ in window(machine, RATE_DELAY, seconds)]
    if len(stops) < 2:
        raise Broken(f"{machine.name}: {len(stops)} checkpoints in {seconds} s")
    span = max(stops[-1] - stops[0], seconds - 2 * RATE_DELAY / 1000)
    longest = max(after - before for before, after in pairwise(stops))
    return {
        "delay_ms": RATE_DELAY,
        "window_s": seconds,
        "checkpoints": len(stops),
        "per_s": round((len(stops) - 1) / span, 1),
        "longest_period_ms": round(longest * 1000, 1),
    }


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    result: dict[str, Any] = {"name": "checkpoint", "windows": options.windows, "window_s": options.seconds}
    files = buildGuest(CACHE)
    for workload, patternBytes in WORKLOADS.items():
        say(f"guest {workload}: booting three machines")
        with contextlib.ExitStack() as stack:
            machines: list[Machine] = []
            for name in ("bare", "pair", "slow"):
                place = directory / f"{workload[0]}{name[0]}"
                machine: Machine
                if name == "bare":
                    machine = Bare(name, place, files, patternBytes)
                else:
                    machine = Pair(name, place, files, patternBytes, SLOW if name == "slow" else None)
                stack.callback(machine.close)
                machines.append(machine)
            for machine in machines:
                machine.protect()
                machine.rest()
            result[workload] = downtimes(machines, DELAYS[workload], options.windows, options.seconds)
            if workload == "idle":
                result["rate"] = rate(machines[1], options.rate_seconds)
                say(f"  {result['rate']}")
    return result


def report(result: dict[str, Any]) -> None:
    """For people."""
    for workload in WORKLOADS:
        figures = result[workload]
        for name, values in figures["downtime_ms"].items():
            print(f"{workload:9} {name:5} downtime ms: " + "  ".join(f"{k} {v}" for k, v in values.items()))
        print(f"{workload:9} pair / bare {figures['pair_to_bare']}, slow / fast {figures['slow_to_fast']}")
    print(f"checkpoints a second at delay {RATE_DELAY} ms: {result['rate']}")


def _interrupted(*_: object) -> None:
    # Once is enough: what was started must be ended now.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """@return: the exit status."""
    parser = argparse.ArgumentParser(description="Downtime and rate of checkpoints of a Linux guest.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--windows", type=int, default=8, help="windows of each machine (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one (default: %(default)s)")
    parser.add_argument(
        "--rate-seconds", type=float, default=20.0, help="for the rate (default: %(default)s)"
    )
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        with tempfile.TemporaryDirectory(prefix="colo-", ignore_cleanup_errors=True) as directory:
            result = measure(Path(directory), options)
    except (Broken, ColoError) as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result)) if options.json else report(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
