"""
Tests for L{colotx.link}: real TLS over loopback TCP, every wait bounded.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import trustme
from OpenSSL.crypto import X509, PKey
from OpenSSL.SSL import NO_OVERLAPPING_PROTOCOLS
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import CertificateOptions, TLSVersion
from twisted.internet.task import deferLater
from twisted.logger import formatEvent, globalLogPublisher
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import SkipTest, TestCase
from zope.interface import implementer

from colotx.certificates import Credentials, initAuthority, issue
from colotx.channel import ChannelKind, clientTLS
from colotx.errors import ConfigError, HelloRefused, OversizeError, PeerError, PeerLost, PeerTimeout
from colotx.hello import FrameDecoder, Hello, encodeFrame
from colotx.link import MAX_STRANGERS, LinkDialer, LinkListener, LinkSettings, _Candidate
from colotx.session import Heartbeat, Session

SETTINGS = LinkSettings(
    heartbeat=Heartbeat(0.5, 5.0),
    connectTimeout=2.0,
    helloTimeout=2.0,
    retryFirst=0.01,
    retryMost=0.05,
    retryRefused=0.1,
)


class Waiting:
    """Lets a test await that something it is told of has come true."""

    def __init__(self):
        self._waiting = []

    def wake(self):
        waiting, self._waiting = self._waiting, []
        for d in waiting:
            d.callback(None)

    async def until(self, condition):
        while not condition():
            d = Deferred()
            self._waiting.append(d)
            await d


class Recorder(Protocol, Waiting):
    """An application protocol that keeps what it got."""

    def __init__(self):
        super().__init__()
        self.received = bytearray()
        self.lost = None

    def dataReceived(self, data):
        self.received += data
        self.wake()

    def connectionLost(self, reason):
        self.lost = reason.value
        self.wake()


class Owner(Waiting):
    """An owner of a link that keeps what it was told."""

    def __init__(self, role, **fields):
        super().__init__()
        self.local = Hello("web", role, str(uuid4()), 3)
        self.local = replace(self.local, **fields)
        self.verdict = None
        self.judged = []
        self.sessions = []
        self.refusals = []
        self.messages = []

    def hello(self):
        return self.local

    def judge(self, peer):
        self.judged.append(peer)
        return self.verdict

    def buildColo(self):
        return Recorder()

    def buildFrames(self):
        return Recorder()

    def sessionEstablished(self, session):
        self.sessions.append(session)
        session.control.onMessage = self._message
        self.wake()

    def linkRefused(self, error):
        self.refusals.append(error)
        self.wake()

    def _message(self, message):
        self.messages.append(message)
        self.wake()


@implementer(IPushProducer)
class Pump:
    """A producer that writes zeros as fast as it may."""

    def __init__(self, transport, total):
        self.transport, self.total = transport, total
        self.sent = 0
        self.paused = Deferred()
        self._running = False

    def resumeProducing(self):
        self._running = True
        while self._running and self.sent < self.total:
            self.sent += 65536
            self.transport.write(bytes(65536))

    def pauseProducing(self):
        self._running = False
        if not self.paused.called:
            self.paused.callback(None)

    def stopProducing(self):
        self._running = False


class LinkCase(TestCase):
    """A listener with certificates; dialers on demand; everything stopped at the end."""

    timeout = 20

    def setUp(self):
        self.directory = Path(self.mktemp())
        initAuthority(self.directory / "ca")
        self.credentials = self.issue("localhost", "127.0.0.1")
        self.secondary = Owner("secondary")
        self.primary = Owner("primary")
        self.log = []
        globalLogPublisher.addObserver(self._observe)
        self.addCleanup(globalLogPublisher.removeObserver, self._observe)
        self.listener = self.listen(self.credentials)

    def _observe(self, event):
        if event.get("log_namespace", "").startswith("colotx"):
            self.log.append(formatEvent(event))

    async def logged(self, *words):
        """Wait until a line with all these words was logged."""
        while not any(all(word in line for word in words) for line in self.log):
            await deferLater(reactor, 0.01)

    def issue(self, *names, authority="ca", **options):
        paths = issue(self.directory / authority, names, self.directory / str(uuid4()), **options)
        return Credentials.load(*paths)

    def listen(self, credentials, peerName="localhost", settings=SETTINGS):
        listener = LinkListener(
            reactor, self.secondary, credentials, peerName, 0, "127.0.0.1", settings=settings
        )
        listener.start()
        self.port = listener.address.port
        self.addCleanup(lambda: Deferred.fromCoroutine(listener.stop()))
        return listener

    def dial(self, owner=None, credentials=None, peerName="localhost", settings=SETTINGS):
        dialer = LinkDialer(
            reactor,
            owner or self.primary,
            credentials or self.credentials,
            "127.0.0.1",
            self.port,
            peerName,
            settings,
        )
        dialer.start()
        self.addCleanup(lambda: Deferred.fromCoroutine(dialer.stop()))
        return dialer

    async def established(self) -> tuple[Session, Session]:
        await self.primary.until(lambda: self.primary.sessions)
        await self.secondary.until(lambda: self.secondary.sessions)
        return self.primary.sessions[-1], self.secondary.sessions[-1]


class SuccessTests(LinkCase):
    async def test_session(self):
        """Two daemons that fit get a session with each other's hello."""
        dialer = self.dial()
        ours, theirs = await self.established()
        self.assertEqual(replace(ours.peer, session=""), self.secondary.local)
        self.assertEqual(replace(theirs.peer, session=""), self.primary.local)
        self.assertEqual(ours.local.session, theirs.peer.session)
        self.assertIs(dialer.session, ours)
        self.assertIs(self.listener.session, theirs)
        self.assertIsNone(ours.frames)

    async def test_frames(self):
        """A dialer that asks for a frames channel gets one; colo and frames bytes do not mix."""
        self.primary.local = replace(self.primary.local, frames=True)
        self.dial()
        ours, theirs = await self.established()
        ours.frames.transport.write(b"frame")
        ours.colo.transport.write(b"colo")
        await theirs.frames.until(lambda: theirs.frames.received)
        await theirs.colo.until(lambda: theirs.colo.received)
        self.assertEqual((theirs.frames.received, theirs.colo.received), (b"frame", b"colo"))

    async def test_coloBothWays(self):
        """The COLO channel carries megabytes both ways, without the session id it began with."""
        self.dial()
        ours, theirs = await self.established()
        there, back = bytes(range(256)) * 16384, b"0123456789abcdef" * 65536
        ours.colo.transport.write(there)
        theirs.colo.transport.write(back)
        await theirs.colo.until(lambda: len(theirs.colo.received) >= len(there))
        await ours.colo.until(lambda: len(ours.colo.received) >= len(back))
        self.assertEqual(theirs.colo.received, there)
        self.assertEqual(ours.colo.received, back)

    async def test_writeAtOnce(self):
        """What an owner writes while it is told of the session arrives, on either channel, from either side."""
        for owner in (self.primary, self.secondary):
            self.patch(owner, "sessionEstablished", self._talkative(owner))
        self.dial()
        ours, theirs = await self.established()
        await ours.colo.until(lambda: ours.colo.received)
        await theirs.colo.until(lambda: theirs.colo.received)
        await self.primary.until(lambda: self.primary.messages)
        await self.secondary.until(lambda: self.secondary.messages)
        self.assertEqual((ours.colo.received, theirs.colo.received), (b"secondary", b"primary"))
        self.assertEqual(self.primary.messages, [{"from": "secondary"}])
        self.assertEqual(self.secondary.messages, [{"from": "primary"}])

    def _talkative(self, owner):
        established = owner.sessionEstablished

        def talk(session):
            session.colo.transport.write(owner.local.role.encode())
            session.control.send({"from": owner.local.role})
            established(session)

        return talk

    async def test_control(self):
        """Control messages arrive in order; one that is too large is the sender's error."""
        self.dial()
        ours, _ = await self.established()
        for n in range(200):
            ours.control.send({"n": n})
        await self.secondary.until(lambda: len(self.secondary.messages) == 200)
        self.assertEqual([m["n"] for m in self.secondary.messages], list(range(200)))
        self.assertRaises(OversizeError, ours.control.send, {"big": "x" * 65536})

    async def test_noDelay(self):
        """Every connection has TCP_NODELAY and keep-alive on."""
        self.dial()
        sessions = await self.established()
        for session in sessions:
            transport = session.colo.transport
            self.assertTrue(transport.getTcpNoDelay())
            self.assertTrue(transport.getTcpKeepAlive())

    async def test_backpressure(self):
        """A paused receiver stops the sender's producer; it goes on after the resume and nothing is lost."""
        self.dial()
        ours, theirs = await self.established()
        theirs.colo.transport.pauseProducing()
        producer = Pump(ours.colo.transport, 64 * 1024 * 1024)
        ours.colo.transport.registerProducer(producer, True)
        producer.resumeProducing()
        await producer.paused
        await deferLater(reactor, 0.2)
        self.assertLess(producer.sent, producer.total / 2)
        theirs.colo.transport.resumeProducing()
        await theirs.colo.until(lambda: len(theirs.colo.received) == producer.total)

    async def test_reconnect(self):
        """When a session ends, the dialer makes another one, with another id."""
        self.dial()
        ours, theirs = await self.established()
        theirs.close("maintenance")
        error = await ours.whenLost()
        self.assertIsInstance(error, PeerLost)
        self.assertIn("the peer closed the session: maintenance", str(error))
        self.assertIn("this side closed", str(await theirs.whenLost()))
        await self.primary.until(lambda: len(self.primary.sessions) == 2)
        self.assertNotEqual(self.primary.sessions[1].local.session, ours.local.session)

    async def test_listenerComesLater(self):
        """The dialer waits for a listener that is not there yet, and says why meanwhile."""
        await Deferred.fromCoroutine(self.listener.stop())
        dialer = self.dial()
        while dialer.failure is None:
            await deferLater(reactor, 0.01)
        self.assertIn("cannot reach 127.0.0.1", str(dialer.failure))
        self.listener = LinkListener(
            reactor, self.secondary, self.credentials, "localhost", self.port, "127.0.0.1", settings=SETTINGS
        )
        self.listener.start()
        self.addCleanup(lambda: Deferred.fromCoroutine(self.listener.stop()))
        await self.established()
        self.assertIsNone(dialer.failure)

    async def test_IPv6(self):
        """The same over IPv6, with an address as the name."""
        credentials = self.issue("::1")
        listener = LinkListener(reactor, self.secondary, credentials, "::1", 0, "::1", SETTINGS)
        try:
            listener.start()
        except ConfigError as e:
            raise SkipTest(str(e)) from e
        dialer = LinkDialer(
            reactor, self.primary, credentials, "::1", listener.address.port, settings=SETTINGS
        )
        dialer.start()
        self.addCleanup(lambda: Deferred.fromCoroutine(listener.stop()))
        self.addCleanup(lambda: Deferred.fromCoroutine(dialer.stop()))
        await self.established()

    async def test_portTaken(self):
        """A port that cannot be used is the operator's error."""
        second = LinkListener(reactor, self.secondary, self.credentials, "localhost", self.port, "127.0.0.1")
        error = self.assertRaises(ConfigError, second.start)
        self.assertIn(str(self.port), str(error))

    async def test_stopWithinCallback(self):
        """A dialer can be stopped from within its owner's callbacks."""
        dialer = self.dial()
        self.primary.sessionEstablished = lambda _: Deferred.fromCoroutine(dialer.stop())
        await self.secondary.until(lambda: self.secondary.sessions)
        error = await self.secondary.sessions[0].whenLost()
        self.assertIn("daemon stops", str(error))
        await deferLater(reactor, 0.1)
        self.assertEqual(len(self.secondary.sessions), 1)


class CertificateTests(LinkCase):
    """Whoever has no right certificate gets nowhere, and both logs say why."""

    async def assertNoSession(self, dialer, *words, listenerSays=()):
        while dialer.failure is None:
            await deferLater(reactor, 0.01)
        for word in words:
            self.assertIn(word, str(dialer.failure))
        if listenerSays:
            await self.logged(*listenerSays)
        await deferLater(reactor, 0.05)
        self.assertEqual((self.primary.sessions, self.secondary.sessions), ([], []))
        self.assertEqual(self.secondary.judged, [])

    async def test_dialerOfOtherAuthority(self):
        initAuthority(self.directory / "other")
        mixed = replace(self.issue("localhost", authority="other"), authority=self.credentials.authority)
        await self.assertNoSession(
            self.dial(credentials=mixed), "TLS failed", "unknown ca", listenerSays=("TLS failed",)
        )

    async def test_listenerOfOtherAuthority(self):
        initAuthority(self.directory / "other")
        dialer = self.dial(credentials=self.issue("localhost", authority="other"))
        await self.assertNoSession(dialer, "certificate verify failed", listenerSays=("unknown ca",))

    async def test_trustmePeer(self):
        """The same with certificates that are not our own make."""
        authority = trustme.CA()
        leaf = authority.issue_cert("localhost", "127.0.0.1")
        paths = [self.directory / name for name in ("trust.pem", "trust-cert.pem", "trust-key.pem")]
        authority.cert_pem.write_to_path(paths[0])
        leaf.cert_chain_pems[0].write_to_path(paths[1])
        leaf.private_key_pem.write_to_path(paths[2])
        paths[2].chmod(0o600)
        foreign = Credentials.load(*paths)
        await self.assertNoSession(self.dial(credentials=foreign), "certificate verify failed")
        await Deferred.fromCoroutine(self.listener.stop())
        self.listen(foreign)
        self.dial(credentials=foreign)
        await self.established()

    async def test_dialerNamedOtherwise(self):
        """The listener compares the client's name itself, and tells it."""
        dialer = self.dial(credentials=self.issue("elsewhere.example", "127.0.0.1"))
        await self.assertNoSession(
            dialer, "for elsewhere.example, 127.0.0.1, not for localhost", listenerSays=("elsewhere.example",)
        )
        self.assertIsInstance(dialer.failure, HelloRefused)

    async def test_listenerNamedOtherwise(self):
        dialer = self.dial(peerName="secondary.example")
        await self.assertNoSession(dialer, "not for secondary.example", listenerSays=("came to nothing",))

    async def test_addressIsNoName(self):
        """An IP address is matched by IP entries only."""
        dialer = self.dial(peerName="127.0.0.2")
        await self.assertNoSession(dialer, "not for 127.0.0.2")

    async def test_address(self):
        self.dial(peerName="127.0.0.1")
        await self.established()

    async def test_dialerExpired(self):
        expired = self.issueExpired()
        await self.assertNoSession(
            self.dial(credentials=expired), "certificate expired", listenerSays=("TLS failed",)
        )

    async def test_listenerExpired(self):
        await Deferred.fromCoroutine(self.listener.stop())
        self.listen(self.issueExpired())
        await self.assertNoSession(self.dial(), "certificate verify failed", listenerSays=("expired",))

    def issueExpired(self):
        life = timedelta(seconds=-1)
        paths = issue(self.directory / "ca", ["localhost"], self.directory / "expired", life)
        return Credentials.load(*paths, now=datetime.now(UTC) - timedelta(seconds=60))


class StrangerTests(LinkCase):
    """Whatever else connects to the port is closed, logged, and harms nobody."""

    async def connect(self, kind=ChannelKind.CONTROL, options=None, plain=False):
        factory = Factory.forProtocol(Recorder)
        if options is not None:
            factory = TLSMemoryBIOFactory(options, True, factory)
        elif not plain:
            factory = clientTLS(self.credentials, "localhost", kind, factory, reactor)
        transport = await TCP4ClientEndpoint(reactor, "127.0.0.1", self.port, timeout=2).connect(factory)
        protocol = transport if plain else transport.wrappedProtocol
        self.addCleanup(lambda: protocol.lost or transport.transport.abortConnection())
        return protocol

    async def assertDropped(self, protocol, *words):
        await protocol.until(lambda: protocol.lost is not None)
        await self.logged(*words)
        self.assertEqual(self.secondary.sessions, [])
        self.dial()
        await self.established()

    def options(self, **options):
        identity = {
            "privateKey": PKey.from_cryptography_key(self.credentials.key),
            "certificate": X509.from_cryptography(self.credentials.certificate),
        }
        return CertificateOptions(**{**identity, **options})

    async def test_noClientCertificate(self):
        client = await self.connect(
            options=CertificateOptions(acceptableProtocols=[ChannelKind.CONTROL.value])
        )
        await self.assertDropped(client, "TLS failed", "certificate")

    async def test_oldTLS(self):
        client = await self.connect(
            options=self.options(
                lowerMaximumSecurityTo=TLSVersion.TLSv1_2, acceptableProtocols=[ChannelKind.CONTROL.value]
            )
        )
        await self.assertDropped(client, "TLS failed", "unsupported protocol")

    async def test_unknownALPN(self):
        client = await self.connect(options=self.options(acceptableProtocols=[b"h2"]))
        await self.assertDropped(client, "ALPN")

    async def test_noALPN(self):
        await self.assertDropped(await self.connect(options=self.options()), "ALPN")

    async def test_plaintext(self):
        client = await self.connect(plain=True)
        client.transport.write(b"GET / HTTP/1.1\r\n\r\n")
        await self.assertDropped(client, "TLS failed")

    async def test_silence(self):
        """Neither a connection without a handshake nor one without a hello may stay for long."""
        self.listen(self.credentials, settings=replace(SETTINGS, helloTimeout=0.5))
        for plain, doing in (True, "complete the TLS handshake"), (False, "say its part of the hello"):
            client = await self.connect(plain=plain)
            await client.until(lambda client=client: client.lost is not None)
            await self.logged(f"did not {doing} within 0.5 s")

    async def test_silentDataChannel(self):
        self.listen(self.credentials, settings=replace(SETTINGS, helloTimeout=0.1))
        client = await self.connect(ChannelKind.COLO)
        await client.until(lambda: client.lost is not None)

    async def test_garbage(self):
        client = await self.connect()
        client.transport.write(b"\0\0\0\4junk")
        await self.assertDropped(client, "no JSON")

    async def test_oversize(self):
        """A length above the limit is refused when it is read, not when all of it has come."""
        client = await self.connect()
        client.transport.write(b"\x7f\xff\xff\xff")
        await self.assertDropped(client, "the limit is 65536")

    async def test_otherMessageFirst(self):
        client = await self.connect()
        client.transport.write(encodeFrame({"type": "accepted"}))
        await self.assertDropped(client, "before its hello")

    async def test_talksOn(self):
        """A peer that sends without end while it is our turn is cut off."""
        client = await self.connect()
        hello = encodeFrame(replace(self.primary.local, session=str(uuid4())).toMessage())
        client.transport.write(hello + encodeFrame({"type": "accepted"}) * 20)
        await self.assertDropped(client, "without waiting for an answer")

    async def test_unknownSession(self):
        client = await self.connect(ChannelKind.COLO)
        client.transport.write(str(uuid4()).encode() + b"more")
        await self.assertDropped(client, "no session waits for it")

    async def test_boundOnce(self):
        """A second COLO channel with the id of a living session is refused; the session lives on."""
        self.dial()
        ours, theirs = await self.established()
        client = await self.connect(ChannelKind.COLO)
        client.transport.write(ours.local.session.encode())
        await client.until(lambda: client.lost is not None)
        await self.logged("no session waits for it")
        ours.colo.transport.write(b"alive")
        await theirs.colo.until(lambda: theirs.colo.received)
        self.assertEqual(theirs.colo.received, b"alive")

    async def test_dataChannelOfOtherName(self):
        """A data channel needs the right name in its certificate as well."""
        self.credentials = self.issue("elsewhere.example")
        client = await self.connectAs(self.credentials)
        client.transport.write(str(uuid4()).encode())
        await client.until(lambda: client.lost is not None)
        await self.logged("a data channel", "elsewhere.example")

    async def connectAs(self, credentials):
        factory = clientTLS(
            credentials, "localhost", ChannelKind.COLO, Factory.forProtocol(Recorder), reactor
        )
        transport = await TCP4ClientEndpoint(reactor, "127.0.0.1", self.port, timeout=2).connect(factory)
        return transport.wrappedProtocol

    async def test_crowd(self):
        """Connections without a handshake cannot keep the peer out: the oldest go."""
        crowd = [await self.connect(plain=True) for _ in range(MAX_STRANGERS + 1)]
        await crowd[0].until(lambda: crowd[0].lost is not None)
        self.dial()
        await self.established()

    async def test_wire(self):
        """
        The bytes of a session, said by hand: hello, accepted, session ids. Only the right id binds a channel, and
        each kind once.
        """
        hello = replace(self.primary.local, frames=True, session=str(uuid4()))
        control = await self.connect()
        control.transport.write(encodeFrame(hello.toMessage()))
        decoder, said = FrameDecoder(), []

        def heard(count):
            said.extend(decoder.feed(bytes(control.received)))
            control.received.clear()
            return len(said) >= count

        await control.until(lambda: heard(2))
        self.assertEqual(Hello.fromMessage(said[0]), replace(self.secondary.local, session=hello.session))
        self.assertEqual(said[1], {"type": "accepted"})
        control.transport.write(encodeFrame({"type": "accepted"}))
        colo = await self.connect(ChannelKind.COLO)
        colo.transport.write(hello.session.encode() + b"early")
        for kind, session in (ChannelKind.FRAMES, str(uuid4())), (ChannelKind.COLO, hello.session):
            wrong = await self.connect(kind)
            wrong.transport.write(session.encode())
            await wrong.until(lambda wrong=wrong: wrong.lost is not None)
        self.assertEqual((len(said), self.secondary.sessions), (2, []))
        frames = await self.connect(ChannelKind.FRAMES)
        for byte in hello.session.encode() + b"frame":
            frames.transport.write(bytes([byte]))
        await control.until(lambda: heard(3))
        self.assertEqual(said[2], {"type": "established"})
        (session,) = self.secondary.sessions
        await session.colo.until(lambda: session.colo.received == b"early")
        await session.frames.until(lambda: session.frames.received == b"frame")
        control.transport.write(encodeFrame({"type": "bye", "reason": "tested"}))
        self.assertIn("tested", str(await session.whenLost()))


class ForeignServerTests(LinkCase):
    """The dialer at a port where something else listens: it says so and goes on trying."""

    async def dialTo(self, factory):
        await Deferred.fromCoroutine(self.listener.stop())
        port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        self.port = port.getHost().port
        dialer = self.dial(settings=replace(SETTINGS, helloTimeout=0.5))
        while dialer.failure is None:
            await deferLater(reactor, 0.01)
        self.assertEqual(self.primary.sessions, [])
        return str(dialer.failure)

    async def test_otherTLS(self):
        options = CertificateOptions(
            privateKey=PKey.from_cryptography_key(self.credentials.key),
            certificate=X509.from_cryptography(self.credentials.certificate),
        )
        options.getContext().set_alpn_select_callback(lambda *_: NO_OVERLAPPING_PROTOCOLS)
        factory = TLSMemoryBIOFactory(options, False, Factory.forProtocol(Recorder), reactor)
        self.assertIn("ALPN", await self.dialTo(factory))

    async def test_plaintext(self):
        class Banner(Protocol):
            def connectionMade(self):
                self.transport.write(b"220 mail.example ESMTP\r\n")

        self.assertIn("TLS failed", await self.dialTo(Factory.forProtocol(Banner)))

    async def test_mute(self):
        self.assertIn("within 0.5 s", await self.dialTo(Factory.forProtocol(Recorder)))


class RefusalTests(LinkCase):
    """A hello that does not fit is refused, and both sides learn the reason."""

    async def assertRefused(self, *words):
        dialer = self.dial()
        await self.primary.until(lambda: self.primary.refusals)
        await self.secondary.until(lambda: self.secondary.refusals)
        for refusal in (self.primary.refusals[0], self.secondary.refusals[0]):
            self.assertIsInstance(refusal, HelloRefused)
            for word in words:
                self.assertIn(word, refusal.reason)
        self.assertEqual(str(dialer.failure), str(self.primary.refusals[0]))
        self.assertEqual((self.primary.sessions, self.secondary.sessions), ([], []))

    async def test_otherVM(self):
        self.primary.local = replace(self.primary.local, vm="mail")
        await self.assertRefused("'mail'", "'web'")

    async def test_otherVersion(self):
        self.patch(Hello, "toMessage", lambda hello: {**asdict(hello), "type": "hello", "protocol": 2})
        await self.assertRefused("version 2", "version 1")

    async def test_sameRole(self):
        self.primary.local = replace(self.primary.local, role="secondary")
        await self.assertRefused("both daemons are secondary")

    async def test_otherKind(self):
        self.primary.local = replace(self.primary.local, secondary="active")
        await self.assertRefused("secondary=active", "secondary=passive")

    async def test_itself(self):
        self.primary.local = replace(self.primary.local, instance=self.secondary.local.instance)
        await self.assertRefused("this very daemon")

    async def test_malformed(self):
        self.primary.local = replace(self.primary.local, epoch=-1)
        await self.assertRefused("'epoch'")

    async def test_listenerJudges(self):
        self.secondary.verdict = "epoch 3 is stale, the last failover was to 4"
        await self.assertRefused("epoch 3 is stale")

    async def test_dialerJudges(self):
        self.primary.verdict = "that one holds an older image"
        await self.assertRefused("an older image")

    async def test_triesAgain(self):
        """The dialer goes on trying after a refusal, and gets its session when the reason is gone."""
        self.secondary.verdict = "not now"
        self.dial()
        await self.primary.until(lambda: self.primary.refusals)
        self.assertEqual(str(self.primary.refusals[0]), "not now")
        self.secondary.verdict = None
        await self.established()

    async def test_secondDialer(self):
        """While a session lives, another instance is refused and learns who is there."""
        self.dial()
        ours, _ = await self.established()
        other = Owner("primary")
        self.dial(other)
        await other.until(lambda: other.refusals)
        self.assertIn(
            f"already protected by this secondary: instance {ours.local.instance}", str(other.refusals[0])
        )
        self.assertIsNone(ours.error)
        self.assertEqual(len(self.secondary.sessions), 1)
        ours.close("done")
        await other.until(lambda: other.sessions or self.primary.sessions[1:])

    async def test_sameInstance(self):
        """The same instance dialing again takes the place of its old session."""
        self.dial()
        ours, theirs = await self.established()
        again = Owner("primary", instance=self.primary.local.instance)
        self.dial(again)
        await again.until(lambda: again.sessions)
        self.assertIn("dialed again", str(await theirs.whenLost()))
        await ours.whenLost()

    async def test_ownerFails(self):
        """An owner that raises is logged, and the next try may work."""
        self.primary.judge = lambda peer: 1 / 0
        dialer = self.dial()
        await self.logged("dialing")
        del self.primary.judge
        await self.established()
        self.assertIsNone(dialer.failure)
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))

    async def test_listenerOwnerFails(self):
        self.secondary.judge = lambda peer: 1 / 0
        dialer = self.dial()
        while dialer.failure is None:
            await deferLater(reactor, 0.01)
        del self.secondary.judge
        await self.established()
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))


class LossTests(LinkCase):
    """A peer that goes away is noticed, whatever way it goes."""

    async def test_connectionDies(self):
        """The end of either connection ends the session on both sides; then there is a new one."""
        self.dial()
        for number, name in enumerate(("colo", "control"), 1):
            await self.primary.until(lambda number=number: len(self.primary.sessions) == number)
            await self.secondary.until(lambda number=number: len(self.secondary.sessions) == number)
            ours, theirs = self.primary.sessions[-1], self.secondary.sessions[-1]
            transport = theirs.colo.transport if name == "colo" else theirs._connection.transport
            transport.transport.abortConnection()  # as when the kernel of a dead process does it
            error = await ours.whenLost()
            self.assertIsInstance(error, PeerLost)
            self.assertIn("channel was closed", str(error))
            await theirs.whenLost()
            await ours.colo.until(lambda colo=ours.colo: colo.lost is not None)
            self.assertIs(ours.colo.lost, error)
            self.assertTrue(0 <= ours.silence < 5)

    async def test_silentPeer(self):
        """A peer whose connections stay but that says nothing is lost at the limit."""
        brisk = replace(SETTINGS, heartbeat=Heartbeat(0.05, 0.2))
        self.dial(settings=brisk)
        ours, theirs = await self.established()
        theirs._timer.cancel()
        theirs._timer = None
        error = await ours.whenLost()
        self.assertIsInstance(error, PeerTimeout)
        self.assertIn("limit 200 ms", str(error))
        self.assertGreaterEqual(ours.silence, 0.2)

    async def test_blockedReactor(self):
        """A reactor that was blocked for longer than the limit does not blame the peer."""
        brisk = replace(SETTINGS, heartbeat=Heartbeat(0.05, 0.2))
        self.dial(settings=brisk)
        ours, theirs = await self.established()
        time.sleep(0.5)
        theirs.control.send({"still": "here"})
        await self.primary.until(lambda: self.primary.messages)
        self.assertIsNone(ours.error)

    async def waits(self, settings, count):
        """@return: how long the dialer waits before each of its tries when every session ends at once."""
        waits = []
        attempt = LinkDialer._attempt

        async def watch(dialer, wait):
            waits.append(wait)
            return await attempt(dialer, wait)

        self.patch(LinkDialer, "_attempt", watch)
        self.secondary.sessionEstablished = lambda session: session.close("cannot")
        self.dial(settings=settings)
        while len(waits) < count:
            await deferLater(reactor, 0.01)
        return waits[:count]

    async def test_shortSessions(self):
        """Sessions that end at once are dialed again more and more slowly."""
        self.assertEqual(await self.waits(SETTINGS, 5), [0.0, 0.01, 0.02, 0.04, 0.05])

    async def test_steadySessions(self):
        """After a session that lived long enough the pace is the first one."""
        self.assertEqual(await self.waits(replace(SETTINGS, steady=0.0), 4), [0.0, 0.01, 0.01, 0.01])

    async def test_lateVerdict(self):
        """A listener that dies between its verdict and the data channels costs one try."""
        whenComplete = _Candidate.whenComplete
        tries = []

        async def failOnce(candidate):
            tries.append(candidate)
            if len(tries) == 1:
                candidate.end(PeerError("struck by lightning"))
            await whenComplete(candidate)

        self.patch(_Candidate, "whenComplete", failOnce)
        self.dial()
        await self.established()
        self.assertEqual(len(self.primary.sessions), 1)
        await self.logged("struck by lightning")

    async def test_listenerStops(self):
        """Stopping the listener tells the dialer, and closes every connection."""
        self.dial()
        ours, _ = await self.established()
        await Deferred.fromCoroutine(self.listener.stop())
        self.assertIn("the secondary's daemon stops", str(await ours.whenLost()))
        self.assertIsNone(self.listener.session)
