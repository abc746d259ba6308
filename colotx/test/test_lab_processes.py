"""Tests of L{colotx.lab.processes}: with small real processes where that is quick, else in memory."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import ensureDeferred
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from colotx.lab import processes
from colotx.lab.client import TrafficSettings
from colotx.lab.processes import ClientProcess, DaemonProcess, LabError, LabProcess, writeToml

_words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


class NoNamespace:
    """A namespace that is where we are."""

    def command(self, *arguments: str) -> list[str]:
        return list(arguments)


class TomlTests(SynchronousTestCase):
    @settings(max_examples=100, deadline=None)
    @given(
        st.dictionaries(
            st.from_regex(r"[a-z][a-z-]{0,10}", fullmatch=True),
            st.one_of(_words, st.integers(-(2**63), 2**63 - 1), st.booleans(), st.lists(_words, max_size=4)),
            max_size=5,
        )
    )
    def test_roundTrip(self, values: dict[str, object]) -> None:
        """What was written is what a TOML reader reads."""
        path = Path(self.mktemp())
        writeToml(path, values)
        self.assertEqual(tomllib.loads(path.read_bytes().decode()), values)


class LabProcessTests(TestCase):
    def make(self, onLine: Any = None) -> LabProcess:
        from twisted.internet import reactor

        namespace: Any = NoNamespace()
        return LabProcess(reactor, namespace, Path(self.mktemp()), onLine)

    def start(self, process: LabProcess, code: str) -> None:
        process.start([sys.executable, "-c", code], Path("."))

    async def test_ends(self) -> None:
        """Its status and last words are known when it ended; its output is in its log."""
        process = self.make()
        self.start(process, "import sys; print('said', flush=True); sys.exit('last words')")
        self.assertNotEqual(process.pid, 0)
        self.assertEqual(await process.whenEnded(), 1)
        self.assertEqual((process.pid, process.lastWords()), (0, "last words"))
        self.assertEqual(process.log.read_text(), "said\nlast words\n")
        self.assertEqual(await process.whenEnded(), 1)

    async def test_lines(self) -> None:
        """Lines of its output are handed over whole."""
        lines: list[bytes] = []
        process = self.make(lines.append)
        self.start(
            process, "import sys\nfor p in 'a', 'b\\nc\\n', 'd': sys.stdout.write(p), sys.stdout.flush()"
        )
        self.assertEqual(await process.whenEnded(), 0)
        self.assertEqual(lines, [b"ab", b"c"])

    async def test_stops(self) -> None:
        """It is asked to end; one that does not is killed."""
        self.patch(processes, "STOP_LIMIT", 0.3)
        for code, status in (
            ("print(flush=True); import time; time.sleep(60)", -15),
            ("import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)", -9),
        ):
            process = self.make()
            self.start(process, code)
            while not process.log.read_bytes():
                await shortPause()
            await process.stop()
            self.assertEqual(process.status, status)
            await process.stop()

    async def test_seesTheSource(self) -> None:
        """It can import colotx from another directory, also when that is not installed."""
        process = self.make()
        process.start([sys.executable, "-c", "import colotx"], Path("/"))
        self.assertEqual(await process.whenEnded(), 0, process.lastWords())


async def shortPause() -> None:
    from twisted.internet import reactor
    from twisted.internet.task import deferLater

    await deferLater(reactor, 0.01)


class FakeProcess:
    """In the place of L{LabProcess}: keeps what was written to it."""

    def __init__(self, reactor: Any, namespace: Any, log: Path, onLine: Any = None) -> None:
        self.log = log
        self.pid = 0
        self.status = 0
        self.transport = self
        self.written: list[bytes] = []
        self.arguments: Sequence[str] = ()
        self.ended: Any = None

    def start(self, arguments: Sequence[str], directory: Path, **variables: str) -> None:
        self.arguments, self.pid = arguments, 4711

    def whenEnded(self) -> Any:
        return self

    def addCallback(self, callback: Any) -> None:
        self.ended = callback

    def writeToChild(self, descriptor: int, data: bytes) -> None:
        self.written.append(data)

    def lastWords(self) -> str:
        return "last words"


class ClientProcessTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.patch(processes, "LabProcess", FakeProcess)
        self.reactor = MemoryReactorClock()
        namespace: Any = NoNamespace()
        self.client = ClientProcess(self.reactor, namespace, Path(self.mktemp()))
        self.process: Any = self.client.process
        self.settings = TrafficSettings("10.77.0.10")
        self.started = ensureDeferred(self.client.start(self.settings))

    def say(self, **message: Any) -> None:
        self.client._lineReceived(json.dumps(message).encode())

    def end(self) -> None:
        self.process.pid = 0
        self.process.ended(1)

    def test_run(self) -> None:
        """From the start to the report."""
        self.assertEqual(self.process.arguments[-len(self.settings.arguments()) :], self.settings.arguments())
        self.assertNoResult(self.started)
        self.say(event="connected")
        self.successResultOf(self.started)
        self.say(event="progress", sent=5)
        self.assertEqual(self.client.progress["sent"], 5)
        self.client.mark(12.5)
        finished = ensureDeferred(self.client.finish(60))
        self.assertEqual(self.process.written, [b"mark 12.5\n", b"drain\n"])
        self.say(event="report", lost=0)
        self.assertEqual(self.successResultOf(finished)["lost"], 0)

    def test_reportBeforeEnd(self) -> None:
        """A report is taken also when the process has ended since."""
        self.say(event="connected")
        self.say(event="report", lost=1)
        self.end()
        self.assertEqual(self.successResultOf(ensureDeferred(self.client.finish(60)))["lost"], 1)

    def test_fails(self) -> None:
        """A client that gives up says why."""
        self.say(event="failed", reason="nothing answers")
        self.end()
        self.assertIn("nothing answers", str(self.failureResultOf(self.started, LabError).value))

    def test_dies(self) -> None:
        """Of one that dies its last words are told."""
        self.end()
        self.assertIn("last words", str(self.failureResultOf(self.started, LabError).value))

    def test_silent(self) -> None:
        """One that says nothing is not waited for for ever."""
        self.reactor.advance(self.settings.connectTimeout + 11)
        self.failureResultOf(self.started, LabError)


class DaemonProcessTests(SynchronousTestCase):
    def test_ended(self) -> None:
        """A daemon that does not run is not asked; its last words are told."""
        self.patch(processes, "LabProcess", FakeProcess)
        namespace: Any = NoNamespace()
        values = {"control": "/nowhere/control", "state-dir": "/nowhere"}
        daemon = DaemonProcess(MemoryReactorClock(), namespace, Path(self.mktemp()), values)
        error = self.failureResultOf(ensureDeferred(daemon.query("query-status")), LabError)
        self.assertIn("last words", str(error.value))
        daemon.start()
        self.assertEqual(tomllib.loads((daemon.directory / "config.toml").read_text()), values)
