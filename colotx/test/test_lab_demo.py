"""Tests of L{colotx.lab.demo} that need no namespaces: the choices, and what a round makes of what happens."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from twisted.internet.defer import ensureDeferred, succeed
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ConfigError
from colotx.lab import demo
from colotx.lab.demo import Demo, _arguments, _chooseGuest
from colotx.lab.pair import GuestChoice, PairSettings, memoryGuest, qemuGuest
from colotx.lab.processes import LabError
from colotx.settings import buildSettings
from colotx.test.test_lab_report import clientConnection, clientReport

QEMU = GuestChoice({"guest": "qemu"}, 1001)


class ChoiceTests(SynchronousTestCase):
    def choose(self, *choice: Any) -> tuple[GuestChoice, str]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            guest = _chooseGuest(*choice)
        return guest, said.getvalue()

    def noQemu(self, binary: str, *check: int) -> GuestChoice:
        raise ConfigError("there is no QEMU")

    def test_qemuFirst(self) -> None:
        """Where QEMU is, it is the guest, unless told otherwise."""
        self.patch(demo, "qemuGuest", lambda *_: QEMU)
        self.assertEqual(self.choose(None, "host", ""), (QEMU, ""))
        self.assertEqual(self.choose("memory", "host", "")[0], memoryGuest())

    def test_fallBack(self) -> None:
        """Where it is not, the embedded guest is shown, and the user told why."""
        self.patch(demo, "qemuGuest", self.noQemu)
        guest, said = self.choose(None, "host", "")
        self.assertEqual(guest, memoryGuest())
        self.assertIn("there is no QEMU", said)

    def test_insists(self) -> None:
        """Who asked for QEMU in any way gets the error."""
        self.patch(demo, "qemuGuest", self.noQemu)
        for choice in (("qemu", "host", ""), (None, "host", "/my/qemu"), (None, "qemu", "")):
            self.assertRaises(ConfigError, _chooseGuest, *choice)

    def test_noProcess(self) -> None:
        """The embedded guest has no QEMU to kill."""
        self.assertRaises(ConfigError, _chooseGuest, "memory", "qemu", "")

    def test_missingBinary(self) -> None:
        """A QEMU that is not there is named."""
        self.assertIn("/no/such/qemu", str(self.assertRaises(ConfigError, qemuGuest, "/no/such/qemu")))

    def test_keys(self) -> None:
        """The embedded guest's keys are ones the daemon knows."""
        self.assertEqual(buildSettings({"role": "primary", **memoryGuest().keys}).guest, "memory")

    def test_arguments(self) -> None:
        """Numbers that make no sense are refused."""
        late = ["--first-connection-late"]
        for wrong in (["--rounds", "0"], ["--checkpoint-delay", "0"], ["--kill", "everything"], late):
            with contextlib.redirect_stderr(io.StringIO()):
                self.assertRaises(SystemExit, _arguments, wrong)

    def test_delays(self) -> None:
        """Checkpoints are far apart where output does not wait for them, and none comes where none may."""
        active = ["--secondary", "active"]
        delays = [
            _arguments(words).checkpoint_delay for words in ([], active, [*active, "--first-connection-late"])
        ]
        self.assertEqual(delays[:2], [50, 5000])
        self.assertGreater(delays[2], 3_600_000)
        self.assertEqual(_arguments([*active, "--checkpoint-delay", "7"]).checkpoint_delay, 7)

    def test_firstLate(self) -> None:
        """Only a Linux guest has the time stamps that its first connection fixes."""
        made: list[Any] = []
        self.patch(demo, "qemuGuest", lambda binary, **settings: made.append(settings))
        _chooseGuest(None, "host", "", "active", True)
        self.assertEqual(made, [{"patternBytes": 0, "firstTcp": False}])
        self.assertRaises(ConfigError, _chooseGuest, "memory", "host", "", "active", True)


class FakeDaemon:
    """Answers queries; its checkpoints grow with each."""

    def __init__(self) -> None:
        self.checkpoints = 0
        self.events: list[tuple[str, dict[str, Any], float]] = []

    async def query(self, command: str) -> Any:
        self.checkpoints += 1
        return {"checkpoints": self.checkpoints, "phases-ms": {"downtime": {"p50": 1.5, "p99": 3.0}}}


class FakePair:
    """A pair where everything happens at once."""

    killed: str | None = None
    closed = False
    opened = 0
    takesOver = False
    """Whether the secondary goes live before anything was broken."""

    def __init__(self, *arguments: Any) -> None:
        self.daemons = {"primary": FakeDaemon(), "secondary": FakeDaemon()}
        self.client = self
        self.report = clientReport()

    async def start(self, *arguments: Any, **more: Any) -> None:
        self.started = more

    def open(self, count: int, interval: float) -> None:
        self.opened = count

    async def describe(self) -> str:
        return "primary protected"

    def mark(self, at: float) -> None: ...

    async def finish(self, timeout: float) -> Any:
        return self.report

    def pause(self, seconds: float) -> Any:
        return succeed(None)

    async def until(self, problem: str, limit: float, condition: Any) -> None:
        for _ in range(100):
            if await condition():
                return
        raise LabError(problem)

    async def failedOver(self) -> bool:
        return self.takesOver or self.killed is not None

    def kill(self, what: str) -> float:
        self.killed = what
        self.daemons["secondary"].events.append(("COLO_EXIT", {}, 100.020))
        return 100.0

    async def __aenter__(self) -> FakePair:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.closed = True


class RoundTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.pairs: list[FakePair] = []
        self.patch(demo, "ProtectedPair", self.makePair)
        self.patch(demo, "_TRAFFIC_BEFORE", (0.0, 0.0))
        self.settings = PairSettings(memoryGuest())
        self.firstLate = False
        self.prepare: Any = lambda pair: None

    def makePair(self, *arguments: Any) -> FakePair:
        pair = FakePair()
        self.prepare(pair)
        self.pairs.append(pair)
        return pair

    def run_(self, rounds: int) -> list[Any]:
        with contextlib.redirect_stdout(io.StringIO()):
            run = Demo(MemoryReactorClock(), self.settings, "daemon", 1, Path("logs"), self.firstLate).run(
                rounds
            )
            return self.successResultOf(ensureDeferred(run))

    def test_good(self) -> None:
        """A round that goes well tells its figures, and cleans up."""
        (result,) = self.run_(1)
        self.assertEqual(result.problem, None)
        self.assertGreaterEqual(result.checkpoints, 5)
        self.assertEqual((result.downtime_p50, result.downtime_p99, result.detection_ms), (1.5, 3.0, 20.0))
        self.assertEqual(self.pairs[0].killed, "daemon")
        self.assertTrue(self.pairs[0].closed)

    def test_goesOn(self) -> None:
        """A round that fails says why, is cleaned up, and does not keep the next."""

        def prepare(pair: FakePair) -> None:
            pair.takesOver = not self.pairs

        self.prepare = prepare
        first, second = self.run_(2)
        self.assertIn("before anything was broken", first.problem)
        self.assertEqual(self.pairs[0].killed, None)
        self.assertTrue(self.pairs[0].closed)
        self.assertEqual(second.problem, None)

    def test_clientFinds(self) -> None:
        """What the client finds fails the round."""

        def prepare(pair: FakePair) -> None:
            pair.report = clientReport(doubled=16)

        self.prepare = prepare
        (result,) = self.run_(1)
        self.assertIn("doubled 16", result.problem)

    def test_active(self) -> None:
        """With an active secondary connections are opened after the last checkpoint, and the guest boots alone."""
        self.settings = PairSettings(memoryGuest(), 5000, secondary="active")
        (result,) = self.run_(1)
        self.assertEqual(result.problem, None)
        self.assertGreater(self.pairs[0].opened, 0)

    def test_firstLate(self) -> None:
        """A round whose first connection is older than a checkpoint shows nothing, and fails."""
        self.settings = PairSettings(memoryGuest(), 5000, secondary="active")
        self.firstLate = True

        def prepare(pair: FakePair) -> None:
            opened = 0.0 if self.pairs else 1e12
            pair.report = clientReport(connections=[clientConnection(opened=opened)])

        self.prepare = prepare
        first, second = self.run_(2)
        self.assertEqual((first.problem, first.late), (None, 1))
        self.assertIn("a checkpoint came", second.problem)
