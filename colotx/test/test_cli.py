"""The colo command, against a daemon's control socket with a fake node behind it, and against what is no daemon."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.internet.utils import getProcessOutputAndValue
from twisted.trial.unittest import SynchronousTestCase, TestCase

import colotx
import colotx.lab.demo
from colotx import _qmp_blocking, cli
from colotx.certificates import Credentials
from colotx.control import ControlService
from colotx.errors import FailoverError
from colotx.status import Protection
from colotx.test.test_control import FakeNode
from colotx.test.test_qmp import shortDirectory

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(colotx.__file__).parent.parent)}


class _Output:
    """What the command prints, until it is asked for."""

    def __init__(self, case: SynchronousTestCase) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        case.patch(sys, "stdout", self.out)
        case.patch(sys, "stderr", self.err)


class DaemonTests(TestCase):
    """Commands to a daemon."""

    def setUp(self) -> None:
        from twisted.internet import reactor

        self.reactor: Any = reactor
        self.directory = shortDirectory(self)
        self.patch(cli, "controlDirectory", lambda: self.directory)
        self.node = FakeNode()
        self.path = os.path.join(self.directory, "guest0.sock")
        service = ControlService(reactor, self.path, self.node)
        service.startService()
        self.addCleanup(service.stopService)
        self.service = service

    async def colo(self, *argv: str) -> tuple[int, str, str]:
        output = _Output(self)
        status = await deferToThread(cli.main, argv)
        return status, output.out.getvalue(), output.err.getvalue()

    async def test_status(self) -> None:
        """The only daemon is found; text for people, JSON for programs."""
        status, out, err = await self.colo("status")
        self.assertEqual((status, err), (cli.OK, ""))
        self.assertIn("protected for 2 min 6 s", out)
        status, out, err = await self.colo("status", "--json")
        self.assertEqual((status, json.loads(out), err), (cli.OK, self.node.described, ""))

    async def test_statusCodes(self) -> None:
        """Only protected is exit status 0."""
        for protection in Protection:
            self.node.described["status"] = protection.value
            status, out, _ = await self.colo("status", "--socket", self.path)
            self.assertEqual(status, cli.OK if protection is Protection.PROTECTED else cli.NOT_PROTECTED)
            self.assertIn(protection.value, out)

    async def test_stats(self) -> None:
        """Figures, or JSON."""
        status, out, _ = await self.colo("stats")
        self.assertEqual(status, cli.OK)
        self.assertIn("downtime", out)
        _, out, _ = await self.colo("stats", "--json")
        self.assertEqual(json.loads(out), self.node.statistics)

    async def test_checkpoint(self) -> None:
        """It is asked for."""
        status, out, _ = await self.colo("checkpoint")
        self.assertEqual((status, self.node.calls), (cli.OK, [("checkpoint",)]))
        self.assertIn("asked for", out)

    async def test_failover(self) -> None:
        """Done, or refused in the daemon's words."""
        status, _, _ = await self.colo("failover")
        self.assertEqual((status, self.node.calls), (cli.OK, [("failover",)]))
        self.node.failoverError = FailoverError("failover is already activated (active)")
        status, _, err = await self.colo("failover")
        self.assertEqual((status, err), (cli.ERROR, "colo: failover is already activated (active)\n"))

    async def test_slowFailover(self) -> None:
        """An answer that does not come is said to be missing; events are no answer."""
        self.patch(cli, "FAILOVER_TIME", 0.3)
        self.node.failover = Deferred()
        self.addCleanup(self.node.failover.callback, None)
        self.reactor.callLater(0.1, self.service.emit, "STOP", {})
        status, _, err = await self.colo("failover")
        self.assertEqual(status, cli.ERROR)
        self.assertIn("waited for the answer to x-colo-lost-heartbeat in vain", err)

    async def test_several(self) -> None:
        """With several daemons one must be named; they are listed as they can be."""
        other = Path(self.directory, "other.sock")
        other.touch()
        status, out, err = await self.colo("status")
        self.assertEqual((status, out), (cli.USAGE, ""))
        self.assertIn(f"\n  --socket {self.path}\n  --socket {other}\n", err)
        status, _, _ = await self.colo("status", "--socket", self.path)
        self.assertEqual(status, cli.OK)

    async def test_process(self) -> None:
        """python -m colotx is the command, in a process of its own."""
        out, err, status = await getProcessOutputAndValue(
            sys.executable, ["-m", "colotx", "status", "--json", "--socket", self.path], env=ENVIRONMENT
        )
        self.assertEqual((json.loads(out), err, status), (self.node.described, b"", 0))


class NoDaemonTests(SynchronousTestCase):
    """What answers is no daemon, or nothing does."""

    def setUp(self) -> None:
        self.directory = shortDirectory(self)
        self.path = os.path.join(self.directory, "x.sock")
        self.patch(cli, "controlDirectory", lambda: self.directory)
        self.patch(_qmp_blocking, "CONNECT_TIME", 0.3)
        self.output = _Output(self)

    def serve(self, answer: Callable[[socket.socket], object]) -> None:
        """Take one connection in a thread, and keep it open until the test has ended."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen()
        listener.settimeout(5)
        ended = threading.Event()

        def run() -> None:
            with listener, listener.accept()[0] as connection:
                connection.settimeout(5)
                answer(connection)
                ended.wait(5)

        thread = threading.Thread(target=run)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(ended.set)

    def unreachable(self) -> str:
        self.assertEqual(cli.main(["status"]), cli.UNREACHABLE)
        return self.output.err.getvalue()

    def test_none(self) -> None:
        """No socket at all: where it was looked for, and what to do."""
        message = self.unreachable()
        self.assertIn(self.directory, message)
        self.assertIn("twistd colo --help", message)

    def test_missing(self) -> None:
        """The one that was named is not there."""
        self.assertEqual(cli.main(["status", "--socket", self.path]), cli.UNREACHABLE)
        self.assertIn("no such socket", self.output.err.getvalue())

    def test_dead(self) -> None:
        """A socket left behind."""
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(self.path)
        self.assertIn("start it again", self.unreachable())

    def test_silent(self) -> None:
        """Nobody greets."""
        self.serve(lambda connection: None)
        self.assertIn("waited for its greeting in vain", self.unreachable())

    def test_foreign(self) -> None:
        """Something else's socket."""
        self.serve(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"))
        self.assertIn("not a colotx control socket", self.unreachable())

    def test_full(self) -> None:
        """A daemon with too many clients closes at once."""
        self.serve(lambda connection: connection.close())
        self.assertIn("closed the connection", self.unreachable())

    def test_otherVersion(self) -> None:
        """A QMP server that does not know our commands, or answers otherwise: refused, not a crash."""
        for answer, expected in [
            ({"error": {"class": "CommandNotFound", "desc": "not found"}}, "colo: not found"),
            ({"return": []}, "another version"),
        ]:

            def script(connection: socket.socket, answer: object = answer) -> None:
                for message in [{"QMP": {}}, {"return": {}}, answer]:
                    connection.sendall(json.dumps(message).encode())
                    connection.recv(1000)

            self.serve(script)
            self.assertEqual(cli.main(["status"]), cli.ERROR)
            self.assertIn(expected, self.output.err.getvalue())
            os.unlink(self.path)


class OtherCommandTests(SynchronousTestCase):
    """What needs no daemon."""

    def setUp(self) -> None:
        self.output = _Output(self)

    def leaves(self, *argv: str) -> int | str | None:
        return cast(SystemExit, self.assertRaises(SystemExit, cli.main, argv)).code

    def test_help(self) -> None:
        """The exit statuses are documented."""
        self.assertEqual(self.leaves("--help"), 0)
        text = self.output.out.getvalue()
        for expected in [
            "0  done",
            "1  refused",
            "2  wrong",
            "3  status: resyncing",
            "4  no daemon",
            "failover",
        ]:
            self.assertIn(expected, text)

    def test_usage(self) -> None:
        """Wrong usage is exit status 2."""
        for argv in [[], ["nonsense"], ["status", "--nonsense"], ["certs"], ["certs", "issue"]]:
            self.assertEqual(self.leaves(*argv), cli.USAGE)

    def test_certs(self) -> None:
        """An authority and a host's certificate that the link takes; a second authority is refused."""
        base = Path(self.mktemp())
        authority, host = base / "ca", base / "host"
        self.assertEqual(cli.main(["certs", "init", str(authority)]), cli.OK)
        issue = ["certs", "issue", "--authority", str(authority), "--out", str(host)]
        self.assertEqual(cli.main([*issue, "host1.example", "192.0.2.1"]), cli.OK)
        credentials = Credentials.load(host / "ca.pem", host / "cert.pem", host / "key.pem")
        credentials.checkName("192.0.2.1")
        self.assertIn("--ca=ca.pem --certificate=cert.pem --key=key.pem", self.output.out.getvalue())
        self.assertEqual(cli.main(["certs", "init", str(authority)]), cli.ERROR)
        self.assertIn("holds an authority already", self.output.err.getvalue())

    def test_demo(self) -> None:
        """All arguments, --help included, are the demo's; so is the exit status."""
        seen: list[list[str]] = []

        def demo(argv: list[str]) -> int:
            seen.append(argv)
            return 7

        self.patch(colotx.lab.demo, "main", demo)
        self.assertEqual(cli.main(["demo", "--rounds", "3", "--help"]), 7)
        self.assertEqual(seen, [["--rounds", "3", "--help"]])


class ImportTests(TestCase):
    """The command's start."""

    async def test_noReactor(self) -> None:
        """It does not install a reactor: the demo may want one of its own."""
        program = "import sys, colotx.cli; sys.exit('twisted.internet.reactor' in sys.modules)"
        _, err, status = await getProcessOutputAndValue(sys.executable, ["-c", program], env=ENVIRONMENT)
        self.assertEqual((err, status), (b"", 0))
