"""
A session: two daemons that accepted each other, and the channels between them.

It begins when both sides accepted and every channel is bound, and ends once, as a whole: whichever channel dies,
whatever the reason, takes the others along. This module does not know how sessions come about (L{colotx.link}).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IProtocol, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from colotx.channel import Channel, ChannelKind
from colotx.errors import ColoError, HelloRefused, PeerError, PeerLost, ProtocolError
from colotx.heartbeat import INTERVAL, LIMIT, HeartbeatMonitor
from colotx.hello import HEARTBEAT, FrameDecoder, Hello, Message, encodeFrame

MAX_INBOX = 8
"""Control messages kept while nobody asks for them: a hello needs three."""

MAX_UNSENT = 1024 * 1024
"""Bytes of control messages kept for a peer that does not read."""

CLOSE_GRACE = 1.0
"""Seconds a closed session may take to say good-bye."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """
    @ivar interval: seconds between heartbeats.
    @ivar limit: seconds of silence after which the peer is lost; at least two intervals.
    """

    interval: float = INTERVAL
    limit: float = LIMIT


class ControlConnection(Protocol):
    """
    The control channel's protocol: JSON messages in frames. While a session is being made its owner awaits
    C{receive}; later every message goes to C{receiver}.

    @ivar receiver: takes each message, or None: they are kept for C{receive}.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.receiver: Callable[[Message], None] | None = None
        self._decoder = FrameDecoder()
        self._inbox: deque[Message] = deque()
        self._waiter: Deferred[Message] | None = None
        self._lost: BaseException | None = None
        self._paused = False
        self._unsent = 0

    # -- Twisted's side

    def connectionMade(self) -> None:
        transport: Any = self.transport
        transport.registerProducer(self, True)

    def dataReceived(self, data: bytes) -> None:
        try:
            messages = self._decoder.feed(data)
        except ProtocolError as e:
            self.channel.end(e)
            return
        for message in messages:
            self._deliver(message)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._lost = reason.value
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            waiter.errback(reason)

    def pauseProducing(self) -> None:
        """The transport's buffer is full: count what comes on top."""
        self._paused = True

    def resumeProducing(self) -> None:
        """The transport takes more."""
        self._paused = False
        self._unsent = 0

    def stopProducing(self) -> None:
        """The transport is gone; C{connectionLost} follows."""

    # -- the owner's side

    def send(self, message: Message) -> None:
        """
        Send a message; nothing happens when the channel is gone.

        @raise OversizeError: it does not fit into a frame.
        """
        self._write(encodeFrame(message))

    def beat(self) -> None:
        """Send a heartbeat, unless bytes enough are waiting to be read by the peer."""
        if not self._paused:
            self._write(HEARTBEAT)

    async def receive(self) -> Message:
        """
        The next message. Bounded by the channel's deadline.

        @raise ColoError: why the channel ended.
        @raise HelloRefused: the peer refused us.
        """
        if self._inbox:
            message = self._inbox.popleft()
        elif self._lost is not None:
            raise self._lost
        else:
            self._waiter = Deferred()
            message = await self._waiter
        if message.get("type") == "refused":
            error = HelloRefused(str(message.get("reason"))[:1000])
            self.finish(error)
            raise error
        return message

    async def receiveType(self, expected: str) -> None:
        """
        Wait for the one message that is due.

        @raise ProtocolError: the peer sent another.
        """
        message = await self.receive()
        if message.get("type") != expected:
            error = ProtocolError(
                f"the peer said {str(message.get('type'))[:40]!r} where {expected!r} was due"
            )
            self.channel.end(error)
            raise error

    def refuse(self, reason: str) -> HelloRefused:
        """Tell the peer why not, and close. @return: the error that says the same here."""
        error = HelloRefused(reason)
        self.send({"type": "refused", "reason": reason})
        self.finish(error)
        return error

    def finish(self, error: ColoError) -> None:
        """Close the channel when all was sent."""
        transport: Any = self.transport
        transport.unregisterProducer()  # while there is one, Twisted's TLS does not close
        self.channel.finish(error)

    def start(self, receiver: Callable[[Message], None]) -> None:
        """From now on messages go to C{receiver}, those kept first."""
        self.receiver = receiver
        while self._inbox:
            receiver(self._inbox.popleft())

    # -- inside

    def _deliver(self, message: Message) -> None:
        if self.receiver is not None:
            self.receiver(message)
        elif self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            waiter.callback(message)
        elif len(self._inbox) < MAX_INBOX:
            self._inbox.append(message)
        else:
            self.channel.end(ProtocolError("the peer talks on without waiting for an answer"))

    def _write(self, data: bytes) -> None:
        if self._lost is not None:
            return
        if self._paused:
            self._unsent += len(data)
            if self._unsent > MAX_UNSENT:
                self.channel.end(PeerError(f"the peer left {self._unsent} bytes of control messages unread"))
                return
        assert self.transport is not None
        self.transport.write(data)


class Control:
    """
    A session's control messages.

    @ivar onMessage: takes each of the peer's messages (a dict). Set it while C{sessionEstablished} runs: messages
        that nobody takes are dropped and logged.
    """

    _log = Logger()

    def __init__(self, connection: ControlConnection) -> None:
        self._connection = connection
        self.onMessage: Callable[[Message], None] = self._drop

    def send(self, message: Message) -> None:
        """
        Send a message of at most 64 KiB as JSON. After the session's end nothing happens.

        @raise OversizeError: it is larger.
        """
        self._connection.send({"type": "message", "body": message})

    def _drop(self, message: Message) -> None:
        self._log.warn("a control message nobody takes: {message}", message=message)


class Session:
    """
    @ivar local: our hello.
    @ivar peer: the peer's.
    @ivar control: L{Control}: small messages between the owners.
    @ivar colo: the protocol the owner made for the COLO channel.
    @ivar frames: the protocol for NIC frames, or None.
    @ivar error: why the session ended; None while it lives.
    @ivar silence: seconds between the peer's last byte and the end; None while the session lives.
    """

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        local: Hello,
        peer: Hello,
        control: ControlConnection,
        channels: Mapping[ChannelKind, Channel],
        colo: IProtocol,
        frames: IProtocol | None,
        heartbeat: Heartbeat,
    ) -> None:
        """
        @param channels: all but the control channel.
        """
        self.local = local
        self.peer = peer
        self.control = Control(control)
        self.colo = colo
        self.frames = frames
        self.error: PeerError | None = None
        self._clock = clock
        self._connection = control
        self._channels = (control.channel, *channels.values())
        self._monitor = HeartbeatMonitor(clock.seconds(), heartbeat.interval, heartbeat.limit)
        self._timer: IDelayedCall | None = None
        self._waiters: list[Deferred[PeerError]] = []
        self._alive = len(self._channels)
        self._goneWaiters: list[Deferred[None]] = []
        for channel in self._channels:
            channel.adopt()
            channel.onBytes = self._life
            channel.onLost = self._channelLost
        channels[ChannelKind.COLO].attach(colo)
        if frames is not None:
            channels[ChannelKind.FRAMES].attach(frames)

    def start(self, established: Callable[[Session], None]) -> None:
        """
        Tell the owner, then let the bytes flow.

        @param established: the owner's callback; when it raises, the session ends.
        """
        try:
            established(self)
        except Exception:
            self._log.failure("the owner of session {session} failed to take it", session=self.local.session)
            self.close("internal error, see the log")
            return
        self._connection.start(self._received)
        for channel in self._channels[1:]:
            if self.error is None:
                channel.release()
        self._tick()

    @property
    def heard(self) -> float:
        """When bytes of the peer last arrived, seconds of the reactor's clock."""
        return self._monitor.heard

    @property
    def silence(self) -> float | None:
        return self._monitor.silence

    def whenLost(self) -> Deferred[PeerError]:
        """@return: a Deferred that fires once with the reason when the session has ended; it never fails."""
        waiter: Deferred[PeerError] = Deferred()
        if self.error is not None:
            waiter.callback(self.error)
        else:
            self._waiters.append(waiter)
        return waiter

    def whenGone(self) -> Deferred[None]:
        """@return: a Deferred that fires when the session has ended and all its connections are closed."""
        waiter: Deferred[None] = Deferred()
        if self._alive:
            self._goneWaiters.append(waiter)
        else:
            waiter.callback(None)
        return waiter

    def close(self, reason: str) -> None:
        """
        End the session and tell the peer why. The peer may take a second to read it, then the connections are
        aborted; what the other channels have not sent by then is lost. Harmless when it has ended.
        """
        if self.error is not None:
            return
        self._connection.send({"type": "bye", "reason": reason})
        error = PeerLost(f"this side closed the session: {reason}")
        self._end(error)
        # The other channels follow when the peer has closed control: closed first, they would hide the reason.
        self._timer = self._clock.callLater(CLOSE_GRACE, self._abort)
        self._connection.finish(error)

    def end(self, error: PeerError) -> None:
        """End the session at once, without a word to the peer. Harmless when it has ended."""
        if self.error is None:
            self._end(error)
            self._abort()

    def _end(self, error: PeerError) -> None:
        self.error = error
        self._monitor.end(self._clock.seconds())
        self._stopTimer()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.callback(error)

    def _abort(self) -> None:
        assert self.error is not None
        self._stopTimer()
        for channel in self._channels:
            channel.end(self.error)

    def _stopTimer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()

    def _life(self) -> None:
        self._monitor.life(self._clock.seconds())

    def _channelLost(self, error: ColoError) -> None:
        if self.error is None:
            self._end(error if isinstance(error, PeerError) else PeerError(str(error)))
        self._abort()
        self._alive -= 1
        if not self._alive:
            waiters, self._goneWaiters = self._goneWaiters, []
            for waiter in waiters:
                waiter.callback(None)

    def _received(self, message: Message) -> None:
        if self.error is not None:
            return
        if message.get("type") == "message" and isinstance(body := message.get("body"), dict):
            self.control.onMessage(body)
        elif message.get("type") == "bye":
            self.end(PeerLost(f"the peer closed the session: {str(message.get('reason'))[:1000]}"))
        else:
            self.end(
                ProtocolError(f"the peer sent an unknown control message: {str(message.get('type'))[:40]!r}")
            )

    def _tick(self) -> None:
        if self.error is not None:
            return
        tick = self._monitor.tick(self._clock.seconds())
        if tick.lost is not None:
            self.end(tick.lost)
            return
        if tick.beat:
            self._connection.beat()
        if self.error is None:
            self._timer = self._clock.callLater(tick.wait, self._tick)
