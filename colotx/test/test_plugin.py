"""twistd finds C{colo}, and says in one line what is wrong. Subprocesses: this is what an operator sees."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from twisted.application.service import IService
from twisted.internet.testing import MemoryReactorClock
from twisted.internet.utils import getProcessOutputAndValue
from twisted.trial.unittest import SynchronousTestCase, TestCase

import colotx
from colotx.options import Options
from colotx.tap import makeService

PROJECT = str(Path(colotx.__file__).parent.parent)


async def twistd(*arguments: str) -> tuple[str, str, int]:
    """@return: its standard output, standard error, exit code."""
    environment = dict(os.environ, PYTHONPATH=PROJECT)
    out, err, code = await getProcessOutputAndValue(
        sys.executable,
        ["-c", "from twisted.scripts.twistd import run; run()", *arguments],
        env=environment,
        path=os.getcwd(),
    )
    return out.decode(), err.decode(), code


class PluginTests(TestCase):
    timeout = 60

    async def test_twistdFindsIt(self) -> None:
        out, err, code = await twistd("--help")
        self.assertEqual((err, code), ("", 0))
        self.assertRegex(out, r"(?m)^ +colo +Keep a virtual machine's service running")

    async def test_wrongOptionIsOneLine(self) -> None:
        for arguments, words in (
            (["--role=both"], "role: 'both' is none of primary, secondary"),
            # Found out only when the service is made:
            (
                [
                    "--role=primary",
                    f"--state-dir={self.mktemp()}",
                    "--ca=nowhere",
                    "--certificate=c",
                    "--key=k",
                ],
                "nowhere is missing",
            ),
        ):
            out, err, code = await twistd("-n", "colo", *arguments)
            self.assertEqual(code, 1)
            lines = [line for line in (out + err).splitlines() if words in line]
            self.assertEqual(len(lines), 1, out + err)
            self.assertNotIn("Traceback", out + err)


class MakeServiceTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.patch(os, "geteuid", lambda: 1000)
        self.patch(os, "environ", dict(os.environ, XDG_STATE_HOME=os.path.abspath(self.mktemp())))
        self.reactor = MemoryReactorClock()

    def make(self, *arguments: str) -> IService:
        options = Options()
        options.parseOptions(list(arguments))
        return makeService(options, self.reactor)

    def test_bothRoles(self) -> None:
        for role in ("primary", "secondary"):
            service = self.make(f"--role={role}")
            self.assertTrue(IService.providedBy(service))
            self.assertEqual(service.role.role, role)
            self.assertEqual(service.status.describe()["status"], "unprotected")

    def test_nothingHappensBeforeItIsStarted(self) -> None:
        self.make("--role=primary")
        self.assertEqual(self.reactor.tcpClients + self.reactor.tcpServers + self.reactor.unixServers, [])
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_cannotWork(self) -> None:
        error = self.assertRaises(
            SystemExit, self.make, "--role=primary", "--ca=nowhere", "--certificate=c", "--key=k"
        )
        self.assertIn("nowhere is missing", str(error.code))
