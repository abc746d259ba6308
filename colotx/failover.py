"""
Failover: who may start it, how far it is, and the order of its steps.

The states and the rule that they change only by compare-and-set are QEMU's (QEMU-FACTS, "Failover states";
C{migration/colo-failover.c})::

    NONE --request--> REQUIRE --perform--> ACTIVE --granted, steps done--> COMPLETED
                                             | |
                      a checkpoint is loaded | | not granted, or a step failed
                                             v v
    NONE (and requested again) <---- RELAUNCH   NONE

This file knows the order, not the how: the steps are the role's (L{IFailoverRole}).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.logger import Logger

from colotx.errors import FailoverError
from colotx.interfaces import ColoMode, Grant


class FailoverStatus(enum.Enum):
    """How far a failover is."""

    NONE = "none"
    REQUIRE = "require"
    ACTIVE = "active"
    COMPLETED = "completed"
    RELAUNCH = "relaunch"


class FailoverState:
    """The status, changed only by compare-and-set; every change is traced."""

    log = Logger()

    def __init__(self) -> None:
        self._status = FailoverStatus.NONE

    @property
    def status(self) -> FailoverStatus:
        """The status now."""
        return self._status

    @property
    def requested(self) -> bool:
        """Whether whoever carries out a checkpoint must leave."""
        return self._status is not FailoverStatus.NONE

    def compareAndSet(self, old: FailoverStatus, new: FailoverStatus) -> bool:
        """Change from C{old} to C{new}. @return: whether it was C{old}; if not, nothing changed."""
        if self._status is not old:
            return False
        self._status = new
        self.log.info("failover state {old.value} -> {new.value}", old=old, new=new)
        return True


@dataclass(frozen=True, slots=True)
class FailoverCause:
    """
    Why a failover was asked for.

    @ivar reason: words for the log and the status.
    @ivar forced: an operator's word, or proof that the other side's guest is dead: stronger than silence.
    @ivar operator: an operator's word: it also accepts a checkpoint that others know to be too old.
    """

    reason: str
    forced: bool = False
    operator: bool = False


class IFailoverRole(Protocol):
    """What a primary or secondary does in a failover. Every method is called at most once, in this order."""

    @property
    def mode(self) -> ColoMode:
        """Which role in COLO this side has now; NONE: none, so there is nothing to fail over from."""

    @property
    def loading(self) -> bool:
        """A checkpoint is being loaded; it must be finished before anything else."""

    async def obtainGrant(self, cause: FailoverCause) -> Grant | None:
        """Ask the arbiter, and persist the new epoch. None: hold."""

    async def shutTransport(self, cause: FailoverCause) -> None:
        """Tear down both directions of the transport to the peer, so that whatever waits on it wakes."""

    async def goLive(self, grant: Grant) -> None:
        """Go on alone: stop replication with failover=true, open the output."""


class FailoverService:
    """
    Accepts requests and carries them out, one at a time.

    @ivar state: the compare-and-set state.
    @ivar onExit: called with (mode, reason) for COLO_EXIT when a failover went through.
    """

    log = Logger()

    def __init__(self, role: IFailoverRole, onExit: Callable[[ColoMode, str], None]) -> None:
        self._role = role
        self._onExit = onExit
        self._relaunch: tuple[FailoverCause, Deferred[None]] | None = None
        self.state = FailoverState()
        self.running: Deferred[None] | None = None

    @property
    def underWay(self) -> bool:
        """Whether one was requested and has not ended."""
        return self.running is not None and not self.running.called

    def request(self, cause: FailoverCause) -> Deferred[None]:
        """
        Start a failover.

        @return: a Deferred that fires when this side goes on alone, and fails with L{FailoverError} when it was not
            granted, or with what stopped it; then it can be requested again.
        @raise FailoverError: no COLO mode, or one is already activated (QEMU's rule: a second request is refused).
        """
        if self._role.mode is ColoMode.NONE:
            raise FailoverError(
                "no failover: this side is not in COLO mode (nothing is protected, or it is over)"
            )
        if not self.state.compareAndSet(FailoverStatus.NONE, FailoverStatus.REQUIRE):
            raise FailoverError(f"failover is already activated ({self.state.status.value})")
        self.log.warn("failover required: {cause.reason}", cause=cause)
        self.running = ensureDeferred(self._perform(cause))
        return self.running

    def loaded(self) -> bool:
        """
        The checkpoint that was being loaded is finished. If a failover waited for it, it is requested again.

        @return: whether one waited: then LOADED must not be sent.
        """
        if not self.state.compareAndSet(FailoverStatus.RELAUNCH, FailoverStatus.NONE):
            return False
        assert self._relaunch is not None
        (cause, done), self._relaunch = self._relaunch, None
        self.request(cause).chainDeferred(done)
        return True

    async def _perform(self, cause: FailoverCause) -> None:
        role, state = self._role, self.state
        state.compareAndSet(FailoverStatus.REQUIRE, FailoverStatus.ACTIVE)
        if role.loading and state.compareAndSet(FailoverStatus.ACTIVE, FailoverStatus.RELAUNCH):
            done: Deferred[None] = Deferred()
            self._relaunch = (cause, done)
            await done
            return
        try:
            grant = await role.obtainGrant(cause)
        except BaseException:
            state.compareAndSet(FailoverStatus.ACTIVE, FailoverStatus.NONE)
            raise
        if grant is None:
            state.compareAndSet(FailoverStatus.ACTIVE, FailoverStatus.NONE)
            raise FailoverError(
                f"holding ({cause.reason}): nobody granted that this side goes on alone; "
                "make sure the other host is off, then say `colo failover` here"
            )
        mode = role.mode
        try:
            await role.shutTransport(cause)
            state.compareAndSet(FailoverStatus.ACTIVE, FailoverStatus.COMPLETED)
            await role.goLive(grant)
        except BaseException:
            # Nothing serves now. An operator who mended the cause must be able to say it again.
            state.compareAndSet(state.status, FailoverStatus.NONE)
            raise
        self._onExit(mode, "request")
