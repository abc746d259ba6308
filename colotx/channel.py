"""
One TLS connection of the link: how it is secured, how its bytes move, who gets them.

Both sides authenticate: OpenSSL checks the chain up to our own authority; service-identity compares the names, on
the client before the handshake ends, on the server right after it. ALPN says what a connection is for. This module
knows no hello and no session.
"""

# mypy: allow-untyped-calls
# (Twisted's TLS has no annotations.)

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from OpenSSL import SSL, crypto
from service_identity.exceptions import CertificateError as UnusableCertificate
from service_identity.exceptions import VerificationError
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IDelayedCall,
    IHandshakeListener,
    IProtocol,
    IProtocolFactory,
    IReactorTime,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.ssl import (
    Certificate,
    CertificateOptions,
    TLSVersion,
    optionsForClientTLS,
    trustRootFromCertificates,
)
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from colotx._writenow import writeNow
from colotx.certificates import Credentials, nameFault
from colotx.errors import ColoError, PeerError, PeerLost, PeerTimeout

READ_SIZE = 128 * 1024
"""Bytes read from a socket at once, and the high-water mark of its sending buffer."""

WRITE_PIECE = 256 * 1024
"""Bytes encrypted at once: bounds what OpenSSL's memory BIO holds."""


_RECORD = 16 * 1024  # bytes in a TLS record, and so the most that one SSL_read returns


class ChannelKind(enum.Enum):
    """What a connection is for; the values are the ALPN tokens."""

    CONTROL = b"colotx-control/1"
    COLO = b"colotx-colo/1"
    FRAMES = b"colotx-frames/1"

    @property
    def label(self) -> str:
        """For people."""
        return self.name.lower()


class LinkTransport(TLSMemoryBIOProtocol):
    """
    Twisted's TLS in larger pieces. The original hands OpenSSL, the socket and the protocol one record (16 KiB) at a
    time, and that costs more than the cipher. It replaces private methods of Twisted 26; a test fails when Twisted
    no longer calls them.
    """

    def makeConnection(self, transport: Any) -> None:
        transport.setTcpNoDelay(True)
        transport.setTcpKeepAlive(True)
        transport.bufferSize = READ_SIZE
        super().makeConnection(transport)

    def _write(self, data: bytes) -> None:
        if self._lostTLSConnection:
            return
        if not self._handshakeDone:
            self._bufferedWrite(data)
            return
        view = memoryview(data)
        for start in range(0, len(data), WRITE_PIECE):
            try:
                self._tlsConnection.sendall(view[start : start + WRITE_PIECE])
            except SSL.Error:
                self._tlsShutdownFinished(Failure())
                return
            self._flushSendBIO()

    def _flushSendBIO(self) -> None:
        more = True
        while more and self.transport is not None:
            try:
                data = self._tlsConnection.bio_read(WRITE_PIECE)
            except SSL.WantReadError:
                return
            writeNow(self.transport, data)
            more = len(data) == WRITE_PIECE

    def _flushReceiveBIO(self) -> None:
        records: list[bytes] = []
        ending: Failure | None = None
        while not self._lostTLSConnection and ending is None:
            try:
                records.append(self._tlsConnection.recv(_RECORD))
            except SSL.WantReadError:
                break
            except SSL.Error:
                ending = Failure()
        if records and not self._aborted:
            self.wrappedProtocol.dataReceived(b"".join(records))
        if ending is not None:
            closed = isinstance(ending.value, SSL.ZeroReturnError)
            if closed:
                self._shutdownTLS()
            self._tlsShutdownFinished(None if closed else ending)
        self._flushSendBIO()


def serverTLS(
    credentials: Credentials, factory: IProtocolFactory, clock: IReactorTime
) -> TLSMemoryBIOFactory:
    """A factory for the listening side: TLS 1.3, a client certificate of our authority is required."""
    options = CertificateOptions(trustRoot=_trust(credentials), **_identity(credentials))
    # Not Twisted's acceptableProtocols: without an overlap that ends in "internal error" on both sides.
    options.getContext().set_alpn_select_callback(_selectChannel)
    return _tls(options, False, factory, clock)


def clientTLS(
    credentials: Credentials, peerName: str, kind: ChannelKind, factory: IProtocolFactory, clock: IReactorTime
) -> TLSMemoryBIOFactory:
    """
    A factory for the dialing side.

    @param peerName: the DNS name or IP address the server's certificate must be for.
    """
    options = optionsForClientTLS(
        peerName,
        trustRoot=_trust(credentials),
        acceptableProtocols=[kind.value],
        extraCertificateOptions=_identity(credentials),
    )
    return _tls(options, True, factory, clock)


def _selectChannel(_: SSL.Connection, offered: list[bytes]) -> Any:
    return next((kind.value for kind in ChannelKind if kind.value in offered), SSL.NO_OVERLAPPING_PROTOCOLS)


def _trust(credentials: Credentials) -> Any:
    return trustRootFromCertificates([Certificate(crypto.X509.from_cryptography(credentials.authority))])


def _identity(credentials: Credentials) -> dict[str, Any]:
    return {
        "privateKey": crypto.PKey.from_cryptography_key(credentials.key),
        "certificate": crypto.X509.from_cryptography(credentials.certificate),
        "raiseMinimumTo": TLSVersion.TLSv1_3,
    }


def _tls(options: Any, isClient: bool, factory: IProtocolFactory, clock: IReactorTime) -> TLSMemoryBIOFactory:
    tls = TLSMemoryBIOFactory(options, isClient, factory, clock)
    tls.protocol = LinkTransport
    return tls


@implementer(IHandshakeListener)
class Channel(Protocol):
    """
    What TLS delivers to. At first it only waits for the handshake; then its owner attaches the protocol that gets
    the bytes. Bytes that come before C{release} are kept (one read's worth: then the transport is paused).

    Until C{adopt}, the connection lives on borrowed time: at the deadline it is aborted, whatever it is doing.

    @ivar secured: fires with this channel when the handshake is complete and the channel's kind is known; fails
        with a L{ColoError} when the connection ends before.
    @ivar kind: what ALPN said.
    @ivar nameFault: on the server: why the client's certificate does not fit, or None.
    @ivar onBytes: called whenever bytes arrived.
    @ivar onLost: called once, with why the connection is gone, before the attached protocol's C{connectionLost}.
    """

    def __init__(self, clock: IReactorTime, peerName: str, deadline: float) -> None:
        """
        @param peerName: the DNS name or IP address the peer's certificate must be for.
        @param deadline: seconds from being connected to C{adopt}.
        """
        self._clock = clock
        self._peerName = peerName
        self._deadline = deadline
        self._timer: IDelayedCall | None = None
        self._inner: IProtocol | None = None
        self._receive: Callable[[bytes], None] = self._keep
        self._early = b""
        self._error: ColoError | None = None
        self._gone = False
        self.secured: Deferred[Channel] = Deferred()
        self.kind: ChannelKind | None = None
        self.nameFault: str | None = None
        self.onBytes: Callable[[], None] = _nothing
        self.onLost: Callable[[ColoError], None] = _nothing

    # -- Twisted's side

    def connectionMade(self) -> None:
        self._timer = self._clock.callLater(self._deadline, self._expire)

    def handshakeCompleted(self) -> None:
        """TLS stands here; when we are the client, the server has not judged our certificate yet."""
        transport: Any = self.transport
        try:
            self.kind = ChannelKind(transport.negotiatedProtocol)
        except ValueError:
            self.end(
                PeerError(
                    "no channel of colotx was agreed on (ALPN): one side is no colotx, or another version"
                )
            )
            return
        self.nameFault = nameFault(transport.getPeerCertificate().to_cryptography(), self._peerName)
        self.secured.callback(self)

    def dataReceived(self, data: bytes) -> None:
        self.onBytes()
        self._receive(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._gone = True
        self.adopt()
        if self._error is None:
            self._error = _explain(reason, self._peerName, self.kind)
        error = self._error
        if not self.secured.called:
            self.secured.errback(Failure(error))
        self.onLost(error)
        if self._inner is not None:
            self._inner.connectionLost(Failure(error))

    # -- the owner's side

    @property
    def peer(self) -> str:
        """The other end's address, for logs."""
        assert self.transport is not None
        address = self.transport.getPeer()
        return f"{getattr(address, 'host', address)}"

    @property
    def adopted(self) -> bool:
        """It belongs to a session, or is gone."""
        return self._timer is None

    def attach(self, inner: IProtocol) -> None:
        """Connect C{inner} to the transport. It gets no bytes before L{release}."""
        assert self.transport is not None
        self._inner = inner
        inner.makeConnection(self.transport)

    def release(self) -> None:
        """Let bytes flow to the attached protocol, first those that came early."""
        assert self._inner is not None
        self._receive = self._inner.dataReceived
        early, self._early = self._early, b""
        if early:
            self._transport.resumeProducing()
            self._receive(early)

    def detach(self, rest: bytes) -> None:
        """Take the channel away from the attached protocol; C{rest} is what that one has not consumed."""
        self._inner = None
        self._receive = self._keep
        if rest:
            self._keep(rest)

    def adopt(self) -> None:
        """The connection belongs to a session now: the deadline is off."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def end(self, error: ColoError) -> None:
        """Abort the connection because of C{error}. Harmless when it is gone."""
        self._error = self._error or error
        if not self._gone:
            self._transport.abortConnection()

    def finish(self, error: ColoError) -> None:
        """Close the connection because of C{error}, after what was written has left. Harmless when it is gone."""
        self._error = self._error or error
        if not self._gone:
            self._transport.loseConnection()

    # -- inside

    @property
    def _transport(self) -> Any:
        # ITransport declares neither the producer API nor abortConnection, which LinkTransport has.
        return self.transport

    def _keep(self, data: bytes) -> None:
        self._early += data
        self._transport.pauseProducing()

    def _expire(self) -> None:
        self._timer = None
        doing = "complete the TLS handshake" if self.kind is None else "say its part of the hello"
        self.end(PeerTimeout(f"the peer did not {doing} within {self._deadline:g} s"))


def _nothing(*_: object) -> None:
    pass


def _explain(reason: Failure, peerName: str, kind: ChannelKind | None) -> ColoError:
    """What an operator can do about a lost connection."""
    value = reason.value
    if isinstance(value, VerificationError | UnusableCertificate):
        return PeerError(
            f"the peer's certificate is not for {peerName}; issue one for that name, or name the peer as its "
            "certificate does"
        )
    if isinstance(value, SSL.Error):
        words = value.args[0][-1][-1] if value.args and value.args[0] else "no reason given"
        return PeerError(
            f"TLS failed: {words}; both hosts need valid certificates of one authority (colo certs issue) and TLS 1.3"
        )
    what = "the connection" if kind is None else f"the {kind.label} channel"
    return PeerLost(f"{what} was closed: {reason.getErrorMessage()}")
