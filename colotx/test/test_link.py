"""
Tests for L{colotx.link}: real TLS over loopback TCP, every wait bounded.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from colotx.certificates import Credentials, initAuthority, issue
from colotx.channel import ChannelKind, clientTLS
from colotx.errors import HelloRefused, PeerError, PeerLost, PeerTimeout
from colotx.hello import Hello, encodeFrame
from colotx.link import LinkDialer, LinkListener, LinkSettings
from colotx.session import Heartbeat, Session

SETTINGS = LinkSettings(
    heartbeat=Heartbeat(0.5, 5.0),
    connectTimeout=2.0,
    helloTimeout=2.0,
    retryFirst=0.01,
    retryMost=0.05,
    retryRefused=0.1,
)


class Recorder(Protocol):
    """An application protocol that keeps what it got."""

    def __init__(self):
        self.received = b""
        self.lost = None
        self._waiting = []

    def dataReceived(self, data):
        self.received += data
        self._wake()

    def connectionLost(self, reason):
        self.lost = reason.value
        self._wake()

    def _wake(self):
        waiting, self._waiting = self._waiting, []
        for d in waiting:
            d.callback(None)

    async def until(self, condition):
        while not condition():
            d = Deferred()
            self._waiting.append(d)
            await d


class Owner:
    """An owner of a link that keeps what it was told."""

    def __init__(self, role, **fields):
        self.local = Hello(vm="web", role=role, instance=str(uuid4()), epoch=3)
        self.local = replace(self.local, **fields)
        self.verdict = None
        self.judged = []
        self.sessions = []
        self.refusals = []
        self.messages = []
        self._waiting = []

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
        self._wake()

    def linkRefused(self, error):
        self.refusals.append(error)
        self._wake()

    def _message(self, message):
        self.messages.append(message)
        self._wake()

    def _wake(self):
        waiting, self._waiting = self._waiting, []
        for d in waiting:
            d.callback(None)

    async def until(self, condition):
        while not condition():
            d = Deferred()
            self._waiting.append(d)
            await d


class LinkCase(TestCase):
    """A listener with certificates; dialers on demand; everything stopped at the end."""

    timeout = 20

    def setUp(self):
        self.directory = Path(self.mktemp())
        initAuthority(self.directory / "ca")
        self.credentials = self.issue("localhost", "127.0.0.1")
        self.secondary = Owner("secondary")
        self.primary = Owner("primary")
        self.listener = self.listen(self.credentials)

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
