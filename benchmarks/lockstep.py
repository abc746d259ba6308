"""
Lock-stepping against QEMU's own: what a guest and its clients pay for an active secondary.

Three guests of the same image run at once, on hosts of their own, and are measured in turns: one that nothing protects
(B{unprotected}), a native QEMU pair (B{native}, see L{benchmarks.native_pair}), and two daemons with
C{--secondary active} (B{colotx}). Measured are

  - the downtime of a checkpoint of an idle guest, by the events STOP and RESUME of the primary's QEMU and its clock;
  - the round trip of a small record through the comparison of the two guests' output, and what that adds;
  - what a client downloads, and what it uploads and gets back, in megabytes a second, through the same.

While clients are served no checkpoint is due, so all there are were asked for by the comparison; they are counted.
Usage::

    python -m benchmarks.lockstep [--json] [--rounds 3] [--seconds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from twisted.internet.task import deferLater

from benchmarks.machines import NEVER
from benchmarks.native_pair import MONITOR, NativePair, Unprotected, Watched
from colotx.lab.namespaces import GUEST_ADDRESS, Lab
from colotx.lab.pair import GuestChoice, PairSettings, ProtectedPair, qemuGuest
from colotx.lab.processes import LabError, LabProcess
from colotx.lab.running import runPrivileged
from colotx.statistics import percentile

DELAY = 300
"""x-checkpoint-delay while downtimes are measured, ms."""
SETTLE = 1.0
"""Seconds after a change of x-checkpoint-delay that do not count."""
TRAFFIC = ("echo", "download", "upload")
"""What the client does, see L{benchmarks.guest_traffic}."""

_TRAFFIC_LIMIT = 30.0
"""Seconds a client may take beyond what it was told to."""
_HEARTBEAT_LIMIT = 5000
"""ms: six virtual machines share the processors, and nobody's death is measured."""


class Guest(Protocol):
    """A guest to be measured."""

    lab: Lab
    watched: Watched

    async def close(self) -> None:
        """End everything."""


class Protected(Guest, Protocol):
    """One that has a secondary."""

    async def setDelay(self, milliseconds: int) -> None:
        """Set x-checkpoint-delay, which also asks for a checkpoint."""


class ColotxPair:
    """
    Two daemons, the secondary an active one.

    @ivar lab: where they run.
    @ivar watched: a monitor of the primary's QEMU.
    """

    def __init__(self, reactor: Any, directory: Path, guest: GuestChoice) -> None:
        settings = PairSettings(guest, NEVER, _HEARTBEAT_LIMIT, both={"secondary": "active"})
        self._pair = ProtectedPair(reactor, directory, settings)
        self.lab = self._pair.lab
        self.watched = Watched(reactor, directory / "primary")

    async def start(self) -> None:
        """Wait until the guest serves and is protected; then no checkpoint is due."""
        await self._pair.start(guestFirst=True)
        await self.watched.connect()

    async def setDelay(self, milliseconds: int) -> None:
        """Set x-checkpoint-delay, which also asks for a checkpoint."""
        await self._pair.daemons["primary"].query(
            "migrate-set-parameters", **{"x-checkpoint-delay": milliseconds}
        )

    async def statistics(self) -> Any:
        """@return: what the primary's daemon counted."""
        return await self._pair.daemons["primary"].query("query-colotx-stats")

    async def close(self) -> None:
        """End everything."""
        self.watched.disconnect()
        await self._pair.close()


class Bench:
    """
    The measurements.

    @ivar found: by contestant and measurement, what each turn found.
    """

    def __init__(self, reactor: Any, directory: Path, seconds: float) -> None:
        self._reactor = reactor
        self._directory = directory
        self._seconds = seconds
        self.found: dict[str, dict[str, list[dict[str, Any]]]] = {}

    async def turn(self, name: str, guest: Guest | Protected) -> None:
        """Measure one contestant once."""
        found = self.found.setdefault(name, {})
        if not isinstance(guest, Unprotected):
            found.setdefault("downtime", []).append(await self._downtime(guest))
        for what in TRAFFIC:
            known = len(guest.watched.downtimes)
            result = await self._traffic(guest.lab, what)
            result["checkpoints"] = len(guest.watched.downtimes) - known
            found.setdefault(what, []).append(result)
            told = {key: value for key, value in result.items() if key != "ms"}
            if "ms" in result:
                told["p50_ms"] = statistics.median(result["ms"])
            say(f"  {name} {what}: {told}")

    async def _downtime(self, guest: Any) -> dict[str, Any]:
        await guest.setDelay(DELAY)
        await deferLater(self._reactor, SETTLE)
        known = len(guest.watched.downtimes)
        await deferLater(self._reactor, self._seconds)
        found = [downtime for _, downtime in guest.watched.downtimes[known:]]
        await guest.setDelay(NEVER)
        await deferLater(self._reactor, SETTLE)
        if not found:
            raise LabError(f"no checkpoint in {self._seconds} s (see {guest.watched.directory})")
        return {"ms": found}

    async def _traffic(self, lab: Lab, what: str) -> dict[str, Any]:
        """@return: what the client told; C{failed}, if it gave up."""
        lines: list[bytes] = []
        client = LabProcess(self._reactor, lab.client, self._directory / "client.log", lines.append)
        address = GUEST_ADDRESS.partition("/")[0]
        arguments = ["-m", "benchmarks.guest_traffic", what, address, str(self._seconds)]
        client.start([sys.executable, *arguments], self._directory)
        killing = self._reactor.callLater(self._seconds + _TRAFFIC_LIMIT, client.kill)
        try:
            status = await client.whenEnded()
        finally:
            client.kill()
        if killing.active():
            killing.cancel()
        if status:
            return {"failed": client.lastWords() if status > 0 else "it did not end"}
        result: dict[str, Any] = json.loads(lines[-1])
        return result


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def summarize(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """
    Of one contestant.

    @return: of each measurement: what it found, all turns together (milliseconds), or the turns' median (megabytes a
        second); C{runs}: the figure of each turn, None where the client gave up.
    """
    summary: dict[str, Any] = {}
    for what, turns in found.items():
        key = "ms" if "ms" in turns[0] or what in ("downtime", "echo") else "mb_s"
        good = [turn[key] for turn in turns if key in turn]
        if key == "ms":
            values = [value for turn in good for value in turn]
            figures = {"n": len(values), **{f"p{q:.0f}": _quantile(values, q / 100) for q in (50, 99)}}
            runs = [_quantile(turn.get("ms", []), 0.5) for turn in turns]
        else:
            figures = {"mb_s": round(statistics.median(good), 2) if good else None}
            runs = [turn.get("mb_s") for turn in turns]
        summary[what] = {**figures, "runs": runs}
        if "checkpoints" in turns[0]:
            summary[what]["checkpoints"] = [turn["checkpoints"] for turn in turns]
        if failures := [turn["failed"] for turn in turns if "failed" in turn]:
            summary[what]["failures"] = failures
    return summary


def _quantile(values: Sequence[float], part: float) -> float | None:
    return round(percentile(values, part), 3) if values else None


def compare(summaries: Mapping[str, Any]) -> dict[str, Any]:
    """@return: colotx to native, the median of the rounds; what each adds to a round trip, ms."""
    alone, native, ours = (summaries[name] for name in ("unprotected", "native", "colotx"))
    ratios = {
        f"{what}_to_native": _middle(lambda one, other: one / other, ours[what]["runs"], native[what]["runs"])
        for what in ("downtime", *TRAFFIC)
    }
    added = {
        name: _middle(lambda one, other: one - other, each["echo"]["runs"], alone["echo"]["runs"])
        for name, each in (("native", native), ("colotx", ours))
    }
    return {**ratios, "echo_added_ms": added}


def _middle(
    of: Callable[[float, float], float], ones: Sequence[float | None], others: Sequence[float | None]
) -> float | None:
    """The machine may be slower in one round than in another: only figures of the same round are compared."""
    found = [of(one, other) for one, other in zip(ones, others, strict=True) if one is not None and other]
    return round(statistics.median(found), 3) if found else None


async def measure(reactor: Any, options: argparse.Namespace) -> dict[str, Any]:
    """
    Boot all, measure in turns, another one first each time.

    @raise ColoError: a guest is not protected, or takes no checkpoints.
    """
    choice = qemuGuest(patternBytes=0)
    arguments = [*choice.keys["qemu-arguments"], *MONITOR]  # type: ignore[misc]
    choice = replace(choice, keys={**choice.keys, "qemu-arguments": arguments})
    with tempfile.TemporaryDirectory(prefix="colo-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        bench = Bench(reactor, directory, options.seconds)
        guests: dict[str, Guest] = {}
        try:
            guests["unprotected"] = unprotected = Unprotected(reactor, directory / "unprotected")
            await unprotected.start(arguments)
            guests["native"] = native = NativePair(reactor, directory / "native")
            await native.start(arguments)
            guests["colotx"] = colotx = ColotxPair(reactor, directory / "colotx", choice)
            await colotx.start()
            order = list(guests.items())
            for number in range(options.rounds):
                say(f"round {number + 1} of {options.rounds}")
                for contestant, guest in (*order[number % 3 :], *order[: number % 3]):
                    await bench.turn(contestant, guest)
            counted = await colotx.statistics()
        finally:
            for guest in guests.values():
                await guest.close()
    summaries = {contestant: summarize(found) for contestant, found in bench.found.items()}
    return {
        "name": "lockstep",
        "rounds": options.rounds,
        "window_s": options.seconds,
        "delay_ms": DELAY,
        **compare(summaries),
        **summaries,
        "phases_ms": counted["phases-ms"],
        "asked_by_compare": counted["compare"]["statistics"]["asked"],
    }


def report(result: Mapping[str, Any]) -> None:
    """For people."""
    for contestant in ("unprotected", "native", "colotx"):
        for what, figures in result[contestant].items():
            print(
                f"{contestant:12} {what:9} " + "  ".join(f"{key} {value}" for key, value in figures.items())
            )
    for key, value in result.items():
        if "_to_native" in key or "_added_" in key:
            print(f"{key}: {value}")


async def _main(reactor: Any, options: argparse.Namespace) -> int:
    result = await measure(reactor, options)
    print(json.dumps(result)) if options.json else report(result)
    return 0


def main(argv: Sequence[str]) -> int:
    """@return: the exit status."""
    parser = argparse.ArgumentParser(description="Lock-stepping: colotx and a native QEMU COLO pair.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="length of one measurement (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    return runPrivileged("benchmarks.lockstep", argv, lambda reactor: _main(reactor, options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
