"""
Two whole daemons in one process: real TLS over loopback, the embedded guest, both control sockets. What may be said
of one role alone is in its own test; here it is shown that the parts are joined the right way.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList, ensureDeferred, maybeDeferred
from twisted.internet.task import deferLater
from twisted.logger import formatEvent, globalLogPublisher
from twisted.trial.unittest import TestCase

from colotx import service
from colotx.certificates import initAuthority, issue
from colotx.errors import ConfigError, PeerLost, QmpError
from colotx.interfaces import ColoMode, RunState
from colotx.primary import PrimaryRole
from colotx.qmp import connectQmp
from colotx.secondary import SecondaryRole
from colotx.service import ColoService
from colotx.settings import Settings, buildSettings
from colotx.state import PersistentState, StateStore

PATIENCE = 15.0
"""Seconds a condition may take to come true on a very busy machine."""


def freePort() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Daemon:
    """A service, and what it told its process and its operator."""

    def __init__(self, settings: Settings) -> None:
        self.exits: list[int] = []
        self.service = ColoService(settings, reactor, self.exits.append)
        self.control = settings.control
        self.left: list[bytes] = []

    def start(self) -> Daemon:
        self.service.startService()
        return self

    @property
    def status(self) -> str:
        return self.service.status.protection.value

    @property
    def why(self) -> str:
        return self.service.status.why

    @property
    def epoch(self) -> object:
        return self.service.describeStatus()["epoch"]

    @property
    def session(self):
        links = (self.service._dialer, self.service._listener)
        return next((link.session for link in links if link and link.session), None)

    @property
    def speaks(self) -> bool:
        """Whether what a guest here says leaves at once."""
        role = self.service.role
        if not isinstance(role, PrimaryRole) or role.runState is not RunState.RUNNING:
            return False
        left = role.outside.dropped
        role.guest.port.deliver([b"probe"])
        return role.outside.dropped > left

    async def ask(self, command: str, **arguments) -> object:
        """Over the control socket, as an operator does."""
        qmp = await connectQmp(reactor, self.control, 5.0)
        try:
            return await qmp.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})
        finally:
            qmp.close()


class ServiceCase(TestCase):
    timeout = 60
    policy = "hold"

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="colotx-"))  # short: a socket's path has a limit
        self.addCleanup(shutil.rmtree, self.directory)
        initAuthority(self.directory / "ca")
        self.port = freePort()
        self.daemons: list[Daemon] = []
        self.log: list[str] = []
        globalLogPublisher.addObserver(self._observe)
        self.addCleanup(globalLogPublisher.removeObserver, self._observe)
        self.addCleanup(lambda: DeferredList([maybeDeferred(d.service.stopService) for d in self.daemons]))

    def _observe(self, event) -> None:
        if event.get("log_namespace", "").startswith("colotx"):
            self.log.append(formatEvent(event))

    async def until(self, condition: Callable[[], object], what: str = "") -> None:
        deadline = reactor.seconds() + PATIENCE
        while not condition():
            if reactor.seconds() > deadline:
                raise AssertionError("\n".join([f"in vain waited for: {what}", *self.log[-30:]]))
            await deferLater(reactor, 0.01)

    async def logged(self, *words: str) -> None:
        await self.until(lambda: any(all(w in line for w in words) for line in self.log), f"log: {words}")

    def identity(self, *names: str, authority: str = "ca") -> dict[str, str]:
        """Options of a certificate for these names."""
        if not (self.directory / authority).exists():
            initAuthority(self.directory / authority)
        paths = issue(self.directory / authority, names, self.directory / "-".join((authority, *names)))
        return dict(zip(("ca", "certificate", "key"), map(str, paths), strict=True))

    def daemon(self, role: str, name: str = "", **options: object) -> Daemon:
        name = name or role
        values: dict[str, object] = {
            "role": role,
            "state-dir": str(self.directory / name),
            "control": str(self.directory / f"{name}.sock"),
            "scheduling": "normal",
            "memory-size": "2M",
            "checkpoint-delay": 50,
            "heartbeat-interval": 50,
            "heartbeat-limit": 400,
            "on-lost-peer": self.policy,
            "listen" if role == "secondary" else "peer": f"127.0.0.1:{self.port}",
            "peer-name": "localhost",
        }
        given = {key.replace("_", "-"): value for key, value in options.items()}
        if "ca" not in given:
            given |= self.identity("localhost")
        daemon = Daemon(buildSettings(values | given))
        self.daemons.append(daemon)
        return daemon

    async def pair(self) -> tuple[Daemon, Daemon]:
        """Both started, and the guest protected."""
        secondary, primary = self.daemon("secondary").start(), self.daemon("primary").start()
        await self.until(lambda: primary.status == secondary.status == "protected", "protected")
        return primary, secondary

    def die(self, daemon: Daemon) -> None:
        """Abruptly: its guest says no more, its connections are gone, nobody says good-bye."""
        daemon.service.role.guest.onLost = None
        daemon.service.role.guest.shutdown()
        dialer, session = daemon.service._dialer, daemon.session
        dialer._stopping = True
        session.end(PeerLost("the power is off"))


class ProtectionTests(ServiceCase):
    async def test_protected(self) -> None:
        began = reactor.seconds()
        primary, secondary = await self.pair()
        self.assertLess(reactor.seconds() - began, 5)
        self.assertFalse(primary.speaks)
        held = secondary.service.role.standby.checkpoint
        await self.until(lambda: secondary.service.role.standby.checkpoint > held + 3, "checkpoints")
        self.assertGreater(primary.service.role.gate.statistics.released, 0)

    async def test_controlSocket(self) -> None:
        primary, secondary = await self.pair()
        status = await primary.ask("query-colotx-status")
        self.assertEqual(
            (status["role"], status["status"], status["epoch"], status["run-state"]),
            ("primary", "protected", 1, "running"),
        )
        self.assertEqual(status["peer"], secondary.service.hello().instance)
        self.assertEqual(
            await primary.ask("query-colo-status"), {"mode": "primary", "last-mode": "none", "reason": "none"}
        )
        self.assertEqual((await secondary.ask("query-colo-status"))["mode"], "secondary")
        self.assertEqual((await secondary.ask("query-status"))["status"], "inmigrate")
        self.assertGreaterEqual((await primary.ask("query-colotx-stats"))["checkpoints"], 1)
        self.assertGreaterEqual((await secondary.ask("query-colotx-stats"))["held-checkpoint"], 1)

    async def test_checkpointDelay(self) -> None:
        """Changed at run time: one at once, then none for a long time."""
        primary, _ = await self.pair()
        await primary.ask("migrate-set-parameters", x_checkpoint_delay=3600_000)
        self.assertEqual(await primary.ask("query-migrate-parameters"), {"x-checkpoint-delay": 3600_000})
        reasons = [record.reason for record in primary.service.statistics.records]
        await self.until(
            lambda: primary.service.statistics.records[-1].reason == "x-checkpoint-delay was set",
            f"{reasons}",
        )
        await primary.ask("xen-colo-do-checkpoint")
        await self.until(
            lambda: primary.service.statistics.records[-1].reason == "xen-colo-do-checkpoint", "asked for"
        )

    async def test_refusedCommands(self) -> None:
        primary, secondary = await self.pair()
        for daemon, command, words in (
            (secondary, "xen-colo-do-checkpoint", "no guest is protected"),
            (secondary, "stop", "no guest runs here"),
            (primary, "stop", "by its checkpoints only"),
        ):
            error = await self.assertFailure(ensureDeferred(daemon.ask(command)), QmpError)
            self.assertIn(words, str(error))

    async def test_pauseWhenUnprotected(self) -> None:
        primary = self.daemon("primary").start()
        await self.until(lambda: primary.service.role.launched, "launched")
        await primary.ask("stop")
        self.assertEqual((await primary.ask("query-status"))["status"], "paused")
        await primary.ask("cont")
        self.assertEqual((await primary.ask("query-status"))["status"], "running")

    async def test_quit(self) -> None:
        primary = self.daemon("primary").start()
        await self.until(lambda: primary.service.role.launched, "launched")
        await primary.ask("quit")
        await self.until(lambda: primary.exits == [0], "exit code 0")


class HoldTests(ServiceCase):
    async def test_primaryDies(self) -> None:
        primary, secondary = await self.pair()
        self.die(primary)
        await self.until(lambda: secondary.status == "degraded", "degraded")
        self.assertIsInstance(secondary.service.role, SecondaryRole)
        self.assertEqual(secondary.epoch, 1)
        await secondary.ask("x-colo-lost-heartbeat")
        self.assertTrue(secondary.speaks)
        self.assertEqual((await secondary.ask("query-colotx-status"))["role"], "primary")
        self.assertEqual(
            await secondary.ask("query-colo-status"),
            {"mode": "none", "last-mode": "secondary", "reason": "request"},
        )
        statistics = await secondary.ask("query-colotx-stats")
        self.assertEqual(statistics["last-failover"]["epoch"], 2)

    async def test_secondaryDies(self) -> None:
        primary, secondary = await self.pair()
        await maybeDeferred(secondary.service._listener._listening.stopListening)
        secondary.session.end(PeerLost("the power is off"))
        await self.until(lambda: primary.status == "degraded", "degraded")
        self.assertFalse(primary.speaks)
        await primary.ask("x-colo-lost-heartbeat")
        self.assertTrue(primary.speaks)
        self.assertEqual(primary.epoch, 2)

    async def test_operatorAtTheSecondary(self) -> None:
        """While the primary lives: one falls silent, the other speaks."""
        primary, secondary = await self.pair()
        await secondary.ask("x-colo-lost-heartbeat")
        await self.until(lambda: primary.status == "degraded", "degraded")
        await self.logged("link refused", "both daemons are primary")
        self.assertEqual((primary.speaks, secondary.speaks), (False, True))
        self.assertTrue(StateStore(str(self.directory / "primary")).current.protected)

    async def test_operatorAtThePrimary(self) -> None:
        """A new session follows at once: the same secondary, one epoch later."""
        primary, secondary = await self.pair()
        await primary.ask("x-colo-lost-heartbeat")
        self.assertEqual(primary.epoch, 2)
        await self.until(lambda: primary.status == secondary.status == "protected", "protected again")
        self.assertEqual(secondary.epoch, 2)
        self.assertIsInstance(secondary.service.role, SecondaryRole)

    async def test_orderlyStopOfThePrimaryHandsOver(self) -> None:
        primary, secondary = await self.pair()
        await primary.service.stopService()
        await self.until(lambda: secondary.speaks, "the guest goes on")
        self.assertEqual(secondary.epoch, 2)
        self.assertFalse(primary.speaks)

    async def test_orderlyStopOfTheSecondary(self) -> None:
        primary, secondary = await self.pair()
        await secondary.service.stopService()
        await self.until(lambda: primary.status == "unprotected", "unprotected")
        self.assertTrue(primary.speaks)
        self.assertEqual(primary.epoch, 1)
        self.assertFalse(StateStore(str(self.directory / "primary")).current.protected)

    async def test_brokenSessionIsReplaced(self) -> None:
        """A connection breaks, both live: protected again in the same epoch."""
        primary, secondary = await self.pair()
        instance = primary.session.local.session
        primary.service.role._session.colo.fail(ConfigError("a fault that is no death"))
        await self.until(
            lambda: (
                primary.session
                and primary.session.local.session != instance
                and primary.status == "protected"
            ),
            "a new session",
        )
        self.assertEqual((primary.epoch, secondary.epoch), (1, 1))


class FailoverPolicyTests(ServiceCase):
    policy = "failover"

    async def test_primaryDies(self) -> None:
        primary, secondary = await self.pair()
        self.die(primary)
        await self.until(lambda: secondary.speaks, "the guest goes on")
        self.assertEqual(secondary.epoch, 2)
        self.assertIs(secondary.service.role.mode, ColoMode.NONE)
        self.assertFalse(primary.speaks)

    async def test_protectedAgainByTheOldPrimary(self) -> None:
        """Its host is repaired and comes back as secondary; the survivor dials it."""
        self.port, other = freePort(), freePort()
        secondary = self.daemon("secondary", peer=f"127.0.0.1:{other}").start()
        primary = self.daemon("primary").start()
        await self.until(lambda: secondary.status == "protected", "protected")
        self.die(primary)
        await self.until(lambda: secondary.speaks, "the guest goes on")
        self.port = other
        await primary.service.stopService()
        back = self.daemon("secondary", name="primary").start()
        await self.until(lambda: back.status == secondary.status == "protected", "protected again")
        self.assertEqual((back.epoch, secondary.epoch), (2, 2))
        self.assertFalse(secondary.speaks)


class RefusalTests(ServiceCase):
    """Refused and logged; the primary's guest runs on, unprotected."""

    async def refused(self, primary: Daemon, secondary: Daemon, *words: str) -> None:
        secondary.start()
        primary.start()
        await self.logged(*words)
        self.assertTrue(primary.speaks)
        self.assertEqual((primary.status, secondary.status), ("unprotected", "unprotected"))
        self.assertFalse(any("linked with" in line for line in self.log))

    async def test_otherAuthority(self) -> None:
        primary = self.daemon("primary", **self.identity("localhost", authority="other"))
        await self.refused(primary, self.daemon("secondary"), "no session with", "authority")

    async def test_primaryOfAnotherName(self) -> None:
        primary = self.daemon("primary", **self.identity("elsewhere.example"))
        await self.refused(
            primary, self.daemon("secondary"), "link refused", "elsewhere.example", "localhost"
        )

    async def test_secondaryOfAnotherName(self) -> None:
        secondary = self.daemon("secondary", **self.identity("elsewhere.example"))
        await self.refused(self.daemon("primary"), secondary, "no session with", "is not for localhost")

    async def test_otherVm(self) -> None:
        secondary = self.daemon("secondary", vm="other")
        await self.refused(self.daemon("primary"), secondary, "link refused", "'other'")

    async def test_stalePrimary(self) -> None:
        secondary = self.daemon("secondary")
        secondary.service._around.store.save(PersistentState(5, "secondary", False))
        await self.refused(self.daemon("primary"), secondary, "link refused", "stale epoch")

    async def test_staleSecondaryIsNot(self) -> None:
        """It was away for some failovers; it learns the epoch."""
        primary, secondary = self.daemon("primary"), self.daemon("secondary")
        primary.service._around.store.save(PersistentState(5, "primary", False))
        secondary.start()
        primary.start()
        await self.until(lambda: secondary.status == "protected", "protected")
        self.assertEqual(secondary.epoch, 5)

    async def test_secondPrimary(self) -> None:
        """The first stays protected."""
        primary, secondary = await self.pair()
        second = self.daemon("primary", name="second").start()
        await self.logged("link refused", "already protected by this secondary")
        self.assertEqual(
            (primary.status, secondary.status, second.status), ("protected", "protected", "unprotected")
        )


class StartTests(ServiceCase):
    async def test_portTaken(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", self.port))
            taken.listen()
            daemon = self.daemon("secondary").start()
            await self.until(lambda: daemon.exits == [1], "exit code 1")
        await self.logged("cannot start", str(self.port))

    async def test_controlSocketTaken(self) -> None:
        first = self.daemon("primary").start()
        await self.until(lambda: first.service.role.launched, "launched")
        second = self.daemon("primary", name="second", control=first.control).start()
        await self.until(lambda: second.exits == [1], "exit code 1")
        await self.logged("cannot start", "another daemon answers there")

    async def test_stateThatCannotBeStored(self) -> None:
        secondary = self.daemon("secondary")
        os.mkdir(self.directory / "secondary" / "state.json.new")
        secondary.start()
        await self.until(lambda: secondary.exits == [1], "exit code 1")
        await self.logged("cannot start", "could not be stored")

    async def test_bug(self) -> None:
        """Whatever it is, the process ends and the log has it whole."""
        daemon = self.daemon("primary")

        async def start() -> None:
            raise ZeroDivisionError

        daemon.service.role.start = start
        daemon.start()
        await self.until(lambda: daemon.exits == [1], "exit code 1")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_certificateMissing(self) -> None:
        self.assertRaises(ConfigError, self.daemon, "primary", ca="nowhere", certificate="c", key="k")

    async def test_stopHasALimit(self) -> None:
        """A guest that does not end must not keep the host from shutting down."""
        self.patch(service, "STOP_TIMEOUT", 0.05)
        daemon = self.daemon("primary").start()
        await self.until(lambda: daemon.service.role.launched, "launched")
        shutdown = daemon.service.role.guest.shutdown
        daemon.service.role.guest.shutdown = Deferred
        await daemon.service.stopService()
        self.assertEqual(len(self.flushLoggedErrors()), 1)
        shutdown()
        daemon.service.role.guest.shutdown = shutdown
