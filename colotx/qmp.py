"""
QMP, both ways. This file is the client: how colotx talks to a QEMU. The server is L{colotx._qmp_server}.

The text itself is in L{colotx._qmp_codec}; this module knows the conversation (greeting, capabilities,
commands with ids, events) as in QEMU's C{docs/interop/qmp-spec}, and no single command's meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from colotx._qmp_codec import JsonObject, Malformed, QmpCodec, encodeQmp
from colotx._qmp_server import Command, QmpServerFactory
from colotx.errors import GuestError, GuestLost, GuestTimeout, QmpError

RETRY_INTERVAL = 0.02
"""Seconds between two looks for QEMU's socket, which appears in the first tenths of a second of its life."""

EventReceiver = Callable[[str, JsonObject, float], None]


class QmpClient(Protocol):
    """
    A conversation with one QEMU. Made by L{connectQmp}, which returns it when commands may be sent.

    @ivar onEvent: C{None} or a callable taking an event's name, its data and its time stamp (seconds since
        1970, -1 when QEMU had none).
    @ivar onLost: C{None} or a callable taking a L{GuestLost}: called once when the connection ends without
        L{close}.
    @ivar greeting: the C{QMP} member of the greeting: C{version}, C{capabilities}.
    """

    _log = Logger()
    transport: Any = None  # of a unix socket: ITransport and abortConnection
    onEvent: EventReceiver | None = None
    onLost: Callable[[GuestLost], None] | None = None

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._codec = QmpCodec()
        self._ids = count(1)
        self._pending: dict[int, tuple[str, Deferred[object]]] = {}
        self._ready: Deferred[QmpClient] = Deferred()
        self._isReady = False
        self._lost: GuestLost | None = None
        self.greeting: Mapping[str, object] = {}

    def whenReady(self) -> Deferred[QmpClient]:
        """
        Wait for the greeting and the end of negotiation. To be called once.

        @return: a Deferred firing with this client.
        @raise GuestLost: the connection ended first.
        """
        return self._ready

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, timeout: float = 10.0
    ) -> Deferred[object]:
        """
        Send a command.

        @param arguments: what JSON can say.
        @param timeout: seconds.
        @return: a Deferred firing with the value QEMU returns.
        @raise QmpError: QEMU refused, in its own words.
        @raise GuestTimeout: no answer in time. Whether the command was carried out is not known.
        @raise GuestLost: the connection is, or was, gone. The same is true.
        """
        if self._lost is not None:
            return fail(self._lost)
        if not self._isReady:
            return fail(GuestError(f"QMP command {command} before the end of negotiation"))
        return self._send(command, arguments, timeout)

    def close(self) -> None:
        """End the conversation at once; pending commands fail with L{GuestLost}. Harmless when it is over."""
        self.onLost = None
        self._end(GuestLost("the QMP connection was closed"))

    def dataReceived(self, data: bytes) -> None:
        for message in self._codec.feed(data):
            if self._lost is not None:
                return
            if isinstance(message, Malformed):
                self._end(GuestLost(f"QEMU's QMP socket sent what is not QMP: {message.reason}"))
            elif "event" in message:
                self._deliver(message)
            elif "QMP" in message:
                self._negotiate(message)
            else:
                self._answer(message)

    def connectionLost(self, reason: Failure | None = None) -> None:
        self._end(GuestLost("QEMU closed its QMP connection; it has most likely exited, see its own log"))

    def _send(
        self, command: str, arguments: Mapping[str, object] | None, timeout: float | None
    ) -> Deferred[object]:
        number = next(self._ids)
        message: JsonObject = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = dict(arguments)
        line = encodeQmp(message)
        answer: Deferred[object] = Deferred(lambda _: self._forget(number))
        self._pending[number] = (command, answer)
        if timeout is not None:
            answer.addTimeout(timeout, self._clock, _timedOut(command))
        self.transport.write(line)
        return answer

    def _forget(self, number: int) -> None:
        del self._pending[number]

    def _negotiate(self, message: JsonObject) -> None:
        greeting = message["QMP"]
        if self.greeting or not isinstance(greeting, dict):
            self._end(GuestLost("QEMU's QMP socket sent an invalid or a second greeting"))
            return
        self.greeting = greeting
        # No time-out of its own: whoever waits in whenReady has one, and nobody else can wait yet.
        self._send("qmp_capabilities", None, timeout=None).addCallbacks(self._negotiated, self._refused)

    def _negotiated(self, _: object) -> None:
        self._isReady = True
        self._ready.callback(self)

    def _refused(self, failure: Failure) -> None:
        if not isinstance(failure.value, GuestLost):
            self._end(GuestLost(f"QEMU refused QMP's negotiation: {failure.getErrorMessage()}"))

    def _answer(self, message: JsonObject) -> None:
        number = message.get("id")
        if not isinstance(number, int) or number not in self._pending:
            # The late answer to a command that timed out, or a complaint that QEMU could not attribute.
            self._log.debug("QMP answer nobody waits for: {message}", message=message)
            return
        _, answer = self._pending.pop(number)
        if "return" in message:
            answer.callback(message["return"])
            return
        error = message.get("error")
        details = error if isinstance(error, dict) else {}
        answer.errback(
            QmpError(str(details.get("class", "GenericError")), str(details.get("desc", "no reason given")))
        )

    def _deliver(self, message: JsonObject) -> None:
        if self.onEvent is None:
            return
        data = message.get("data")
        try:
            self.onEvent(
                str(message["event"]),
                data if isinstance(data, dict) else {},
                _seconds(message.get("timestamp")),
            )
        except Exception:
            self._log.failure("Receiver of QMP event {event} failed", event=message["event"])

    def _end(self, error: GuestLost) -> None:
        if self._lost is not None:
            return
        self._lost = error
        if self.transport is not None:
            self.transport.abortConnection()
        pending, self._pending = self._pending, {}
        for command, answer in pending.values():
            answer.errback(GuestLost(f"{error} (while waiting for the answer to {command})"))
        if not self._isReady:
            self._ready.errback(error)
        if self.onLost is not None:
            self.onLost(error)


def _timedOut(command: str) -> Callable[[object, float], object]:
    def translate(_: object, timeout: float) -> object:
        raise GuestTimeout(f"QEMU did not answer the QMP command {command} within {timeout:g} s")

    return translate


def _seconds(timestamp: object) -> float:
    """QMP's two numbers as one. QEMU sends -1 for both when its clock failed."""
    if not isinstance(timestamp, dict):
        return -1.0
    seconds, microseconds = timestamp.get("seconds"), timestamp.get("microseconds")
    if not isinstance(seconds, int) or not isinstance(microseconds, int) or seconds < 0:
        return -1.0
    return seconds + microseconds / 1e6


def connectQmp(reactor: Any, path: str, timeout: float = 10.0) -> Deferred[QmpClient]:
    """
    Connect to a QEMU that is starting: wait for its socket to appear, then negotiate.

    @param reactor: provides C{IReactorTime} and C{IReactorUNIX}.
    @param path: the socket of C{-qmp unix:PATH,server=on,wait=off}.
    @param timeout: seconds for all of it.
    @return: a Deferred firing with a L{QmpClient} that takes commands. It may be cancelled.
    @raise GuestTimeout: nothing answered in time; says what the last try met.
    """
    lastError = ["nothing answered"]

    def translate(_: object, seconds: float) -> object:
        raise GuestTimeout(f"no QMP at {path} within {seconds:g} s: {lastError[0]}")

    connecting = Deferred.fromCoroutine(_connect(reactor, path, timeout, lastError))
    connecting.addTimeout(timeout, reactor, translate)
    return connecting


async def _connect(reactor: Any, path: str, timeout: float, lastError: list[str]) -> QmpClient:
    endpoint = UNIXClientEndpoint(reactor, path, timeout=timeout)  # type: ignore[no-untyped-call]
    factory = Factory.forProtocol(lambda: QmpClient(reactor))
    while True:
        try:
            client: QmpClient = await endpoint.connect(factory)  # type: ignore[no-untyped-call]
        except ConnectError as error:
            lastError[0] = str(error)
        else:
            lastError[0] = "connected, but no greeting came (does another client hold the connection?)"
            try:
                return await client.whenReady()
            except GuestLost as error:
                lastError[0] = str(error)
            except BaseException:
                client.close()
                raise
        await deferLater(reactor, RETRY_INTERVAL)


__all__ = [
    "Command",
    "EventReceiver",
    "JsonObject",
    "Malformed",
    "QmpClient",
    "QmpCodec",
    "QmpServerFactory",
    "connectQmp",
    "encodeQmp",
]
