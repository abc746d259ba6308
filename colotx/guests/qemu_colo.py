"""
The COLO exchange with the local QEMU, in which colotx takes the secondary's place.

QEMU is the primary of this exchange and believes that its peer holds every checkpoint; colotx reads it as a stream of
bytes and sends it on. The order is that of QEMU-FACTS, "The COLO message exchange". This module knows the exchange and
its socket; it does not know QMP, processes or the other host.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure

from colotx.errors import ColoError, ConfigError, GuestError, GuestTimeout, PeerError, PeerTimeout
from colotx.interfaces import Sink
from colotx.protocol import ColoConnection, ColoMessage, Consumer, WholeStream
from colotx.vmstate import CheckpointReader, InitialReader, RamEvent, RamReader


class Phase(enum.Enum):
    """Where the exchange is."""

    INITIAL = "the initial stream is under way"
    LOADED = "QEMU waits for READY"
    RUNNING = "the guest runs"
    STOPPING = "QEMU was told to stop the guest"
    STOPPED = "QEMU sends RAM"
    DEVICES = "QEMU sends device state"
    HELD = "QEMU waits for RECEIVED and LOADED"
    ENDED = "over"


class _SinkFailed(Exception):
    """What the sink raised, on its way past the translation of QEMU's errors."""

    def __init__(self, error: ColoError) -> None:
        self.error = error


class _OnlyQemu(Factory):
    """Takes one connection: QEMU makes one, and nobody else has business here."""

    def __init__(self, connection: ColoConnection) -> None:
        self._connection: ColoConnection | None = connection
        self.connected: Deferred[None] = Deferred()

    def buildProtocol(self, addr: IAddress | None) -> ColoConnection | None:
        connection, self._connection = self._connection, None
        if connection is not None and not self.connected.called:
            self.connected.callback(None)
        return connection


class ColoExchange:
    """
    One protection's exchange, from the initial stream to its end.

    @ivar phase: where it is.
    """

    def __init__(self, reactor: Any, path: str, timeout: float, onWanted: Callable[[str], None]) -> None:
        """
        @param path: of the unix socket to listen on.
        @param timeout: seconds QEMU may take for each message, and for the next byte of a stream.
        @param onWanted: called with a reason when QEMU wants a checkpoint, or will not carry on with the exchange,
            which the attempt to make one then tells.
        """
        self._reactor = reactor
        self._path = path
        self._timeout = timeout
        self._onWanted = onWanted
        self._ram = RamReader()
        self._connection = ColoConnection(reactor, timeout)
        self._factory = _OnlyQemu(self._connection)
        self._listening: Any = None
        self._request: Failure | ColoMessage | None = None
        self._requestWaiter: Deferred[None] | None = None
        self.phase = Phase.INITIAL

    def listen(self) -> None:
        """
        Open the socket QEMU is to migrate to.

        @raise ConfigError: it cannot be.
        """
        try:
            self._listening = self._reactor.listenUNIX(self._path, self._factory, mode=0o600)
        except CannotListenError as error:
            raise ConfigError(f"{self._path}: cannot listen for QEMU: {error}") from error

    async def initial(self, sink: Sink) -> None:
        """
        Pass the initial stream on. Afterwards QEMU waits, its guest stopped, for L{answer}.

        @raise GuestError: QEMU did not send it all.
        """
        self._require(Phase.INITIAL)
        self._factory.connected.addTimeout(self._timeout, self._reactor, _notConnected)
        await self._factory.connected
        with asGuestErrors():
            await self._connection.receiveStream(
                WholeStream(InitialReader(self._ram)), _passTo(sink), self._timeout
            )
        self.phase = Phase.LOADED

    async def stop(self, nudge: Callable[[], Deferred[object]]) -> None:
        """
        Have the guest stopped.

        @param nudge: makes QEMU ask for a checkpoint; not called when it asked already.
        @raise GuestTimeout: QEMU did not. While C{phase} is RUNNING still, the guest runs on.
        """
        self._require(Phase.RUNNING)
        if self._request is None:
            await self._requested(nudge)
        if isinstance(self._request, Failure):
            with asGuestErrors():
                self._request.raiseException()
        self._request = None
        self.phase = Phase.STOPPING
        with asGuestErrors():
            self._connection.sendMessage(ColoMessage.CHECKPOINT_REPLY)
            await self._connection.receiveMessage(ColoMessage.VMSTATE_SEND, self._timeout)
        self.phase = Phase.STOPPED

    async def live(self, sink: Sink) -> None:
        """Pass the RAM part of a checkpoint on."""
        self._require(Phase.STOPPED)
        with asGuestErrors():
            await self._connection.receiveStream(CheckpointReader(self._ram), _passTo(sink), self._timeout)
        self.phase = Phase.DEVICES

    async def device(self) -> bytes:
        """@return: the device-state blob."""
        self._require(Phase.DEVICES)
        with asGuestErrors():
            size = await self._connection.receiveSize(self._timeout)
            blob = await self._connection.receiveBlob(size, self._timeout)
        self.phase = Phase.HELD
        return blob

    @property
    def answerDue(self) -> bool:
        """QEMU waits for an answer and will then let the guest run."""
        return self.phase in (Phase.LOADED, Phase.HELD)

    async def answer(self) -> None:
        """
        Give the answer that is due: QEMU lets the guest run on.

        @raise GuestError: QEMU closed the socket.
        """
        with asGuestErrors():
            if self.phase is Phase.LOADED:
                self._connection.sendMessage(ColoMessage.CHECKPOINT_READY)
            else:
                self._require(Phase.HELD)
                # One write for both: QEMU reads the second without waiting.
                self._connection.sendMessage(ColoMessage.VMSTATE_RECEIVED, ColoMessage.VMSTATE_LOADED)
        self.phase = Phase.RUNNING
        # QEMU may ask at any time now: by its own timer, or because its compare saw a difference.
        request = ensureDeferred(self._connection.receiveMessage(ColoMessage.CHECKPOINT_REQUEST, None))
        request.addCallbacks(lambda _: self._asked(ColoMessage.CHECKPOINT_REQUEST), self._asked)

    def end(self, error: ColoError) -> None:
        """Shut the socket down both ways: whatever waits on it fails with C{error}. Harmless when it is over."""
        if self.phase is Phase.ENDED:
            return
        self.phase = Phase.ENDED
        if self._listening is not None:
            self._listening.stopListening()
        self._connection.abort(error)
        if not self._factory.connected.called:
            self._factory.connected.errback(error)
        # Nobody may be waiting.
        self._factory.connected.addErrback(lambda failure: None)

    async def _requested(self, nudge: Callable[[], Deferred[object]]) -> None:
        waiter: Deferred[None] = Deferred()
        self._requestWaiter = waiter

        def refused(failure: Failure) -> None:
            if not waiter.called:
                waiter.errback(failure)

        waiter.addTimeout(self._timeout, self._reactor, _notRequested)
        nudge().addErrback(refused)
        try:
            await waiter
        finally:
            self._requestWaiter = None

    def _asked(self, request: Failure | ColoMessage) -> None:
        self._request = request
        if self._requestWaiter is not None:
            if not self._requestWaiter.called:
                self._requestWaiter.callback(None)
        elif self.phase is Phase.RUNNING:
            failed = isinstance(request, Failure)
            self._onWanted("QEMU left the COLO exchange" if failed else "QEMU asked for a checkpoint")

    def _require(self, phase: Phase) -> None:
        if self.phase is not phase:
            raise GuestError(
                f"the guest's COLO exchange is out of order: {self.phase.value}, not {phase.value}"
            )


@contextmanager
def asGuestErrors() -> Iterator[None]:
    """The peer of this exchange is the local QEMU: what is wrong with it is the guest's error."""
    try:
        yield
    except _SinkFailed as failed:
        raise failed.error from None
    except PeerTimeout as error:
        raise GuestTimeout(f"the local QEMU: {error}") from error
    except PeerError as error:
        raise GuestError(f"the local QEMU: {error}") from error


def _passTo(sink: Sink) -> Consumer:
    async def consume(raw: bytes | memoryview, events: Sequence[RamEvent]) -> None:
        try:
            await sink.write(raw)
        except ColoError as error:
            raise _SinkFailed(error) from error

    return consume


def _notConnected(_: object, timeout: float) -> None:
    raise GuestTimeout(f"QEMU did not begin its initial stream within {timeout:g} s")


def _notRequested(_: object, timeout: float) -> None:
    raise GuestTimeout(
        f"QEMU did not answer the wish for a checkpoint within {timeout:g} s; the guest runs on"
    )


__all__ = ["ColoExchange", "Phase", "asGuestErrors"]
