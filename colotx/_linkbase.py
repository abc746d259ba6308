"""
What both ends of a link share: whom they serve, their settings, and how a session is made of its channels.

The way in is L{colotx.link}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from typing import Protocol as TypingProtocol

from twisted.internet.interfaces import IProtocol
from twisted.logger import Logger

from colotx.channel import Channel, ChannelKind
from colotx.errors import HelloRefused, PeerError
from colotx.hello import Hello
from colotx.session import ControlConnection, Heartbeat, Session

Reactor = Any
"""IReactorTCP, IReactorTime and IReactorPluggableNameResolver at once; zope.interface has no intersections."""


class LinkOwner(TypingProtocol):
    """What the link asks of the daemon it serves."""

    def hello(self) -> Hello:
        """Who we are at this moment; the link fills in C{session}."""

    def judge(self, peer: Hello) -> str | None:
        """@return: the reason to refuse the peer, or None: it is welcome."""

    def buildColo(self) -> IProtocol:
        """@return: a new protocol for the COLO channel of a session."""

    def buildFrames(self) -> IProtocol:
        """@return: a new protocol for the frames channel; called only when the dialer's hello asked for one."""

    def sessionEstablished(self, session: Session) -> None:
        """Both sides accepted and every channel is connected; bytes flow when this returns."""

    def linkRefused(self, error: HelloRefused) -> None:
        """This side or the other refused; the dialer will try again."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """
    All in seconds.

    @ivar heartbeat: see L{Heartbeat}.
    @ivar connectTimeout: for one TCP connection.
    @ivar helloTimeout: from a TCP connection to the session.
    @ivar retryFirst: before the first retry; doubled for each further one.
    @ivar retryMost: at most between two tries.
    @ivar retryRefused: after a refusal, which seldom goes away by itself.
    @ivar steady: a session that lived shorter counts as a failed try.
    """

    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    connectTimeout: float = 3.0
    helloTimeout: float = 5.0
    retryFirst: float = 0.05
    retryMost: float = 1.0
    retryRefused: float = 5.0
    steady: float = 5.0


def dataChannels(dialer: Hello) -> tuple[ChannelKind, ...]:
    """The channels a session has besides control; the dialer says so."""
    return (ChannelKind.COLO, ChannelKind.FRAMES) if dialer.frames else (ChannelKind.COLO,)


def makeSession(
    reactor: Reactor,
    owner: LinkOwner,
    settings: LinkSettings,
    local: Hello,
    peer: Hello,
    control: ControlConnection,
    channels: Mapping[ChannelKind, Channel],
) -> Session:
    frames = owner.buildFrames() if ChannelKind.FRAMES in channels else None
    return Session(reactor, local, peer, control, channels, owner.buildColo(), frames, settings.heartbeat)


def logLost(log: Logger, session: Session, error: PeerError) -> None:
    log.warn(
        "session {session} with instance {instance} ended {silence} ms after the peer was last heard: {reason}",
        session=session.local.session,
        instance=session.peer.instance,
        silence=round((session.silence or 0) * 1000),
        reason=str(error),
    )


__all__ = ["LinkOwner", "LinkSettings", "Reactor", "dataChannels", "logLost", "makeSession"]
