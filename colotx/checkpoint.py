"""
The checkpoint process: what the primary and the secondary do, in the order of the COLO message exchange.

A transaction reads like the protocol text of QEMU-FACTS; every step is a call on an interface of
L{colotx.interfaces} or a message on a L{ColoConnection}. This file knows the order, the time-outs, and when the
output may leave. It does not know what a guest is made of, where a channel leads, or who decides about a failover.

Two events that look alike are kept apart (rule 7 of the design): the guest is B{answered} when it may run on, the
checkpoint is B{committed} when the peer holds it. With a passive secondary the primary B{pipelines}: it takes the
checkpoint into a spool at the speed of a local copy, answers its guest, and only then sends. The output gate opens
for the checkpoint's epoch on the peer's RECEIVED, never earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from colotx.errors import ColoError, GuestError, GuestLost, UnexpectedMessage
from colotx.failover import FailoverService
from colotx.interfaces import ColoMode
from colotx.protocol import ColoConnection, ColoMessage, WholeStream, encodeMessage
from colotx.relay import NoRelay, SecondaryRelay
from colotx.spool import Spool
from colotx.statistics import CheckpointRecord, CheckpointStatistics
from colotx.trigger import CheckpointTrigger
from colotx.vmstate import CheckpointReader, InitialReader, RamReader, checkDeviceState

Guest = Any
"""An implementation of L{colotx.interfaces.IPrimaryGuest} or L{colotx.interfaces.ISecondaryGuest}."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """
    How long each wait of the exchange may take, seconds. The heartbeat finds a dead peer much earlier; these find
    one that lives and does not do its part.

    @ivar message: a message that is due.
    @ivar progress: the next byte of a stream or blob that is under way.
    @ivar received: RECEIVED, after the last byte of a checkpoint was handed to the transport.
    @ivar loaded: LOADED after RECEIVED.
    """

    message: float = 10.0
    progress: float = 15.0
    received: float = 60.0
    loaded: float = 60.0


class FailoverRequested(ColoError):
    """A failover was asked for: whoever carries out a checkpoint leaves it where it is."""


class _Transcript:
    """Trace events of one side: messages, phases and run-state changes. Silent unless switched on."""

    log = Logger(namespace="colotx.trace")

    def __init__(self, role: str, enabled: bool) -> None:
        self._role = role
        self._enabled = enabled

    def sent(self, message: ColoMessage) -> None:
        if self._enabled:
            self.log.debug("{role}: sent {message.name}", role=self._role, message=message)

    def received(self, message: ColoMessage) -> None:
        if self._enabled:
            self.log.debug("{role}: received {message.name}", role=self._role, message=message)

    def phase(self, phase: str, **values: object) -> None:
        if self._enabled:
            self.log.debug("{role}: {phase} {values}", role=self._role, phase=phase, values=values)


class _Counted:
    """A sink that counts what passes."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self.bytes = 0

    async def write(self, data: bytes | memoryview) -> None:
        self.bytes += len(data)
        await self._sink.write(data)


class _HoldBack:
    """A sink that keeps the last piece, so that the peer cannot be complete before C{finish}."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self._last = b""

    async def write(self, data: bytes | memoryview) -> None:
        if self._last:
            await self._sink.write(self._last)
        self._last = bytes(data)

    async def finish(self) -> None:
        await self._sink.write(self._last)


class PrimaryProcess:
    """
    The primary's checkpoint process: one protection, from the initial transfer until it ends.

    @ivar trigger: when the next checkpoint is due.
    @ivar statistics: of all checkpoints of this process.
    """

    def __init__(
        self,
        clock: IReactorTime,
        guest: Guest,
        gate: Any,
        replication: Any,
        failover: FailoverService,
        trigger: CheckpointTrigger,
        statistics: CheckpointStatistics,
        makeSpool: Callable[[], Spool] | None,
        timeouts: Timeouts = Timeouts(),
        relay: Any = None,
        trace: bool = False,
        onExposed: Callable[[], None] = lambda: None,
        onCommitted: Callable[[CheckpointRecord], None] = lambda record: None,
    ) -> None:
        """
        @param guest: an L{colotx.interfaces.IPrimaryGuest}, running.
        @param gate: an L{colotx.interfaces.IOutputGate}.
        @param replication: an L{colotx.interfaces.IReplication}.
        @param makeSpool: makes the spool of a pipelined checkpoint; None: not pipelined, the guest is answered
            only when the peer has loaded (active secondary).
        @param relay: an L{colotx.interfaces.IFrameRelay}: carries the frames of an active secondary.
        @param trace: log every message and phase.
        @param onExposed: called once, when the initial transfer is out: from then on the peer may hold a checkpoint.
            When it raises, the protection ends before the peer could.
        @param onCommitted: called after each checkpoint the peer holds, the initial one (number 0) included.
        """
        self._clock = clock
        self._guest = guest
        self._gate = gate
        self._replication = replication
        self._failover = failover
        self._makeSpool = makeSpool
        self._relay = relay or NoRelay()
        self._timeouts = timeouts
        self._onExposed = onExposed
        self._onCommitted = onCommitted
        self._trace = _Transcript("primary", trace)
        self.trigger = trigger
        self.statistics = statistics

    async def run(self, wire: ColoConnection) -> None:
        """
        Protect the guest over C{wire} until something ends it. The guest is left running, out of COLO mode,
        however this ends; the gate is left as it is: whoever decides about the failover opens it.

        @raise ColoError: what ended it; L{FailoverRequested} when a failover did; L{GuestLost} when the guest could not
            be made to run on. It never returns normally.
        """
        try:
            await self._initial(wire)
            self.trigger.arm()
            number = 0
            while True:
                reason = await self._due(wire)
                number += 1
                await self._transaction(wire, CheckpointRecord(number, reason))
        except ColoError:
            self.statistics.failed += 1
            raise
        finally:
            self.trigger.disarm()
            try:
                await self._release()
            finally:
                self._relay.end()

    async def _release(self) -> None:
        """@raise GuestLost: the guest does not run on: it is as good as dead."""
        try:
            await self._guest.endProtection()
        except GuestError as error:
            raise GuestLost(f"the guest does not run on: {error}") from error

    async def _due(self, wire: ColoConnection) -> str:
        """Wait for a trigger, or for the end of the channel."""
        due = ensureDeferred(self.trigger.wait())
        lost: list[ColoError] = []

        def wake(error: ColoError) -> None:
            lost.append(error)
            due.cancel()

        wire.whenLost = wake
        try:
            self._check(wire)
            return await due
        except BaseException:
            if lost:
                raise lost[0] from None
            raise
        finally:
            wire.whenLost = None

    async def _initial(self, wire: ColoConnection) -> None:
        guest = self._guest
        record = CheckpointRecord(0, "initial transfer")
        heldBack = _HoldBack(wire)
        sink = _Counted(heldBack)
        began = self._clock.seconds()
        await guest.transferInitial(sink)
        self._check(wire)
        stopped = self._clock.seconds()
        guest.port.drain()
        self._gate.shut()
        epoch = self._gate.closeEpoch()
        self._relay.closeEpoch(0)
        # With the last piece the peer can hold a checkpoint, and one day go on from it: nothing leaves uncovered from
        # here on, and whoever must know that is told first.
        self._onExposed()
        await heldBack.finish()
        record.live = (stopped - began) * 1000
        record.ramBytes = sink.bytes
        self._trace.phase("initial stream is out", bytes=sink.bytes)
        if self._makeSpool is not None:
            await self._answer(record, stopped)
        await self._expect(wire, ColoMessage.CHECKPOINT_READY, self._timeouts.received)
        record.commit = self._since(stopped)
        await self._replication.startAll(ColoMode.PRIMARY)
        if self._makeSpool is None:
            await self._answer(record, stopped)
        self._commit(record, epoch)

    async def _transaction(self, wire: ColoConnection, record: CheckpointRecord) -> None:
        """One checkpoint: REQUEST to LOADED."""
        guest, timeouts = self._guest, self._timeouts
        began = self._clock.seconds()
        self._relay.hold()
        self._send(wire, ColoMessage.CHECKPOINT_REQUEST)
        await self._expect(wire, ColoMessage.CHECKPOINT_REPLY, timeouts.message)
        record.request = self._since(began)

        stopping = self._clock.seconds()
        await guest.stop()
        stopped = self._clock.seconds()
        record.stop = (stopped - stopping) * 1000
        self._check(wire)
        await self._replication.doCheckpointAll()
        self._check(wire)
        guest.port.drain()
        epoch = self._gate.closeEpoch()
        self._relay.closeEpoch(record.number)
        # Everything asked for up to this stop is covered. A trigger that comes later asks for the next one: with
        # a pipelined commit the guest runs, and speaks, before RECEIVED.
        self.trigger.reset()

        if self._makeSpool is None:
            await self._transfer(wire, record)
        else:
            spool = self._makeSpool()
            pump = await self._capture(wire, spool, record, stopping)
            await pump
        await self._expect(wire, ColoMessage.VMSTATE_RECEIVED, timeouts.received)
        record.commit = self._since(stopped)
        self._commit(record, epoch)
        received = self._clock.seconds()
        await self._expect(wire, ColoMessage.VMSTATE_LOADED, timeouts.loaded)
        record.load = self._since(received)
        if self._makeSpool is None:
            await self._answer(record, stopping)

    async def _capture(
        self, wire: ColoConnection, spool: Spool, record: CheckpointRecord, stopping: float
    ) -> Deferred[None]:
        """
        Take the checkpoint into the spool and answer the guest.

        @return: the pump that sends it. It starts when the guest was answered, so that encryption does not compete
            with the copy while the guest stands still; or as soon as the spool is full.
        """
        pump = ensureDeferred(self._pump(wire, spool))
        try:
            await self._transfer(spool, record)
            await self._answer(record, stopping)
            spool.finish()
            self._check(wire)
        except BaseException as error:
            spool.abort(
                error if isinstance(error, ColoError) else ColoError(f"the checkpoint failed: {error!r}")
            )
            pump.addErrback(lambda failure: None)  # its error is the one that is raised here
            raise
        return pump

    async def _pump(self, wire: ColoConnection, spool: Spool) -> None:
        await spool.whenReady()
        await spool.pump(wire.write)

    async def _transfer(self, sink: Any, record: CheckpointRecord) -> None:
        """SEND, the RAM section, SIZE and the device state, into C{sink}."""
        guest = self._guest
        began = self._clock.seconds()
        await sink.write(encodeMessage(ColoMessage.VMSTATE_SEND))
        self._trace.sent(ColoMessage.VMSTATE_SEND)
        counted = _Counted(sink)
        await guest.transferLive(counted)
        record.ramBytes = counted.bytes
        record.live = self._since(began)
        self._checkFailover()
        began = self._clock.seconds()
        blob = await guest.saveDeviceState()
        record.deviceBytes = len(blob)
        record.device = self._since(began)
        self._checkFailover()
        await sink.write(encodeMessage(ColoMessage.VMSTATE_SIZE, len(blob)))
        self._trace.sent(ColoMessage.VMSTATE_SIZE)
        await sink.write(blob)

    async def _answer(self, record: CheckpointRecord, stopping: float) -> None:
        await self._guest.start()
        self._relay.resume(record.number)
        self.trigger.resumed()
        record.downtime = self._since(stopping)
        self._trace.phase("guest answered", downtime=record.downtime)

    def _commit(self, record: CheckpointRecord, epoch: int) -> None:
        self._gate.release(epoch)
        self.statistics.add(record)
        self._trace.phase("committed", number=record.number, epoch=epoch, commit=record.commit)
        self._onCommitted(record)

    def _since(self, start: float) -> float:
        return (self._clock.seconds() - start) * 1000

    def _send(self, wire: ColoConnection, message: ColoMessage) -> None:
        self._check(wire)
        wire.sendMessage(message)
        self._trace.sent(message)

    async def _expect(self, wire: ColoConnection, message: ColoMessage, timeout: float) -> None:
        self._check(wire)
        await wire.receiveMessage(message, timeout)
        self._trace.received(message)
        self._check(wire)

    def _check(self, wire: ColoConnection) -> None:
        """The look after every step: has the channel ended, was a failover asked for?"""
        self._checkFailover()
        wire.checkOpen()

    def _checkFailover(self) -> None:
        if self._failover.state.requested:
            raise FailoverRequested("a failover was requested")


class SecondaryProcess:
    """
    The secondary's checkpoint process: one protection, from the initial stream until it ends.

    @ivar loading: a committed checkpoint is being settled: a failover must wait for it.
    """

    def __init__(
        self,
        clock: IReactorTime,
        guest: Guest,
        replication: Any,
        failover: FailoverService,
        timeouts: Timeouts = Timeouts(),
        relay: SecondaryRelay | None = None,
        trace: bool = False,
        onCommitted: Callable[[int], None] = lambda number: None,
    ) -> None:
        """
        @param guest: an L{colotx.interfaces.ISecondaryGuest}.
        @param relay: carries the frames of an L{colotx.interfaces.IActiveSecondary}.
        @param trace: log every message.
        @param onCommitted: called with the count of checkpoints held after each commit.
        """
        self._clock = clock
        self._guest = guest
        self._replication = replication
        self._failover = failover
        self._timeouts = timeouts
        self._relay = relay
        self._onCommitted = onCommitted
        self._trace = _Transcript("secondary", trace)
        self.loading = False

    async def run(self, wire: ColoConnection) -> None:
        """
        Hold checkpoints for the primary at the other end until something ends it. What was staged and not
        committed is forgotten; the last committed checkpoint stays.

        @raise ColoError: what ended it. It never returns normally.
        """
        try:
            ram = RamReader()
            await self._initial(wire, ram)
            while True:
                await self._transaction(wire, ram)
        finally:
            if self._relay is not None:
                self._relay.end()
            self._guest.abandon()

    async def _initial(self, wire: ColoConnection, ram: RamReader) -> None:
        reader = InitialReader(ram)
        await wire.receiveStream(WholeStream(reader), self._guest.stageInitial, self._timeouts.progress)
        self._checkFailover()
        initial = reader.complete
        assert initial is not None
        self._guest.describe(initial.machine, initial.configuration)
        with self._load():
            await self._guest.commit(initial.deviceState)
            await self._replication.startAll(ColoMode.SECONDARY)
            self._onCommitted(self._guest.checkpoint)
            self._send(wire, ColoMessage.CHECKPOINT_READY)
            await self._guest.settle()
        if self._relay is not None:
            self._relay.begin(self._guest.port)

    async def _transaction(self, wire: ColoConnection, ram: RamReader) -> None:
        message = await wire.receiveAny(None)
        if message is not ColoMessage.CHECKPOINT_REQUEST:
            raise UnexpectedMessage(
                f"Got unknown COLO message: {int(message)} ({message.name}) between checkpoints"
            )
        self._trace.received(message)
        self._checkFailover()
        await self._guest.prepare()
        if self._relay is not None:
            self._relay.closeEpoch()
        self._checkFailover()
        self._send(wire, ColoMessage.CHECKPOINT_REPLY)
        await self._expect(wire, ColoMessage.VMSTATE_SEND, self._timeouts.message)
        await wire.receiveStream(CheckpointReader(ram), self._guest.stageLive, self._timeouts.progress)
        self._checkFailover()
        size = await wire.receiveSize(self._timeouts.message)
        self._trace.received(ColoMessage.VMSTATE_SIZE)
        blob = await wire.receiveBlob(size, self._timeouts.progress)
        checkDeviceState(blob)
        self._checkFailover()
        with self._load():
            await self._guest.commit(blob)
            self._onCommitted(self._guest.checkpoint)
            self._send(wire, ColoMessage.VMSTATE_RECEIVED)
            await self._guest.settle()
        self._replication.getErrorAll()
        await self._replication.doCheckpointAll()
        self._send(wire, ColoMessage.VMSTATE_LOADED)

    @contextmanager
    def _load(self) -> Iterator[None]:
        """
        A checkpoint becomes the current one: an active VM is neither the old nor the new one meanwhile, so a failover
        waits for the end.

        @raise FailoverRequested: one waited; LOADED must not be sent.
        """
        self.loading = True
        try:
            yield
        finally:
            self.loading = False
            relaunched = self._failover.loaded()
        if relaunched:
            raise FailoverRequested("a failover was requested while a checkpoint was loaded")
        self._checkFailover()

    def _send(self, wire: ColoConnection, message: ColoMessage) -> None:
        wire.sendMessage(message)
        self._trace.sent(message)

    async def _expect(self, wire: ColoConnection, message: ColoMessage, timeout: float) -> None:
        await wire.receiveMessage(message, timeout)
        self._trace.received(message)
        self._checkFailover()

    def _checkFailover(self) -> None:
        if self._failover.state.requested:
            raise FailoverRequested("a failover was requested")
