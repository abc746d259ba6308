"""
Daemons that must not work together: each refuses, says why on both sides, and nothing runs twice.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from colotx.lab.processes import DaemonProcess
from colotx.state import FILE
from tests.harness import asynchronous
from tests.hosts import HOST, Hosts, isProtected, logOf, pause, status, until


async def runState(daemon: DaemonProcess) -> str:
    """@return: of the guest, in the words of query-status."""
    return str((await daemon.query("query-status"))["status"])


class RefusalTests(TestCase):
    """Two real daemons, one of them with something wrong."""

    timeout = 120

    async def refused(
        self, primary: DaemonProcess, secondary: DaemonProcess, primarySays: str, secondarySays: str
    ) -> None:
        """Start both, wait until both logs name the reason, and see that only the primary's guest runs."""
        secondary.start()
        primary.start()

        async def bothSay() -> bool:
            return bool(re.search(primarySays, logOf(primary)) and re.search(secondarySays, logOf(secondary)))

        try:
            await until(bothSay, "both logs name the reason", 20)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{logOf(primary)}\n{logOf(secondary)}") from None
        for _ in range(10):
            self.assertEqual(await runState(primary), "running")
            self.assertNotIn(await runState(secondary), ("running", "colo"))
            self.assertEqual(await status(primary), "unprotected")
            self.assertEqual(await status(secondary), "unprotected")
            await pause(0.1)
        for daemon in (primary, secondary):
            self.assertNotIn("Traceback", logOf(daemon))
            self.assertNotIn("linked with", logOf(daemon))

    def identity(self, ca: Path, certificate: Path, key: Path) -> dict[str, object]:
        return {"ca": str(ca), "certificate": str(certificate), "key": str(key)}

    @asynchronous
    async def test_wrongAuthority(self) -> None:
        """The primary's certificate is of another authority, which it trusts too: neither knows the other."""
        async with Hosts() as hosts:
            stranger = self.identity(*hosts.certificate(authority="other"))
            await self.refused(
                hosts.daemon("primary", **stranger),
                hosts.daemon("secondary"),
                "TLS failed: certificate verify failed; both hosts need valid certificates of one authority",
                "a connection came to nothing: .*TLS failed|TLS failed",
            )

    @asynchronous
    async def test_certificateOfAnotherAuthority(self) -> None:
        """A daemon whose own three files do not belong together does not even start."""
        async with Hosts() as hosts:
            ca, _, _ = hosts.certificate()
            _, certificate, key = hosts.certificate(authority="other")
            primary = hosts.daemon("primary", **self.identity(ca, certificate, key))
            primary.start()
            ended = primary.process.whenEnded()
            self.assertEqual(await ended.addTimeout(30, reactor), 1)
            self.assertIn("was not issued by the authority in", logOf(primary))

    @asynchronous
    async def test_wrongNameOfThePrimary(self) -> None:
        """The primary's certificate is of the right authority, for another name: another host of the cluster."""
        async with Hosts() as hosts:
            other = self.identity(*hosts.certificate(["10.11.12.13"]))
            reason = f"the certificate is for 10.11.12.13, not for {HOST}"
            await self.refused(hosts.daemon("primary", **other), hosts.daemon("secondary"), reason, reason)

    @asynchronous
    async def test_wrongNameOfTheSecondary(self) -> None:
        async with Hosts() as hosts:
            other = self.identity(*hosts.certificate(["10.11.12.13"]))
            await self.refused(
                hosts.daemon("primary"),
                hosts.daemon("secondary", **other),
                f"the peer's certificate is not for {HOST}",
                "a connection came to nothing: .*",
            )

    @asynchronous
    async def test_staleEpoch(self) -> None:
        """The primary's host slept through a failover: what it would protect is an old generation."""
        async with Hosts() as hosts:
            primary, secondary = hosts.daemon("primary"), hosts.daemon("secondary")
            self.writeState(secondary, epoch=7, role="primary")
            self.writeState(primary, epoch=6, role="primary")
            await self.refused(
                primary,
                secondary,
                "stale epoch: this primary knows of epoch 6, the peer of 7",
                "stale epoch: the peer is in epoch 6, this host knows of epoch 7",
            )

    @asynchronous
    async def test_twoPrimaries(self) -> None:
        """One dials the other, who does not listen for it: both run what is theirs, neither protects the other."""
        async with Hosts() as hosts:
            first = hosts.daemon("primary")
            hosts.ports["secondary"] = hosts.ports["primary"]
            second = hosts.daemon("primary", "second")
            for daemon in (first, second):
                daemon.start()

            async def said() -> bool:
                return all("no session with" in logOf(daemon) for daemon in (first, second))

            await until(said, "both say that there is no session", 20)
            for daemon in (first, second):
                self.assertEqual(await status(daemon), "unprotected")

    @asynchronous
    async def test_twoSecondaries(self) -> None:
        """Nobody dials: nothing runs anywhere."""
        async with Hosts() as hosts:
            first, second = (
                hosts.daemon("secondary"),
                hosts.daemon("secondary", "second", listen=f"{HOST}:{hosts.ports['primary']}"),
            )
            for daemon in (first, second):
                daemon.start()
            for daemon in (first, second):
                await until(lambda daemon=daemon: daemon.query("query-status"), "the daemon answers")
                self.assertEqual(await status(daemon), "unprotected")
                self.assertNotEqual(await runState(daemon), "running")

    @asynchronous
    async def test_secondPrimaryForOneSecondary(self) -> None:
        """A second host starts the same VM as a primary: it is not let in, and the first stays protected."""
        async with Hosts() as hosts:
            first, secondary = hosts.daemon("primary"), hosts.daemon("secondary")
            for daemon in (secondary, first):
                daemon.start()
            await until(lambda: isProtected(first, secondary), "the first primary is protected")
            second = hosts.daemon("primary", "second")
            second.start()

            async def bothSay() -> bool:
                reason = "already protected by this secondary: instance"
                return reason in logOf(second) and reason in logOf(secondary)

            await until(bothSay, "both logs name the reason", 20)
            for _ in range(10):
                self.assertTrue(await isProtected(first, secondary))
                self.assertEqual(await status(second), "unprotected")
                self.assertNotEqual(await runState(secondary), "running")
                await pause(0.1)
            # It tries for ever. When the first leaves, its guest goes on at the secondary, not the second's.
            await first.stop()

            async def bothPrimary() -> bool:
                reason = "both daemons are primary"
                return reason in logOf(second) and reason in logOf(secondary)

            await until(bothPrimary, "both logs name the reason", 20)
            self.assertEqual(await runState(secondary), "running")
            self.assertEqual((await secondary.query("query-colotx-status"))["epoch"], 2)

    @asynchronous
    async def test_returnOfThePrimary(self) -> None:
        """
        A primary that died and was replaced comes back: as a primary it runs nothing; as a secondary it protects.
        """
        async with Hosts() as hosts:
            primary = hosts.daemon("primary", on_lost_peer="failover")
            secondary = hosts.daemon("secondary", on_lost_peer="failover")
            for daemon in (secondary, primary):
                daemon.start()
            await until(lambda: isProtected(primary, secondary), "the primary is protected")
            primary.process.kill()
            await primary.process.whenEnded()

            async def goesOn() -> bool:
                return await runState(secondary) == "running"

            await until(goesOn, "the guest goes on at the secondary")
            before = len(logOf(primary))
            primary.start()

            async def waits() -> bool:
                return await status(primary) == "degraded"

            await until(waits, "the old primary is there again")
            for _ in range(20):
                self.assertEqual(await runState(secondary), "running")
                self.assertNotIn(await runState(primary), ("running", "colo"))
                await pause(0.1)
            self.assertIn("it may run there now", logOf(primary)[before:])
            await primary.stop()
            primary.settings = {**primary.settings, "role": "secondary"}
            primary.start()
            await until(lambda: isProtected(primary, secondary), "it protects the other now")
            self.assertEqual(await runState(secondary), "running")
            self.assertNotIn(await runState(primary), ("running", "colo"))
            epochs = [(await daemon.query("query-colotx-status"))["epoch"] for daemon in (primary, secondary)]
            self.assertEqual(epochs, [2, 2])

    def writeState(self, daemon: DaemonProcess, epoch: int, role: str) -> None:
        path = Path(str(daemon.settings["state-dir"]), FILE)
        path.write_text(json.dumps({"epoch": epoch, "role": role, "protected": False}))
