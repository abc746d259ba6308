"""
All benchmarks, and what is expected of them: C{python -m benchmarks [--only NAME ...] [--quick] [--json FILE]}.

The last line of standard output is one JSON object: what each benchmark found, each bar, and whether it was met. A
missed bar is told and no failure; the exit status is 1 only when a benchmark broke.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 1800.0
"""Seconds one benchmark may take."""

BENCHMARKS = {
    "stream_reader": ("--mib", "64", "--runs", "3"),
    "link": ("--megabytes", "32", "--runs", "3"),
    "checkpoint": ("--windows", "3", "--seconds", "2", "--rate-seconds", "8"),
    "failover": ("--rounds", "2"),
    "lockstep": ("--rounds", "1"),
    "compare": ("--runs", "3", "--share", "0.3"),
}
"""Name, which is the module's, and the options that make it quick."""


@dataclass(frozen=True, slots=True)
class Bar:
    """
    What one figure of a benchmark should be.

    @ivar path: keys that lead to the figure in what the benchmark printed.
    @ivar atMost: it should be C{limit} or less; else C{limit} or more.
    """

    what: str
    benchmark: str
    path: tuple[str, ...]
    limit: float
    atMost: bool

    def judge(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """@return: the bar, the figure (None: there is none) and whether it is met."""
        figure: Any = results[self.benchmark]
        for key in self.path:
            figure = figure.get(key) if isinstance(figure, dict) else None
        met = figure is not None and (figure <= self.limit if self.atMost else figure >= self.limit)
        return {
            "bar": self.what,
            "benchmark": self.benchmark,
            "figure": figure,
            "at most" if self.atMost else "at least": self.limit,
            "met": met,
        }


BARS = (
    Bar("reader, runs of pages, GB/s", "stream_reader", ("uniform_gb_s",), 1.0, False),
    Bar("reader, mixed records, GB/s", "stream_reader", ("mixed_gb_s",), 0.5, False),
    Bar("downtime, guest idle: pair / bare peer", "checkpoint", ("idle", "pair_to_bare"), 2.0, True),
    Bar("downtime, guest dirties: pair / bare peer", "checkpoint", ("dirtying", "pair_to_bare"), 2.0, True),
    Bar("checkpoints a second at delay 50 ms", "checkpoint", ("rate", "per_s"), 20.0, False),
    Bar("downtime, guest idle: slow link / fast link", "checkpoint", ("idle", "slow_to_fast"), 1.5, True),
    Bar(
        "downtime, guest dirties: slow link / fast link",
        "checkpoint",
        ("dirtying", "slow_to_fast"),
        1.5,
        True,
    ),
    Bar("takeover of a 256 MB guest, p99, ms", "failover", ("takeover_ms", "p99"), 300.0, True),
    Bar("client's outage after detection, p99, ms", "failover", ("after_detection_ms", "p99"), 300.0, True),
    Bar("downtime, lock-stepping: colotx / native", "lockstep", ("downtime_to_native",), 1.0, True),
    Bar("round trip through compare: colotx / native", "lockstep", ("echo_to_native",), 1.0, True),
    Bar("round trip: what colotx adds, ms", "lockstep", ("echo_added_ms", "colotx"), 1.0, True),
    Bar("download through compare: colotx / native", "lockstep", ("download_to_native",), 1.0, False),
    Bar("upload through compare: colotx / native", "lockstep", ("upload_to_native",), 1.0, False),
    *(
        Bar(
            f"comparer, {name}: rate / QEMU's, median",
            "compare",
            ("profiles", name, "rate_ratio", "median"),
            1.5,
            False,
        )
        for name in ("small", "mixed", "mtu", "flows")
    ),
    Bar("comparer, any run: rate / QEMU's", "compare", ("lowest_ratio",), 1.0, False),
)


def run(name: str, quick: bool) -> dict[str, Any]:
    """@return: what the benchmark printed, or C{{"error": ...}}."""
    options = BENCHMARKS[name] if quick else ()
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *options]
    print(f"== {name}", file=sys.stderr, flush=True)
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
        if process.returncode:
            return {"error": f"{name} ended with status {process.returncode}; it said why above"}
        found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"{name} took longer than {LIMIT:.0f} s"}
    except (ValueError, IndexError):
        return {"error": f"{name} printed no JSON"}
    finally:
        # Asked, it removes what it started.
        process.terminate()
        process.wait()
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """@return: the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure colotx, and judge what was found."
    )
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help="only these")
    parser.add_argument("--quick", action="store_true", help="shorter runs; figures scatter more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object there, too")
    options = parser.parse_args()
    results = {name: run(name, options.quick) for name in options.only or BENCHMARKS}
    bars = [bar.judge(results) for bar in BARS if bar.benchmark in results]
    for bar in bars:
        limit = f"at most {bar['at most']}" if "at most" in bar else f"at least {bar['at least']}"
        print(f"{'met' if bar['met'] else 'MISSED':7} {bar['bar']:48} {bar['figure']!s:>9}  ({limit})")
    broken = [name for name, result in results.items() if "error" in result]
    for name in broken:
        print(f"BROKEN  {results[name]['error']}")
    summary = json.dumps(
        {
            "benchmarks": results,
            "bars": bars,
            "all_met": all(bar["met"] for bar in bars),
            "quick": options.quick,
            "machine": {"python": platform.python_version(), "kernel": platform.release()},
        }
    )
    if options.json:
        options.json.write_text(summary + "\n")
    print(summary, flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
