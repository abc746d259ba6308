"""
What the primary's and the secondary's role share: their surroundings, the grant of a new epoch, the vocabulary of
the control channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from colotx.certificates import Credentials
from colotx.errors import PeerError, PeerLost, PeerTimeout
from colotx.failover import FailoverCause
from colotx.interfaces import Grant
from colotx.settings import Settings
from colotx.state import StateStore
from colotx.statistics import CheckpointStatistics
from colotx.status import StatusBoard


@dataclass(slots=True)
class Parameters:
    """
    What can be changed at run time.

    @ivar checkpointDelay: x-checkpoint-delay, ms.
    """

    checkpointDelay: int


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


class PeerResync(PeerError):
    """The peer lives and asked for a new session."""


PEER_DIED = (PeerLost, PeerTimeout)
"""A session that ended so means that the peer is gone. Any other end is the fault of a peer that lives."""
