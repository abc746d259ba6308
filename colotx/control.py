"""
The control socket: what operators and programs can ask of a daemon, and where.

The commands have the names, arguments and answers of QEMU's (C{qapi/migration.json}, C{qapi/run-state.json}), so
that what drives QEMU's COLO can drive colotx; C{query-colotx-*} are our own. The conversation is L{colotx.qmp}'s,
the deeds are the node's (L{ColoNode}). Events go out through L{ControlService.emit}::

    COLO_EXIT             {mode, reason: request|error}     protection ended
    STOP, RESUME          {}                                the guest was stopped, runs on
    SHUTDOWN              {}                                the guest is gone
    COLOTX_STATUS_CHANGE  {status, why}                     see query-colotx-status
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort

from colotx.comparecontrol import CompareProperties, propertyCommands
from colotx.errors import ConfigError, QmpError, StorageError
from colotx.interfaces import ColoMode, RunState
from colotx.qmp import Command, JsonObject, QmpServerFactory

MAX_PATH = 107
"""Bytes of the longest path of a unix socket (Linux, C{unix(7)})."""

PROBE_TIME = 1.0
"""Seconds a socket found at our path has to answer before it counts as alive but busy."""


@dataclass(frozen=True, slots=True)
class ColoStatus:
    """
    The answer to C{query-colo-status}.

    @ivar reason: of the last exit from COLO: C{none}, C{request}, C{error}, or C{processing}.
    """

    mode: ColoMode
    lastMode: ColoMode
    reason: str


class ColoNode(CompareProperties, Protocol):
    """
    What the control socket needs of a daemon. Methods that return C{object} return C{None}, a value, a Deferred
    or a coroutine; they have time limits of their own, and raise L{colotx.errors.ColoError} when they refuse.
    """

    @property
    def runState(self) -> RunState:
        """Of the guest here; SHUTDOWN when there is none."""

    @property
    def checkpointDelay(self) -> int:
        """x-checkpoint-delay, milliseconds."""

    def coloStatus(self) -> ColoStatus:
        """C{query-colo-status}."""

    def setCheckpointDelay(self, milliseconds: int) -> object:
        """C{migrate-set-parameters}: re-arms the timer and notifies at once."""

    def doCheckpoint(self) -> object:
        """C{xen-colo-do-checkpoint}: ask for a checkpoint now."""

    def lostHeartbeat(self) -> object:
        """C{x-colo-lost-heartbeat}: the operator's word that the peer is dead. Raises L{FailoverError}."""

    def startReplication(self, mode: ColoMode) -> object:
        """C{xen-set-replication} with enable."""

    def stopReplication(self, failover: bool) -> object:
        """C{xen-set-replication} without enable."""

    def checkReplication(self) -> None:
        """C{query-xen-replication-status}: raises L{StorageError} when replication is broken."""

    def stopGuest(self) -> object:
        """C{stop}."""

    def continueGuest(self) -> object:
        """C{cont}."""

    def quit(self) -> object:
        """C{quit}: end the daemon in an orderly way, soon; return before it, so that the answer gets out."""

    def describeStatus(self) -> Mapping[str, object]:
        """C{query-colotx-status}: vm, role, status, why, if-peer-dies, since, seconds, peer, epoch, guest."""

    def describeStatistics(self) -> Mapping[str, object]:
        """C{query-colotx-stats}."""

    def describeEvidence(self) -> Mapping[str, object]:
        """C{query-colotx-evidence}: what the VMs of an active pair said differently. Raises L{GuestError}."""


def commandTable(node: ColoNode) -> dict[str, Command]:
    """The commands over a node, as L{QmpServerFactory} takes them."""

    def queryColoStatus() -> JsonObject:
        status = node.coloStatus()
        return {"mode": status.mode.value, "last-mode": status.lastMode.value, "reason": status.reason}

    def setParameters(x_checkpoint_delay: int | None = None) -> object:
        if x_checkpoint_delay is None:
            return None
        if not 1 <= x_checkpoint_delay < 2**32:
            raise QmpError(
                "GenericError",
                f"Parameter 'x-checkpoint-delay' expects milliseconds from 1 to {2**32 - 1}",
            )
        return node.setCheckpointDelay(x_checkpoint_delay)

    def setReplication(enable: bool, primary: bool, failover: bool | None = None) -> object:
        if not enable:
            return node.stopReplication(bool(failover))
        if failover is not None:
            raise QmpError("GenericError", "Parameter 'failover' is only for stopping replication")
        return node.startReplication(ColoMode.PRIMARY if primary else ColoMode.SECONDARY)

    def queryReplication() -> JsonObject:
        try:
            node.checkReplication()
        except StorageError as error:
            return {"error": True, "desc": str(error)}
        return {"error": False}

    def queryStatus() -> JsonObject:
        state = node.runState
        return {"running": state is RunState.RUNNING, "singlestep": False, "status": state.value}

    return {
        "query-colo-status": Command(queryColoStatus),
        "x-colo-lost-heartbeat": Command(node.lostHeartbeat),
        "migrate-set-parameters": Command(setParameters, optional={"x-checkpoint-delay": int}),
        "query-migrate-parameters": Command(lambda: {"x-checkpoint-delay": node.checkpointDelay}),
        "xen-colo-do-checkpoint": Command(node.doCheckpoint),
        "xen-set-replication": Command(
            setReplication, required={"enable": bool, "primary": bool}, optional={"failover": bool}
        ),
        "query-xen-replication-status": Command(queryReplication),
        "query-status": Command(queryStatus),
        "stop": Command(node.stopGuest),
        "cont": Command(node.continueGuest),
        "quit": Command(node.quit),
        "query-colotx-status": Command(node.describeStatus),
        "query-colotx-stats": Command(node.describeStatistics),
        "query-colotx-evidence": Command(node.describeEvidence),
        **propertyCommands(node),
    }


def controlDirectory() -> str:
    """Where this user's control sockets are by default."""
    if os.geteuid() == 0:
        return "/run/colotx"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return f"{runtime}/colotx" if runtime else f"/tmp/colotx-{os.geteuid()}"


def defaultControlPath(vm: str) -> str:
    """The control socket of the daemon that protects the VM of this name, for this user."""
    return f"{controlDirectory()}/{vm}.sock"


class ControlSocket(Service):
    """
    Serves a command table on a socket, mode 0600, while it runs.

    @ivar path: of the socket.
    """

    def __init__(self, reactor: Any, path: str, commands: Mapping[str, Command]) -> None:
        """@param reactor: provides C{IReactorTime} and C{IReactorUNIX}."""
        self._reactor = reactor
        self._factory = QmpServerFactory(reactor, commands, _version())
        self._port: IListeningPort | None = None
        self.path = path

    def startService(self) -> None:
        """
        Listen. A socket left behind by a daemon that died is replaced.

        @raise ConfigError: somebody answers there, or there can be no socket; says what to do.
        """
        _makeRoom(self.path)
        try:
            self._port = self._reactor.listenUNIX(self.path, self._factory, mode=0o600)
        except CannotListenError as error:
            raise ConfigError(
                f"no control socket at {self.path}: {error.socketError}; choose another --control"
            ) from error
        super().startService()  # type: ignore[no-untyped-call]

    def stopService(self) -> Deferred[None]:
        """Answer what was asked (for a second at most), close, remove the socket. @return: a Deferred."""
        super().stopService()  # type: ignore[no-untyped-call]
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        port, self._port = self._port, None
        if port is None:
            return
        # A port that finds its path removed by somebody else would never finish closing.
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        Path(self.path).touch()
        await maybeDeferred(port.stopListening)
        await self._factory.finish()

    def emit(self, event: str, data: Mapping[str, object]) -> None:
        """Send an event to all clients. Never waits; harmless when the service does not run."""
        self._factory.emit(event, data)


class ControlService(ControlSocket):
    """The control socket of a daemon that protects a VM."""

    def __init__(self, reactor: Any, path: str, node: ColoNode) -> None:
        """@param reactor: as for L{ControlSocket}."""
        super().__init__(reactor, path, commandTable(node))


def _makeRoom(path: str) -> None:
    """
    Make the socket's directory, and remove a socket nobody answers on.

    @raise ConfigError: the path cannot be used.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise ConfigError(f"control socket {path}: longer than {MAX_PATH} bytes; choose a shorter --control")
    directory = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        owner = os.stat(directory).st_uid
    except OSError as error:
        raise ConfigError(
            f"control socket {path}: {directory} cannot be used ({error.strerror}); choose another --control"
        ) from error
    # Whoever owns the directory can put a socket of his own in the place of ours.
    if owner not in (0, os.geteuid()):
        raise ConfigError(
            f"control socket {path}: {directory} belongs to another user; choose another --control"
        )
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"control socket {path}: there is something that is no socket; move it away")
    if _answers(path):
        raise ConfigError(
            f"control socket {path}: another daemon answers there; stop it, or choose another --vm or --control"
        )
    Path(path).unlink(missing_ok=True)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_TIME)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            # It is full, busy, or not for us: in any case alive.
            return True
    return True


def _version() -> str:
    try:
        return version("colotx")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0"


__all__ = [
    "ColoNode",
    "ColoStatus",
    "ControlService",
    "ControlSocket",
    "commandTable",
    "controlDirectory",
    "defaultControlPath",
]
