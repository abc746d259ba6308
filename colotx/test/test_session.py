"""
Tests for L{colotx.session}, and for L{colotx.channel} without its TLS: two ends in memory, time from a clock.
"""

from __future__ import annotations

from uuid import uuid4

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from colotx.channel import Channel, ChannelKind
from colotx.errors import HelloRefused, OversizeError, PeerError, PeerLost, PeerTimeout, ProtocolError
from colotx.hello import Hello, encodeFrame
from colotx.session import CLOSE_GRACE, MAX_INBOX, MAX_UNSENT, ControlConnection, Heartbeat, Session


class MemoryTransport(StringTransport):
    """One end of a connection; C{carry} takes what was written to the other end."""

    def __init__(self, channel):
        super().__init__()
        self.channel = channel
        self.other = None
        self.closed = False
        self.cut = False

    def carry(self):
        data = self.value()
        self.clear()
        if data and not self.cut and not self.other.closed:
            self.other.channel.dataReceived(data)
        return bool(data)

    def abortConnection(self):
        self.close(ConnectionLost())

    def loseConnection(self):
        if self.producer is None:
            self.carry()
            self.close(ConnectionDone())

    def close(self, reason):
        """As TCP does it: both ends learn of it, this one at once and the other later."""
        if not self.closed:
            self.closed = True
            self.clear()
            self.channel.connectionLost(Failure(reason))


class App(Protocol):
    def __init__(self):
        self.received = b""
        self.lost = None

    def dataReceived(self, data):
        self.received += data

    def connectionLost(self, reason):
        self.lost = reason.value


class End:
    """One daemon's half: channels, control connection and, after C{begin}, a session."""

    def __init__(self, clock, role, kinds):
        self.clock = clock
        self.hello = Hello("web", role, str(uuid4()), 0)
        self.transports = {}
        for kind in kinds:
            channel = Channel(clock, "peer", 5.0)
            channel.kind = kind
            self.transports[kind] = MemoryTransport(channel)
            channel.makeConnection(self.transports[kind])
            channel.secured.callback(channel)
        self.control = ControlConnection(self.channel(ChannelKind.CONTROL))
        self.control.channel.attach(self.control)
        self.control.channel.release()
        self.messages = []

    def channel(self, kind):
        return self.transports[kind].channel

    def begin(self, peer, heartbeat=None, established=None):
        frames = App() if ChannelKind.FRAMES in self.transports else None
        channels = {k: self.channel(k) for k in self.transports if k is not ChannelKind.CONTROL}
        self.session = Session(
            self.clock,
            self.hello,
            peer,
            self.control,
            channels,
            App(),
            frames,
            heartbeat or Heartbeat(0.1, 0.3),
        )
        self.session.start(established or self.established)
        return self.session

    def established(self, session):
        session.control.onMessage = self.messages.append


class SessionCase(SynchronousTestCase):
    kinds: tuple[ChannelKind, ...] = (ChannelKind.CONTROL, ChannelKind.COLO)

    def setUp(self):
        self.clock = Clock()
        self.a = End(self.clock, "primary", self.kinds)
        self.b = End(self.clock, "secondary", self.kinds)
        for kind in self.kinds:
            one, two = self.a.transports[kind], self.b.transports[kind]
            one.other, two.other = two, one

    def begin(self):
        self.ours = self.a.begin(self.b.hello)
        self.theirs = self.b.begin(self.a.hello)

    def flush(self):
        """Carry bytes and ends of connections until nothing moves."""
        moved = True
        while moved:
            moved = False
            for end in self.a, self.b:
                for transport in end.transports.values():
                    moved |= transport.carry()
                    if transport.other.closed and not transport.closed and not transport.cut:
                        transport.close(ConnectionDone())
                        moved = True

    def cut(self):
        """The cable is out: nothing is carried, nobody is told."""
        for end in self.a, self.b:
            for transport in end.transports.values():
                transport.cut = True

    def pass_(self, seconds, step=0.01):
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            self.flush()


class LivingTests(SessionCase):
    def test_idle(self):
        """Heartbeats keep an idle session alive, for as long as it takes."""
        self.begin()
        self.pass_(10)
        self.assertEqual((self.ours.error, self.theirs.error), (None, None))
        self.assertTrue(self.clock.seconds() - self.ours.heard < 0.2)
        self.assertIsNone(self.ours.silence)

    def test_dataIsLife(self):
        """Bytes on the COLO channel count as life when control's are stuck."""
        self.begin()
        for transport in self.a.transports[ChannelKind.CONTROL], self.b.transports[ChannelKind.CONTROL]:
            transport.cut = True
        for _ in range(20):
            self.ours.colo.transport.write(b"x")
            self.theirs.colo.transport.write(b"x")
            self.pass_(0.1)
        self.assertEqual((self.ours.error, self.theirs.error), (None, None))

    def test_messages(self):
        self.begin()
        self.ours.control.send({"a": [1, {"b": None}]})
        self.theirs.control.send({})
        self.flush()
        self.assertEqual((self.b.messages, self.a.messages), ([{"a": [1, {"b": None}]}], [{}]))

    def test_nobodyTakesIt(self):
        """A message without a taker is dropped; the session goes on."""
        self.ours = self.a.begin(self.b.hello, established=lambda session: None)
        self.theirs = self.b.begin(self.a.hello)
        self.theirs.control.send({"a": 1})
        self.pass_(1)
        self.assertIsNone(self.ours.error)

    def test_earlyBytes(self):
        """What arrives before a side has its session waits, unread at the socket, and is delivered in order."""
        colo = self.a.channel(ChannelKind.COLO)
        colo.dataReceived(b"early")
        self.assertEqual(colo.transport.producerState, "paused")
        self.a.control.channel.dataReceived(encodeFrame({"type": "message", "body": {"n": 1}}))

        def established(session):
            self.assertEqual((session.colo.received, self.a.messages), (b"", []))
            self.a.established(session)

        session = self.a.begin(self.b.hello, established=established)
        self.assertEqual((session.colo.received, self.a.messages), (b"early", [{"n": 1}]))
        self.assertEqual(colo.transport.producerState, "producing")
        colo.dataReceived(b" late")
        self.assertEqual(session.colo.received, b"early late")

    def test_adopted(self):
        """The hello's deadline does not end a session."""
        self.begin()
        self.assertTrue(self.a.channel(ChannelKind.COLO).adopted)
        self.pass_(6)
        self.assertIsNone(self.ours.error)


class EndingTests(SessionCase):
    kinds = ChannelKind.CONTROL, ChannelKind.COLO, ChannelKind.FRAMES

    def assertOver(self, session, error, words):
        self.assertIsInstance(session.error, error)
        self.assertIn(words, str(session.error))
        self.assertIs(self.successResultOf(session.whenLost()), session.error)
        self.successResultOf(session.whenGone())
        self.assertIs(session.colo.lost, session.error)
        self.assertIs(session.frames.lost, session.error)

    def test_cable(self):
        """Silence ends a session at the limit, on both sides, with figures."""
        self.begin()
        self.pass_(1)
        self.cut()
        lost = self.ours.whenLost()
        self.pass_(0.19)
        self.assertNoResult(lost)
        self.pass_(0.12)
        self.assertOver(self.ours, PeerTimeout, "ms (limit 300 ms, a heartbeat every 100 ms)")
        self.assertOver(self.theirs, PeerTimeout, "the peer was silent for")
        self.assertTrue(0.3 <= self.ours.silence < 0.32, self.ours.silence)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_ownStall(self):
        """A process that was paused reads its sockets before it judges."""
        self.begin()
        self.pass_(1)
        self.clock.rightNow += 10  # paused: no timer ran, and the peer's heartbeats wait unread
        self.clock.advance(0)
        self.assertIsNone(self.ours.error)
        self.flush()
        self.pass_(1)
        self.assertIsNone(self.ours.error)

    def test_anyChannel(self):
        """The end of any channel is the end of the session, at once."""
        for kind in self.kinds:
            self.setUp()
            self.begin()
            self.pass_(0.5)
            self.clock.advance(0.005)
            self.a.transports[kind].abortConnection()
            self.assertOver(self.ours, PeerLost, f"the {kind.label} channel was closed")
            self.flush()
            self.assertOver(self.theirs, PeerLost, "channel was closed")
            self.assertTrue(0 < self.theirs.silence < 0.1)
            self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_close(self):
        """A closed session says why, and the application's channels end with that reason."""
        self.begin()
        lost = self.ours.whenLost()
        self.ours.close("failover")
        self.assertIn("this side closed the session: failover", str(self.successResultOf(lost)))
        self.flush()
        self.assertOver(self.ours, PeerLost, "failover")
        self.assertOver(self.theirs, PeerLost, "the peer closed the session: failover")
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_closeTwice(self):
        self.begin()
        self.ours.close("one")
        self.ours.close("two")
        self.ours.end(PeerLost("three"))
        self.flush()
        self.assertOver(self.theirs, PeerLost, "one")

    def test_closeOnDeafPeer(self):
        """A peer that does not close its side is not waited for."""
        self.begin()
        self.cut()
        self.patch(self.a.transports[ChannelKind.CONTROL], "loseConnection", lambda: None)
        self.ours.close("failover")
        self.assertIsNone(self.ours.colo.lost)
        self.clock.advance(CLOSE_GRACE)
        self.assertOver(self.ours, PeerLost, "failover")

    def test_afterTheEnd(self):
        """Sending on a session that has ended does nothing; messages that come are not delivered."""
        self.begin()
        self.theirs.control.send({"late": True})
        self.ours.end(PeerLost("enough"))
        self.ours.control.send({"a": 1})
        self.flush()
        self.assertEqual((self.a.messages, self.b.messages), ([], []))
        self.assertOver(self.ours, PeerLost, "enough")

    def test_messageAfterClose(self):
        self.begin()
        self.patch(self.a.transports[ChannelKind.CONTROL], "loseConnection", lambda: None)
        self.ours.close("failover")
        self.a.control.channel.dataReceived(encodeFrame({"type": "message", "body": {}}))
        self.assertEqual(self.a.messages, [])

    def test_unknownMessage(self):
        self.begin()
        for message in {"type": "dance"}, {"type": "message", "body": 3}, {}:
            self.setUp()
            self.begin()
            self.a.control.channel.dataReceived(encodeFrame(message))
            self.assertOver(self.ours, ProtocolError, "unknown control message")

    def test_garbage(self):
        self.begin()
        self.a.control.channel.dataReceived(b"\x00\x00\x00\x02{]")
        self.assertOver(self.ours, ProtocolError, "no JSON")

    def test_ownerFails(self):
        """An owner that raises loses the session, and its words are in the log."""
        self.ours = self.a.begin(self.b.hello, established=lambda session: 1 / 0)
        self.theirs = self.b.begin(self.a.hello)
        self.flush()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertOver(self.ours, PeerLost, "internal error")
        self.assertOver(self.theirs, PeerLost, "internal error")

    def test_ownerCloses(self):
        """An owner may close the session while it is told of it: no bytes are delivered then."""
        self.a.channel(ChannelKind.COLO).dataReceived(b"early")
        session = self.a.begin(self.b.hello, established=lambda session: session.end(PeerLost("no")))
        self.assertOver(session, PeerLost, "no")
        self.assertEqual(session.colo.received, b"")

    def test_unread(self):
        """A peer that does not read control costs a bounded amount of memory, then its session."""
        self.begin()
        self.a.control.pauseProducing()
        piece = {"x": "y" * 60000}
        for _ in range(MAX_UNSENT // 60000):
            self.ours.control.send(piece)
        self.assertIsNone(self.ours.error)
        self.ours.control.send(piece)
        self.assertOver(self.ours, PeerError, "unread")

    def test_readAgain(self):
        """What was counted is forgotten when the peer reads again."""
        self.begin()
        for _ in range(3):
            self.a.control.pauseProducing()
            for _ in range(10):
                self.ours.control.send({"x": "y" * 60000})
            self.a.control.resumeProducing()
        self.assertIsNone(self.ours.error)

    def test_noBeatsOnTop(self):
        """Heartbeats are not piled on a full buffer."""
        self.begin()
        self.a.control.pauseProducing()
        self.flush()
        self.clock.advance(0.1)
        self.assertEqual(self.a.transports[ChannelKind.CONTROL].value(), b"")


class ControlTests(SessionCase):
    """The control connection while a session is being made."""

    def receive(self):
        return Deferred.fromCoroutine(self.a.control.receive())

    def test_order(self):
        """Messages that come before they are asked for, and after, arrive in order."""
        self.b.control.send({"type": "x", "n": 1})
        self.flush()
        self.assertEqual(self.successResultOf(self.receive())["n"], 1)
        second = self.receive()
        self.assertNoResult(second)
        self.b.control.send({"type": "x", "n": 2})
        self.flush()
        self.assertEqual(self.successResultOf(second)["n"], 2)

    def test_inboxIsBounded(self):
        for _ in range(MAX_INBOX):
            self.b.control.send({"type": "x"})
        self.flush()
        self.assertFalse(self.a.transports[ChannelKind.CONTROL].closed)
        self.b.control.send({"type": "x"})
        self.flush()
        self.assertTrue(self.a.transports[ChannelKind.CONTROL].closed)

    def test_refused(self):
        waiting = self.receive()
        error = self.b.control.refuse("too old")
        self.flush()
        self.assertEqual(self.failureResultOf(waiting, HelloRefused).value.reason, "too old")
        self.assertEqual(error.reason, "too old")
        self.assertTrue(self.a.transports[ChannelKind.CONTROL].closed)
        self.assertTrue(self.b.transports[ChannelKind.CONTROL].closed)

    def test_longRefusal(self):
        """A peer's words are cut before they reach a log."""
        waiting = self.receive()
        self.b.control.send({"type": "refused", "reason": "x" * 50000})
        self.flush()
        self.assertEqual(len(self.failureResultOf(waiting, HelloRefused).value.reason), 1000)

    def test_lost(self):
        waiting = self.receive()
        self.a.transports[ChannelKind.CONTROL].close(ConnectionLost())
        self.failureResultOf(waiting, PeerLost)
        self.failureResultOf(self.receive(), PeerLost)

    def test_deadline(self):
        waiting = self.receive()
        self.clock.advance(5)
        error = self.failureResultOf(waiting, PeerTimeout).value
        self.assertIn("say its part of the hello within 5 s", str(error))

    def test_oversize(self):
        self.assertRaises(OversizeError, self.a.control.send, {"x": "y" * 70000})
