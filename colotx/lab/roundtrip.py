"""
A round-trip meter: one small record at a time to a service of the guest and back.

Runs as a process of its own inside the client's network namespace and ends with one JSON object on its standard
output::

    python -m colotx.lab.roundtrip HOST [--port 7] [--seconds 10]       the same from both guests of a pair
    python -m colotx.lab.roundtrip HOST --port 13 --diverging           the guest's clock: never the same

It blocks on purpose: between the network and the clock there is nothing but a system call.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colotx.errors import ConfigError
from colotx.lab.guestimage import CLOCK_LINE, ECHO_PORT
from colotx.lab.namespaces import Namespace
from colotx.lab.processes import LabError, LabProcess
from colotx.lab.traffic import percentile

ANSWER_LIMIT = 30.0
"""Seconds one answer may take."""
_MARGIN = 10.0


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """
    What was measured.

    @ivar count: how many round trips there were.
    @ivar p50: milliseconds, as C{p99} and C{longest}.
    @ivar each: milliseconds, rounded, in order; the first thousands.
    """

    count: int
    p50: float
    p99: float
    longest: float
    each: list[float]


def measure(
    connection: socket.socket, seconds: float, diverging: bool, now: Callable[[], float] = time.monotonic
) -> RoundTrips:
    """
    Send lines of L{CLOCK_LINE} bytes, one at a time; each is answered by as many bytes.

    @param diverging: the answer is another line than was sent; else it must be the same.
    @raise ConfigError: the guest closed, or answered wrongly, or nothing came in L{ANSWER_LIMIT}.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(ANSWER_LIMIT)
    taken: list[float] = []
    end = now() + seconds
    while (sent := now()) < end:
        line = b"%*d\n" % (CLOCK_LINE - 1, len(taken))
        answer = _ask(connection, line)
        taken.append((now() - sent) * 1000)
        if (answer == line) is diverging:
            raise ConfigError(f"the guest answered {answer!r} to {line!r}")
    p50, p99, longest = (round(percentile(taken, share) or 0.0, 3) for share in (0.5, 0.99, 1.0))
    return RoundTrips(len(taken), p50, p99, longest, [round(one, 3) for one in taken[:10_000]])


def _ask(connection: socket.socket, line: bytes) -> bytes:
    """@return: as many bytes as were sent."""
    answer = b""
    try:
        connection.sendall(line)
        while len(answer) < len(line):
            piece = connection.recv(len(line) - len(answer))
            if not piece:
                raise ConfigError("the guest closed the connection")
            answer += piece
    except OSError as error:
        raise ConfigError(f"no answer: {error}") from None
    return answer


async def measureFrom(
    reactor: Any,
    namespace: Namespace,
    log: Path,
    host: str,
    port: int,
    seconds: float,
    diverging: bool = False,
) -> RoundTrips:
    """
    Run the meter in a namespace.

    @param log: a file that gets what it says on standard error.
    @raise LabError: it failed, with its last words.
    """
    lines: list[bytes] = []
    meter = LabProcess(reactor, namespace, log, lines.append)
    options = [host, f"--port={port}", f"--seconds={seconds}", *(["--diverging"] if diverging else [])]
    meter.start([sys.executable, "-m", "colotx.lab.roundtrip", *options], log.parent)
    killing = reactor.callLater(seconds + ANSWER_LIMIT + _MARGIN, meter.kill)
    status = await meter.whenEnded()
    if killing.active():
        killing.cancel()
    if status or not lines:
        raise LabError(f"the round-trip meter: {meter.lastWords()} (see {log})")
    return RoundTrips(**json.loads(lines[-1]))


def main(argv: Sequence[str]) -> int:
    """@return: the exit status: 0 when every answer came and was right."""
    parser = argparse.ArgumentParser(
        prog="python -m colotx.lab.roundtrip",
        description="Measure round trips to a test guest, one at a time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("host", help="address of the guest")
    parser.add_argument("--port", type=int, default=ECHO_PORT, help="TCP port of the service")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long")
    parser.add_argument("--diverging", action="store_true", help="the answers differ from what was sent")
    options = parser.parse_args(argv)
    try:
        with socket.create_connection((options.host, options.port), ANSWER_LIMIT) as connection:
            found = measure(connection, options.seconds, options.diverging)
    except (OSError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(asdict(found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
