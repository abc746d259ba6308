"""
The primary's end of a link: it dials, and never gives up. The conversation is drawn in L{colotx.link}.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast
from uuid import uuid4

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.interfaces import ITransport
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from colotx._linkbase import LinkOwner, LinkSettings, Reactor, dataChannels, logLost, makeSession
from colotx.certificates import Credentials
from colotx.channel import Channel, ChannelKind, LinkTransport, clientTLS
from colotx.errors import ColoError, HelloRefused, PeerLost
from colotx.hello import Hello
from colotx.session import ControlConnection, Session


class LinkDialer:
    """
    The primary's end: dials until C{stop}, for ever.

    @ivar session: the L{Session} that lives now, or None.
    @ivar failure: why the last try failed or the last session ended, for status reports; None while all is well.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        owner: LinkOwner,
        credentials: Credentials,
        host: str,
        port: int,
        peerName: str | None = None,
        settings: LinkSettings | None = None,
    ) -> None:
        """
        @param host: DNS name or IP address of the secondary.
        @param peerName: the name the secondary's certificate must be for; None: C{host}.
        """
        self._reactor = reactor
        self._owner = owner
        self._credentials = credentials
        self._host = host
        self._port = port
        self._peerName = peerName or host
        self._settings = settings or LinkSettings()
        self._running: Deferred[None] | None = None
        self._stopping = False
        self.session: Session | None = None
        self.failure: ColoError | None = None

    def start(self) -> None:
        """Begin to dial."""
        self._stopping = False
        self._running = Deferred.fromCoroutine(self._run()).addErrback(_stopped)

    async def stop(self) -> None:
        """Dial no more, end the session, wait until its connections are closed. Harmless when stopped."""
        self._stopping = True
        if self.session is not None:
            session = self.session
            session.close("the primary's daemon stops")
            await session.whenGone()
        elif self._running is not None:
            self._running.cancel()

    async def _run(self) -> None:
        wait = 0.0
        while not self._stopping:  # an owner may stop us from within its callbacks
            await deferLater(self._reactor, wait)
            wait = await self._attempt(wait)

    async def _attempt(self, lastWait: float) -> float:
        """Have one session, or fail to get it. @return: how long to wait then, seconds."""
        settings = self._settings
        longer = min(max(settings.retryFirst, lastWait * 2), settings.retryMost)
        try:
            session = await self._dialSession()
        except HelloRefused as e:
            self._failed(e)
            self._owner.linkRefused(e)
            return settings.retryRefused
        except ColoError as e:
            self._failed(e)
            return longer
        except Exception:
            if self._stopping:
                return 0.0
            self._log.failure("dialing {host}:{port}", host=self._host, port=self._port)
            return settings.retryMost
        self.failure = None
        self.session = session
        began = self._reactor.seconds()
        session.start(self._owner.sessionEstablished)
        self.failure = await session.whenLost()
        logLost(self._log, session, self.failure)
        self.session = None
        return settings.retryFirst if self._reactor.seconds() - began >= settings.steady else longer

    def _failed(self, error: ColoError) -> None:
        if str(error) != str(self.failure):  # a peer that is down would otherwise fill the log
            where = f"{self._host}:{self._port}"
            self._log.warn("no session with {where} yet: {reason}", where=where, reason=str(error))
        self.failure = error

    async def _dialSession(self) -> Session:
        local = replace(self._owner.hello(), session=str(uuid4()))
        control = ControlConnection(await self._dial(ChannelKind.CONTROL))
        channels: dict[ChannelKind, Channel] = {}
        try:
            control.channel.attach(control)
            control.channel.release()
            control.send(local.toMessage())
            peer = await self._judge(control, local)
            for kind in dataChannels(local):
                channel = channels[kind] = await self._dial(kind)
                channel.onLost = control.channel.end
                cast(ITransport, channel.transport).write(local.session.encode())
            await control.receiveType("established")
        except HelloRefused:
            raise  # control is closing, so that the reason gets across
        except BaseException as e:
            for channel in (control.channel, *channels.values()):
                channel.end(e if isinstance(e, ColoError) else PeerLost("this daemon stops"))
            raise
        return makeSession(self._reactor, self._owner, self._settings, local, peer, control, channels)

    async def _judge(self, control: ControlConnection, local: Hello) -> Hello:
        """Exchange verdicts. @return: the peer's hello. @raise HelloRefused: by one side or the other."""
        try:
            peer = Hello.fromMessage(await control.receive())
        except HelloRefused as e:
            raise control.refuse(e.reason) from None
        reason = local.fault(peer) or self._owner.judge(peer)
        if peer.session != local.session:
            reason = "the peer answered another hello than ours"
        if reason is not None:
            raise control.refuse(reason)
        await control.receiveType("accepted")
        control.send({"type": "accepted"})
        return peer

    async def _dial(self, kind: ChannelKind) -> Channel:
        settings = self._settings
        factory = Factory.forProtocol(lambda: Channel(self._reactor, self._peerName, settings.helloTimeout))
        tls = clientTLS(self._credentials, self._peerName, kind, factory, self._reactor)
        endpoint = HostnameEndpoint(self._reactor, self._host, self._port, timeout=settings.connectTimeout)
        try:
            transport = await endpoint.connect(tls)
        except (ConnectError, DNSLookupError) as e:
            raise PeerLost(f"cannot reach {self._host}:{self._port}: {e}") from e
        channel = cast(Channel, cast(LinkTransport, transport).wrappedProtocol)
        try:
            return await channel.secured
        except CancelledError:
            channel.end(PeerLost("this daemon stops"))
            raise


def _stopped(failure: Failure) -> None:
    if not isinstance(failure.value, CancelledError):
        failure.raiseException()


__all__ = ["LinkDialer"]
