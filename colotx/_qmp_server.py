"""
QMP, the server: how operators, C{qmp-shell}, libvirt-like managers and the C{colo} command talk to colotx.

It knows the conversation as in QEMU's C{docs/interop/qmp-spec} and uses QEMU's own words in errors, because people
and programs know them; what the commands do is the table's business.

Commands of one client are carried out one after another, as QEMU does, so answers keep the order of the
questions; clients do not wait for each other. Bounds: the length of a command, the number of clients, what a
client does not read. A client with more commands waiting than the one being carried out is not read from.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.interfaces import (
    IAddress,
    IHalfCloseableProtocol,
    IPushProducer,
    IReactorTime,
)
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from colotx._qmp_codec import JsonObject, Malformed, QmpCodec, encodeQmp
from colotx.errors import ColoError, QmpError

MAX_COMMAND = 64 * 1024
"""Bytes of the longest command taken."""

MAX_CLIENTS = 16
"""Connections at a time; one more is closed at once."""

MAX_UNSENT = 256 * 1024
"""Bytes kept for a client that does not read; with more it is disconnected."""

FINISH_TIME = 1.0
"""Seconds a client has at the end to take its last answer."""

_TYPE_NAMES: dict[type, str] = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}


@dataclass(frozen=True, slots=True)
class Command:
    """
    One row of a command table.

    @ivar run: called with the arguments as keywords (C{-} becomes C{_}); returns a value JSON can say, C{None} for
        nothing, or a Deferred or coroutine of one. A L{ColoError} becomes the answer C{GenericError}.
    @ivar required: names and types (bool, int, str, list, dict) of the arguments that must be there.
    @ivar optional: the same of those that may be.
    """

    run: Callable[..., object]
    required: Mapping[str, type] = field(default_factory=dict)
    optional: Mapping[str, type] = field(default_factory=dict)

    def call(self, arguments: JsonObject) -> object:
        """
        Check the arguments and run.

        @raise QmpError: an argument that is missing, unexpected or of another type; it is named.
        """
        for name, value in arguments.items():
            kind = self.required.get(name) or self.optional.get(name)
            if kind is None:
                raise _generic(f"Parameter '{name}' is unexpected")
            # Not isinstance: in Python True is an int, in JSON it is not.
            if type(value) is not kind:
                raise _generic(f"Invalid parameter type for '{name}', expected: {_TYPE_NAMES[kind]}")
        for name in self.required:
            if name not in arguments:
                raise _generic(f"Parameter '{name}' is missing")
        return self.run(**{name.replace("-", "_"): value for name, value in arguments.items()})


def _generic(description: str) -> QmpError:
    return QmpError("GenericError", description)


@implementer(IHalfCloseableProtocol, IPushProducer)
class QmpServer(Protocol):
    """
    One client of a L{QmpServerFactory}.

    As a producer it is told by its transport when the client does not read fast enough.
    """

    _log = Logger()
    factory: QmpServerFactory
    transport: Any  # of a unix socket: ITransport, IConsumer, IPushProducer and abortConnection

    def __init__(self) -> None:
        self._codec = QmpCodec(MAX_COMMAND)
        self._backlog: deque[JsonObject | Malformed] = deque()
        self._unsent: deque[bytes] = deque()
        self._unsentBytes = 0
        self._congested = False
        self._busy = False
        self._working = False
        self._finishing = False
        self.negotiated = False
        self.gone: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)
        self.factory.clients.add(self)
        self.write(encodeQmp({"QMP": {"version": self.factory.version, "capabilities": []}}))

    def connectionLost(self, reason: Failure | None = None) -> None:
        self._backlog.clear()
        self._unsent.clear()
        self._finishing = True
        self.factory.clients.discard(self)
        self.gone.callback(None)

    def dataReceived(self, data: bytes) -> None:
        self._backlog.extend(self._codec.feed(data))
        self._work()

    def readConnectionLost(self) -> None:
        """C{printf ... | socat - UNIX:...} closes its side early and still wants its answers."""
        self.finish()

    def writeConnectionLost(self) -> None:
        """Part of the interface; C{connectionLost} follows."""

    def pauseProducing(self) -> None:
        self._congested = True

    def resumeProducing(self) -> None:
        self._congested = False
        if self._unsent:
            data = b"".join(self._unsent)
            self._unsent.clear()
            self._unsentBytes = 0
            self.transport.write(data)
        self._work()

    def stopProducing(self) -> None:
        """Part of the interface; C{connectionLost} follows."""

    def finish(self) -> None:
        """Close the connection when the commands that came were carried out and their answers written."""
        self._finishing = True
        self.transport.pauseProducing()
        self._work()

    def abort(self) -> None:
        """Close the connection now; nothing more is said to this client."""
        self.factory.clients.discard(self)
        self._backlog.clear()
        self.transport.abortConnection()

    def write(self, line: bytes) -> None:
        """Write an encoded message; what the client does not read is kept up to a limit."""
        if not self._congested:
            self.transport.write(line)
        elif self._unsentBytes + len(line) <= MAX_UNSENT:
            self._unsent.append(line)
            self._unsentBytes += len(line)
        else:
            self._log.warn("A control client does not read its answers and events; disconnecting it")
            self.abort()

    def _work(self) -> None:
        """Carry out what waits, one after another, until one takes time or the client does not read."""
        if self._working:
            return
        self._working = True
        while self._backlog and not self._busy and not self._congested:
            self._begin(self._backlog.popleft())
        self._working = False
        if self._backlog:
            self.transport.pauseProducing()
        elif not self._finishing:
            self.transport.resumeProducing()
        elif not self._busy and not self._congested:
            self.transport.unregisterProducer()
            self.transport.loseConnection()

    def _begin(self, message: JsonObject | Malformed) -> None:
        self._busy = True
        identity = {} if isinstance(message, Malformed) or "id" not in message else {"id": message["id"]}
        maybeDeferred(self._execute, message).addCallback(
            lambda value: encodeQmp({"return": {} if value is None else value, **identity})
        ).addErrback(lambda failure: encodeQmp({"error": self._describe(failure), **identity})).addCallback(
            self._finished
        )

    def _execute(self, message: JsonObject | Malformed) -> object:
        name, arguments = _validate(message)
        if not self.negotiated and name != "qmp_capabilities":
            raise QmpError("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
        if name == "qmp_capabilities":
            return Command(self._negotiate, optional={"enable": list}).call(arguments)
        command = self.factory.commands.get(name)
        if command is None:
            raise QmpError("CommandNotFound", f"The command {name} has not been found")
        return command.call(arguments)

    def _negotiate(self, enable: list[object] | None = None) -> None:
        if self.negotiated:
            raise QmpError("CommandNotFound", "Capabilities negotiation is already complete, command ignored")
        if enable:
            raise _generic(f"Capability {enable[0]} not available")
        self.negotiated = True

    def _describe(self, failure: Failure) -> JsonObject:
        error = failure.value
        if isinstance(error, QmpError):
            return _details(error.errorClass, error.description)
        if isinstance(error, ColoError):
            return _details("GenericError", str(error))
        self._log.failure("A control command failed unexpectedly", failure=failure)
        return _details("GenericError", f"internal error ({error!r}), see the daemon's log")

    def _finished(self, answer: bytes) -> None:
        self._busy = False
        self.write(answer)
        self._work()


class QmpServerFactory(Factory):
    """
    Serves a command table to up to L{MAX_CLIENTS} clients.

    C{query-commands} and C{query-version} are added to the table; C{qmp_capabilities} is part of the conversation.

    @ivar clients: the connected L{QmpServer}s.
    @ivar version: what C{query-version} and the greeting say. The numbers are colotx's; the member is called
        C{qemu} because clients read it by that name.
    """

    noisy = False
    _log = Logger()

    def __init__(self, clock: IReactorTime, commands: Mapping[str, Command], version: str) -> None:
        """
        @param clock: its C{seconds()} time-stamps events: seconds since 1970.
        @param version: of colotx, such as C{0.1.0}.
        """
        self._clock = clock
        self.clients: set[QmpServer] = set()
        self.version = _versionInfo(version)
        self.commands: dict[str, Command] = {
            **commands,
            "query-commands": Command(self._queryCommands),
            "query-version": Command(lambda: self.version),
        }

    def buildProtocol(self, addr: IAddress | None) -> QmpServer | None:  # type: ignore[override]
        """@return: C{None}, which closes the connection, when there are too many."""
        if len(self.clients) >= MAX_CLIENTS:
            self._log.warn("More than {limit} control clients; refusing one", limit=MAX_CLIENTS)
            return None
        client = QmpServer()
        client.factory = self
        return client

    def emit(self, event: str, data: Mapping[str, object] | None = None) -> None:
        """Tell all clients that have negotiated. Never fails for a client's sake, never waits."""
        microseconds = round(self._clock.seconds() * 1_000_000)
        message: JsonObject = {
            "event": event,
            "timestamp": {"seconds": microseconds // 1_000_000, "microseconds": microseconds % 1_000_000},
        }
        if data:
            message["data"] = data
        line = encodeQmp(message)
        for client in list(self.clients):
            if client.negotiated:
                client.write(line)

    def finish(self) -> Deferred[None]:
        """
        Let every client take the answers it waits for, at most L{FINISH_TIME}, then close.

        @return: a Deferred that fires when none is left. It never fails.
        """
        clients = list(self.clients)
        limit = self._clock.callLater(FINISH_TIME, self._abortAll)
        for client in clients:
            client.finish()

        def done(_: object) -> None:
            if limit.active():
                limit.cancel()

        return DeferredList([client.gone for client in clients]).addCallback(done)

    def _abortAll(self) -> None:
        for client in list(self.clients):
            client.abort()

    def _queryCommands(self) -> object:
        return [{"name": name} for name in sorted([*self.commands, "qmp_capabilities"])]


def _details(errorClass: str, description: str) -> JsonObject:
    return {"class": errorClass, "desc": description}


def _validate(message: JsonObject | Malformed) -> tuple[str, JsonObject]:
    """
    The form of every command.

    @return: its name and its arguments.
    @raise QmpError: what is wrong, in QEMU's words where it has them.
    """
    if isinstance(message, Malformed):
        raise _generic(message.reason)
    for member in message:
        if member not in ("execute", "arguments", "id"):
            raise _generic(f"QMP input member '{member}' is unexpected")
    if "execute" not in message:
        raise _generic("QMP input lacks member 'execute'")
    name, arguments = message["execute"], message.get("arguments", {})
    if not isinstance(name, str):
        raise _generic("QMP input member 'execute' must be a string")
    if not isinstance(arguments, dict):
        raise _generic("QMP input member 'arguments' must be an object")
    return name, arguments


def _versionInfo(version: str) -> JsonObject:
    numbers = [int(number) for number in re.findall(r"\d+", version)[:3]] + [0, 0, 0]
    return {
        "qemu": dict(zip(("major", "minor", "micro"), numbers, strict=False)),
        "package": f"colotx {version}",
    }


__all__ = ["Command", "QmpServer", "QmpServerFactory"]
