"""
Both roles on a clock: real guests, a real state file, a link in memory that can be cut, delayed and lied about. What
a test asks is who speaks: whose guest's frames reach the outside.
"""

from __future__ import annotations

from collections import deque
from uuid import uuid4

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from colotx import primary as primaryModule
from colotx.errors import ColoError, PeerLost, StorageError
from colotx.failover import FailoverCause
from colotx.frames import FrameChannel
from colotx.guests.memory import MemoryGuestFactory, MemorySettings
from colotx.hello import Hello
from colotx.interfaces import RunState
from colotx.ports import NullPort
from colotx.primary import PrimaryRole
from colotx.protocol import ColoConnection
from colotx.role import Parameters, Surroundings
from colotx.secondary import SecondaryRole
from colotx.settings import Settings
from colotx.state import PersistentState, StateStore
from colotx.statistics import CheckpointStatistics
from colotx.status import StatusBoard
from colotx.test.wires import PipeTransport
from colotx.witness.policy import PolicyWitness

GUEST = MemorySettings(ramBytes=2 << 20, dirtyPages=1)
OPERATOR = FailoverCause("the operator said so", forced=True, operator=True)


class Outside(NullPort):
    """Notes what leaves; the guest's own frames (42 bytes and more) are not of interest."""

    def __init__(self) -> None:
        self.left: list[bytes] = []

    def send(self, frames) -> None:
        self.left.extend(frame for frame in frames if len(frame) < 42)


class End:
    """One end of a session, as a role sees it: C{peer}, C{control}, C{colo}, C{frames}, C{error}, C{close}."""

    def __init__(self, clock: Clock, peer: Hello) -> None:
        self.frames: FrameChannel | None = None
        self.frameTransport = PipeTransport()
        if peer.secondary == "active":
            self.frames = FrameChannel()
            self.frames.makeConnection(self.frameTransport)
        self.peer = peer
        self.control = self
        self.colo = ColoConnection(clock)
        self.transport = PipeTransport()
        self.colo.makeConnection(self.transport)
        self.error: ColoError | None = None
        self.sent: deque[dict[str, object]] = deque()
        self.said: list[str] = []
        self.onMessage = None

    def send(self, message) -> None:
        """The control channel."""
        if self.error is None:
            self.sent.append(message)
            self.said.append(message["type"])

    def close(self, reason: str) -> None:
        if self.error is None:
            self.sent.append({"type": "bye", "reason": reason})
            self.error = PeerLost(f"this side closed the session: {reason}")

    def receive(self, message) -> None:
        """What the peer sent on the control channel."""
        if self.error is not None:
            return
        if message.get("type") == "bye":
            self.lose(PeerLost(f"the peer closed the session: {message['reason']}"))
        else:
            self.onMessage(message)

    def lose(self, error: ColoError) -> None:
        """The connection is gone."""
        self.error = self.error or error
        self.colo.connectionLost(Failure(ConnectionLost()))
        if self.frames is not None:
            self.frames.connectionLost(Failure(ConnectionLost()))


class Session:
    """Both ends of one."""

    def __init__(self, clock: Clock, primary: Side, secondary: Side) -> None:
        self.left, self.right = End(clock, secondary.hello()), End(clock, primary.hello())
        self.left.colo.pauseProducing()
        self._paused = True
        self.over = False

    def flush(self) -> None:
        """Carry until nothing moves: on each channel in order, COLO first."""
        if self._paused:
            # The initial transfer takes until now.
            self._paused = False
            self.left.colo.resumeProducing()
        moved = True
        while moved and not self.over:
            moved = False
            for source, target in ((self.left, self.right), (self.right, self.left)):
                if source.transport.sent and not target.transport.paused and not self.over:
                    target.colo.dataReceived(source.transport.sent.popleft())
                    moved = True
                elif source.frameTransport.sent and not self.over:
                    target.frames.dataReceived(source.frameTransport.sent.popleft())
                    moved = True
                elif source.sent and not self.over:
                    message = source.sent.popleft()
                    target.receive(message)
                    moved = True
                    if message["type"] == "bye":
                        self.over = True
                        source.lose(PeerLost("closed"))

    def cut(self, error: ColoError | None = None) -> None:
        """Both ends lose it; what was on its way is lost."""
        if not self.over:
            self.over = True
            self.right.lose(error or PeerLost("no heartbeat"))
            self.left.lose(error or PeerLost("no heartbeat"))


class Side:
    """
    One host: a role and what surrounds it. As L{colotx.service.ColoService} does, it changes its role at a failover.
    """

    def __init__(self, case: RoleCase, role: str, policy: str, kind: str) -> None:
        self.clock = case.clock
        self.events: list[tuple[str, dict[str, object]]] = []
        self.outside = Outside()
        self.store = StateStore(case.mktemp())
        self.hungUp = False
        self.status = StatusBoard(self.clock, lambda event, data: None)
        settings = Settings(role=role, onLostPeer=policy, checkpointDelay=100, secondary=kind)
        self.around = Surroundings(
            reactor=self.clock,
            settings=settings,
            parameters=Parameters(settings.checkpointDelay),
            store=self.store,
            witness=PolicyWitness(policy),
            factory=MemoryGuestFactory(self.clock, GUEST),
            credentials=None,
            instance=str(uuid4()),
            status=self.status,
            statistics=CheckpointStatistics(),
            hangUp=lambda: setattr(self, "hungUp", True),
            emit=lambda event, data: self.events.append((event, data)),
            monotonic=self.clock.seconds,
        )
        self.role: PrimaryRole | SecondaryRole
        if role == "primary":
            self.role = self.makePrimary(self.around.factory.createPrimary())
        else:
            self.role = SecondaryRole(self.around, self._promoted)

    def makePrimary(self, *arguments) -> PrimaryRole:
        previous = primaryModule.parseOutside
        primaryModule.parseOutside = lambda text: lambda reactor: self.outside
        try:
            return PrimaryRole(self.around, *arguments)
        finally:
            primaryModule.parseOutside = previous

    def _promoted(self, guest, addresses, grant) -> Deferred[None]:
        self.role = self.makePrimary(guest, addresses)
        return ensureDeferred(self.role.goOn(grant))

    def hello(self, **fields) -> Hello:
        kind = self.around.settings.secondary
        values = {"vm": "guest0", "role": self.role.role, "instance": self.around.instance}
        values |= {"secondary": kind, "frames": kind == "active"}
        return Hello(**(values | {"epoch": self.store.current.epoch} | fields))

    def start(self) -> Deferred[None]:
        return ensureDeferred(self.role.start())

    def request(self, cause: FailoverCause = OPERATOR) -> Deferred[None]:
        """A failover; a refusal comes as a failure."""

        async def request() -> None:
            await self.role.failover.request(cause)

        return ensureDeferred(request())

    def say(self, frame: bytes) -> None:
        """The guest's NIC sends this, if a guest runs here."""
        if isinstance(self.role, PrimaryRole) and self.role.runState is RunState.RUNNING:
            self.role.guest.port.receiver([frame])

    @property
    def speaks(self) -> bool:
        """Whether what a guest here says now leaves the host at once."""
        probe = b"probe %d" % len(self.outside.left)
        self.say(probe)
        return probe in self.outside.left

    @property
    def heard(self) -> list[bytes]:
        """What left the host, probes aside."""
        return [frame for frame in self.outside.left if not frame.startswith(b"probe")]

    @property
    def why(self) -> str:
        return f"{self.status.protection.value}: {self.status.why}"

    @property
    def exits(self) -> list[dict[str, object]]:
        return [data for event, data in self.events if event == "COLO_EXIT"]


class RoleCase(SynchronousTestCase):
    """A pair: C{a} is started as primary, C{b} as secondary."""

    policy = "hold"
    kind = "passive"

    def setUp(self) -> None:
        self.clock = Clock()
        self.sessions: list[Session] = []
        self.a = Side(self, "primary", self.policy, self.kind)
        self.b = Side(self, "secondary", self.policy, self.kind)
        self.addCleanup(self._end)

    def _end(self) -> None:
        for side in (self.a, self.b):
            ensureDeferred(side.role.stop())
        self.advance(0.2)
        for session in self.sessions:
            session.cut()
        # Nothing may be left behind: a timer of a role that ended would act for the next one.
        self.assertEqual([call for call in self.clock.getDelayedCalls() if call.active()], [])

    def start(self) -> None:
        self.successResultOf(self.b.start())
        self.successResultOf(self.a.start())

    def connect(self, primary: Side | None = None, secondary: Side | None = None) -> Session:
        """Make a session; neither side refuses. The listener is told first, as in the link."""
        primary, secondary = primary or self.a, secondary or self.b
        self.assertIsNone(secondary.role.judge(primary.hello()))
        self.assertIsNone(primary.role.judge(secondary.hello()))
        session = Session(self.clock, primary, secondary)
        self.sessions.append(session)
        secondary.role.sessionEstablished(session.right)
        primary.role.sessionEstablished(session.left)
        return session

    def protect(self) -> Session:
        """Start both, and have a checkpoint held."""
        self.start()
        session = self.connect()
        self.advance(0.05)
        self.assertEqual(self.a.status.protection.value, "protected")
        self.assertEqual(self.b.status.protection.value, "protected")
        return session

    def advance(self, seconds: float) -> None:
        step = 0.001 if seconds <= 0.5 else 0.01
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            for session in self.sessions:
                session.flush()

    def assertSpeaks(self, *sides: Side) -> None:
        """Exactly these guests speak."""
        names = {id(self.a): "a", id(self.b): "b"}
        self.assertEqual(
            [names[id(side)] for side in (self.a, self.b) if side.speaks], [names[id(s)] for s in sides]
        )

    def breakStore(self, side: Side) -> None:
        """Its state file can be written no more."""

        def save(state: PersistentState) -> None:
            if state != side.store.current:
                raise StorageError("no space left")

        side.store.save = save  # type: ignore[method-assign]
