"""
The control socket of real daemons, driven by other people's tools for QEMU: the qemu.qmp package and its qmp-shell.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.utils import getProcessOutputAndValue
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from colotx.lab.processes import DaemonProcess
from tests.harness import asynchronous
from tests.hosts import Hosts, isProtected, until

_CLIENT = """
import asyncio, json, sys
from qemu.qmp import EventListener, ExecuteError, QMPClient

def say(value):
    print(json.dumps(value))

async def main(primaryPath, secondaryPath):
    primary, secondary = QMPClient("primary"), QMPClient("secondary")
    await primary.connect(primaryPath)
    await secondary.connect(secondaryPath)
    say([await client.execute("query-colo-status") for client in (primary, secondary)])
    await primary.execute("migrate-set-parameters", {"x-checkpoint-delay": 60000})
    say(await primary.execute("query-migrate-parameters"))
    before = (await primary.execute("query-colotx-stats"))["checkpoints"]
    await primary.execute("xen-colo-do-checkpoint")
    while (await primary.execute("query-colotx-stats"))["checkpoints"] == before:
        await asyncio.sleep(0.01)
    with secondary.listener("COLO_EXIT") as listener:
        await secondary.execute("x-colo-lost-heartbeat")
        say((await listener.get())["data"])
    say(await secondary.execute("query-colo-status"))
    say(await secondary.execute("query-status"))
    try:
        await secondary.execute("x-colo-lost-heartbeat")
    except ExecuteError as error:
        say([error.error_class, str(error)])
    for client in (primary, secondary):
        await client.disconnect()

asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), 40))
"""


class _Shell(ProcessProtocol):
    """A process that is given its standard input and whose output is kept."""

    def __init__(self, lines: bytes) -> None:
        self._lines = lines
        self.ended: Deferred[None] = Deferred()
        self.output = b""

    def connectionMade(self) -> None:
        transport: Any = self.transport
        transport.write(self._lines)
        transport.closeStdin()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self.output += data

    def processEnded(self, reason: Failure) -> None:
        self.ended.callback(None)


class ControlPeerTests(TestCase):
    """A protected embedded guest, and a stranger's client at both control sockets."""

    timeout = 120
    if find_spec("qemu") is None or find_spec("qemu.qmp") is None:
        skip = "the qemu.qmp package is not installed"

    async def protected(self, hosts: Hosts) -> tuple[DaemonProcess, DaemonProcess]:
        primary, secondary = hosts.daemon("primary"), hosts.daemon("secondary")
        for daemon in (secondary, primary):
            daemon.start()
        await until(lambda: isProtected(primary, secondary), "the guest is protected")
        return primary, secondary

    @asynchronous
    async def test_qemuQmp(self) -> None:
        """Status, parameters, a checkpoint and a failover with its event, as with a QEMU in COLO."""
        async with Hosts() as hosts:
            paths = [str(daemon.settings["control"]) for daemon in await self.protected(hosts)]
            arguments = ["-c", _CLIENT, *paths]
            output, errors, code = await getProcessOutputAndValue(sys.executable, arguments, os.environ)
            self.assertEqual((code, errors), (0, b""))
            both, parameters, event, status, guest, error = map(json.loads, output.splitlines())
            self.assertEqual([one["mode"] for one in both], ["primary", "secondary"])
            self.assertEqual(parameters["x-checkpoint-delay"], 60000)
            self.assertEqual(event, {"mode": "secondary", "reason": "request"})
            self.assertEqual((status["mode"], status["last-mode"]), ("none", "secondary"))
            self.assertEqual((guest["status"], guest["running"]), ("running", True))
            self.assertEqual(error[0], "GenericError")

    @asynchronous
    async def test_qmpShell(self) -> None:
        """An operator asks, and says the failover, in qmp-shell."""
        async with Hosts() as hosts:
            _, secondary = await self.protected(hosts)
            shell = _Shell(b"query-colo-status\nx-colo-lost-heartbeat\nquery-status\nnonsense\n")
            arguments = [sys.executable, "-m", "qemu.qmp.qmp_shell", str(secondary.settings["control"])]
            environment = {**os.environ, "HOME": str(hosts.directory), "TERM": "dumb"}
            process: Any = reactor
            process.spawnProcess(shell, sys.executable, arguments, env=environment)
            await shell.ended.addTimeout(40, reactor)
            said = shell.output.decode()
            self.assertIn('"mode": "secondary"', said)
            self.assertIn('"status": "running"', said)
            self.assertIn("The command nonsense has not been found", said)
            self.assertEqual((await secondary.query("query-colo-status"))["last-mode"], "secondary")
