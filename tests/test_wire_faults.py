"""
The peer does something wrong, at every boundary of the message exchange: real daemons, real TLS, a real QEMU.

Nobody can stand between two daemons that authenticate each other, so one end of the link is the test's: with the right
certificates, and with the wrong words at the right moment.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from twisted.internet import reactor
from twisted.internet.defer import DeferredList, ensureDeferred, succeed
from twisted.internet.utils import getProcessOutputAndValue
from twisted.trial.unittest import TestCase
from zope.interface import implementer

from colotx.checkpoint import SecondaryProcess
from colotx.errors import ColoError
from colotx.failover import FailoverService
from colotx.interfaces import ISecondaryGuest
from colotx.lab.processes import DaemonProcess
from colotx.protocol import ColoConnection, ColoMessage, encodeMessage
from colotx.qmp import QmpClient, connectQmp
from colotx.replication import NoReplication
from colotx.session import Session
from colotx.test.test_checkpoint import recorded
from colotx.vmstate import InitialReader, RamReader
from tests.harness import asynchronous, needQemuGuest
from tests.hosts import Hosts, ScriptedPeer, closeColo, isProtected, logOf, pause, status, until, vanish

M = ColoMessage
GARBAGE = b"\xde\xad\xbe\xef"
MESSAGE_TIMEOUT = 10.0
"""Seconds a daemon waits for a message that is due; 15 for the next byte of a stream."""


async def failover(daemon: DaemonProcess) -> None:
    """What the operator says. @raise AssertionError: it was refused."""
    arguments = ["-m", "colotx", "failover", "--socket", str(daemon.settings["control"])]
    source = str(Path(__file__).parents[1])
    output, errors, code = await getProcessOutputAndValue(
        sys.executable, arguments, {"PYTHONPATH": source}, source
    )
    assert code == 0, (output, errors)


# -- a real secondary


class Recording:
    """
    What an embedded guest's primary sends, taken once: the initial stream and two checkpoints.

    @ivar pieces: (name, bytes) of each message, stream and blob.
    """

    def __init__(self) -> None:
        self.pieces, self._fingerprints = recorded()
        reader = InitialReader(RamReader())
        reader.feed(self.pieces[0][1])
        assert reader.complete is not None
        states = [reader.complete.deviceState]
        self._states = states + [data for name, data in self.pieces if name == "blob"]

    def whole(self, boundary: int) -> int:
        """@return: checkpoints that the first C{boundary} pieces hold."""
        return sum(name in ("initial", "blob") for name, _ in self.pieces[:boundary])

    def isCheckpoint(self, number: int, ram: bytes) -> bool:
        """@return: whether C{ram}, with the device state sent, is the guest as it was at this checkpoint, from 1."""
        state = hashlib.sha256(ram + self._states[number - 1]).hexdigest()
        return bool(state == self._fingerprints[number - 1])


RECORDING = Recording()
BOUNDARIES = range(len(RECORDING.pieces))


def heldRam(daemon: DaemonProcess) -> bytes:
    """@return: the one RAM image this secondary holds."""
    images = {
        path.stat().st_ino: path  # a mapping holds the file a second time
        for path in Path(f"/proc/{daemon.process.pid}/fd").iterdir()
        if path.is_symlink() and "memfd:colotx-ram" in str(path.readlink())
    }
    (image,) = images.values()
    return image.read_bytes()


async def script(session: Session, boundary: int) -> None:
    """Play the first pieces, and get the answers a primary waits for."""
    colo: Any = session.colo
    for name, data in RECORDING.pieces[:boundary]:
        await colo.write(data)
        if name == "initial":
            await colo.receiveMessage(M.CHECKPOINT_READY, 30)
        elif name == "REQUEST":
            await colo.receiveMessage(M.CHECKPOINT_REPLY, 30)
        elif name == "blob":
            await colo.receiveMessage(M.VMSTATE_RECEIVED, 30)
            await colo.receiveMessage(M.VMSTATE_LOADED, 30)


def _vanish(session: Session, name: str, data: bytes) -> None:
    vanish(session)


def _truncate(session: Session, name: str, data: bytes) -> None:
    colo: Any = session.colo
    colo.transport.write(data[: len(data) // 2])
    closeColo(colo)


def _garbage(session: Session, name: str, data: bytes) -> None:
    # A blob of garbage is noticed when it is whole.
    colo: Any = session.colo
    colo.transport.write(GARBAGE * (len(data) // 4 + 1 if name == "blob" else 64))


def _wrongMessage(session: Session, name: str, data: bytes) -> None:
    colo: Any = session.colo
    message = encodeMessage(M.VMSTATE_LOADED)
    colo.transport.write(message * (len(data) // 4 + 1 if name == "blob" else 64))


def _oversize(session: Session, name: str, data: bytes) -> None:
    colo: Any = session.colo
    colo.transport.write(encodeMessage(M.VMSTATE_SIZE, 1 << 62))


def _nothing(session: Session, name: str, data: bytes) -> None:
    pass


Fault = Callable[[Session, str, bytes], None]


class SecondaryTests(TestCase):
    """
    A real daemon stands by; its primary does something wrong instead of sending its next piece. Always: the reason is
    logged, the last whole checkpoint is what it was to the byte, and can go on.
    """

    timeout = 300

    def setUp(self) -> None:
        self.instance = str(uuid4())

    async def secondary(self, hosts: Hosts, name: str = "secondary") -> DaemonProcess:
        daemon = hosts.daemon("secondary", name, on_lost_peer="hold")
        daemon.start()
        await until(lambda: daemon.query("query-status"), "the secondary's daemon answers")
        return daemon

    async def fault(
        self, hosts: Hosts, daemon: DaemonProcess, boundary: int, fault: Fault, reason: str, limit: float = 10
    ) -> int:
        """
        One session that ends by a fault; its first pieces show that a good primary is protected after the one before.

        @param reason: an expression that what is logged must match.
        @return: the checkpoints the session committed.
        """
        where = f"{fault.__name__} instead of piece {boundary} ({RECORDING.pieces[boundary][0]})"
        held = await self.held(daemon)
        before = len(logOf(daemon))
        peer, session = await self.linked(hosts)
        await script(session, boundary)
        whole = RECORDING.whole(boundary)
        if whole:
            self.assertEqual(await status(daemon), "protected", where)
        fault(session, *RECORDING.pieces[boundary])

        async def ended() -> bool:
            return "protection ended" in logOf(daemon)[before:]

        await until(ended, f"the protection ended: {where}", limit)
        said = logOf(daemon)[before:]
        self.assertRegex(said, f"protection ended: .*({reason})", where)
        self.assertNotIn("Traceback", said, where)
        self.assertEqual(await self.held(daemon), held + whole, where)
        if whole:
            ram = heldRam(daemon)
            self.assertEqual([n for n in range(1, 4) if RECORDING.isCheckpoint(n, ram)], [whole], where)
        await peer.stop()
        return whole

    async def held(self, daemon: DaemonProcess) -> int:
        return int((await daemon.query("query-colotx-stats"))["held-checkpoint"])

    async def everywhere(self, fault: Fault, reason: str, boundaries: Any = BOUNDARIES) -> None:
        """The fault at all boundaries; then everything right once more."""
        async with Hosts() as hosts:
            daemon = await self.secondary(hosts)
            for boundary in boundaries:
                await self.fault(hosts, daemon, boundary, fault, reason)
            peer, session = await self.linked(hosts)
            await script(session, len(BOUNDARIES))
            self.assertEqual(await status(daemon), "protected")
            self.assertTrue(RECORDING.isCheckpoint(3, heldRam(daemon)))
            await peer.stop()

    async def linked(self, hosts: Hosts) -> tuple[ScriptedPeer, Session]:
        """@return: a new session of the same primary; another instance would be one whose guest is dead."""
        peer = ScriptedPeer(hosts, "primary", instance=self.instance)
        coming = ensureDeferred(peer.session())
        peer.start()
        return peer, await coming

    @asynchronous
    async def test_vanish(self) -> None:
        await self.everywhere(_vanish, "closed")

    @asynchronous
    async def test_truncation(self) -> None:
        await self.everywhere(_truncate, "the COLO channel was closed within")

    @asynchronous
    async def test_garbage(self) -> None:
        await self.everywhere(
            _garbage,
            "no migration stream|Invalid message 3735928559|section type 0xde|no sections of a migration stream",
        )

    @asynchronous
    async def test_wrongMessage(self) -> None:
        await self.everywhere(
            _wrongMessage,
            "no migration stream|Got unknown COLO message: 6|Unexpected COLO message 6, expected [34]|"
            "section type 0x00|no sections of a migration stream",
        )

    @asynchronous
    async def test_oversize(self) -> None:
        """2^62 bytes of device state are announced: refused by the number, and nothing of the kind is allocated."""
        sizes = [boundary for boundary in BOUNDARIES if RECORDING.pieces[boundary][0] == "SIZE"]
        await self.everywhere(_oversize, "4611686018427387904", sizes)

    @asynchronous
    async def test_delay(self) -> None:
        """Within a transaction a primary that lives and stalls is given up. All boundaries wait at once."""
        boundaries = [boundary for boundary in BOUNDARIES[:6] if RECORDING.pieces[boundary][0] != "REQUEST"]

        async def one(boundary: int) -> None:
            async with Hosts() as hosts:
                daemon = await self.secondary(hosts)
                await self.fault(hosts, daemon, boundary, _nothing, r"did not .* within 1[05] s", 40)

        results = await DeferredList([ensureDeferred(one(boundary)) for boundary in boundaries])
        self.assertEqual([value.getErrorMessage() for good, value in results if not good], [])

    async def goesOn(self, fault: Fault) -> None:
        """
        Held by policy after a fault in the middle of the second checkpoint; the operator lets the last whole one live.
        """
        (boundary,) = (place for place in BOUNDARIES[:5] if RECORDING.pieces[place][0] == "SIZE")
        async with Hosts() as hosts:
            daemon = await self.secondary(hosts)
            whole = await self.fault(hosts, daemon, boundary, fault, ".")
            self.assertEqual(whole, 1)
            await pause(0.5)
            self.assertEqual((await daemon.query("query-status"))["status"], "inmigrate")
            await failover(daemon)
            self.assertEqual((await daemon.query("query-status"))["status"], "running")
            # It checks its own memory at every tick, and dies of what is not as it left it.
            await pause(0.5)
            self.assertEqual((await daemon.query("query-status"))["status"], "running")
            self.assertEqual((await daemon.query("query-colo-status"))["last-mode"], "secondary")

    @asynchronous
    async def test_failoverAfterVanish(self) -> None:
        await self.goesOn(_vanish)

    @asynchronous
    async def test_failoverAfterTruncation(self) -> None:
        await self.goesOn(_truncate)

    @asynchronous
    async def test_failoverAfterGarbage(self) -> None:
        await self.goesOn(_garbage)

    @asynchronous
    async def test_failoverAfterOversize(self) -> None:
        await self.goesOn(_oversize)


# -- a real primary with a real guest


@implementer(ISecondaryGuest)
class _Discards:
    """A standby that keeps nothing: what is of interest happens on the primary."""

    kind = "passive"
    checkpoint = 0

    def stageInitial(self, raw: Any, events: Any) -> None:
        pass

    def stageLive(self, raw: Any, events: Any) -> None:
        pass

    def describe(self, machine: str, configuration: bytes) -> None:
        pass

    def commit(self, deviceState: bytes) -> Any:
        self.checkpoint += 1
        return succeed(None)

    def prepare(self) -> Any:
        return succeed(None)

    def settle(self) -> Any:
        return succeed(None)

    def abandon(self) -> None:
        pass


@dataclass
class _Plan:
    """
    What a scripted secondary does wrong.

    @ivar due: instead of this message.
    @ivar fault: what.
    @ivar done: it was done.
    """

    due: ColoMessage
    fault: Callable[[_FaultyColo], None]
    done: bool = False


class _FaultyColo(ColoConnection):
    """
    Says the right things, but for what is planned.

    @ivar session: it belongs to it.
    """

    session: Session

    def __init__(self, plan: _Plan) -> None:
        super().__init__(reactor)
        self._plan = plan

    def sendMessage(self, *messages: ColoMessage, value: int | None = None) -> None:
        if messages == (self._plan.due,) and not self._plan.done:
            self._plan.done = True
            self._plan.fault(self)
        elif not self._plan.done:
            super().sendMessage(*messages, value=value)

    def raw(self, data: bytes) -> None:
        """Send these bytes, whatever they are."""
        self._send(data)


def _wrong(due: ColoMessage) -> ColoMessage:
    return M.VMSTATE_SEND if due is not M.VMSTATE_SEND else M.CHECKPOINT_READY


class PrimaryTests(TestCase):
    """
    A real daemon with a real QEMU; its secondary does something wrong instead of giving its next answer. Always: the
    guest runs on, out of COLO, in QEMU's own words and its console's, and the reason is logged.
    """

    timeout = 600
    ANSWERS = (M.CHECKPOINT_READY, M.CHECKPOINT_REPLY, M.VMSTATE_RECEIVED, M.VMSTATE_LOADED)

    def setUp(self) -> None:
        guest = needQemuGuest()
        spy = [
            "-chardev",
            "socket,id=spy,path=spy.sock,server=on,wait=off",
            "-mon",
            "chardev=spy,mode=control",
        ]
        arguments: Any = guest.keys["qemu-arguments"]
        self.keys = {"guest": "qemu", "qemu_binary": guest.keys["qemu-binary"]}
        self.keys["qemu_arguments"] = [*arguments, *spy]

    async def primary(self, hosts: Hosts) -> tuple[DaemonProcess, QmpClient]:
        """@return: the daemon and a second monitor of its QEMU, when the guest has begun to check its memory."""
        daemon = hosts.daemon("primary", on_lost_peer="hold", **self.keys)
        daemon.start()

        async def checks() -> bool:
            return self.rounds(daemon) > 1

        await until(checks, "the guest checks its memory", 180)
        spy = await connectQmp(reactor, str(daemon.directory / "spy.sock"), 5)

        async def close() -> None:
            spy.close()

        hosts.atEnd(close)
        return daemon, spy

    def rounds(self, daemon: DaemonProcess) -> int:
        """@return: how often the guest has found its memory whole."""
        console = daemon.directory / "serial.log"
        said = console.read_bytes() if console.exists() else b""
        self.assertNotIn(b"CORRUPT", said)
        return len(re.findall(rb"colotx: \d+ ok", said))

    async def fault(
        self, hosts: Hosts, daemon: DaemonProcess, spy: QmpClient, plan: _Plan, reason: str, limit: float = 30
    ) -> None:
        """One session that ends by a fault."""
        where = f"{reason} instead of {plan.due.name}"
        before = len(logOf(daemon))
        peer = ScriptedPeer(hosts, "secondary", lambda: _FaultyColo(plan))
        coming = ensureDeferred(peer.session(60))
        peer.start()
        session = await coming
        colo: Any = session.colo
        colo.session = session
        process = SecondaryProcess(
            reactor,
            _Discards(),
            NoReplication(),
            FailoverService(None, lambda mode, why: None),
        )
        running = ensureDeferred(process.run(colo))
        running.addErrback(lambda failure: failure.trap(ColoError))

        async def ended() -> bool:
            return "protection ended" in logOf(daemon)[before:]

        await until(ended, f"the protection ended: {where}", limit)
        vanish(session)
        await peer.stop()
        await running
        self.assertTrue(plan.done, where)
        said = logOf(daemon)[before:]
        self.assertRegex(said, f"protection ended: .*({reason})", where)
        self.assertNotIn("Traceback", said, where)
        # The peer may hold a checkpoint: nothing may leave that it does not cover, whatever is wrong with it.
        self.assertEqual(await status(daemon), "degraded", where)
        self.assertEqual((await daemon.query("query-colotx-stats"))["gate"], "shut", where)
        await self.runs(daemon, spy, where)

    async def runs(self, daemon: DaemonProcess, spy: QmpClient, where: str) -> None:
        self.assertEqual((await daemon.query("query-status"))["status"], "running", where)
        state: Any = await spy.execute("query-status")
        self.assertEqual(state["status"], "running", f"QEMU's own run state, {where}")
        rounds = self.rounds(daemon)

        async def goesOn() -> bool:
            return self.rounds(daemon) > rounds

        await until(goesOn, f"the guest goes on: {where}", 60)
        state = await spy.execute("query-status")
        self.assertEqual(state["status"], "running", f"QEMU's own run state, later, {where}")

    async def everywhere(
        self, fault: Callable[[_FaultyColo, ColoMessage], None], reason: str, answers: Any = ANSWERS
    ) -> None:
        """The fault in place of every answer; then a real secondary."""
        async with Hosts() as hosts:
            daemon, spy = await self.primary(hosts)
            for due in answers:
                plan = _Plan(due, lambda colo, due=due: fault(colo, due))
                await self.fault(hosts, daemon, spy, plan, reason)
            secondary = hosts.daemon("secondary", on_lost_peer="hold", **self.keys)
            secondary.start()
            await until(lambda: isProtected(daemon, secondary), "a real secondary protects the guest", 60)
            rounds = self.rounds(daemon)

            async def goesOn() -> bool:
                return self.rounds(daemon) > rounds

            await until(goesOn, "the protected guest goes on", 60)
            spy.close()

    @asynchronous
    async def test_vanish(self) -> None:
        await self.everywhere(lambda colo, due: vanish(colo.session), "closed")

    @asynchronous
    async def test_truncation(self) -> None:
        def truncate(colo: _FaultyColo, due: ColoMessage) -> None:
            colo.raw(encodeMessage(due)[:3])
            closeColo(colo)

        await self.everywhere(truncate, "the COLO channel was closed within a COLO message")

    @asynchronous
    async def test_garbage(self) -> None:
        await self.everywhere(lambda colo, due: colo.raw(GARBAGE), "Invalid message 3735928559")

    @asynchronous
    async def test_wrongMessage(self) -> None:
        await self.everywhere(
            lambda colo, due: colo.raw(encodeMessage(_wrong(due))), "Unexpected COLO message 3, expected"
        )

    @asynchronous
    async def test_delay(self) -> None:
        """
        REPLY does not come, from a peer that lives. The other answers have 60 s; their time-outs are the unit tests'.
        """
        await self.everywhere(
            lambda colo, due: None, "did not send CHECKPOINT_REPLY within 10 s", [M.CHECKPOINT_REPLY]
        )
