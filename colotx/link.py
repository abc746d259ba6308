"""
The link between two daemons: one listening port, several TLS connections, one session at a time.

The secondary listens (L{LinkListener}), the primary dials and never gives up (L{LinkDialer})::

    dialer                                   listener
      TLS, ALPN colotx-control/1  -------->    checks the name in the certificate
      hello  ----------------------------->    judges it
      judges it  <-------------------------  hello, accepted | refused
      accepted | refused  ---------------->
      TLS, ALPN colotx-colo/1, session id ->   binds it to the session
     [TLS, ALPN colotx-frames/1, session id]
      session  <---------------------------  established, session

Both judge by protocol version, VM name, role and kind of secondary, then ask their owner. A refusal is sent to the
other side, so that both logs name it. No byte of a session reaches an owner before both sides accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IListeningPort
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure

from colotx._linkbase import LinkOwner, LinkSettings, Reactor, dataChannels, logLost, makeSession
from colotx._linkdialer import LinkDialer
from colotx.certificates import Credentials
from colotx.channel import Channel, ChannelKind, serverTLS
from colotx.errors import ColoError, ConfigError, HelloRefused, PeerError, PeerLost
from colotx.hello import Hello
from colotx.session import ControlConnection, Session

MAX_STRANGERS = 32
"""Connections that may be within their TLS handshake at the same time; one more, and the oldest is dropped."""

_SESSION_ID = 36  # bytes of a session id in text form, the first ones on every channel but control


class _Candidate:
    """A session being made by the listener: who it is for, and the channels it has so far."""

    def __init__(self, peer: Hello, control: Channel) -> None:
        self.peer = peer
        self.channels: dict[ChannelKind, Channel] = {}
        self.missing = set(dataChannels(peer))
        self._control = control
        self._error: ColoError | None = None
        self._waiter: Deferred[None] | None = None
        control.onLost = self.end

    def bind(self, kind: ChannelKind, channel: Channel) -> None:
        """A data channel has said that it belongs here."""
        self.missing.remove(kind)
        self.channels[kind] = channel
        channel.onLost = self.end
        self._wake()

    def end(self, error: ColoError) -> None:
        """It will not be: whichever channel was lost, the others go too. Harmless when repeated."""
        self._error = self._error or error
        for channel in (self._control, *self.channels.values()):
            channel.end(error)
        self._wake()

    async def whenComplete(self) -> None:
        """
        Wait until no channel is missing; the channels' deadlines bound it.

        @raise ColoError: it was ended.
        """
        while self.missing and self._error is None:
            self._waiter = Deferred()
            await self._waiter
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            waiter.callback(None)


class _Preface(Protocol):
    """Reads the session id, then hands the channel over."""

    def __init__(self, bind: Callable[[str, bytes], None]) -> None:
        self._bind = bind
        self._buffer = b""

    def dataReceived(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= _SESSION_ID:
            session = self._buffer[:_SESSION_ID].decode("ascii", "replace")
            self._bind(session, self._buffer[_SESSION_ID:])


class LinkListener:
    """
    The secondary's end.

    @ivar session: the L{Session} that lives now, or None.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        owner: LinkOwner,
        credentials: Credentials,
        peerName: str,
        port: int,
        interface: str = "",
        settings: LinkSettings | None = None,
    ) -> None:
        """
        @param peerName: the DNS name or IP address the primary's certificate must be for.
        @param port: TCP port; 0: any, see L{address}.
        @param interface: the local IP address to listen on; empty: all IPv4 addresses, C{::}: all.
        """
        self._reactor = reactor
        self._owner = owner
        self._credentials = credentials
        self._peerName = peerName
        self._port = port
        self._interface = interface
        self._settings = settings or LinkSettings()
        self._listening: IListeningPort | None = None
        self._tls: TLSMemoryBIOFactory | None = None
        self._candidate: _Candidate | None = None
        self.session: Session | None = None

    def start(self) -> None:
        """
        Listen.

        @raise ConfigError: the address or port cannot be used.
        """
        self._tls = serverTLS(self._credentials, Factory.forProtocol(self._accept), self._reactor)
        try:
            self._listening = self._reactor.listenTCP(self._port, self._tls, interface=self._interface)
        except (CannotListenError, OSError) as e:
            where = self._interface or "all addresses"
            raise ConfigError(f"cannot listen on port {self._port} of {where}: {e}; choose another") from e

    @property
    def address(self) -> IAddress:
        """Where it listens."""
        assert self._listening is not None
        return self._listening.getHost()

    async def stop(self) -> None:
        """Stop listening, end the session, wait until its connections are closed. Harmless when stopped."""
        listening, self._listening = self._listening, None
        if listening is not None:
            await maybeDeferred(listening.stopListening)
        for channel in self._channels():
            if not channel.adopted:
                channel.end(PeerLost("this daemon stops"))
        if self.session is not None:
            session = self.session
            session.close("the secondary's daemon stops")
            await session.whenGone()

    # -- connections

    def _channels(self) -> list[Channel]:
        """All there are, the oldest first."""
        assert self._tls is not None
        return [cast(Channel, transport.wrappedProtocol) for transport in self._tls.protocols]

    def _accept(self) -> Channel:
        strangers = [channel for channel in self._channels() if channel.kind is None]
        if len(strangers) >= MAX_STRANGERS:
            strangers[0].end(PeerError("too many connections that do not complete the TLS handshake"))
        channel = Channel(self._reactor, self._peerName, self._settings.helloTimeout)
        channel.secured.addCallbacks(self._admit, self._stranger)
        return channel

    def _stranger(self, failure: Failure) -> None:
        self._log.warn("a connection came to nothing: {reason}", reason=failure.getErrorMessage())

    def _admit(self, channel: Channel) -> None:
        if channel.kind is ChannelKind.CONTROL:
            Deferred.fromCoroutine(self._welcome(channel)).addErrback(self._unwelcome, channel)
        else:
            channel.attach(_Preface(lambda session, rest: self._bind(channel, session, rest)))
            channel.release()

    def _bind(self, channel: Channel, session: str, rest: bytes) -> None:
        candidate, kind = self._candidate, channel.kind
        if channel.nameFault is not None:
            reason = channel.nameFault
        elif candidate is None or kind not in candidate.missing or session != candidate.peer.session:
            reason = "no session waits for it"
        else:
            channel.detach(rest)
            candidate.bind(kind, channel)
            return
        self._log.warn("a data channel of {peer} was refused: {reason}", peer=channel.peer, reason=reason)
        channel.end(PeerError(reason))

    # -- sessions

    async def _welcome(self, channel: Channel) -> None:
        control = ControlConnection(channel)
        channel.attach(control)
        channel.release()
        if channel.nameFault is not None:
            raise control.refuse(channel.nameFault)
        try:
            peer = Hello.fromMessage(await control.receive())
        except HelloRefused as e:
            raise control.refuse(e.reason) from None
        local = replace(self._owner.hello(), session=peer.session)
        control.send(local.toMessage())
        reason = local.fault(peer) or self._owner.judge(peer) or self._occupied(peer)
        if reason is not None:
            raise control.refuse(reason)
        self._makeRoom()
        candidate = self._candidate = _Candidate(peer, channel)
        try:
            control.send({"type": "accepted"})
            await control.receiveType("accepted")
            await candidate.whenComplete()
        except BaseException:
            candidate.end(PeerLost("the session did not come about"))
            raise
        finally:
            if self._candidate is candidate:
                self._candidate = None
        control.send({"type": "established"})
        session = self.session = makeSession(
            self._reactor, self._owner, self._settings, local, peer, control, candidate.channels
        )
        session.whenLost().addCallback(self._sessionLost, session)
        session.start(self._owner.sessionEstablished)

    def _unwelcome(self, failure: Failure, channel: Channel) -> None:
        error = failure.value
        if isinstance(error, ColoError):
            self._log.warn("no session with {peer}: {reason}", peer=channel.peer, reason=str(error))
        else:
            self._log.failure("no session with {peer}", failure, peer=channel.peer)
            channel.end(PeerError("internal error, see the log"))
        if isinstance(error, HelloRefused):
            self._owner.linkRefused(error)

    def _occupied(self, peer: Hello) -> str | None:
        for other in (self.session, self._candidate):
            if other is not None and other.peer.instance != peer.instance:
                return f"already protected by this secondary: instance {other.peer.instance}; end that daemon first"
        return None

    def _makeRoom(self) -> None:
        """Whatever is here is of the same instance, which has begun anew."""
        if self._candidate is not None:
            self._candidate.end(PeerLost("the same instance dialed again"))
        if self.session is not None:
            # No PeerLost: whoever dials is not dead.
            self.session.end(PeerError("the same instance dialed again"))

    def _sessionLost(self, error: PeerError, session: Session) -> None:
        logLost(self._log, session, error)
        if self.session is session:
            self.session = None


__all__ = ["MAX_STRANGERS", "LinkDialer", "LinkListener", "LinkOwner", "LinkSettings"]
