"""The control socket: the command table over a fake node, the socket's file, and a client on a real socket."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path
from typing import Any
from unittest import mock

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock, deferLater
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from colotx import control
from colotx.control import (
    ColoNode,
    ColoStatus,
    ControlService,
    commandTable,
    controlDirectory,
    defaultControlPath,
)
from colotx.errors import ConfigError, FailoverError, StorageError
from colotx.interfaces import ColoMode, RunState
from colotx.qmp import QmpServerFactory, connectQmp
from colotx.test.test_qmp import shortDirectory


class FakeNode:
    """A L{ColoNode} that notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.runState = RunState.RUNNING
        self.checkpointDelay = 20000
        self.status = ColoStatus(ColoMode.PRIMARY, ColoMode.NONE, "processing")
        self.replicationError: StorageError | None = None
        self.failoverError: FailoverError | None = None
        self.checkpoint: Deferred[None] | None = None
        self.failover: Deferred[None] | None = None
        self.described: dict[str, object] = {
            "vm": "guest0",
            "role": "primary",
            "status": "protected",
            "why": "the peer holds a checkpoint",
            "if-peer-dies": "the guest runs on here",
            "since": "2026-01-02T03:04:05.678+00:00",
            "seconds": 125.5,
            "peer": "192.0.2.2:7800",
            "epoch": 3,
            "guest": "running",
        }
        self.statistics: dict[str, object] = {
            "checkpoints": 12,
            "phases-ms": {
                "stop": {"p50": 0.5, "p99": 1.25, "max": 2.0},
                "downtime": {"p50": 5.0, "p99": 9.0, "max": 13.0},
            },
            "last-checkpoint": None,
            "held-frames": 4,
        }

    def properties(self) -> dict[str, object]:
        return {"compare_timeout": 3000}

    def setLimit(self, name: str, value: int) -> None:
        self.calls.append(("setLimit", name, value))

    def describeEvidence(self) -> dict[str, object]:
        return {"reasons": {"content": 1}}

    def coloStatus(self) -> ColoStatus:
        return self.status

    def setCheckpointDelay(self, milliseconds: int) -> None:
        self.checkpointDelay = milliseconds

    def doCheckpoint(self) -> object:
        self.calls.append(("checkpoint",))
        return self.checkpoint

    def lostHeartbeat(self) -> object:
        if self.failoverError is not None:
            raise self.failoverError
        self.calls.append(("failover",))
        return self.failover

    def startReplication(self, mode: ColoMode) -> None:
        self.calls.append(("start", mode))

    def stopReplication(self, failover: bool) -> None:
        self.calls.append(("stop", failover))

    def checkReplication(self) -> None:
        if self.replicationError is not None:
            raise self.replicationError

    def stopGuest(self) -> None:
        self.calls.append(("stop",))

    def continueGuest(self) -> None:
        self.calls.append(("cont",))

    def quit(self) -> None:
        self.calls.append(("quit",))

    def describeStatus(self) -> dict[str, object]:
        return self.described

    def describeStatistics(self) -> dict[str, object]:
        return self.statistics


class CommandTableTests(SynchronousTestCase):
    """L{commandTable}, spoken to in QMP."""

    def setUp(self) -> None:
        self.node = FakeNode()
        node: ColoNode = self.node
        server = QmpServerFactory(Clock(), commandTable(node), "1").buildProtocol(None)
        assert server is not None
        self.server = server
        self.transport = StringTransport()
        self.server.makeConnection(self.transport)
        self.addCleanup(self.server.connectionLost, Failure(ConnectionDone()))
        self.server.dataReceived(b'{"execute": "qmp_capabilities"}')

    def ask(self, command: str, **arguments: object) -> Any:
        """@return: the returned value, or the description of the error, which is a GenericError."""
        self.transport.clear()
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.server.dataReceived(json.dumps({"execute": command, "arguments": named}).encode())
        answer = json.loads(self.transport.value())
        if "return" in answer:
            return answer["return"]
        self.assertEqual(answer["error"]["class"], "GenericError")
        return answer["error"]["desc"]

    def test_coloStatus(self) -> None:
        """Mode, last-mode and reason, under QEMU's names."""
        self.assertEqual(
            self.ask("query-colo-status"), {"mode": "primary", "last-mode": "none", "reason": "processing"}
        )

    def test_lostHeartbeat(self) -> None:
        """The operator's word is passed on; a failover that cannot be is told in its words."""
        self.assertEqual(self.ask("x-colo-lost-heartbeat"), {})
        self.node.failoverError = FailoverError("failover is already activated (active)")
        self.assertEqual(self.ask("x-colo-lost-heartbeat"), "failover is already activated (active)")
        self.assertEqual(self.node.calls, [("failover",)])

    def test_checkpointDelay(self) -> None:
        """Set and read in milliseconds; what is out of range or unknown is refused by name, and nothing changes."""
        for good in [1, 50, 2**32 - 1]:
            self.assertEqual(self.ask("migrate-set-parameters", x_checkpoint_delay=good), {})
            self.assertEqual(self.ask("query-migrate-parameters"), {"x-checkpoint-delay": good})
        for bad in [0, -1, 2**32]:
            self.assertIn("from 1 to 4294967295", self.ask("migrate-set-parameters", x_checkpoint_delay=bad))
        for wrong in ["50", 1.5, True, None]:
            self.assertEqual(
                self.ask("migrate-set-parameters", x_checkpoint_delay=wrong),
                "Invalid parameter type for 'x-checkpoint-delay', expected: integer",
            )
        self.assertEqual(
            self.ask("migrate-set-parameters", x_checkpoint_delay=1, max_bandwidth=2),
            "Parameter 'max-bandwidth' is unexpected",
        )
        self.assertEqual(self.ask("migrate-set-parameters"), {})
        self.assertEqual(self.node.checkpointDelay, 2**32 - 1)

    def test_checkpoint(self) -> None:
        """Asked for at once, answered when the node says."""
        self.assertEqual(self.ask("xen-colo-do-checkpoint"), {})
        self.node.checkpoint = Deferred()
        self.transport.clear()
        self.server.dataReceived(b'{"execute": "xen-colo-do-checkpoint"}')
        self.assertEqual((self.node.calls, self.transport.value()), ([("checkpoint",)] * 2, b""))
        self.node.checkpoint.callback(None)
        self.assertEqual(json.loads(self.transport.value()), {"return": {}})

    def test_setReplication(self) -> None:
        """QEMU's rule: failover is only for stopping."""
        self.ask("xen-set-replication", enable=True, primary=True)
        self.ask("xen-set-replication", enable=True, primary=False)
        self.ask("xen-set-replication", enable=False, primary=True)
        self.ask("xen-set-replication", enable=False, primary=True, failover=True)
        expected = [
            ("start", ColoMode.PRIMARY),
            ("start", ColoMode.SECONDARY),
            ("stop", False),
            ("stop", True),
        ]
        self.assertEqual(self.node.calls, expected)
        for failover in [True, False]:
            self.assertEqual(
                self.ask("xen-set-replication", enable=True, primary=True, failover=failover),
                "Parameter 'failover' is only for stopping replication",
            )
        self.assertEqual(self.ask("xen-set-replication", enable=True), "Parameter 'primary' is missing")
        self.assertEqual(self.node.calls, expected)

    def test_replicationStatus(self) -> None:
        """Whether it is broken, and why."""
        self.assertEqual(self.ask("query-xen-replication-status"), {"error": False})
        self.node.replicationError = StorageError("disk full")
        self.assertEqual(self.ask("query-xen-replication-status"), {"error": True, "desc": "disk full"})

    def test_runState(self) -> None:
        """query-status as of QEMU, stop, cont and quit."""
        self.assertEqual(
            self.ask("query-status"), {"running": True, "singlestep": False, "status": "running"}
        )
        self.node.runState = RunState.COLO
        self.assertEqual(self.ask("query-status"), {"running": False, "singlestep": False, "status": "colo"})
        for command in ["stop", "cont", "quit"]:
            self.assertEqual(self.ask(command), {})
        self.assertEqual(self.node.calls, [("stop",), ("cont",), ("quit",)])

    def test_ours(self) -> None:
        """query-colotx-status and -stats carry what the node says."""
        self.assertEqual(self.ask("query-colotx-status"), self.node.described)
        self.assertEqual(self.ask("query-colotx-stats"), self.node.statistics)

    def test_queryCommands(self) -> None:
        """All of them can be found out."""
        names = {row["name"] for row in self.ask("query-commands")}
        self.assertEqual(
            names - set(commandTable(self.node)), {"qmp_capabilities", "query-commands", "query-version"}
        )
        self.assertLessEqual(set(commandTable(self.node)), names)


class PathTests(SynchronousTestCase):
    """Where the socket is by default."""

    def path(self, uid: int, **environment: str) -> str:
        with (
            mock.patch.object(os, "geteuid", lambda: uid),
            mock.patch.dict(os.environ, environment, clear=True),
        ):
            self.assertEqual(os.path.dirname(defaultControlPath("guest0")), controlDirectory())
            return defaultControlPath("guest0")

    def test_default(self) -> None:
        """/run for root, else the user's runtime directory, else one of the user's own in /tmp."""
        self.assertEqual(self.path(0, XDG_RUNTIME_DIR="/run/user/0"), "/run/colotx/guest0.sock")
        self.assertEqual(self.path(7, XDG_RUNTIME_DIR="/run/user/7"), "/run/user/7/colotx/guest0.sock")
        self.assertEqual(self.path(7), "/tmp/colotx-7/guest0.sock")


class ControlServiceTests(TestCase):
    """L{ControlService} and its file."""

    def setUp(self) -> None:
        self.directory = shortDirectory(self)
        self.path = os.path.join(self.directory, "made", "guest0.sock")
        self.node = FakeNode()

    def service(self, path: str | None = None) -> ControlService:
        from twisted.internet import reactor

        service = ControlService(reactor, path or self.path, self.node)
        self.addCleanup(service.stopService)
        return service

    def refusal(self, path: str | None = None) -> str:
        return str(self.assertRaises(ConfigError, self.service(path).startService))

    async def test_conversation(self) -> None:
        """Commands, events to all, an orderly end that removes the socket."""
        from twisted.internet import reactor

        service = self.service()
        service.emit("STOP", {})
        service.startService()
        mode = os.stat(self.path)
        self.assertEqual(stat.S_IMODE(mode.st_mode), 0o600)
        self.assertEqual(stat.S_IMODE(os.stat(os.path.dirname(self.path)).st_mode), 0o700)
        clients = [await connectQmp(reactor, self.path, 5.0) for _ in range(2)]
        events: list[Any] = []
        lost = []
        for client in clients:
            client.onEvent = lambda name, data, timestamp: events.append((name, data))
            ended: Deferred[object] = Deferred()
            client.onLost = ended.callback
            lost.append(ended)
        service.emit("COLO_EXIT", {"mode": "primary", "reason": "request"})
        status: Any = await clients[0].execute("query-colotx-status")
        await clients[1].execute("query-status")
        self.assertEqual(status["status"], "protected")
        self.assertEqual(events, [("COLO_EXIT", {"mode": "primary", "reason": "request"})] * 2)
        await service.stopService()
        self.assertFalse(os.path.exists(self.path))
        for ended in lost:
            await ended

    async def test_answersAtTheEnd(self) -> None:
        """Who asked before the end gets the answer: C{quit} does."""
        from twisted.internet import reactor

        service = self.service()
        service.startService()
        client = await connectQmp(reactor, self.path, 5.0)
        self.node.checkpoint = Deferred()
        answer = client.execute("xen-colo-do-checkpoint")
        while not self.node.calls:
            await deferLater(reactor, 0)
        stopped = service.stopService()
        self.node.checkpoint.callback(None)
        self.assertEqual(await answer, {})
        await stopped

    async def test_stale(self) -> None:
        """A socket left behind by a dead daemon is replaced."""
        os.mkdir(os.path.dirname(self.path), 0o700)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(self.path)
        self.service().startService()
        await deferToThread(_connect, self.path)

    async def test_alive(self) -> None:
        """A second daemon is refused, and the first one's socket stays."""
        self.service().startService()
        self.assertIn("another daemon answers", self.refusal())
        await deferToThread(_connect, self.path)

    def test_busy(self) -> None:
        """Somebody whose queue is full is alive, too."""
        os.mkdir(os.path.dirname(self.path), 0o700)
        self.patch(control, "PROBE_TIME", 0.05)
        with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
            busy.bind(self.path)
            busy.listen(0)
            waiting.connect(self.path)
            self.assertIn("another daemon answers", self.refusal())
        self.assertTrue(os.path.exists(self.path))

    def test_unusable(self) -> None:
        """Each path that cannot be says why, and nothing is removed."""
        file = Path(self.directory, "file")
        file.write_text("mine")
        self.assertIn("no socket", self.refusal(str(file)))
        self.assertIn("cannot be used", self.refusal(str(file / "guest0.sock")))
        self.assertEqual(file.read_text(), "mine")
        self.assertIn("107 bytes", self.refusal("/tmp/" + "x" * 120))

    def test_foreignDirectory(self) -> None:
        """A directory of another user's, who could replace the socket, is refused."""
        if os.geteuid() != 0:
            raise self.skipTest("needs root")
        foreign = os.path.join(self.directory, "foreign")
        os.mkdir(foreign)
        os.chown(foreign, 65534, 65534)
        self.assertIn("belongs to another user", self.refusal(os.path.join(foreign, "guest0.sock")))

    async def test_removed(self) -> None:
        """The service ends also when somebody removed its socket, or the whole directory."""
        service = self.service()
        service.startService()
        os.unlink(self.path)
        os.rmdir(os.path.dirname(self.path))
        await service.stopService()
        self.assertFalse(os.path.exists(self.path))

    async def test_restart(self) -> None:
        """It can be started again, and stopped twice."""
        service = self.service()
        for _ in range(2):
            service.startService()
            await deferToThread(_connect, self.path)
            await service.stopService()
        await service.stopService()


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(path)
        assert b"colotx" in client.recv(1000)
