"""Tests of L{colotx.lab.roundtrip}."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ConfigError
from colotx.lab import roundtrip
from colotx.lab.guestimage import CLOCK_LINE
from colotx.lab.roundtrip import RoundTrips, measure


class MeasureTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.listener.close)

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """One connection, in which each line is answered."""

        def run() -> None:
            peer, _ = self.listener.accept()
            with peer, peer.makefile("rb") as lines:
                for line in lines:
                    if not (said := answer(line)):
                        return
                    peer.sendall(said)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.addCleanup(thread.join, 10)

    def measure(self, diverging: bool = False) -> RoundTrips:
        """Ten seconds of a clock that goes on by one a look: five round trips."""
        clock = iter(range(100))
        with socket.create_connection(self.listener.getsockname(), 10) as connection:
            return measure(connection, 10.0, diverging, lambda: float(next(clock)))

    def test_identical(self) -> None:
        """An echo is measured, a line of the fixed length at a time."""
        lines: list[bytes] = []

        def echo(line: bytes) -> bytes:
            lines.append(line)
            return line

        self.serve(echo)
        found = self.measure()
        self.assertEqual((found.count, found.p50, found.p99, found.longest), (5, 1000.0, 1000.0, 1000.0))
        self.assertEqual({len(line) for line in lines}, {CLOCK_LINE})

    def test_diverging(self) -> None:
        """Other lines of the same length are right where they are expected, and wrong where they are not."""
        self.serve(lambda line: b"x" * (len(line) - 1) + b"\n")
        self.assertEqual(self.measure(diverging=True).count, 5)
        self.serve(lambda line: b"x" * (len(line) - 1) + b"\n")
        self.assertRaises(ConfigError, self.measure)

    def test_closed(self) -> None:
        """A guest that closes is an error, and so is one that is silent."""
        self.serve(lambda line: b"")
        self.assertRaises(ConfigError, self.measure)
        self.patch(roundtrip, "ANSWER_LIMIT", 0.05)
        self.serve(lambda line: line[:5])
        self.assertIn("no answer", str(self.assertRaises(ConfigError, self.measure)))

    def test_process(self) -> None:
        """The program prints what it measured."""
        self.serve(lambda line: line)
        port = self.listener.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "colotx.lab.roundtrip", "127.0.0.1", f"--port={port}", "--seconds=0.05"],
            capture_output=True,
            timeout=30,
            check=True,
        )
        self.assertGreater(RoundTrips(**json.loads(done.stdout)).count, 0)
