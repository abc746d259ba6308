"""
Two hosts on loopback, for cases in which one or both daemons are real and nothing needs a network of its own; and
scripted ends of the link, which a test speaks through instead of a daemon.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from colotx.certificates import Credentials, initAuthority, issue
from colotx.errors import GuestError, HelloRefused, PeerLost
from colotx.hello import Hello
from colotx.lab.processes import DaemonProcess
from colotx.link import LinkDialer, LinkListener, LinkSettings
from colotx.protocol import ColoConnection
from colotx.session import Heartbeat, Session

HOST = "127.0.0.1"
VM = "acceptance"
HEARTBEAT_LIMIT = 3000
"""ms: nothing here dies by silence, and a busy machine stalls for long."""


class _Here:
    """Stands in for a namespace: this machine as it is."""

    def command(self, *arguments: str) -> list[str]:
        """@return: the command line; the process dies with its parent."""
        return ["setpriv", "--pdeathsig", "KILL", *arguments]


class Hosts:
    """
    Makes daemons, certificates and ports, and remembers what to end. Use it as C{async with}.

    @ivar directory: of everything; short, for the sockets in it.
    """

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="colo-", ignore_cleanup_errors=True)
        self.directory = Path(self._temporary.name)
        self.ports = {"primary": _freePort(), "secondary": _freePort()}
        self._endings: list[Callable[[], Awaitable[None]]] = []
        self._count = 0
        initAuthority(self.directory / "ca")

    def certificate(self, names: Sequence[str] = (HOST,), authority: str = "ca") -> tuple[Path, Path, Path]:
        """
        @param authority: a new one is made under a new name.
        @return: the paths of the authority's certificate, a new certificate of it and its key.
        """
        if not (self.directory / authority).exists():
            initAuthority(self.directory / authority)
        self._count += 1
        return issue(self.directory / authority, names, self.directory / f"tls{self._count}")

    def daemon(self, role: str, name: str = "", **keys: object) -> DaemonProcess:
        """
        A daemon, not started.

        @param name: of its directory; the role, if it is not told.
        @param keys: further configuration keys, with C{_} for C{-}.
        """
        (other,) = self.ports.keys() - {role}
        home = self.directory / (name or role)
        state = home / "state"
        state.mkdir(parents=True, exist_ok=True)
        ca, certificate, key = self.certificate()
        settings: Mapping[str, object] = {
            "role": role,
            "vm": VM,
            "state-dir": str(state),
            "control": str(home / "control"),
            "listen": f"{HOST}:{self.ports[role]}",
            "peer": f"{HOST}:{self.ports[other]}",
            "ca": str(ca),
            "certificate": str(certificate),
            "key": str(key),
            "checkpoint-delay": 100,
            "heartbeat-limit": HEARTBEAT_LIMIT,
            "guest": "memory",
            **{key.replace("_", "-"): value for key, value in keys.items()},
        }
        daemon = DaemonProcess(reactor, _Here(), home, settings)
        self.atEnd(daemon.stop)
        return daemon

    def atEnd(self, ending: Callable[[], Awaitable[None]]) -> None:
        """Await this when everything ends, the last first."""
        self._endings.append(ending)

    async def __aenter__(self) -> Hosts:
        return self

    async def __aexit__(self, *exception: object) -> None:
        try:
            for ending in reversed(self._endings):
                await ending()
        finally:
            self._temporary.cleanup()


def _freePort() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def logOf(daemon: DaemonProcess) -> str:
    """@return: all that the daemon has said."""
    return daemon.process.log.read_text(errors="replace")


def pause(seconds: float) -> Deferred[None]:
    """@return: a Deferred that fires later."""
    return deferLater(reactor, seconds)


async def until(condition: Callable[[], Awaitable[bool]], what: str, limit: float = 30.0) -> None:
    """
    Wait for a condition.

    @raise AssertionError: C{what} did not come about within C{limit} seconds.
    """
    deadline = time.monotonic() + limit
    last = ""
    while True:
        try:
            if await condition():
                return
        except GuestError as error:
            last = f": {error}"
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit:.0f} s: {what}{last}")
        await pause(0.02)


async def status(daemon: DaemonProcess) -> str:
    """@return: what the daemon says of the protection, one word."""
    return str((await daemon.query("query-colotx-status"))["status"])


async def isProtected(*daemons: DaemonProcess) -> bool:
    """@return: whether all of them say so."""
    return all([await status(daemon) == "protected" for daemon in daemons])


class ScriptedPeer:
    """
    One end of the link in the test's hands, with right certificates.

    @ivar sessions: those it had.
    @ivar refusals: why it was refused.
    """

    def __init__(
        self,
        hosts: Hosts,
        role: str,
        makeColo: Callable[[], ColoConnection] = lambda: ColoConnection(reactor),
        instance: str = "",
    ) -> None:
        self._role = role
        self._makeColo = makeColo
        self._instance = instance or str(uuid4())
        self._waiter: Deferred[Session] | None = None
        self.sessions: list[Session] = []
        self.refusals: list[str] = []
        credentials = Credentials.load(*hosts.certificate())
        # A dialer has one session: the next is a new object's.
        never = 600.0
        settings = LinkSettings(
            Heartbeat(0.1, HEARTBEAT_LIMIT / 1000), retryFirst=never, retryMost=never, retryRefused=never
        )
        port = hosts.ports["secondary"]
        self._link: LinkDialer | LinkListener
        if role == "primary":
            self._link = LinkDialer(reactor, self, credentials, HOST, port, settings=settings)
        else:
            self._link = LinkListener(reactor, self, credentials, HOST, port, HOST, settings)
        hosts.atEnd(self.stop)

    def start(self) -> None:
        """Dial, or listen."""
        self._link.start()

    async def stop(self) -> None:
        """Say good-bye."""
        await self._link.stop()

    async def session(self, limit: float = 30.0) -> Session:
        """@return: the next session that comes about."""
        self._waiter = Deferred()
        self._waiter.addTimeout(limit, reactor)
        return await self._waiter

    def hello(self) -> Hello:
        """See L{colotx.link.LinkOwner}."""
        return Hello(VM, self._role, self._instance, 1)

    def judge(self, peer: Hello) -> str | None:
        """See L{colotx.link.LinkOwner}."""
        return None

    def buildColo(self) -> ColoConnection:
        """See L{colotx.link.LinkOwner}."""
        return self._makeColo()

    def buildFrames(self) -> Any:
        """See L{colotx.link.LinkOwner}."""
        raise NotImplementedError

    def sessionEstablished(self, session: Session) -> None:
        """See L{colotx.link.LinkOwner}."""
        session.control.onMessage = lambda message: None
        self.sessions.append(session)
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.callback(session)

    def linkRefused(self, error: HelloRefused) -> None:
        """See L{colotx.link.LinkOwner}."""
        self.refusals.append(error.reason)


def vanish(session: Session) -> None:
    """As if the power had gone: no word, every connection broken off."""
    session.end(PeerLost("the test vanished"))


def closeColo(colo: ColoConnection) -> None:
    """Close the COLO channel after what was written."""
    transport: Any = colo.transport
    transport.unregisterProducer()  # while there is one, TLS does not close
    transport.loseConnection()
