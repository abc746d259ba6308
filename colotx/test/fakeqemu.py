"""
A fake QEMU, as L{colotx.guests.qemu} sees one: a process, a QMP server, a NIC's socket, and the COLO exchange's other
end, with QEMU's manners (QEMU-FACTS) and, on demand, its bad ones. All of it in memory, with a clock that stands still.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from struct import unpack
from typing import Any

import numpy as np
from twisted.internet.error import ConnectError, ProcessDone, ProcessTerminated
from twisted.internet.protocol import Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from twisted.test.iosim import FakeTransport, connect

from colotx.protocol import ColoDecoder, ColoMessage, WholeStream, encodeMessage
from colotx.vmstate import PAGE_SIZE, CheckpointReader, InitialReader, Pages, RamBlock, RamReader, RamWriter

BLOCKS = (RamBlock("pc.ram", 64 * PAGE_SIZE), RamBlock("pc.bios", 4 * PAGE_SIZE))
MACHINE = "pc-fake-1.0"
DESCRIPTION = b'{"page_size": 4096, "devices": []}'
CAPABILITIES = ("xbzrle", "return-path", "postcopy-ram", "x-colo", "multifd", "x-ignore-shared")


def page(block: str, number: int, fill: int) -> Pages:
    """One page full of one byte."""
    return Pages(
        block, np.array([number * PAGE_SIZE], np.uint64), np.full((1, PAGE_SIZE), fill, dtype=np.uint8)
    )


def blob(number: int) -> bytes:
    """The device state of checkpoint C{number}."""
    return RamWriter().deviceSection(7, "timer", 0, 2, b"state %d" % number) + b"\0"


class FakeReactor(MemoryReactorClock):
    """
    A reactor in which unix sockets connect and processes are L{FakeQemu}s.

    @ivar qemus: all that were spawned, in order.
    @ivar prepare: called with each new one before anything happens to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qemus: list[FakeQemu] = []
        self.pumps: list[Any] = []
        self.listening: dict[str, Callable[[], Protocol]] = {}
        self.prepare: Callable[[FakeQemu], object] = lambda qemu: None

    def spawnProcess(self, protocol: Any, executable: str, args: list[str], env: Any = None) -> None:
        qemu = FakeQemu(self, protocol, args, env)
        self.qemus.append(qemu)
        self.prepare(qemu)
        qemu.begin()

    def connectUNIX(self, address: str, factory: Any, timeout: float = 30, checkPID: int = 0) -> Any:
        connector = super().connectUNIX(address, factory, timeout, checkPID)
        make = self.listening.get(address)
        if make is None:
            factory.clientConnectionFailed(connector, Failure(ConnectError(string=f"nobody at {address}")))
        else:
            self.join(make(), factory.buildProtocol(None))
        return connector

    def listenUNIX(self, address: str, factory: Any, *args: Any, **named: Any) -> Any:
        port = super().listenUNIX(address, factory, *args, **named)
        self.listening[address] = lambda: factory.buildProtocol(None)
        ended = port.stopListening

        def stopListening() -> Any:
            del self.listening[address]
            return ended()

        port.stopListening = stopListening
        return port

    def join(self, server: Any, client: Any) -> None:
        """Connect two protocols."""
        transport = FakeTransport(client, isServer=False)
        transport.socket = _DrySocket()  # type: ignore[attr-defined]
        self.pumps.append(
            connect(
                server,
                FakeTransport(server, isServer=True),
                client,
                transport,
                greet=False,
                clock=self,
            )
        )

    def settle(self, seconds: float = 0.0) -> None:
        """
        Let everything happen that is to happen on all connections, then time pass, at most 50 ms at once, and what
        follows from it.
        """
        self._flush()
        end = self.seconds() + seconds
        while (left := end - self.seconds()) > 0:
            self.advance(left if left < 0.06 else 0.05)
            self._flush()

    def _flush(self) -> None:
        self.advance(0)
        for _ in range(1000):
            moved = [pump.flush() for pump in list(self.pumps)]  # all of them, not just until one moved
            if True not in moved:
                return
        raise AssertionError("it never settles")


class _DrySocket:
    """What a transport reads from when it is asked to by others than its reactor: there is never more."""

    def recv(self, size: int) -> bytes:
        raise BlockingIOError


class FakeQemu:
    """
    @ivar commands: the QMP commands it got: (name, arguments).
    @ivar silent: commands it does not answer, and things it does not do: C{connect} to the migration's socket,
        C{request} a checkpoint, C{send} the state of one; as a secondary, to be C{ready}, C{reply}, C{received},
        C{loaded}.
    @ivar refusing: commands it answers with an error.
    @ivar answers: the bytes it got on the COLO channel, a list of what came at once.
    @ivar incoming: the bytes it was restored from.
    @ivar loads: the device state of each checkpoint it has loaded as a secondary.
    @ivar status: the run state.
    @ivar migration: what C{query-migrate} says.
    @ivar failing: words it ends with when it is started, or restored.
    @ivar leaving: what it does when its COLO channel is lost while it migrates: the next C{migration}.
    """

    def __init__(self, reactor: FakeReactor, protocol: Any, command: list[str], environment: Any) -> None:
        self.reactor = reactor
        self.protocol = protocol
        self.command = command
        self.environment = environment
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.silent: set[str] = set()
        self.refusing: set[str] = set()
        self.answers: list[bytes] = []
        self.incoming = bytearray()
        self.loads: list[bytes] = []
        self.status = "inmigrate" if "-incoming" in command else "running"
        self.migration = "none"
        self.capabilities = dict.fromkeys(CAPABILITIES, False) | {"multifd": True}
        self.failing = ""
        self.failingRestore = ""
        self.leaving = "failed"
        self.checkpoints = 0
        self.alive = True
        self.pid = 4711
        self.qmp: _Qmp | None = None
        self.colo: Protocol | None = None
        self.writer = RamWriter()

    def begin(self) -> None:
        """The process starts."""
        self.protocol.makeConnection(self)
        if self.failing:
            self.reactor.callLater(0, self.die, self.failing)
            return
        listening = self.reactor.listening
        listening[self.path("-qmp", "unix:")] = lambda: _Qmp(self)
        listening[self.path("-netdev", "addr.path=")] = Protocol

    def path(self, option: str, before: str) -> str:
        """A path from the command line."""
        return self.command[self.command.index(option) + 1].partition(before)[2].partition(",")[0]

    def closeStdin(self) -> None:
        pass

    def signalProcess(self, name: str) -> None:
        """It is killed."""
        self.die("", name)

    def die(self, words: str = "", how: str = "") -> None:
        """The process ends: by itself, or by a signal."""
        if not self.alive:
            return
        self.alive = False
        if words:
            self.protocol.childDataReceived(2, words.encode() + b"\n")
        for connection in (self.qmp, self.colo):
            if connection is not None:
                connection.transport.loseConnection()
        reason = ProcessTerminated(signal=9) if how else ProcessDone(0)
        self.protocol.processEnded(Failure(reason))

    # -- QMP

    def execute(self, name: str, arguments: dict[str, Any]) -> Any:
        """@return: the answer."""
        self.commands.append((name, arguments))
        handler = getattr(self, "do_" + name.replace("-", "_"), None)
        return {} if handler is None else handler(**{k.replace("-", "_"): v for k, v in arguments.items()})

    def named(self, name: str) -> list[dict[str, Any]]:
        """The arguments of every command of this name."""
        return [arguments for command, arguments in self.commands if command == name]

    def event(self, name: str, **data: Any) -> None:
        """Say that something happened."""
        assert self.qmp is not None
        self.qmp.send({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 0}})

    def run(self) -> None:
        """The guest runs."""
        if self.status != "running":
            self.status = "running"
            self.event("RESUME")

    def halt(self, status: str) -> None:
        """The guest stops."""
        self.status = status
        self.event("STOP")

    def do_query_status(self) -> Any:
        return {"status": self.status, "running": self.status == "running"}

    def do_query_memory_size_summary(self) -> Any:
        return {"base-memory": BLOCKS[0].length}

    def do_query_migrate(self) -> Any:
        return {} if self.migration == "none" else {"status": self.migration}

    def do_query_migrate_capabilities(self) -> Any:
        return [{"capability": name, "state": state} for name, state in self.capabilities.items()]

    def do_migrate_set_capabilities(self, capabilities: Any) -> Any:
        self.capabilities.update({entry["capability"]: entry["state"] for entry in capabilities})
        return {}

    def do_migrate_set_parameters(self, **parameters: Any) -> Any:
        if self.migration == "colo" and self.status == "running" and "request" not in self.silent:
            self.request()
        return {}

    def do_migrate(self, uri: str) -> Any:
        self.migration = "active"
        if "connect" not in self.silent:
            self.colo = _Colo(self)
            self.writer = RamWriter()
            self.reactor.join(self.reactor.listening[uri.partition(":")[2]](), self.colo)
            if "initial" not in self.silent:
                self.sendInitial()
        return {}

    def do_migrate_incoming(self, uri: str) -> Any:
        kind = _Following if self.capabilities["x-colo"] else _Incoming
        self.reactor.listening[uri.partition(":")[2]] = lambda: kind(self)
        return {}

    def do_migrate_cancel(self) -> Any:
        self.migration = "cancelled"
        return {}

    def do_x_colo_lost_heartbeat(self) -> Any:
        self.migration = "completed"
        if self.status == "running":
            self.halt("colo")
        self.run()
        return {}

    def do_cont(self) -> Any:
        self.run()
        return {}

    def do_quit(self) -> Any:
        self.reactor.callLater(0, self.die)
        return {}

    # -- COLO

    def initial(self) -> bytes:
        """The initial stream."""
        writer = self.writer
        parts = [writer.header(), writer.configuration(MACHINE), writer.enableColo(), writer.start(BLOCKS)]
        parts += [*writer.part([page("pc.ram", 3, 0x33)]), *writer.end([page("pc.bios", 0, 0xB0)])]
        parts += [blob(0), writer.vmdesc(DESCRIPTION)]
        return b"".join(parts)

    def live(self) -> bytes:
        """The RAM part of the next checkpoint."""
        return b"".join([*self.writer.end([page("pc.ram", 5, self.checkpoints)]), self.writer.eof()])

    def sendInitial(self) -> None:
        """The end of the initial migration."""
        self.halt("finish-migrate")
        self.migration = "colo"
        self.tell(self.initial())

    def tell(self, data: bytes) -> None:
        """Say something on the COLO channel."""
        assert self.colo is not None
        self.colo.transport.write(data)

    def request(self) -> None:
        """Ask for a checkpoint."""
        self.tell(encodeMessage(ColoMessage.CHECKPOINT_REQUEST))

    def answered(self, message: ColoMessage) -> None:
        """A message came on the COLO channel."""
        if message in (ColoMessage.CHECKPOINT_READY, ColoMessage.VMSTATE_LOADED):
            self.run()
        elif message is ColoMessage.CHECKPOINT_REPLY and "send" not in self.silent:
            self.checkpoints += 1
            self.halt("colo")
            device = blob(self.checkpoints)
            self.tell(encodeMessage(ColoMessage.VMSTATE_SEND) + self.live())
            self.tell(encodeMessage(ColoMessage.VMSTATE_SIZE, len(device)) + device)

    def coloLost(self) -> None:
        """The COLO channel ended. Only an initial migration ends with it."""
        if self.migration == "active":
            self.migration = self.leaving

    def restored(self) -> None:
        """All of the state it was to be restored from is there."""
        if self.failingRestore:
            self.die(self.failingRestore)
        else:
            self.run()


class _Qmp(Protocol):
    transport: Any

    def __init__(self, qemu: FakeQemu) -> None:
        self._qemu = qemu
        self._buffer = b""

    def connectionMade(self) -> None:
        self._qemu.qmp = self
        self.send({"QMP": {"version": {}, "capabilities": []}})

    def send(self, message: Any) -> None:
        self.transport.write(json.dumps(message).encode() + b"\r\n")

    def dataReceived(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            name, number = message["execute"], message["id"]
            if name in self._qemu.refusing:
                self._qemu.commands.append((name, message.get("arguments", {})))
                self.send({"id": number, "error": {"class": "GenericError", "desc": f"no {name} today"}})
                continue
            answer = self._qemu.execute(name, message.get("arguments", {}))
            if name not in self._qemu.silent:
                self.send({"id": number, "return": answer})


class _Colo(Protocol):
    transport: Any

    def __init__(self, qemu: FakeQemu) -> None:
        self._qemu = qemu

    def dataReceived(self, data: bytes) -> None:
        self._qemu.answers.append(data)
        for (number,) in (unpack(">I", data[at : at + 4]) for at in range(0, len(data), 4)):
            self._qemu.answered(ColoMessage(number))

    def connectionLost(self, reason: object = None) -> None:
        self._qemu.coloLost()


class _Incoming(Protocol):
    transport: Any

    def __init__(self, qemu: FakeQemu) -> None:
        self._qemu = qemu

    def dataReceived(self, data: bytes) -> None:
        self._qemu.incoming += data
        if self._qemu.incoming.endswith(b'"devices": []}'):
            self._qemu.restored()


class _Following(Protocol):
    """The secondary of the COLO exchange."""

    transport: Any

    def __init__(self, qemu: FakeQemu) -> None:
        self._qemu = qemu
        self._decoder = ColoDecoder()
        self._ram = RamReader()
        self._steps = self._exchange()

    def connectionMade(self) -> None:
        self._qemu.colo = self

    def dataReceived(self, data: bytes) -> None:
        self._qemu.incoming += data
        self._decoder.feed(data)
        next(self._steps)

    def connectionLost(self, reason: object = None) -> None:
        if self._qemu.alive:
            self._qemu.event("COLO_EXIT", mode="secondary", reason="error")

    def _exchange(self) -> Iterator[None]:
        """Everything it does, with a stop wherever it waits for more."""
        qemu = self._qemu
        yield from self._stream(WholeStream(InitialReader(self._ram)))
        qemu.migration = "colo"
        qemu.run()
        self._say("ready", ColoMessage.CHECKPOINT_READY)
        while True:
            yield from self._until(lambda: self._decoder.nextMessage(ColoMessage.CHECKPOINT_REQUEST))
            qemu.halt("colo")
            self._say("reply", ColoMessage.CHECKPOINT_REPLY)
            yield from self._until(lambda: self._decoder.nextMessage(ColoMessage.VMSTATE_SEND))
            yield from self._stream(CheckpointReader(self._ram))
            size = yield from self._until(self._decoder.nextSize)
            blob = b""
            while len(blob) < size:
                blob += yield from self._until(lambda: self._decoder.nextBytes(size - len(blob)))  # noqa: B023
            self._say("received", ColoMessage.VMSTATE_RECEIVED)
            if qemu.failingRestore:
                qemu.protocol.childDataReceived(2, qemu.failingRestore.encode() + b"\n")
                qemu.event("COLO_EXIT", mode="secondary", reason="error")
                yield
            qemu.loads.append(blob)
            if "loaded" not in qemu.silent:
                qemu.run()
            self._say("loaded", ColoMessage.VMSTATE_LOADED)

    def _say(self, what: str, message: ColoMessage) -> None:
        if what not in self._qemu.silent:
            self.transport.write(encodeMessage(message))

    def _until(self, ask: Callable[[], Any]) -> Any:
        while (answer := ask()) is None:
            yield
        return answer

    def _stream(self, reader: Any) -> Iterator[None]:
        while not reader.complete:
            yield from self._until(lambda: self._decoder.nextStream(reader))
