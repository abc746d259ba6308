"""
The checkpoint process of both roles: a whole pair on a clock, and every fault at every message boundary.

The guests are real (the embedded guest, a passive secondary with its RAM cache); only the wire is in memory.
"""

from __future__ import annotations

import hashlib

from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from colotx.checkpoint import FailoverRequested, PrimaryProcess, SecondaryProcess
from colotx.errors import (
    ColoError,
    GuestLost,
    GuestTimeout,
    InvalidMessage,
    OversizeError,
    PeerLost,
    PeerTimeout,
    StorageError,
    TruncatedError,
    UnexpectedMessage,
)
from colotx.failover import FailoverCause, FailoverService, FailoverStatus
from colotx.gate import OutputGate
from colotx.guests.memory import MemoryGuestFactory, MemorySettings
from colotx.interfaces import ColoMode, Grant, IReplication, RunState
from colotx.protocol import ColoMessage, encodeMessage
from colotx.replication import NoReplication
from colotx.spool import BufferPool, Spool
from colotx.statistics import CheckpointStatistics
from colotx.test.wires import PipeTransport, WirePair, connect
from colotx.trigger import CheckpointTrigger

M = ColoMessage
DELAY = 100
SMALL = MemorySettings(ramBytes=2 << 20)


def fingerprint(guest) -> str:
    """All of a stopped embedded guest's state."""
    machine = guest.machine
    return hashlib.sha256(machine.memory.pages.tobytes() + machine.deviceState()).hexdigest()


class Role:
    """A role whose failover only notes that it went on."""

    mode = ColoMode.PRIMARY

    def __init__(self) -> None:
        self.live = False
        self.process = None

    @property
    def loading(self) -> bool:
        return self.process is not None and getattr(self.process, "loading", False)

    async def obtainGrant(self, cause):
        return Grant(2, "test")

    async def shutTransport(self, cause):
        pass

    async def goLive(self, grant):
        self.live = True


@implementer(IReplication)
class NotedReplication(NoReplication):
    """Notes what it is told; C{error} makes it broken."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.error: StorageError | None = None

    def startAll(self, mode):
        self.did.append(f"start {mode.value}")
        return succeed(None)

    def doCheckpointAll(self):
        self.did.append("checkpoint")
        return succeed(None)

    def getErrorAll(self):
        if self.error is not None:
            raise self.error


class PrimarySide:
    """A primary guest, its gate and its process."""

    def __init__(self, clock: Clock, pipelined: bool = True) -> None:
        self.clock = clock
        self.out: list[bytes] = []
        """Frames that left; the guest's own (42 bytes and more) are not of interest."""
        self.role = Role()
        self.failover = FailoverService(self.role, lambda mode, reason: None)
        self.replication = NotedReplication()
        self.trigger = CheckpointTrigger(clock, DELAY)
        self.gate = OutputGate(self._left, self.trigger.notify, lambda on: None)
        self.guest = MemoryGuestFactory(clock, SMALL).createPrimary()
        self.guest.port.receiver = self.gate.hold
        self.guest.launch()
        self.statistics = CheckpointStatistics()
        self.exposed = 0
        self.fingerprints: list[str] = []
        pool = BufferPool()
        self.process = PrimaryProcess(
            clock,
            self.guest,
            self.gate,
            self.replication,
            self.failover,
            self.trigger,
            self.statistics,
            (lambda: Spool(pool)) if pipelined else None,
            onExposed=self._exposed,
        )
        # What the guest is at each stop is what a survivor must be.
        save = self.guest.saveDeviceState

        def saveDeviceState():
            self.fingerprints.append(fingerprint(self.guest))
            return save()

        self.guest.saveDeviceState = saveDeviceState

    def _left(self, frames) -> None:
        self.out.extend(frame for frame in frames if len(frame) < 42)

    def _exposed(self) -> None:
        self.exposed += 1
        self.fingerprints.append(fingerprint(self.guest))


class SecondarySide:
    """A passive standby and its process."""

    def __init__(self, clock: Clock) -> None:
        self.role = Role()
        self.role.mode = ColoMode.SECONDARY
        self.failover = FailoverService(self.role, lambda mode, reason: None)
        self.replication = NotedReplication()
        self.standby = MemoryGuestFactory(clock, SMALL).createStandby()
        self.process = SecondaryProcess(clock, self.standby, self.replication, self.failover)
        self.role.process = self.process


def advance(clock: Clock, wire: WirePair | None, seconds: float) -> None:
    for _ in range(round(seconds * 1000)):
        clock.advance(0.001)
        if wire is not None:
            wire.flush()


class PairTests(SynchronousTestCase):
    """Both processes, joined."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.wire = WirePair(self.clock)
        self.primary = PrimarySide(self.clock)
        self.secondary = SecondarySide(self.clock)
        self.addCleanup(self.secondary.standby.close)
        self.running = ensureDeferred(self.primary.process.run(self.wire.left))
        self.holding = ensureDeferred(self.secondary.process.run(self.wire.right))
        advance(self.clock, self.wire, 0.02)

    def advance(self, seconds: float) -> None:
        advance(self.clock, self.wire, seconds)

    def end(self) -> None:
        self.wire.cut()
        self.failureResultOf(self.running, PeerLost)
        self.failureResultOf(self.holding, ColoError)

    def promoted(self):
        promoting = self.secondary.standby.promote()
        self.advance(0.1)
        return self.successResultOf(promoting)

    def test_interfaces(self) -> None:
        verifyObject(IReplication, NoReplication())
        self.end()

    def test_initialThenPeriodic(self) -> None:
        self.assertEqual(self.secondary.standby.checkpoint, 1)
        self.assertEqual(self.primary.exposed, 1)
        self.assertIs(self.primary.guest.runState, RunState.RUNNING)
        self.advance(1.0)
        self.assertEqual(self.secondary.standby.checkpoint, 11)
        self.assertEqual(self.primary.statistics.checkpoints, 11)
        self.assertEqual(self.primary.replication.did, ["start primary"] + ["checkpoint"] * 10)
        self.assertEqual(self.secondary.replication.did, ["start secondary"] + ["checkpoint"] * 10)
        self.end()

    def test_survivorIsTheLastCheckpoint(self) -> None:
        self.advance(0.55)
        self.end()
        self.assertEqual(fingerprint(self.promoted()), self.primary.fingerprints[-1])

    def test_outputWaitsForItsCheckpoint(self) -> None:
        self.primary.gate.hold([b"first"])
        self.advance(0.05)
        self.assertEqual(self.primary.out, [])
        self.advance(0.05)
        self.assertEqual(self.primary.out, [b"first"])
        self.end()

    def test_earlyRequest(self) -> None:
        self.primary.trigger.notify("test")
        self.advance(0.01)
        self.assertEqual(self.secondary.standby.checkpoint, 2)
        self.assertEqual(self.primary.statistics.records[-1].reason, "test")
        self.end()

    def test_guestRunsOnBeforeThePeerHasIt(self) -> None:
        """Pipelined: the guest is answered while the checkpoint travels; the gate stays shut until RECEIVED."""
        self.clock.advance(DELAY / 1000)
        self.primary.gate.hold([b"covered"])
        request = self.wire.leftTransport.take()
        self.wire.right.dataReceived(request)
        self.wire.left.dataReceived(self.wire.rightTransport.take())
        self.assertIs(self.primary.guest.runState, RunState.RUNNING)
        self.assertEqual(len(self.primary.fingerprints), 2)
        self.primary.gate.hold([b"uncovered"])
        self.assertEqual(self.primary.out, [])
        self.advance(0.01)
        self.assertEqual(self.primary.out, [b"covered"])
        self.end()

    def test_triggerWhileACheckpointTravels(self) -> None:
        """One in flight, the next waits, and is not lost."""
        self.clock.advance(DELAY / 1000)
        self.wire.right.dataReceived(self.wire.leftTransport.take())
        self.wire.left.dataReceived(self.wire.rightTransport.take())
        self.primary.trigger.notify("while in flight")
        self.assertEqual(self.secondary.standby.checkpoint, 1)
        self.advance(0.01)
        self.assertEqual(self.secondary.standby.checkpoint, 3)
        self.assertEqual(self.primary.statistics.records[-1].reason, "while in flight")
        self.end()

    def test_failoverOnThePrimary(self) -> None:
        self.primary.failover.request(FailoverCause("test"))
        self.primary.trigger.notify("wake")
        self.failureResultOf(self.running, FailoverRequested)
        self.assertIs(self.primary.guest.runState, RunState.RUNNING)
        self.wire.cut()
        self.failureResultOf(self.holding, PeerLost)

    def test_failoverWhileLoading(self) -> None:
        """A checkpoint that is being loaded is finished, LOADED is not sent, and the failover goes on."""
        settling: Deferred[None] = Deferred()
        self.secondary.standby.settle = lambda: settling
        self.advance(0.11)
        self.assertTrue(self.secondary.process.loading)
        self.secondary.failover.request(FailoverCause("test"))
        self.assertIs(self.secondary.failover.state.status, FailoverStatus.RELAUNCH)
        settling.callback(None)
        self.failureResultOf(self.holding, FailoverRequested)
        self.assertTrue(self.secondary.role.live)
        self.assertEqual(self.wire.rightTransport.take(), b"")
        self.wire.cut()
        self.failureResultOf(self.running, PeerLost)

    def test_replicationErrorOnTheSecondary(self) -> None:
        self.secondary.replication.error = StorageError("replication is broken")
        self.advance(0.2)
        self.failureResultOf(self.holding, StorageError)
        self.assertEqual(self.secondary.standby.checkpoint, 2)
        self.wire.cut()
        self.failureResultOf(self.running, PeerLost)

    def test_guestThatDoesNotStop(self) -> None:
        def stop():
            raise GuestTimeout("it did not stop")

        self.primary.guest.stop = stop
        self.advance(0.2)
        self.failureResultOf(self.running, GuestTimeout)
        self.assertIs(self.primary.guest.runState, RunState.RUNNING)
        self.wire.cut()
        self.failureResultOf(self.holding, PeerLost)


class FrozenGuestTests(SynchronousTestCase):
    def test_guestThatDoesNotRunOnIsLost(self) -> None:
        clock = Clock()
        side = PrimarySide(clock)
        wire, _ = connect(clock)
        running = ensureDeferred(side.process.run(wire))
        advance(clock, None, 0.02)

        def endProtection():
            raise GuestTimeout("QEMU does not leave COLO")

        side.guest.endProtection = endProtection
        wire.connectionLost(Failure(ConnectionLost()))
        self.assertIn("does not leave COLO", str(self.failureResultOf(running, GuestLost).value))
        side.guest.shutdown()


class NotPipelinedTests(SynchronousTestCase):
    """The order an active secondary needs: the guest waits for LOADED."""

    def test_vanishAtEveryBoundary(self) -> None:
        """Whatever the guest waits for, it runs on when the peer is gone."""
        for boundary in range(4):
            clock = Clock()
            side = PrimarySide(clock, pipelined=False)
            wire, transport = connect(clock)
            running = ensureDeferred(side.process.run(wire))
            advance(clock, None, 0.02)
            for answer in ANSWERS[:boundary]:
                wire.dataReceived(encodeMessage(answer))
                if answer is M.CHECKPOINT_READY:
                    advance(clock, None, 0.1)
            if boundary != 1:
                self.assertIs(side.guest.runState, RunState.COLO)
            wire.connectionLost(Failure(ConnectionLost()))
            self.failureResultOf(running, PeerLost)
            self.assertIs(side.guest.runState, RunState.RUNNING)
            side.guest.shutdown()

    def test_guestWaitsForLoaded(self) -> None:
        clock = Clock()
        side = PrimarySide(clock, pipelined=False)
        wire, transport = connect(clock)
        running = ensureDeferred(side.process.run(wire))
        advance(clock, None, 0.02)
        self.assertIs(side.guest.runState, RunState.COLO)
        wire.dataReceived(encodeMessage(M.CHECKPOINT_READY))
        self.assertIs(side.guest.runState, RunState.RUNNING)
        advance(clock, None, 0.1)
        wire.dataReceived(encodeMessage(M.CHECKPOINT_REPLY))
        side.gate.hold([b"x"])
        self.assertIs(side.guest.runState, RunState.COLO)
        wire.dataReceived(encodeMessage(M.VMSTATE_RECEIVED))
        self.assertIs(side.guest.runState, RunState.COLO)
        wire.dataReceived(encodeMessage(M.VMSTATE_LOADED))
        self.assertIs(side.guest.runState, RunState.RUNNING)
        wire.connectionLost(Failure(ConnectionLost()))
        self.failureResultOf(running, PeerLost)


ANSWERS = [M.CHECKPOINT_READY, M.CHECKPOINT_REPLY, M.VMSTATE_RECEIVED, M.VMSTATE_LOADED]


class PrimaryFaultTests(SynchronousTestCase):
    """
    The peer does something wrong instead of its n-th answer. Always: a clear error, the guest running out of COLO, and
    no frame out that the peer has not acknowledged.
    """

    def setUp(self) -> None:
        self.clock = Clock()

    def upTo(self, boundary: int):
        """A primary whose peer has given C{boundary} right answers."""
        side = PrimarySide(self.clock)
        wire, transport = connect(self.clock)
        running = ensureDeferred(side.process.run(wire))
        advance(self.clock, None, 0.02)
        for answer in ANSWERS[:boundary]:
            wire.dataReceived(encodeMessage(answer))
            if answer is M.CHECKPOINT_READY:
                advance(self.clock, None, 0.1)
        side.gate.hold([b"uncovered"])
        self.assertNoResult(running)
        return side, wire, transport, running

    def check(self, side, running, error, covered: int) -> str:
        failure = self.failureResultOf(running, error)
        self.assertIs(side.guest.runState, RunState.RUNNING)
        self.assertNotIn(b"uncovered", side.out)
        self.assertEqual(side.statistics.checkpoints, covered)
        self.assertEqual(
            [call for call in self.clock.getDelayedCalls() if call.func.__name__ == "expire"], []
        )
        side.guest.shutdown()
        return str(failure.value)

    def everywhere(self, fault, errors) -> None:
        for boundary, expected in enumerate(ANSWERS):
            side, wire, _, running = self.upTo(boundary)
            fault(wire, expected)
            covered = (0, 1, 1, 2)[boundary]
            message = self.check(side, running, errors, covered)
            self.assertTrue(message)

    def test_vanish(self) -> None:
        self.everywhere(lambda wire, due: wire.connectionLost(Failure(ConnectionLost())), PeerLost)

    def test_truncation(self) -> None:
        def fault(wire, due):
            wire.dataReceived(encodeMessage(due)[:3])
            wire.connectionLost(Failure(ConnectionLost()))

        self.everywhere(fault, TruncatedError)

    def test_garbage(self) -> None:
        self.everywhere(lambda wire, due: wire.dataReceived(b"\xde\xad\xbe\xef"), InvalidMessage)

    def test_wrongMessage(self) -> None:
        def fault(wire, due):
            wrong = M.VMSTATE_SEND if due is not M.VMSTATE_SEND else M.CHECKPOINT_READY
            wire.dataReceived(encodeMessage(wrong))

        self.everywhere(fault, UnexpectedMessage)

    def test_delay(self) -> None:
        self.everywhere(lambda wire, due: self.clock.pump([0.5] * 130), PeerTimeout)

    def test_vanishBetweenCheckpoints(self) -> None:
        side, wire, _, running = self.upTo(4)
        wire.connectionLost(Failure(ConnectionLost()))
        self.check(side, running, PeerLost, 2)

    def test_peerThatTakesNothing(self) -> None:
        """A checkpoint that cannot be sent: the guest was answered long ago, the error comes with the stall."""
        side, wire, transport, running = self.upTo(1)
        transport.producer.pauseProducing()
        wire.dataReceived(encodeMessage(M.CHECKPOINT_REPLY))
        self.assertIs(side.guest.runState, RunState.RUNNING)
        self.clock.pump([1.0] * 31)
        self.check(side, running, PeerTimeout, 1)

    def test_failoverAtEveryBoundary(self) -> None:
        for boundary in range(4):
            side, wire, _, running = self.upTo(boundary)
            side.failover.request(FailoverCause("test"))
            wire.dataReceived(encodeMessage(ANSWERS[boundary]))
            self.check(side, running, FailoverRequested, (0, 1, 1, 2)[boundary])

    def test_exposedCannotBeStored(self) -> None:
        """The epoch's file cannot be written: the peer must not get a checkpoint it could go on from."""
        side = PrimarySide(self.clock)

        def exposed() -> None:
            raise StorageError("disk full")

        side.process._onExposed = exposed
        wire, transport = connect(self.clock)
        running = ensureDeferred(side.process.run(wire))
        advance(self.clock, None, 0.02)
        self.failureResultOf(running, StorageError)
        standby = SecondarySide(self.clock)
        other, _ = connect(self.clock)
        holding = ensureDeferred(standby.process.run(other))
        other.dataReceived(transport.take())
        self.assertNoResult(holding)
        self.assertEqual(standby.standby.checkpoint, 0)
        other.connectionLost(Failure(ConnectionLost()))
        self.failureResultOf(holding, TruncatedError)


def recorded() -> tuple[list[tuple[str, bytes]], list[str]]:
    """What a primary sends: named pieces from the initial stream through two checkpoints, and its fingerprints."""
    clock = Clock()
    side = PrimarySide(clock)
    wire, transport = connect(clock)
    running = ensureDeferred(side.process.run(wire))
    advance(clock, None, 0.02)
    pieces = [("initial", transport.take())]
    wire.dataReceived(encodeMessage(M.CHECKPOINT_READY))
    for _ in range(2):
        advance(clock, None, DELAY / 1000)
        pieces.append(("REQUEST", transport.take()))
        wire.dataReceived(encodeMessage(M.CHECKPOINT_REPLY))
        sent = transport.take()
        size = sent.rindex(encodeMessage(M.VMSTATE_SIZE, len(side.guest.machine.deviceState())))
        pieces += [("SEND", sent[:4]), ("RAM", sent[4:size]), ("SIZE", sent[size : size + 12])]
        pieces.append(("blob", sent[size + 12 :]))
        wire.dataReceived(encodeMessage(M.VMSTATE_RECEIVED) + encodeMessage(M.VMSTATE_LOADED))
    side.guest.shutdown()
    running.addErrback(lambda failure: None)
    wire.connectionLost(Failure(ConnectionLost()))
    return pieces, side.fingerprints


class SecondaryFaultTests(SynchronousTestCase):
    """
    The primary does something wrong at each boundary. Always: a clear error, and what goes on is the last whole
    checkpoint, to the byte.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.pieces, self.fingerprints = recorded()

    def upTo(self, boundary: int):
        side = SecondarySide(self.clock)
        self.addCleanup(side.standby.close)
        wire, transport = connect(self.clock)
        running = ensureDeferred(side.process.run(wire))
        for _, data in self.pieces[:boundary]:
            wire.dataReceived(data)
            self.clock.pump([0.001] * 10)
        self.assertNoResult(running)
        return side, wire, transport, running

    def check(self, side, running, errors, whole: int, transport: PipeTransport) -> None:
        failure = self.failureResultOf(running, *errors)
        self.assertTrue(str(failure.value))
        self.assertEqual(side.standby.checkpoint, whole)
        sent = transport.take()
        # READY and every RECEIVED stand for a checkpoint that is held.
        self.assertEqual(
            sent.count(encodeMessage(M.VMSTATE_RECEIVED)) + (sent[:4] == encodeMessage(M.CHECKPOINT_READY)),
            whole,
        )
        if whole:
            promoting = side.standby.promote()
            self.clock.pump([0.001] * 20)
            self.assertEqual(fingerprint(self.successResultOf(promoting)), self.fingerprints[whole - 1])

    def whole(self, boundary: int) -> int:
        """Checkpoints that C{boundary} pieces hold."""
        return sum(name in ("initial", "blob") for name, _ in self.pieces[:boundary])

    def everywhere(self, fault, *errors) -> None:
        for boundary, (name, data) in enumerate(self.pieces):
            side, wire, transport, running = self.upTo(boundary)
            fault(wire, name, data)
            self.check(side, running, errors, self.whole(boundary), transport)

    def test_recordingIsRight(self) -> None:
        self.assertEqual(
            [name for name, _ in self.pieces], ["initial", *["REQUEST", "SEND", "RAM", "SIZE", "blob"] * 2]
        )
        side, wire, transport, running = self.upTo(len(self.pieces))
        wire.connectionLost(Failure(ConnectionLost()))
        self.check(side, running, [PeerLost], 3, transport)

    def test_vanish(self) -> None:
        self.everywhere(
            lambda wire, name, data: wire.connectionLost(Failure(ConnectionLost())), PeerLost, TruncatedError
        )

    def test_truncation(self) -> None:
        def fault(wire, name, data):
            wire.dataReceived(data[: len(data) // 2])
            wire.connectionLost(Failure(ConnectionLost()))

        self.everywhere(fault, TruncatedError)

    def test_garbage(self) -> None:
        def fault(wire, name, data):
            wire.dataReceived(b"\xde\xad\xbe\xef" * 64)
            wire.connectionLost(Failure(ConnectionLost()))

        self.everywhere(fault, ColoError)

    def test_oversize(self) -> None:
        for boundary, (name, _) in enumerate(self.pieces):
            if name == "SIZE":
                side, wire, transport, running = self.upTo(boundary)
                wire.dataReceived(encodeMessage(M.VMSTATE_SIZE, 2**62))
                self.check(side, running, [OversizeError], self.whole(boundary), transport)

    def test_unexpectedMessage(self) -> None:
        def fault(wire, name, data):
            wire.dataReceived(encodeMessage(M.VMSTATE_LOADED))
            wire.connectionLost(Failure(ConnectionLost()))

        self.everywhere(fault, ColoError)

    def test_unknownMessageBetweenCheckpoints(self) -> None:
        side, wire, transport, running = self.upTo(1)
        wire.dataReceived(encodeMessage(M.VMSTATE_SEND))
        self.assertIn(
            "Got unknown COLO message: 3", str(self.failureResultOf(running, UnexpectedMessage).value)
        )

    def test_delay(self) -> None:
        """Within a transaction a primary that stalls is given up; between two it may be silent for ever."""
        for boundary, (name, _) in enumerate(self.pieces):
            side, wire, transport, running = self.upTo(boundary)
            self.clock.pump([0.5] * 130)
            if name == "REQUEST":
                self.assertNoResult(running)
                wire.connectionLost(Failure(ConnectionLost()))
                self.check(side, running, [PeerLost], self.whole(boundary), transport)
            else:
                self.check(side, running, [PeerTimeout], self.whole(boundary), transport)

    def test_noRoomForTheCheckpoint(self) -> None:
        def stageLive(raw, events):
            raise StorageError("no space left")

        side, wire, transport, running = self.upTo(2)
        side.standby.stageLive = stageLive
        wire.dataReceived(self.pieces[2][1] + self.pieces[3][1])
        self.check(side, running, [StorageError], 1, transport)
