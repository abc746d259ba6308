"""
The primary's role: it runs the guest, lets its output out through the gate, keeps a secondary supplied with
checkpoints, and knows when to hold.

It joins the guest, the outside port, the gate, the link and the checkpoint process; each of them decides for itself
what is its own. What is decided here is only what ends and what begins when one of them fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import deferLater

from colotx.announce import AddressTable, Announcer
from colotx.checkpoint import PrimaryProcess
from colotx.errors import ColoError, GuestError, GuestLost, PeerLost
from colotx.evidence import Evidence
from colotx.gate import OutputGate
from colotx.guests.translating import TranslatingPort
from colotx.hello import Hello, Role
from colotx.interfaces import ColoMode, Grant, RunState
from colotx.lockstep import LockstepGate
from colotx.ports import parseOutside
from colotx.relay import Inlet, PrimaryRelay
from colotx.replication import NoReplication
from colotx.role import ControlMessage, PeerResync, ProtectedRole, Surroundings
from colotx.spool import BufferPool, Spool
from colotx.statistics import CheckpointRecord
from colotx.status import Protection
from colotx.trigger import CheckpointTrigger

TRANSLATIONS = 200
"""Entries in one message; it holds 64 KiB."""

DEATH_KNELL = 0.5
"""Seconds a guest that broke its part of the exchange has to turn out dead."""


class PrimaryRole(ProtectedRole):
    """
    One guest that runs here.

    @ivar mode: PRIMARY from the moment the peer may hold a checkpoint until a failover.
    @ivar guest: the L{colotx.interfaces.IPrimaryGuest}.
    """

    role: Role = "primary"

    def __init__(self, around: Surroundings, guest: Any, addresses: AddressTable | None = None) -> None:
        """
        @param guest: an L{colotx.interfaces.IPrimaryGuest}, not launched.
        @param addresses: what it is known by already.
        """
        settings = around.settings
        super().__init__(around)
        self.guest = guest
        parameters = around.parameters
        self.outside = parseOutside(settings.outside)(around.reactor)
        self.trigger = CheckpointTrigger(
            around.reactor, parameters.checkpointDelay, parameters.checkpointFloor
        )
        self.gate = self._newGate()
        self.inlet = Inlet(self.outside, guest.port)
        self.addresses = addresses or AddressTable()
        self.replication = NoReplication()
        self.launched = False
        self._pool = BufferPool(settings.spoolMemory)
        self._announcer: Announcer | None = None
        self._outranked = False
        self._translations: list[dict[str, object]] = []
        guest.onLost = self._guestLost
        guest.onCheckpointWanted = self.trigger.notify
        guest.port.receiver = self._fromGuest
        self.outside.receiver = self.inlet.take

    def _newGate(self) -> OutputGate:
        around = self._around
        if around.settings.secondary == "passive":
            return OutputGate(self.outside.send, self.trigger.notify, self._throttle)
        return LockstepGate(
            around.monotonic,
            self.outside.send,
            self.trigger.notify,
            self._throttle,
            around.parameters.compare,
        )

    # -- beginning and end

    async def start(self) -> None:
        """
        Run the guest, or, when a peer may have gone on with it while this daemon was away, wait for a word.

        @raise colotx.errors.ConfigError: the outside port cannot be opened.
        @raise GuestError: the guest does not start.
        """
        if self._around.store.current.protected:
            self._wait("when this daemon stopped, the peer could go on with the guest: it may run there now")
            return
        await self._launch()
        self._set(
            Protection.UNPROTECTED, "no secondary has connected yet", "the guest is lost if this host dies"
        )

    async def goOn(self, grant: Grant) -> None:
        """
        Run a promoted guest: its output is ungated, its neighbours are told where it is now.

        @raise ColoError: the guest does not start, or the outside port cannot be opened; a failover tries again.
        """
        try:
            await self._launch()
        except ColoError as error:
            self._wait(f"the guest could not go on here: {error}")
            raise
        self._alone(grant)

    def _wait(self, why: str) -> None:
        """Run nothing until a secondary is there, or an operator says so."""
        self.mode = ColoMode.PRIMARY
        self._set(
            Protection.DEGRADED,
            why,
            "nothing runs here; `colo failover` starts the guest here if the other host is certainly off",
        )

    async def stop(self) -> None:
        """End the guest, tell the peer that it is certainly dead, release everything."""
        self._cancelGrace()
        if self._announcer is not None:
            self._announcer.stop()
        session, self._session = self._session, None
        self.guest.onLost = None
        self.gate.shut()
        await self.guest.shutdown()
        if session is not None:
            session.control.send(
                {
                    "type": ControlMessage.GUEST_LOST,
                    "reason": "the primary's daemon was stopped in an orderly way",
                }
            )
            session.close("this daemon stops")
            session.colo.fail(PeerLost("this daemon stops"))
        await self._protection
        await self.outside.close()

    @property
    def runState(self) -> RunState:
        """Of the guest."""
        state: RunState = self.guest.runState
        return state

    def describe(self) -> dict[str, object]:
        """For C{query-colotx-stats}: the gate and the frames."""
        statistics = self.gate.statistics
        return {
            "gate": "open" if self.gate.isOpen else "shut",
            "held-frames": statistics.heldFrames,
            "held-bytes": statistics.heldBytes,
            "max-held-bytes": statistics.maxHeldBytes,
            "released-frames": statistics.released,
            "throttled": statistics.throttled,
            "early-checkpoints": self.trigger.early,
            "deferred-checkpoints": self.trigger.deferred,
            **({"compare": self.gate.describe()} if isinstance(self.gate, LockstepGate) else {}),
        }

    @property
    def evidence(self) -> Evidence | None:
        """Of what the secondary said otherwise; None: its kind says nothing."""
        return self.gate.evidence if isinstance(self.gate, LockstepGate) else None

    def limitsChanged(self) -> None:
        """An operator set the comparer's."""
        if isinstance(self.gate, LockstepGate):
            self.gate.compareLimits = self._around.parameters.compare

    # -- frames

    def _fromGuest(self, frames: Sequence[bytes]) -> None:
        if self.addresses.observe(frames):
            self._tellAddresses()
        self.gate.hold(frames)

    def _throttle(self, on: bool) -> None:
        if on:
            self.log.warn("much output waits for a checkpoint: the guest's port is paused")
            self.guest.port.pause()
        else:
            self.guest.port.resume()

    # -- the link

    def judge(self, hello: Hello) -> str | None:
        """@return: why the peer's hello is refused, or None."""
        epoch = self._around.store.current.epoch
        if hello.role != "secondary":
            return f"a second primary: the guest of {hello.vm} runs on both hosts' account; one must be secondary"
        if hello.epoch > epoch:
            return f"stale epoch: this primary knows of epoch {epoch}, the peer of {hello.epoch}"
        return None

    def refused(self, reason: str) -> None:
        """This side or the other refused a session; it may have been a stranger's."""
        if self._session is not None:
            return
        if self.mode is ColoMode.PRIMARY:
            held = "output is held" if self.launched else "nothing runs here"
            self._set(Protection.DEGRADED, f"{held}; a session was refused: {reason}", "nothing changes")
        elif self.launched:
            self._set(
                Protection.UNPROTECTED,
                f"a session was refused: {reason}",
                "the guest is lost if this host dies",
            )

    def sessionEstablished(self, session: Any) -> None:
        """A secondary is there, so no guest runs on the other host: protect this one."""
        self._cancelGrace()
        if self.failover.underWay:
            session.close("a failover is under way")
            return
        self._session = session
        self._outranked = False
        self.failover = self._newFailover()
        session.control.onMessage = self._fromPeer
        self._protection = ensureDeferred(self._protect(session, self._protection))

    def _fromPeer(self, message: dict[str, Any]) -> None:
        kind, reason = message.get("type"), str(message.get("reason"))[:200]
        if kind == ControlMessage.RESYNC:
            self._fail(PeerResync(f"the secondary wants a new session: {reason}"))
        elif kind == ControlMessage.STANDBY_GONE:
            self.mode = ColoMode.NONE
            self._remember(False)
            self._fail(PeerLost(f"the secondary left: {reason}"))
        elif kind == ControlMessage.TAKEN_OVER:
            # Whatever this side knew of the peer's checkpoints, the guest speaks over there now.
            self.gate.shut()
            self._outranked = True
            self.mode = ColoMode.PRIMARY
            self._remember(True)
            self._fail(PeerLost(f"the guest goes on at the peer: {reason}"))

    def _remember(self, protected: bool) -> None:
        """For the next start, which waits when the peer may run the guest."""
        try:
            self._save(protected)
        except ColoError as error:
            self.log.error("{error}", error=error)

    def _save(self, protected: bool) -> None:
        state = self._around.store.current
        self._around.store.save(replace(state, role="primary", protected=protected))

    def _tellAddresses(self) -> None:
        if self._session is not None:
            self._session.control.send(
                {"type": ControlMessage.ADDRESSES, "sightings": self.addresses.encode()}
            )

    def _tellTranslations(self) -> None:
        """What a VM that once stood by still translates, its next secondary must translate too."""
        port = self.guest.port
        if self._session is None or not isinstance(port, TranslatingPort):
            return
        entries = port.translator.export()
        if entries == self._translations:
            return
        self._translations = entries
        for start in range(0, max(1, len(entries)), TRANSLATIONS):
            self._session.control.send(
                {
                    "type": ControlMessage.TRANSLATIONS,
                    "entries": entries[start : start + TRANSLATIONS],
                    "more": start + TRANSLATIONS < len(entries),
                }
            )

    # -- protection

    async def _protect(self, session: Any, before: Deferred[None]) -> None:
        # The protection before may still be on its way out of the guest, which can be in one only.
        await before
        if session is not self._session:
            return
        try:
            if session.error is not None:
                raise session.error
            await self._process(session)
        except GuestLost as error:
            await self._untilDead(session)
            if session is self._session:
                # It is not dead, but it does not run on either: a guest that is frozen for good must make way.
                await self.guest.shutdown()
                self._guestLost(error)
        except GuestError as error:
            await self._untilDead(session)
            self._over(session, error)
        except ColoError as error:
            self._over(session, error)
        except Exception as error:
            self.log.failure("the protection ended unexpectedly")
            self._over(session, ColoError(f"internal error, see the log: {error!r}"))

    async def _process(self, session: Any) -> None:
        settings = self._around.settings
        # The peer is a secondary again: whatever checkpoint it had before is void, and so is what was held for it.
        self.mode = ColoMode.NONE
        process = PrimaryProcess(
            self._around.reactor,
            self.guest,
            self.gate,
            self.replication,
            self.failover,
            self.trigger,
            self._around.statistics,
            # An active secondary's VM must run again before the primary's does.
            (lambda: Spool(self._pool, settings.spillDir)) if session.frames is None else None,
            relay=self._newRelay(session),
            trace=settings.trace,
            onExposed=self._exposed,
            onCommitted=self._committed,
        )
        await self._launch()
        # Launching took its time: the peer's operator may have said another thing meanwhile.
        session.colo.checkOpen()
        self.gate.open()
        self._tellAddresses()
        self._translations = []
        self._tellTranslations()
        self._set(
            Protection.RESYNCING,
            f"the guest's state is on its way to {session.peer.instance}",
            "the guest runs on here, unprotected",
        )
        await process.run(session.colo)

    def _newRelay(self, session: Any) -> PrimaryRelay | None:
        if not isinstance(self.gate, LockstepGate):
            return None
        return PrimaryRelay(self._around.reactor, session.frames, self.inlet, self.gate)

    async def _untilDead(self, session: Any) -> None:
        """A guest that dies fails what is under way before it is known to be dead; dead is what the peer must hear."""
        deadline = self._around.reactor.seconds() + DEATH_KNELL
        while session is self._session and self._around.reactor.seconds() < deadline:
            await deferLater(self._around.reactor, DEATH_KNELL / 50)

    def _exposed(self) -> None:
        self._save(True)
        self.mode = ColoMode.PRIMARY

    def _committed(self, record: CheckpointRecord) -> None:
        self._tellTranslations()
        if record.number == 0:
            self._set(
                Protection.PROTECTED,
                "the secondary holds a checkpoint",
                "the guest runs on here"
                if self._around.settings.onLostPeer == "failover"
                else "the guest's output is held until `colo failover` or until a secondary is back",
            )

    def _ended(self, error: ColoError, died: bool) -> None:
        if self.mode is not ColoMode.PRIMARY:
            if not self.launched:
                self._wait(str(error))
                return
            # The peer holds nothing it could go on from, so nothing needs to be held here.
            self.gate.open()
            self._set(
                Protection.UNPROTECTED,
                f"the secondary holds no checkpoint: {error}",
                "the guest is lost if this host dies",
            )
            return
        self._set(
            Protection.DEGRADED,
            f"output is held: {error}",
            "nothing changes: a secondary that is back, or `colo failover`, ends the hold",
        )
        if self._outranked:
            self._around.emit("COLO_EXIT", {"mode": "primary", "reason": "error"})
        elif died:
            self._peerLost(error)
        else:
            self._await(error)

    # -- failover

    async def goLive(self, grant: Grant) -> None:
        """See L{colotx.failover.IFailoverRole}."""
        await self.replication.stopAll(True)
        await self._launch()
        self.gate.open()
        self._alone(grant)

    def _alone(self, grant: Grant) -> None:
        self._set(
            Protection.UNPROTECTED,
            f"alone in epoch {grant.epoch} ({grant.source})",
            "the guest is lost if this host dies",
        )

    def _exited(self, mode: ColoMode, reason: str) -> None:
        self.mode = ColoMode.NONE
        super()._exited(mode, reason)

    # -- the guest

    async def _launch(self) -> None:
        """Harmless when it runs. @raise ColoError: it does not, and can be tried again."""
        if self.launched:
            return
        await self.outside.open()
        try:
            await self.guest.launch()
        except BaseException:
            await self.outside.close()
            raise
        self.launched = True
        if self.addresses.sightings:
            # It was known elsewhere before.
            self._announcer = Announcer(self._around.reactor, self.outside, self.addresses)
            self._announcer.start()

    def _guestLost(self, error: GuestError) -> None:
        self.log.error("the guest is lost: {error}", error=error)
        self._cancelGrace()
        self.gate.shut()
        self.launched = False
        session, self._session = self._session, None
        told = session is not None and self.mode is ColoMode.PRIMARY
        self.mode = ColoMode.NONE
        if session is not None:
            session.control.send({"type": ControlMessage.GUEST_LOST, "reason": str(error)})
            session.close(f"the guest is lost: {error}")
            session.colo.fail(error)
        self._around.hangUp()
        self._set(
            Protection.UNPROTECTED,
            f"the guest died: {error}",
            "the peer was told to go on" if told else "nothing runs; restart this daemon to start the guest",
        )
