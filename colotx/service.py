"""
The daemon as a Twisted service: it builds the parts, joins them, and changes its role at a failover.

Everything below gets its reactor, its settings and its peers from here; nothing below knows the command line.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from colotx.announce import AddressTable
from colotx.certificates import Credentials, localCredentials
from colotx.compare import CompareLimits
from colotx.control import ColoStatus, ControlService, defaultControlPath
from colotx.errors import ColoError, GuestError, HelloRefused
from colotx.failover import FailoverCause, FailoverStatus
from colotx.frames import FrameChannel
from colotx.guests import createFactory
from colotx.hello import Hello
from colotx.interfaces import ColoMode, Grant, RunState
from colotx.link import LinkDialer, LinkListener, LinkSettings
from colotx.primary import PrimaryRole
from colotx.protocol import ColoConnection
from colotx.role import Parameters, Surroundings
from colotx.secondary import SecondaryRole
from colotx.session import Heartbeat, Session
from colotx.settings import Settings, defaultStateDir, stateRoot
from colotx.state import StateStore
from colotx.statistics import CheckpointStatistics
from colotx.status import Protection, StatusBoard
from colotx.witness.policy import PolicyWitness

STOP_TIMEOUT = 15.0
"""Seconds the parts may take to end in an orderly way."""


class ColoService(MultiService):
    """
    One daemon: one role for one VM. It is the owner of its link and the node behind its control socket.

    @ivar role: the L{PrimaryRole} or L{SecondaryRole} it has now.
    """

    log = Logger()

    def __init__(self, settings: Settings, reactor: Any, quit: Callable[[int], None]) -> None:
        """
        @param quit: ends the process with an exit code.
        @raise ColoError: something in the settings cannot work on this machine.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        stateDir = settings.stateDir or defaultStateDir(settings)
        control = settings.control or defaultControlPath(_controlName(settings))
        self._settings = settings
        self._reactor = reactor
        self._quit = quit
        self._lastFailover: dict[str, object] | None = None
        self._lastExit = (ColoMode.NONE, "none")
        self._detected = 0.0
        self._silence = 0.0
        self.statistics = CheckpointStatistics()
        self.status = StatusBoard(reactor, self._emit)
        self._around = Surroundings(
            reactor=reactor,
            settings=settings,
            parameters=Parameters(
                settings.checkpointDelay,
                settings.checkpointFloor,
                CompareLimits(
                    compareTimeout=settings.compareTimeout,
                    expiredScanCycle=settings.expiredScanCycle,
                    maxQueueSize=settings.maxQueueSize,
                ),
            ),
            store=StateStore(stateDir),
            witness=PolicyWitness(settings.onLostPeer),
            factory=createFactory(settings, reactor, stateDir, f"{control}.d"),
            credentials=_credentials(settings),
            instance=str(uuid4()),
            status=self.status,
            statistics=self.statistics,
            hangUp=self._hangUp,
            emit=self._emit,
        )
        self._control = ControlService(reactor, control, self)
        self._control.setServiceParent(self)  # type: ignore[no-untyped-call]
        self._dialer: LinkDialer | None = None
        self._listener: LinkListener | None = None
        self.role: PrimaryRole | SecondaryRole
        if settings.role == "primary":
            self.role = PrimaryRole(self._around, self._around.factory.createPrimary())
        else:
            self.role = SecondaryRole(self._around, self._promoted)

    # -- beginning and end

    def startService(self) -> None:
        """Start; a failure ends the process with exit code 1 and one line that says why."""
        # What is there now stays: the collector need not look at it again and again, for milliseconds each time.
        gc.freeze()
        if self._settings.scheduling == "realtime":
            _raisePriority(self.log)
        ensureDeferred(self._start()).addErrback(self._startFailed)

    async def _start(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        if isinstance(self.role, SecondaryRole):
            self._listen()
            await self.role.start()
        else:
            await self.role.start()
            self._dial()

    def _startFailed(self, failure: Failure) -> None:
        if isinstance(failure.value, ColoError):
            self.log.critical("cannot start: {reason}", reason=failure.getErrorMessage())
        else:
            self.log.failure("cannot start", failure)
        self._quit(1)

    def stopService(self) -> Deferred[None]:
        """Stop in an orderly way. @return: a Deferred that never fails and fires within L{STOP_TIMEOUT}."""
        done = ensureDeferred(self._stop())
        done.addTimeout(STOP_TIMEOUT, self._reactor)
        done.addErrback(lambda failure: self.log.failure("the end was not orderly", failure))
        return done

    async def _stop(self) -> None:
        running = self.role.failover.running
        if running is not None and not running.called:
            # Half a guest could not be ended; who asked for the failover hears what came of it.
            with suppress(Exception):
                await running
        await self.role.stop()
        if self._dialer is not None:
            await self._dialer.stop()
        if self._listener is not None:
            await self._listener.stop()
        await MultiService.stopService(self)  # type: ignore[no-untyped-call]

    def _linkSettings(self) -> LinkSettings:
        settings = self._settings
        return LinkSettings(Heartbeat(settings.heartbeatInterval / 1000, settings.heartbeatLimit / 1000))

    def _dial(self) -> None:
        peer = self._settings.peerAddress
        self._dialer = LinkDialer(
            self._reactor,
            self,
            self._around.credentials,
            peer.host,
            peer.port,
            self._settings.peerName or peer.host,
            self._linkSettings(),
        )
        self._dialer.start()

    def _hangUp(self) -> None:
        if self._dialer is not None:
            ensureDeferred(self._dialer.stop())

    def _listen(self) -> None:
        listen = self._settings.listen
        self._listener = LinkListener(
            self._reactor,
            self,
            self._around.credentials,
            self._settings.peerName or self._settings.peerAddress.host,
            listen.port,
            "127.0.0.1" if listen.host == "localhost" else listen.host,
            self._linkSettings(),
        )
        self._listener.start()

    # -- LinkOwner

    def hello(self) -> Hello:
        """See L{colotx.link.LinkOwner}."""
        return Hello(
            vm=self._settings.vm,
            role=self.role.role,
            instance=self._around.instance,
            epoch=self._around.store.current.epoch,
            secondary=self._settings.secondary,  # type: ignore[arg-type]  # checked by settings
            frames=self._settings.secondary == "active",
        )

    def judge(self, peer: Hello) -> str | None:
        """See L{colotx.link.LinkOwner}."""
        return self.role.judge(peer)

    def buildColo(self) -> ColoConnection:
        """See L{colotx.link.LinkOwner}."""
        return ColoConnection(self._reactor)

    def buildFrames(self) -> FrameChannel:
        """See L{colotx.link.LinkOwner}."""
        return FrameChannel()

    def sessionEstablished(self, session: Session) -> None:
        """See L{colotx.link.LinkOwner}."""
        self.log.info(
            "linked with {peer.role} {peer.instance}, epoch {peer.epoch}",
            peer=session.peer,
        )
        session.whenLost().addCallback(lambda error: self._sessionLost(session, error))
        self.role.sessionEstablished(session)

    def _sessionLost(self, session: Session, error: ColoError) -> None:
        self._detected = self._reactor.seconds()
        self._silence = session.silence or 0.0
        self.log.warn("link lost: {error}", error=error)

    def linkRefused(self, error: HelloRefused) -> None:
        """See L{colotx.link.LinkOwner}."""
        self.log.warn("link refused: {reason}", reason=error.reason)
        if isinstance(self.role, PrimaryRole):
            self.role.refused(error.reason)

    # -- the change of role

    def _promoted(self, guest: Any, addresses: AddressTable, grant: Grant) -> Deferred[None]:
        return ensureDeferred(self._goOn(guest, addresses, grant))

    async def _goOn(self, guest: Any, addresses: AddressTable, grant: Grant) -> None:
        standby = self.role
        assert isinstance(standby, SecondaryRole)
        self.role = primary = PrimaryRole(self._around, guest, addresses)
        try:
            await primary.goOn(grant)
        finally:
            await standby.release()
        self._lastFailover = {
            "epoch": grant.epoch,
            "granted-by": grant.source,
            "silence-ms": round(self._silence * 1000, 3),
            "takeover-ms": round((self._reactor.seconds() - self._detected) * 1000, 3),
        }
        self.log.warn("failover: the guest runs here: {facts}", facts=self._lastFailover)
        if self._settings.peer is not None:
            self._dial()

    # -- the node behind the control socket

    @property
    def runState(self) -> RunState:
        """See L{colotx.control.ColoNode}."""
        return self.role.runState

    @property
    def checkpointDelay(self) -> int:
        """See L{colotx.control.ColoNode}."""
        return self._around.parameters.checkpointDelay

    def coloStatus(self) -> ColoStatus:
        """See L{colotx.control.ColoNode}. The reason follows QEMU's rule (C{qmp_query_colo_status})."""
        mode, failover = self.role.mode, self.role.failover.state.status
        lastMode, lastReason = self._lastExit
        if failover is FailoverStatus.NONE:
            reason = lastReason if mode is ColoMode.NONE else "none"
        elif failover is FailoverStatus.COMPLETED:
            reason = "request"
        else:
            reason = "error" if mode is ColoMode.NONE else "processing"
        return ColoStatus(mode, lastMode, reason)

    def setCheckpointDelay(self, milliseconds: int) -> None:
        """See L{colotx.control.ColoNode}."""
        self._around.parameters.checkpointDelay = milliseconds
        if isinstance(self.role, PrimaryRole):
            self.role.trigger.delay = milliseconds

    def properties(self) -> dict[str, object]:
        """See L{colotx.control.ColoNode}."""
        compare = self._around.parameters.compare
        return {
            "compare_timeout": compare.compareTimeout,
            "expired_scan_cycle": compare.expiredScanCycle,
            "max_queue_size": compare.maxQueueSize,
        }

    def setLimit(self, name: str, value: int) -> None:
        """See L{colotx.control.ColoNode}."""
        parameters = self._around.parameters
        parameters.compare = replace(parameters.compare, **{name: value})
        if isinstance(self.role, PrimaryRole):
            self.role.limitsChanged()

    def doCheckpoint(self) -> None:
        """See L{colotx.control.ColoNode}."""
        if not isinstance(self.role, PrimaryRole) or self.role.mode is not ColoMode.PRIMARY:
            raise GuestError("no checkpoint: no guest is protected by this daemon now")
        self.role.trigger.notify("xen-colo-do-checkpoint")

    def lostHeartbeat(self) -> Deferred[None]:
        """See L{colotx.control.ColoNode}."""
        self._detected, self._silence = self._reactor.seconds(), 0.0
        return self.role.failover.request(FailoverCause("the operator said so", forced=True, operator=True))

    def startReplication(self, mode: ColoMode) -> object:
        """See L{colotx.control.ColoNode}."""
        return self.role.replication.startAll(mode)

    def stopReplication(self, failover: bool) -> object:
        """See L{colotx.control.ColoNode}."""
        return self.role.replication.stopAll(failover)

    def checkReplication(self) -> None:
        """See L{colotx.control.ColoNode}."""
        self.role.replication.getErrorAll()

    def stopGuest(self) -> object:
        """See L{colotx.control.ColoNode}."""
        return self._unprotectedGuest().pause()

    def continueGuest(self) -> object:
        """See L{colotx.control.ColoNode}."""
        return self._unprotectedGuest().unpause()

    def _unprotectedGuest(self) -> Any:
        if not isinstance(self.role, PrimaryRole) or not self.role.launched:
            raise GuestError("no guest runs here")
        if self.role.mode is not ColoMode.NONE or self.status.protection is Protection.RESYNCING:
            raise GuestError("a protected guest is stopped and continued by its checkpoints only")
        return self.role.guest

    def quit(self) -> None:
        """See L{colotx.control.ColoNode}."""
        self._reactor.callLater(0, self._quit, 0)

    def describeStatus(self) -> dict[str, object]:
        """See L{colotx.control.ColoNode}."""
        link = self._dialer or self._listener
        session = None if link is None else link.session
        return {
            "vm": self._settings.vm,
            "role": self.role.role,
            **self.status.describe(),
            "peer": None if session is None else session.peer.instance,
            "epoch": self._around.store.current.epoch,
            "guest": self._settings.guest,
            "run-state": self.runState.value,
        }

    def describeStatistics(self) -> dict[str, object]:
        """See L{colotx.control.ColoNode}."""
        return {
            **self.statistics.describe(),
            **self.role.describe(),
            "last-failover": self._lastFailover,
        }

    def describeEvidence(self) -> dict[str, object]:
        """See L{colotx.control.ColoNode}."""
        evidence = self.role.evidence if isinstance(self.role, PrimaryRole) else None
        if evidence is None:
            raise GuestError("nothing is compared here: only the primary of an active secondary compares")
        return evidence.describe()

    def _emit(self, event: str, data: dict[str, object]) -> None:
        if event == "COLO_EXIT":
            self._lastExit = (ColoMode(data["mode"]), str(data["reason"]))
        self._control.emit(event, data)


def _controlName(settings: Settings) -> str:
    """Both daemons of a VM can run on one machine, to try it out."""
    return settings.vm if settings.role == "primary" else f"{settings.vm}-secondary"


def _raisePriority(log: Logger) -> None:
    """
    Run before everything that is not urgent. What we start (QEMU) does not inherit it. Cluster daemons do the same: a
    heartbeat that waits for a processor looks like a death.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError as error:
        log.info("no real-time priority ({reason}): a very busy host may look dead", reason=error.strerror)


def _credentials(settings: Settings) -> Credentials:
    if settings.ca:
        return Credentials.load(Path(settings.ca), Path(settings.certificate), Path(settings.key))
    return localCredentials(Path(stateRoot(), "local-authority"))
