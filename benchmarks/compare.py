"""
How fast our comparer is, and what a frame costs it, against QEMU's C{colo-compare}: the same two streams of frames,
the same sockets, in the same run, in turns.

Both run as processes, ours as C{twistd colo --role=compare}; both are fresh for every run. This process has made all
frames before, writes them in large pieces as fast as they are taken, and only counts what comes back, so it is not
what is measured. A run ends when the last frame has left. CPU time is the comparer's process', all threads. Ratios
are run by run: ours against QEMU's just before or after it. Usage::

    python -m benchmarks.compare [--json] [--runs 9] [--profiles small mixed mtu flows] [--share 1.0]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.compare_traffic import PROFILES, Traffic, traffic
from colotx.errors import ColoError
from colotx.lab.comparepeer import CompareOptions, CompareProcess, RemoteComparer, ourCommand, qemuCommand

KINDS: dict[str, Callable[[CompareOptions], list[str]]] = {"ours": ourCommand, "qemu": qemuCommand}

LIMIT = 120.0
"""Seconds a run may take."""

SEND_BUFFER = 32 << 10
"""Bytes."""

_READ = 1 << 20
_REQUEST = 4 + len(b"DO_CHECKPOINT")


@dataclass(frozen=True, slots=True)
class Run:
    """
    @ivar frames: of both guests, a second.
    @ivar cpu: microseconds of CPU time a frame.
    @ivar left: share of the primary's frames that left, by their bytes.
    @ivar requests: how often a checkpoint was asked for.
    """

    frames: float
    cpu: float
    left: float
    requests: int


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def run(kind: str, what: Traffic, directory: Path) -> Run:
    """
    One comparer, from its start to its end.

    @raise LabError: it broke.
    """
    options = CompareOptions(compareTimeout=60_000)
    process = CompareProcess(KINDS[kind](options), directory)
    comparer = RemoteComparer(process, options)
    with contextlib.closing(comparer):
        return _feed(process, comparer, what)


def _feed(process: CompareProcess, comparer: RemoteComparer, what: Traffic) -> Run:
    inputs = [comparer.connection("primary_in"), comparer.connection("secondary_in")]
    outdev, notify = comparer.connection("outdev"), comparer.connection("notify_dev")
    for connection in (*inputs, outdev, notify):
        connection.setblocking(False)
    for connection in inputs:
        # Little waits to be read, so that one guest is ahead of the other as far as was meant, and not by what a
        # socket holds.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    # The last thing said: when it leaves, what could leave did, or does with it.
    mark = comparer.encode([comparer.newMark()])
    chunks = [*what.chunks, (0, mark), (1, mark)]
    space = memoryview(bytearray(_READ))
    received = requests = 0
    end = b""
    cpu, began = process.cpuSeconds(), time.perf_counter()
    position, piece = 0, memoryview(chunks[0][1])
    while mark not in end:
        writable: list[Any] = []
        if position < len(chunks):
            writable = [inputs[chunks[position][0]]]
        readable, writable, _ = select.select([outdev, notify], writable, [], 1.0)
        if outdev in readable:
            count = outdev.recv_into(space)
            received += count
            if not count:
                raise ColoError("the comparer hung up")
            if position == len(chunks):
                end = end[-len(mark) :] + bytes(space[:count])
        if notify in readable:
            requests += len(notify.recv(_READ)) // _REQUEST
        if writable:
            # As much as is taken, so that one turn of this loop is many frames.
            with contextlib.suppress(BlockingIOError):
                while position < len(chunks):
                    piece = piece[inputs[chunks[position][0]].send(piece) :]
                    if not piece:
                        position += 1
                        piece = memoryview(chunks[position][1] if position < len(chunks) else b"")
        if time.perf_counter() > began + LIMIT:
            raise ColoError(f"{received} bytes left within {LIMIT:.0f} s, and then nothing")
    took, cpu = time.perf_counter() - began, process.cpuSeconds() - cpu
    while select.select([outdev], [], [], 0.05)[0] and (count := outdev.recv_into(space)):
        received += count
    frames = what.primary + what.secondary
    left = (received - len(mark)) / (what.bytes + 4 * what.primary)
    return Run(frames / took, cpu / frames * 1e6, left, requests)


def measure(profiles: Sequence[str], runs: int, share: float) -> dict[str, Any]:
    """@param share: of the frames of each profile."""
    result: dict[str, Any] = {"name": "compare", "runs": runs, "profiles": {}}
    with tempfile.TemporaryDirectory(prefix="colo-", ignore_cleanup_errors=True) as directory:
        for name in profiles:
            profile = replace(PROFILES[name], frames=int(PROFILES[name].frames * share))
            what = traffic(profile, name)
            say(f"{name}: {what.primary} frames of {what.bytes // what.primary} bytes on average")
            found: dict[str, list[Run]] = {kind: [] for kind in KINDS}
            for number in range(runs):
                # Who goes first changes each time.
                for kind in list(KINDS)[:: 1 if number % 2 else -1]:
                    found[kind].append(run(kind, what, Path(directory) / f"{name}{number}{kind[0]}"))
                ours, qemu = found["ours"][-1], found["qemu"][-1]
                say(
                    f"  run {number + 1} of {runs}: ours {ours.frames:.0f} frames/s {ours.cpu:.2f} us, "
                    f"QEMU {qemu.frames:.0f} frames/s {qemu.cpu:.2f} us: {ours.frames / qemu.frames:.2f}x"
                )
            result["profiles"][name] = _summary(found)
    rates = [figures["rate_ratio"] for figures in result["profiles"].values()]
    result["lowest_median_ratio"] = min(ratio["median"] for ratio in rates)
    result["lowest_ratio"] = min(ratio["min"] for ratio in rates)
    return result


def _summary(found: dict[str, list[Run]]) -> dict[str, Any]:
    pairs = list(zip(found["ours"], found["qemu"], strict=True))
    summary: dict[str, Any] = {
        kind: {
            "frames_per_s": round(median(one.frames for one in runs)),
            "cpu_us_per_frame": round(median(one.cpu for one in runs), 3),
            "left": round(min(one.left for one in runs), 5),
            "requests": max(one.requests for one in runs),
        }
        for kind, runs in found.items()
    }
    summary["rate_ratio"] = _spread([ours.frames / qemu.frames for ours, qemu in pairs])
    summary["cpu_ratio"] = _spread([qemu.cpu / ours.cpu for ours, qemu in pairs])
    return summary


def _spread(ratios: Sequence[float]) -> dict[str, Any]:
    return {
        "median": round(median(ratios), 2),
        "min": round(min(ratios), 2),
        "max": round(max(ratios), 2),
        "runs": [round(ratio, 2) for ratio in ratios],
    }


def report(result: dict[str, Any]) -> None:
    """For people."""
    print(f"{'':7} {'frames/s':>18} {'us CPU/frame':>14} {'left':>16} {'rate':>12} {'CPU':>12}")
    print(f"{'':7} {'ours      QEMU':>18} {'ours   QEMU':>14} {'ours    QEMU':>16}")
    for name, figures in result["profiles"].items():
        ours, qemu = figures["ours"], figures["qemu"]
        rate, cpu = figures["rate_ratio"], figures["cpu_ratio"]
        print(
            f"{name:7} {ours['frames_per_s']:8} {qemu['frames_per_s']:9} "
            f"{ours['cpu_us_per_frame']:7.2f} {qemu['cpu_us_per_frame']:6.2f} "
            f"{ours['left']:8.4f} {qemu['left']:7.4f} {rate['median']:6.2f}x >={rate['min']:.2f} {cpu['median']:6.2f}x"
        )


def main() -> int:
    """@return: the exit status."""
    parser = argparse.ArgumentParser(description="Our comparer against QEMU's colo-compare.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--runs", type=int, default=9, help="of each comparer and profile (default: %(default)s)"
    )
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), default=list(PROFILES))
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the frames of each (default: %(default)s)"
    )
    options = parser.parse_args()
    # Ended from outside, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        result = measure(options.profiles, options.runs, options.share)
    except ColoError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result)) if options.json else report(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
