"""
What the primary's and the secondary's role share: their surroundings, the vocabulary of the control channel, and how a
session ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from colotx.certificates import Credentials
from colotx.checkpoint import FailoverRequested
from colotx.compare import CompareLimits
from colotx.errors import ColoError, PeerError, PeerLost, PeerTimeout
from colotx.failover import FailoverCause, FailoverService
from colotx.interfaces import ColoMode, Grant
from colotx.settings import Settings
from colotx.state import StateStore
from colotx.statistics import CheckpointStatistics
from colotx.status import Protection, StatusBoard


@dataclass(slots=True)
class Parameters:
    """
    What can be changed at run time.

    @ivar checkpointDelay: x-checkpoint-delay, ms.
    @ivar checkpointFloor: ms the guest runs at least between two checkpoints.
    @ivar compare: the comparer's bounds.
    """

    checkpointDelay: int
    checkpointFloor: int = 0
    compare: CompareLimits = field(default_factory=CompareLimits)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """
    What a role works with and does not own.

    @ivar reactor: clock, sockets, processes.
    @ivar witness: an L{colotx.interfaces.IWitness}.
    @ivar factory: an L{colotx.interfaces.IGuestFactory}.
    @ivar instance: UUID of this run of the daemon.
    @ivar hangUp: makes the link dial no more: there is no guest to protect.
    @ivar emit: sends a QMP event (name, data) to the clients of the control socket.
    @ivar monotonic: seconds of a clock that nobody sets.
    """

    reactor: Any
    settings: Settings
    parameters: Parameters
    store: StateStore
    witness: Any
    factory: Any
    credentials: Credentials
    instance: str
    status: StatusBoard
    statistics: CheckpointStatistics
    hangUp: Callable[[], None]
    emit: Callable[[str, dict[str, object]], None]
    monotonic: Callable[[], float] = time.monotonic

    async def obtainGrant(self, cause: FailoverCause) -> Grant | None:
        """
        Ask the witness for the next epoch and make it durable before anything follows from it.

        @return: None when the witness says hold.
        @raise colotx.errors.StorageError: the epoch cannot be stored: then nothing is granted either.
        """
        state = self.store.current
        grant: Grant | None = await self.witness.acquire(
            self.settings.vm, state.epoch + 1, self.instance, cause.forced
        )
        if grant is not None:
            self.store.save(replace(state, epoch=grant.epoch, role="primary", protected=False))
        return grant


class ControlMessage:
    """The C{type} of messages on the control channel, both ways."""

    RESYNC = "resync"
    """C{reason}: this session ends by a fault that is no death; the sender lives and wants a new session."""
    TAKEN_OVER = "taken-over"
    """C{reason}: the sender goes on alone, by its operator's word; the receiver must not."""
    GUEST_LOST = "guest-lost"
    """C{reason}: the primary's guest is certainly dead, its output has ended: the secondary should go on."""
    STANDBY_GONE = "standby-gone"
    """C{reason}: the secondary forgets its checkpoint: the primary may go on ungated."""
    ADDRESSES = "addresses"
    """C{sightings}: what the guest answers to, so that the survivor can announce it."""
    TRANSLATIONS = "translations"
    """
    C{entries}, C{more}: connections that the primary's port translates since an earlier failover, for the secondary's
    VM from the next checkpoint on; a list too long for one message comes in several, all but the last with C{more}.
    """


class PeerResync(PeerError):
    """The peer lives and asked for a new session."""


PEER_DIED = (PeerLost, PeerTimeout)
"""A session that ended so means that the peer is gone. Any other end is the fault of a peer that lives."""


RESYNC_GRACE = 2.0
"""Seconds a peer that lives has to come back with a new session before it counts as lost."""


class ProtectedRole:
    """
    What both roles do alike: one session at a time, what its end means, and the tearing down in a failover.

    @ivar mode: this side's COLO mode; while it is not NONE the peer may hold, or depend on, a checkpoint.
    @ivar failover: the failover of the session that is, or was last.
    """

    log = Logger()

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._session: Any = None
        self._protection: Deferred[None] = succeed(None)
        self._grace: Any = None
        self.mode = ColoMode.NONE
        self.failover = self._newFailover()

    # -- what differs

    @property
    def loading(self) -> bool:
        """See L{colotx.failover.IFailoverRole}."""
        return False

    async def obtainGrant(self, cause: FailoverCause) -> Grant | None:
        """See L{colotx.failover.IFailoverRole}."""
        return await self._around.obtainGrant(cause)

    async def goLive(self, grant: Grant) -> None:
        """See L{colotx.failover.IFailoverRole}."""
        raise NotImplementedError

    def _ended(self, error: ColoError, died: bool) -> None:
        """The protection is over. @param died: the peer is dead, as far as one can see."""
        raise NotImplementedError

    def _exited(self, mode: ColoMode, reason: str) -> None:
        self._around.emit("COLO_EXIT", {"mode": mode.value, "reason": reason})

    # -- the end of a session

    def _over(self, session: Any, error: ColoError) -> None:
        """A protection ended; what that means is told apart here."""
        self.log.info("protection ended: {error}", error=error)
        if session is not self._session:
            return
        self._session = None
        # A peer that asked for a new session has closed the old one by now: that is no death.
        resync = isinstance(error, PeerResync)
        died = isinstance(session.error, PEER_DIED) and not resync
        why = error if resync else session.error or error
        if session.error is None:
            session.control.send({"type": ControlMessage.RESYNC, "reason": str(error)})
            session.close(str(error))
        if not self.failover.state.requested and not isinstance(error, FailoverRequested):
            self._ended(why, died)

    def _fail(self, error: ColoError) -> None:
        """End the protection under way, if one is."""
        if self._session is not None:
            self._session.colo.fail(error)

    def _await(self, error: ColoError) -> None:
        """The peer lives: give it some time for a new session."""
        self._grace = self._around.reactor.callLater(RESYNC_GRACE, self._graceOver, error)

    def _graceOver(self, error: ColoError) -> None:
        self._grace = None
        self._peerLost(error)

    def _cancelGrace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    # -- failover

    def _newFailover(self) -> FailoverService:
        return FailoverService(self, self._exited)

    def _peerLost(self, error: ColoError) -> None:
        """The peer counts as lost: fail over, or hold, as the witness says."""
        self._takeOver(FailoverCause(str(error)))

    def _takeOver(self, cause: FailoverCause) -> None:
        if self.mode is not ColoMode.NONE and not self.failover.state.requested:
            self.failover.request(cause).addErrback(self._held, self.mode)

    def _held(self, failure: Failure, mode: ColoMode) -> None:
        if failure.check(ColoError) is None:  # type: ignore[no-untyped-call]
            self.log.failure("the failover failed", failure)
        self.log.warn("{reason}", reason=failure.getErrorMessage())
        self._around.emit("COLO_EXIT", {"mode": mode.value, "reason": "error"})

    async def shutTransport(self, cause: FailoverCause) -> None:
        """See L{colotx.failover.IFailoverRole}. Nothing of the protection runs any more when this is done."""
        self._cancelGrace()
        session, self._session = self._session, None
        if session is not None:
            session.control.send({"type": ControlMessage.TAKEN_OVER, "reason": cause.reason})
            session.close(f"failover: {cause.reason}")
            session.colo.fail(FailoverRequested("a failover was requested"))
        await self._protection

    def _set(self, protection: Protection, why: str, consequence: str) -> None:
        self._around.status.set(protection, why, consequence)
