"""The QMP client, against a scripted server and a real QEMU."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, getConnectError
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from colotx.errors import GuestError, GuestLost, GuestTimeout, QmpError
from colotx.qmp import QmpClient, QmpCodec, connectQmp, encodeQmp

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": ["oob"]}}


def shortDirectory(case: SynchronousTestCase) -> str:
    """A directory whose path leaves room for a unix socket's name (108 bytes in all)."""
    directory = tempfile.mkdtemp(prefix="colotx-")
    case.addCleanup(shutil.rmtree, directory)
    return directory


class ClientTests(SynchronousTestCase):
    """L{QmpClient} against a scripted server."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.client = QmpClient(self.clock)
        self.transport = StringTransport()
        self.client.makeConnection(self.transport)

    def sent(self) -> list[Any]:
        messages = QmpCodec().feed(self.transport.value())
        self.transport.clear()
        return messages

    def receive(self, *messages: dict[str, Any]) -> None:
        self.client.dataReceived(b"".join(encodeQmp(message) for message in messages))

    def negotiate(self) -> None:
        ready = self.client.whenReady()
        self.receive(GREETING)
        [request] = self.sent()
        self.receive({"return": {}, "id": request["id"]})
        self.assertIs(self.successResultOf(ready), self.client)

    def lose(self) -> None:
        self.client.connectionLost(Failure(ConnectionDone()))

    def test_negotiation(self) -> None:
        """The greeting is answered with qmp_capabilities; commands are not sent before its answer."""
        ready = self.client.whenReady()
        self.receive(GREETING)
        self.assertNoResult(ready)
        self.failureResultOf(self.client.execute("stop"), GuestError)
        [request] = self.sent()
        self.assertEqual(request["execute"], "qmp_capabilities")
        self.receive({"return": {}, "id": request["id"]})
        self.successResultOf(ready)
        self.assertEqual(self.client.greeting["capabilities"], ["oob"])

    def test_negotiationFails(self) -> None:
        """Refused, lost or nonsense: whoever waits for ready is told."""
        for script, reason in [
            (
                lambda: self.receive(GREETING, {"error": {"class": "GenericError", "desc": "no"}, "id": 1}),
                "no",
            ),
            (lambda: self.receive(GREETING, GREETING), "second greeting"),
            (lambda: self.receive({"QMP": 3}), "greeting"),
            (self.lose, "closed"),
            (lambda: self.client.dataReceived(b"SSH-2.0-OpenSSH\r\n"), "not QMP"),
        ]:
            self.setUp()
            script()
            self.assertIn(reason, str(self.failureResultOf(self.client.whenReady(), GuestLost).value))

    def test_answers(self) -> None:
        """Answers find their command by id, in any order."""
        self.negotiate()
        first = self.client.execute("query-status")
        second = self.client.execute("migrate", {"uri": "unix:/x"})
        one, two = self.sent()
        self.assertNotIn("arguments", one)
        self.assertEqual(two["arguments"], {"uri": "unix:/x"})
        self.receive({"return": 2, "id": two["id"]}, {"return": {"status": "colo"}, "id": one["id"]})
        self.assertEqual(self.successResultOf(first), {"status": "colo"})
        self.assertEqual(self.successResultOf(second), 2)

    def test_error(self) -> None:
        """An error answer is a L{QmpError} with QEMU's words; what is not one is still an error."""
        self.negotiate()
        answers: list[tuple[dict[str, Any], tuple[str, str]]] = [
            ({"error": {"class": "CommandNotFound", "desc": "none"}}, ("CommandNotFound", "none")),
            ({"error": 3}, ("GenericError", "no reason given")),
            ({}, ("GenericError", "no reason given")),
        ]
        for answer, expected in answers:
            result = self.client.execute("nope")
            self.receive({**answer, "id": self.sent()[0]["id"]})
            error = self.failureResultOf(result, QmpError).value
            self.assertEqual((error.errorClass, error.description), expected)

    def test_timeout(self) -> None:
        """No answer in time is a L{GuestTimeout}; the late answer disturbs nobody."""
        self.negotiate()
        result = self.client.execute("stop", timeout=2.0)
        [request] = self.sent()
        self.clock.advance(1.9)
        self.assertNoResult(result)
        self.clock.advance(0.1)
        self.assertIn("stop within 2 s", str(self.failureResultOf(result, GuestTimeout).value))
        self.receive({"return": {}, "id": request["id"]})
        result = self.client.execute("cont")
        self.receive({"return": {}, "id": self.sent()[0]["id"]})
        self.assertEqual(self.successResultOf(result), {})
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_lost(self) -> None:
        """The end of the connection fails everything pending, now and later, and is reported once."""
        self.negotiate()
        lost: list[GuestLost] = []
        self.client.onLost = lost.append
        results = [self.client.execute("stop"), self.client.execute("cont")]
        self.lose()
        for result, name in zip(results, ["stop", "cont"], strict=True):
            self.assertIn(name, str(self.failureResultOf(result, GuestLost).value))
        self.failureResultOf(self.client.execute("stop"), GuestLost)
        self.assertEqual(len(lost), 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_close(self) -> None:
        """L{QmpClient.close} ends it at once and is no loss."""
        self.negotiate()
        self.client.onLost = lambda error: self.fail(str(error))
        result = self.client.execute("stop")
        self.client.close()
        self.failureResultOf(result, GuestLost)
        self.assertTrue(self.transport.disconnected)
        self.lose()
        self.client.close()

    def test_garbage(self) -> None:
        """A server that stops speaking QMP is lost, with what it said; nothing behind it is looked at."""
        self.negotiate()
        result = self.client.execute("stop")
        self.client.dataReceived(b'Segmentation fault\n{"return": {}, "id": 2}\n')
        self.assertIn("0x53", str(self.failureResultOf(result, GuestLost).value))
        self.assertTrue(self.transport.disconnected)

    def test_events(self) -> None:
        """Events reach their receiver with time stamps in seconds; its faults stay its own."""
        self.receive({"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 1}})
        self.negotiate()
        seen: list[Any] = []

        def receiver(name: str, data: dict[str, object], timestamp: float) -> None:
            seen.append((name, data, timestamp))
            if name == "STOP":
                raise ZeroDivisionError

        self.client.onEvent = receiver
        self.receive(
            {"event": "STOP", "timestamp": {"seconds": 10, "microseconds": 500000}},
            {
                "event": "COLO_EXIT",
                "data": {"mode": "primary"},
                "timestamp": {"seconds": -1, "microseconds": -1},
            },
            {"event": "ODD", "data": 3},
        )
        self.assertEqual(
            seen, [("STOP", {}, 10.5), ("COLO_EXIT", {"mode": "primary"}, -1.0), ("ODD", {}, -1.0)]
        )
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_strangeAnswers(self) -> None:
        """Answers without or with somebody else's id are passed over."""
        self.negotiate()
        self.receive({"return": {}}, {"return": {}, "id": [1]}, {"error": {"desc": "x"}, "id": 99})
        result = self.client.execute("cont")
        self.receive({"return": 1, "id": self.sent()[0]["id"]})
        self.assertEqual(self.successResultOf(result), 1)


class ConnectTests(SynchronousTestCase):
    """L{connectQmp}."""

    def test_retriesAndGivesUp(self) -> None:
        """A socket that refuses is tried again, for no longer than the time-out; the last reason is told."""
        reactor = MemoryReactorClock()
        result = connectQmp(reactor, "/nowhere/qmp", timeout=1.0)
        for _ in range(3):
            *_, (path, factory, *_rest) = reactor.unixClients
            self.assertEqual(path, "/nowhere/qmp")
            factory.clientConnectionFailed(None, Failure(getConnectError((2, "No such file or directory"))))
            reactor.advance(0.02)
        self.assertEqual(len(reactor.unixClients), 4)
        self.assertNoResult(result)
        reactor.advance(1.0)
        message = str(self.failureResultOf(result, GuestTimeout).value)
        self.assertIn("/nowhere/qmp within 1 s", message)
        self.assertIn("No such file", message)
        self.assertEqual(reactor.getDelayedCalls(), [])

    def test_negotiates(self) -> None:
        """It fires with a client that is ready, and tries again when QEMU went away before."""
        reactor = MemoryReactorClock()
        result = connectQmp(reactor, "/run/qmp", timeout=1.0)
        self._accept(reactor).connectionLost(Failure(ConnectionDone()))
        self.assertNoResult(result)
        reactor.advance(0.02)
        protocol = self._accept(reactor)
        protocol.dataReceived(encodeQmp(GREETING) + encodeQmp({"return": {}, "id": 1}))
        self.assertIsInstance(self.successResultOf(result), QmpClient)
        self.assertEqual(reactor.getDelayedCalls(), [])

    def test_silent(self) -> None:
        """A socket where nobody greets (QEMU serves one client at a time) is a time-out, and is let go."""
        reactor = MemoryReactorClock()
        result = connectQmp(reactor, "/run/qmp", timeout=1.0)
        transport = self._accept(reactor).transport
        reactor.advance(1.0)
        self.assertIn("another client", str(self.failureResultOf(result, GuestTimeout).value))
        self.assertTrue(transport.disconnected)

    def _accept(self, reactor: MemoryReactorClock) -> Any:
        protocol = reactor.unixClients[-1][1].buildProtocol(None)
        protocol.makeConnection(StringTransport())
        return protocol


class QemuTests(TestCase):
    """The client against a real QEMU."""

    if shutil.which("qemu-system-x86_64") is None:
        skip = "no qemu-system-x86_64"

    async def test_conversation(self) -> None:
        """Connect while it starts, talk, get events, see it die."""
        from twisted.internet import reactor

        path = os.path.join(shortDirectory(self), "qmp")
        ended: Deferred[None] = Deferred()
        process = _Process(ended)
        command = ["qemu-system-x86_64", "-machine", "none", "-display", "none"]
        command += ["-qmp", f"unix:{path},server=on,wait=off"]
        connecting = connectQmp(reactor, path, timeout=20.0)
        reactor.spawnProcess(process, command[0], command, env=os.environ)
        client = await connecting
        self.assertIn("qemu", client.greeting["version"])
        self.assertTrue((await client.execute("query-status"))["running"])  # type: ignore[index]
        # The longest answer there is: far longer than one read.
        self.assertGreater(len(await client.execute("query-qmp-schema")), 500)  # type: ignore[arg-type]
        error: Any = await self.assertFailure(client.execute("x-colo-lost-heartbeat"), QmpError)
        self.assertEqual(error.errorClass, "GenericError")
        seen: list[Any] = []
        lost: Deferred[GuestLost] = Deferred()
        client.onEvent = lambda *event: seen.append(event)
        client.onLost = lost.callback
        await client.execute("stop")
        await client.execute("quit")
        await lost
        await ended
        self.assertEqual([name for name, _, _ in seen], ["STOP", "SHUTDOWN"])
        await self.assertFailure(client.execute("stop"), GuestLost)


class _Process(ProcessProtocol):
    def __init__(self, ended: Deferred[None]) -> None:
        self.ended = ended

    def processEnded(self, reason: Failure) -> None:
        self.ended.callback(None)
