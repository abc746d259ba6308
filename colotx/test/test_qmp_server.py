"""The QMP server, against a scripted client, the C{qemu.qmp} package's client and C{qmp-shell}."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.internet.utils import getProcessOutputAndValue
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from colotx import _qmp_server
from colotx.errors import FailoverError, QmpError
from colotx.qmp import Command, QmpServerFactory
from colotx.test.test_qmp import shortDirectory
from colotx.test.test_qmp_codec import BOUNDED, objects


class ServerTransport(StringTransport):
    """A transport as of a server's unix socket, whose buffer the test declares full."""

    producer: Any

    def clogged(self) -> None:
        self.producer.pauseProducing()

    def drained(self) -> None:
        self.producer.resumeProducing()


class ServerTests(SynchronousTestCase):
    """L{QmpServerFactory} against a scripted client."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1_700_000_000.25)
        self.slow: list[Deferred[object]] = []
        self.calls: list[Any] = []
        self.factory = QmpServerFactory(
            self.clock,
            {
                "echo": Command(lambda **arguments: arguments, {"a-flag": bool}, {"count": int, "name": str}),
                "nothing": Command(lambda: self.calls.append("nothing")),
                "slow": Command(self.doSlow),
                "fail": Command(self.doFail),
                "broken": Command(lambda: 1 // 0),
                "qemu-fails": Command(lambda: self.raising(QmpError("DeviceNotFound", "no such"))),
                "unspeakable": Command(object),
                "coroutine": Command(self.doCoroutine),
            },
            version="1.2.3.dev4",
        )
        self.server, self.transport = self.connect()

    def raising(self, error: Exception) -> None:
        raise error

    def doSlow(self) -> Deferred[object]:
        self.slow.append(Deferred())
        return self.slow[-1]

    def doFail(self) -> None:
        raise FailoverError("no COLO mode")

    async def doCoroutine(self) -> int:
        return await succeed(5)

    def connect(self) -> tuple[Any, ServerTransport]:
        server = self.factory.buildProtocol(None)
        assert server is not None
        transport = ServerTransport()
        server.makeConnection(transport)
        return server, transport

    def sent(self, transport: ServerTransport | None = None) -> list[Any]:
        transport = transport or self.transport
        data = transport.value()
        transport.clear()
        self.assertTrue(data == b"" or data.endswith(b"\r\n"))
        return [json.loads(line) for line in data.splitlines()]

    def receive(self, *messages: Any) -> None:
        self.server.dataReceived(b"".join(json.dumps(message).encode() + b"\n" for message in messages))

    def negotiate(self) -> None:
        self.receive({"execute": "qmp_capabilities"})
        self.sent()

    def ask(self, message: Any) -> Any:
        self.receive(message)
        [answer] = self.sent()
        return answer

    def refusal(self, message: Any) -> tuple[str, str]:
        error = self.ask(message)["error"]
        return error["class"], error["desc"]

    def test_greeting(self) -> None:
        """Version and capabilities, as QEMU's clients read them."""
        version = {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "colotx 1.2.3.dev4"}
        self.assertEqual(self.sent(), [{"QMP": {"version": version, "capabilities": []}}])
        self.negotiate()
        self.assertEqual(self.ask({"execute": "query-version"}), {"return": version})

    def test_negotiation(self) -> None:
        """No command before qmp_capabilities, which is taken once, with nothing to enable."""
        self.sent()
        self.assertEqual(
            self.refusal({"execute": "nothing"}),
            ("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'"),
        )
        self.assertEqual(
            self.refusal({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}),
            ("GenericError", "Capability oob not available"),
        )
        self.assertEqual(
            self.ask({"execute": "qmp_capabilities", "arguments": {"enable": []}}), {"return": {}}
        )
        self.assertEqual(self.refusal({"execute": "qmp_capabilities"})[0], "CommandNotFound")

    def test_refusals(self) -> None:
        """QEMU's words for what is wrong, and the argument's name."""
        self.negotiate()
        for message, expected in [
            ({}, "QMP input lacks member 'execute'"),
            ({"execute": 3}, "QMP input member 'execute' must be a string"),
            ({"execute": "echo", "arguments": []}, "QMP input member 'arguments' must be an object"),
            ({"execute": "echo", "extra": 1}, "QMP input member 'extra' is unexpected"),
            ({"exec-oob": "echo"}, "QMP input member 'exec-oob' is unexpected"),
            ({"execute": "echo"}, "Parameter 'a-flag' is missing"),
            ({"execute": "echo", "arguments": {"a-flag": True, "b": 1}}, "Parameter 'b' is unexpected"),
            (
                {"execute": "echo", "arguments": {"a-flag": 1}},
                "Invalid parameter type for 'a-flag', expected: boolean",
            ),
            (
                {"execute": "echo", "arguments": {"a-flag": True, "count": True}},
                "Invalid parameter type for 'count', expected: integer",
            ),
            (
                {"execute": "echo", "arguments": {"a-flag": True, "name": None}},
                "Invalid parameter type for 'name', expected: string",
            ),
        ]:
            self.assertEqual(self.refusal(message), ("GenericError", expected))
        self.assertEqual(
            self.refusal({"execute": "nope"}), ("CommandNotFound", "The command nope has not been found")
        )
        self.assertIn("invalid JSON object", self.refusal([1])[1])

    def test_answers(self) -> None:
        """Values, nothing, coroutines; the id comes back as it came, also with errors."""
        self.negotiate()
        self.assertEqual(
            self.ask({"execute": "echo", "arguments": {"a-flag": True, "count": 2}, "id": [1, {"x": None}]}),
            {"return": {"a_flag": True, "count": 2}, "id": [1, {"x": None}]},
        )
        self.assertEqual(self.ask({"execute": "nothing", "id": None}), {"return": {}, "id": None})
        self.assertEqual(self.ask({"execute": "coroutine"}), {"return": 5})
        self.assertEqual(self.ask({"execute": "nope", "id": 7})["id"], 7)
        names = [row["name"] for row in self.ask({"execute": "query-commands"})["return"]]
        self.assertEqual(names, sorted(names))
        self.assertLessEqual({"echo", "qmp_capabilities", "query-commands", "query-version"}, set(names))

    def test_failures(self) -> None:
        """Our errors are GenericError, QEMU's pass through, accidents are logged and said to be internal."""
        self.negotiate()
        self.assertEqual(self.refusal({"execute": "fail"}), ("GenericError", "no COLO mode"))
        self.assertEqual(self.refusal({"execute": "qemu-fails"}), ("DeviceNotFound", "no such"))
        self.assertIn("internal error", self.refusal({"execute": "broken"})[1])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertIn("internal error", self.refusal({"execute": "unspeakable"})[1])
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)
        self.assertEqual(self.ask({"execute": "nothing"}), {"return": {}})

    def test_order(self) -> None:
        """Answers come in the order of the questions, and one client does not hold up another."""
        self.negotiate()
        self.receive(
            {"execute": "slow", "id": 1}, {"execute": "nothing", "id": 2}, {"execute": "slow", "id": 3}
        )
        self.assertEqual(self.sent(), [])
        self.assertEqual(self.transport.producerState, "paused")
        other, transport = self.connect()
        other.dataReceived(b'{"execute": "qmp_capabilities"}{"execute": "nothing"}')
        self.assertEqual(len(self.sent(transport)), 3)
        self.slow[0].callback({"x": 1})
        self.assertEqual(self.sent(), [{"return": {"x": 1}, "id": 1}, {"return": {}, "id": 2}])
        self.assertEqual(self.transport.producerState, "producing")
        self.slow[1].errback(FailoverError("no"))
        self.assertEqual(self.sent()[0]["id"], 3)

    def test_manyInOneChunk(self) -> None:
        """Thousands of commands in one read are carried out without recursion."""
        self.negotiate()
        self.server.dataReceived(b'{"execute": "nothing"}' * 2900)
        self.assertEqual(len(self.sent()), 2900)

    def test_oversize(self) -> None:
        """A command beyond 64 KiB is refused without being kept, the next one is carried out."""
        self.negotiate()
        self.server.dataReceived(b'{"execute": "' + b"x" * 70_000)
        self.server.dataReceived(b"x" * 70_000 + b'"}\n{"execute": "nothing"}')
        error, answer = self.sent()
        self.assertIn("longer than 65536 bytes", error["error"]["desc"])
        self.assertEqual(answer, {"return": {}})

    def test_events(self) -> None:
        """Events go to every client that has negotiated, with the time."""
        self.factory.emit("STOP")
        self.assertEqual(len(self.sent()), 1)
        self.negotiate()
        self.factory.emit("STOP")
        self.factory.emit("COLO_EXIT", {"mode": "primary"})
        timestamp = {"seconds": 1_700_000_000, "microseconds": 250_000}
        self.assertEqual(
            self.sent(),
            [
                {"event": "STOP", "timestamp": timestamp},
                {"event": "COLO_EXIT", "timestamp": timestamp, "data": {"mode": "primary"}},
            ],
        )

    def test_slowReader(self) -> None:
        """A client that does not read gets nothing carried out, its events are kept up to a limit, then it goes."""
        self.negotiate()
        self.transport.clogged()
        self.receive({"execute": "nothing", "id": 1})
        self.factory.emit("ONE")
        self.factory.emit("TWO")
        self.assertEqual((self.calls, self.sent()), ([], []))
        self.transport.drained()
        self.assertEqual([m.get("event", m.get("id")) for m in self.sent()], ["ONE", "TWO", 1])
        for _ in range(3):
            self.transport.clogged()
            self.factory.emit("BIG", {"x": "y" * (_qmp_server.MAX_UNSENT // 2)})
            self.transport.drained()
        self.assertEqual(len(self.sent()), 3)
        self.transport.clogged()
        for _ in range(_qmp_server.MAX_UNSENT // 1000):
            self.factory.emit("BIG", {"x": "y" * 800})
        self.assertFalse(self.transport.disconnected)
        for _ in range(100):
            self.factory.emit("BIG", {"x": "y" * 800})
        self.assertTrue(self.transport.disconnected)
        self.assertEqual(self.factory.clients, set())

    def test_tooManyClients(self) -> None:
        """The seventeenth client is not taken, until one leaves."""
        for _ in range(15):
            self.connect()
        self.assertIsNone(self.factory.buildProtocol(None))
        self.server.connectionLost(Failure(ConnectionDone()))
        self.connect()

    def test_clientLeaves(self) -> None:
        """A command goes on when its client has left; its answer is for nobody."""
        self.negotiate()
        self.receive({"execute": "slow"}, {"execute": "nothing"})
        self.server.connectionLost(Failure(ConnectionDone()))
        self.slow[0].callback(None)
        self.assertEqual(self.calls, [])
        self.factory.emit("STOP")

    def test_halfClose(self) -> None:
        """A client that has said all it wants still gets its answers; then the connection is closed."""
        self.negotiate()
        self.receive({"execute": "slow"}, {"execute": "nothing"})
        self.server.readConnectionLost()
        self.assertFalse(self.transport.disconnecting)
        self.slow[0].callback(None)
        self.assertEqual(len(self.sent()), 2)
        self.assertTrue(self.transport.disconnecting)
        # A transport with a producer would wait for it before it closes.
        self.assertIsNone(self.transport.producer)

    def test_finish(self) -> None:
        """At the end clients get the answers they wait for; one who never would is cut off."""
        self.negotiate()
        self.receive({"execute": "slow"})
        idle, idleTransport = self.connect()
        finished = self.factory.finish()
        self.assertTrue(idleTransport.disconnecting)
        idle.connectionLost(Failure(ConnectionDone()))
        self.assertFalse(self.transport.disconnecting)
        self.clock.advance(_qmp_server.FINISH_TIME)
        self.assertTrue(self.transport.disconnected)
        self.assertNoResult(finished)
        self.server.connectionLost(Failure(ConnectionDone()))
        self.successResultOf(finished)

    def test_finishNobody(self) -> None:
        """Without clients the end is at once, and leaves no timer."""
        self.server.connectionLost(Failure(ConnectionDone()))
        self.successResultOf(self.factory.finish())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    @BOUNDED
    @given(
        st.lists(objects | st.sampled_from([{"execute": "nothing"}, {"execute": "echo"}])),
        st.binary(max_size=30),
    )
    def test_anything(self, messages: list[Any], rest: bytes) -> None:
        """Whatever is said, every object is answered, and nothing else happens."""
        self.setUp()
        self.negotiate()
        self.receive(*messages)
        self.assertEqual(len(self.sent()), len(messages))
        self.server.dataReceived(rest)


_CLIENT = """
import asyncio, json, sys
from qemu.qmp import EventListener, ExecuteError, QMPClient

async def main():
    client = QMPClient("test")
    await client.connect(sys.argv[1])
    print(json.dumps(client.greeting._asdict()))
    with client.listener("COLO_EXIT") as listener:
        print(json.dumps(await client.execute("echo", {"text": "hello"})))
        print(json.dumps((await listener.get())["data"]))
    try:
        await client.execute("nope")
    except ExecuteError as error:
        print(json.dumps([error.error_class, str(error)]))
    await client.disconnect()

asyncio.run(asyncio.wait_for(main(), 20))
"""


class InteropTests(TestCase):
    """The server against other people's clients, over a real socket."""

    if find_spec("qemu.qmp" if find_spec("qemu") else "qemu") is None:
        skip = "the qemu.qmp package is not installed"

    def setUp(self) -> None:
        from twisted.internet import reactor

        self.directory = shortDirectory(self)
        self.path = os.path.join(self.directory, "control")
        self.factory = QmpServerFactory(reactor, {"echo": Command(self.echo, {"text": str})}, version="0.1.0")
        port = reactor.listenUNIX(self.path, self.factory)  # type: ignore[attr-defined]
        self.addCleanup(port.stopListening)
        self.addCleanup(self.factory.finish)

    def echo(self, text: str) -> dict[str, str]:
        self.factory.emit("COLO_EXIT", {"mode": "secondary", "reason": "request"})
        return {"text": text}

    async def test_qemuQmp(self) -> None:
        """The qemu.qmp package's client: greeting, command, event, error."""
        program = Path(self.directory, "client.py")
        program.write_text(_CLIENT)
        out, err, code = await getProcessOutputAndValue(
            sys.executable, [str(program), self.path], env=os.environ
        )
        self.assertEqual((code, err), (0, b""))
        greeting, answer, event, error = map(json.loads, out.splitlines())
        self.assertEqual(greeting["QMP"]["version"]["package"], "colotx 0.1.0")
        self.assertEqual(answer, {"text": "hello"})
        self.assertEqual(event, {"mode": "secondary", "reason": "request"})
        self.assertEqual(error, ["CommandNotFound", "The command nope has not been found"])

    async def test_qmpShell(self) -> None:
        """qmp-shell, as an operator would use it."""
        from twisted.internet import reactor

        ended: Deferred[None] = Deferred()
        shell = _Shell(ended, b"echo text=hello\nnope\nquery-version\n")
        arguments = [sys.executable, "-m", "qemu.qmp.qmp_shell", self.path]
        environment = {**os.environ, "HOME": self.directory, "TERM": "dumb"}
        reactor.spawnProcess(shell, sys.executable, arguments, env=environment)
        ended.addTimeout(20, reactor)
        await ended
        out = shell.output.decode()
        self.assertIn("Connected to QEMU 0.1.0", out)
        self.assertIn('{"return": {"text": "hello"}', out)
        self.assertIn("The command nope has not been found", out)
        self.assertIn('"package": "colotx 0.1.0"', out)


class _Shell(ProcessProtocol):
    """A process that is given its standard input and whose output is kept."""

    def __init__(self, ended: Deferred[None], lines: bytes) -> None:
        self.ended = ended
        self.lines = lines
        self.output = b""

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(self.lines)
        self.transport.closeStdin()

    def childDataReceived(self, fd: int, data: bytes) -> None:
        self.output += data

    def processEnded(self, reason: Failure) -> None:
        self.ended.callback(None)
