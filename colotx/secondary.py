"""
The secondary's role: it holds the primary's checkpoints, and makes a guest of the last one when it must.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred

from colotx.announce import AddressTable
from colotx.checkpoint import SecondaryProcess
from colotx.errors import ColoError, PeerLost, ProtocolError
from colotx.failover import FailoverCause
from colotx.hello import Hello, Role
from colotx.interfaces import ColoMode, Grant, RunState
from colotx.relay import SecondaryRelay
from colotx.replication import NoReplication
from colotx.role import ControlMessage, PeerResync, ProtectedRole, Surroundings
from colotx.status import Protection

MAX_TRANSLATIONS = 1 << 16

ALONE = "nothing runs here, and nothing could"


class SecondaryRole(ProtectedRole):
    """
    One guest that stands by here.

    @ivar mode: SECONDARY while a checkpoint is held that could go live.
    @ivar standby: the L{colotx.interfaces.ISecondaryGuest}.
    """

    role: Role = "secondary"

    def __init__(
        self, around: Surroundings, promoted: Callable[[Any, AddressTable, Grant], Deferred[None]]
    ) -> None:
        """
        @param promoted: takes over: gets the L{colotx.interfaces.IPrimaryGuest} to launch, its addresses and the
            grant; its Deferred fires when the guest serves.
        """
        super().__init__(around)
        self._promoted = promoted
        self.standby = around.factory.createStandby(around.settings.secondary)
        if self.standby.kind == "active":
            self.standby.onLost = self._fail
        self.replication = NoReplication()
        self.addresses = AddressTable()
        self._superseded = False
        self._process: SecondaryProcess | None = None
        self._primary = self._checkpointOf = ""
        self._translations: list[object] = []

    @property
    def loading(self) -> bool:
        """A checkpoint is being settled."""
        return self._process is not None and self._process.loading

    # -- beginning and end

    async def start(self) -> None:
        """Stand by."""
        self._around.store.save(replace(self._around.store.current, role="secondary"))
        self._set(Protection.UNPROTECTED, "no primary has connected yet", ALONE)

    async def stop(self) -> None:
        """Release everything; the primary notices that its secondary is gone."""
        self._cancelGrace()
        session, self._session = self._session, None
        if session is not None:
            session.control.send(
                {"type": ControlMessage.STANDBY_GONE, "reason": "the secondary's daemon stops"}
            )
            session.close("the secondary's daemon stops")
            session.colo.fail(PeerLost("this daemon stops"))
        await self._protection
        await self.standby.close()

    async def release(self) -> None:
        """The guest goes on in another role: what is left here is not needed."""
        await self.standby.close()

    @property
    def runState(self) -> RunState:
        """No guest runs here."""
        return RunState.INMIGRATE if self.standby.checkpoint else RunState.SHUTDOWN

    def describe(self) -> dict[str, object]:
        """For C{query-colotx-stats}."""
        return {"held-checkpoint": self.standby.checkpoint, "superseded": self._superseded}

    # -- the link

    def judge(self, hello: Hello) -> str | None:
        """@return: why the peer's hello is refused, or None."""
        epoch = self._around.store.current.epoch
        if self.failover.state.requested:
            return "a failover is under way: this side is about to run the guest"
        if hello.role != "primary":
            return "two secondaries: start one of the daemons with --role=primary"
        if hello.epoch < epoch:
            return f"stale epoch: the peer is in epoch {hello.epoch}, this host knows of epoch {epoch}"
        if hello.secondary != self.standby.kind:
            return f"the peer wants an {hello.secondary} secondary, this one is {self.standby.kind}"
        if self._outlived(hello):
            cause = FailoverCause("the primary's daemon was restarted, so its guest is dead", forced=True)
            self._around.reactor.callLater(0, self._takeOver, cause)
            return "the guest goes on here: this host holds its last checkpoint, and the daemon that ran it is gone"
        return None

    def _outlived(self, hello: Hello) -> bool:
        """
        Whether the checkpoint held here is all that is left of the guest. A guest dies with its daemon, and the
        certificate says that this is the primary's host: another instance there means that the guest is dead. While a
        session lives its peer is alive, whoever else comes.
        """
        current = self.mode is ColoMode.SECONDARY and not self._superseded
        return current and self._session is None and hello.instance != self._checkpointOf

    def sessionEstablished(self, session: Any) -> None:
        """A primary is there."""
        self._cancelGrace()
        if self.failover.state.requested:
            reason = "a failover is under way"
            session.control.send({"type": ControlMessage.TAKEN_OVER, "reason": reason})
            session.close(reason)
            return
        # From now on the primary serves ungated until the next initial transfer is whole.
        self._superseded = self.standby.checkpoint > 0
        # Started as primary one day, this host must not boot a second guest.
        self._around.store.save(
            replace(self._around.store.current, epoch=session.peer.epoch, role="secondary", protected=True)
        )
        self._session = session
        self._translations = []
        if self.standby.kind == "active":
            self.standby.port.adopt([])
        self._primary = session.peer.instance
        session.control.onMessage = self._fromPeer
        self.failover = self._newFailover()
        self._set(Protection.RESYNCING, f"receiving from {session.peer.instance}", ALONE)
        self._protection = ensureDeferred(self._protect(session, self._protection))

    def _fromPeer(self, message: dict[str, Any]) -> None:
        kind, reason = message.get("type"), str(message.get("reason"))[:200]
        if kind == ControlMessage.ADDRESSES:
            self._learn(message.get("sightings"))
        elif kind == ControlMessage.TRANSLATIONS:
            self._translate(message)
        elif kind == ControlMessage.RESYNC:
            self._fail(PeerResync(f"the primary wants a new session: {reason}"))
        elif kind == ControlMessage.GUEST_LOST:
            self._takeOver(FailoverCause(f"the primary's guest is dead: {reason}", forced=True))
        elif kind == ControlMessage.TAKEN_OVER:
            self._superseded = True
            # A checkpoint still on its way would look newer than what the primary says from now on.
            self._fail(PeerLost(f"the primary goes on alone: {reason}"))

    def _learn(self, sightings: Any) -> None:
        try:
            self.addresses = AddressTable.decode(sightings)
        except ColoError as error:
            self._fail(error)

    def _translate(self, message: dict[str, Any]) -> None:
        entries = message.get("entries")
        if self.standby.kind != "active" or not isinstance(entries, list):
            self._fail(ProtocolError("the primary sent translations that make no sense"))
            return
        self._translations += entries
        if message.get("more"):
            if len(self._translations) > MAX_TRANSLATIONS:
                self._fail(ProtocolError("the primary sent translations without end"))
            return
        translations, self._translations = self._translations, []
        try:
            self.standby.port.adopt(translations)
        except ColoError as error:
            self._fail(error)

    # -- protection

    async def _protect(self, session: Any, before: Deferred[None]) -> None:
        # The protection before forgets what is staged when it ends: that must not be this one's.
        await before
        if session is not self._session:
            return
        self._process = process = SecondaryProcess(
            self._around.reactor,
            self.standby,
            self.replication,
            self.failover,
            relay=None if session.frames is None else SecondaryRelay(session.frames),
            trace=self._around.settings.trace,
            onCommitted=self._committed,
        )
        try:
            await process.run(session.colo)
        except ColoError as error:
            self._checkStandby(session, error)
            self._over(session, error)
        except Exception as error:
            self.log.failure("the protection ended unexpectedly")
            self._over(session, ColoError(f"internal error, see the log: {error!r}"))

    def _checkStandby(self, session: Any, error: ColoError) -> None:
        """A VM that died, or failed to load, is nothing to go on from: the primary must not wait for this side."""
        if self.mode is ColoMode.SECONDARY and not self.standby.promotable:
            self.log.error("the standby is lost: {error}", error=error)
            self.mode = ColoMode.NONE
            session.control.send({"type": ControlMessage.STANDBY_GONE, "reason": str(error)})

    def _committed(self, number: int) -> None:
        self._checkpointOf = self._primary
        self._superseded = False
        self.mode = ColoMode.SECONDARY
        self._set(
            Protection.PROTECTED,
            "a checkpoint of the primary is held",
            "the guest goes on here from the last checkpoint"
            if self._around.settings.onLostPeer == "failover"
            else "nothing happens until `colo failover` is said here",
        )

    def _ended(self, error: ColoError, died: bool) -> None:
        if self.mode is ColoMode.SECONDARY and self._superseded:
            self._set(
                Protection.UNPROTECTED,
                f"the checkpoint held here is older than what the primary said since: {error}",
                "nothing runs here; `colo failover` goes on from the old checkpoint all the same",
            )
            return
        if self.mode is not ColoMode.SECONDARY:
            self._set(Protection.UNPROTECTED, f"there is no checkpoint that could go on: {error}", ALONE)
            return
        self._set(
            Protection.DEGRADED,
            f"holding the last checkpoint: {error}",
            "`colo failover` makes the guest go on here if the other host is certainly off",
        )
        if died:
            self._peerLost(error)
        else:
            self._await(error)

    # -- failover

    async def obtainGrant(self, cause: FailoverCause) -> Grant | None:
        """See L{colotx.failover.IFailoverRole}."""
        if self._superseded and not cause.operator:
            self.log.warn(
                "the checkpoint held here is older than what the primary said since: not going on by itself"
            )
            return None
        return await super().obtainGrant(cause)

    async def goLive(self, grant: Grant) -> None:
        """See L{colotx.failover.IFailoverRole}."""
        await self.replication.stopAll(True)
        guest = await self.standby.promote()
        self.mode = ColoMode.NONE
        await self._promoted(guest, self.addresses, grant)
