"""Tests of L{colotx.guests.qemu} and its parts, with a fake QEMU."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyClass, verifyObject

from colotx.errors import ColoError, ConfigError, GuestError, GuestLost, GuestTimeout, PeerLost, QmpError
from colotx.guests.passive import PassiveSecondary
from colotx.guests.qemu import QemuGuestFactory, QemuPrimaryGuest, QemuSettings
from colotx.guests.qemu_arguments import MappedRam, SocketPaths, commandLine, ownsMemory
from colotx.interfaces import CheckpointImage, IGuestFactory, IPrimaryGuest, ISecondaryGuest, RunState
from colotx.protocol import ColoMessage, encodeMessage
from colotx.ramcache import RamCache
from colotx.test.fakeqemu import BLOCKS, MACHINE, FakeQemu, FakeReactor, blob, page
from colotx.vmstate import Blocks, InitialReader, RamReader, RamWriter

READY = encodeMessage(ColoMessage.CHECKPOINT_READY)
REPLY = encodeMessage(ColoMessage.CHECKPOINT_REPLY)
RUN_ON = encodeMessage(ColoMessage.VMSTATE_RECEIVED) + encodeMessage(ColoMessage.VMSTATE_LOADED)


class _Sink:
    """Keeps what it gets, or fails."""

    def __init__(self, error: ColoError | None = None) -> None:
        self.data = b""
        self._error = error

    async def write(self, data: bytes | memoryview) -> None:
        if self._error is not None:
            raise self._error
        self.data += bytes(data)


class CommandLineTests(SynchronousTestCase):
    """The arguments QEMU gets."""

    paths = SocketPaths("/run/c/vm", "/run/c/vm/qmp", "/run/c/vm/nic", "/run/c/vm/colo", "/run/c/vm/incoming")

    def line(self, *arguments: str, **named: Any) -> str:
        """The command line, with the user's arguments."""
        given = {name: named.pop(name) for name in ("mac", "nicModel") if name in named}
        return " ".join(commandLine(QemuSettings(arguments, "/run/c", **given), self.paths, **named))

    def test_added(self):
        """colotx's own arguments follow the user's, and QEMU dies with us."""
        self.assertEqual(
            self.line("-m", "1G", mac="52:54:00:00:00:01"),
            "setpriv --pdeathsig KILL -- qemu-system-x86_64 -m 1G -display none "
            "-qmp unix:/run/c/vm/qmp,server=on,wait=off "
            "-netdev stream,id=colotx,server=on,addr.type=unix,addr.path=/run/c/vm/nic "
            "-device virtio-net-pci,netdev=colotx,id=colotx-nic,mac=52:54:00:00:00:01",
        )

    def test_ownDisplay(self):
        """A display of the user's choice stays the only one."""
        for own in (("-display", "gtk"), ("--nographic",), ("-vnc", ":1")):
            self.assertNotIn("-display none", self.line(*own))

    def test_restoring(self):
        """A restored guest waits for its state, and maps what is there already."""
        line = self.line(restoring=True, ram=MappedRam("pc.ram", "/proc/1/fd/9", 4096))
        self.assertIn(
            "-object memory-backend-file,id=pc.ram,size=4096,mem-path=/proc/1/fd/9,share=on,"
            "x-use-canonical-path-for-ramblock-id=off -machine memory-backend=pc.ram -incoming defer",
            line,
        )
        self.assertNotIn("memory-backend", self.line(restoring=True))

    def test_commas(self):
        """A comma in a path is not taken for the end of it."""
        paths = SocketPaths.under("/run/a,b")
        line = " ".join(commandLine(QemuSettings([], "/run/a,b"), paths))
        self.assertIn("unix:/run/a,,b/vm-", line)
        self.assertIn("addr.path=/run/a,,b/vm-", line)

    def test_refused(self):
        """What cannot work is refused by name, with the reason."""
        for wrong in ("-daemonize", "--incoming", "-qmp"):
            error = self.assertRaises(ConfigError, QemuSettings, ["-m", "1G", wrong, "x"], "/run/c")
            self.assertIn(wrong.lstrip("-"), str(error))
        self.assertIn("too long", str(self.assertRaises(ConfigError, QemuSettings, [], "/run/" + "x" * 90)))

    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 120))
    def test_shortEnough(self, length):
        """A directory that is taken leaves room for every socket."""
        base = "/" + "d" * length
        try:
            QemuSettings([], base)
        except ConfigError:
            self.assertGreater(length, 80)
        else:
            paths = SocketPaths.under(base)
            for path in (paths.qmp, paths.nic, paths.colo, paths.incoming):
                self.assertLessEqual(len(path), 107)

    def test_ownsMemory(self):
        """A user's own guest RAM is seen."""
        self.assertTrue(ownsMemory(["-object", "memory-backend-ram,id=m,size=1G"]))
        self.assertTrue(ownsMemory(["-machine", "pc,memory-backend=m"]))
        self.assertTrue(ownsMemory(["--mem-path", "/dev/hugepages"]))
        self.assertFalse(ownsMemory(["-m", "1G", "-machine", "q35,accel=kvm"]))


class _GuestCase(SynchronousTestCase):
    """A guest in a fake QEMU."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.wanted: list[str] = []
        self.lost: list[GuestError] = []
        # "true" is there on every machine; nothing is started.
        self.settings = QemuSettings(
            ["-m", "1G"],
            os.path.relpath(self.mktemp()),
            binary="true",
            environment={"LD_PRELOAD": "x.so"},
            startTimeout=30,
            stopTimeout=10,
        )
        self.factory = QemuGuestFactory(self.reactor, self.settings)

    def done(self, waiting: Deferred[Any], seconds: float = 0.0) -> Any:
        """The result of something, after C{seconds}."""
        self.reactor.settle(seconds)
        return self.successResultOf(waiting)

    def failed(self, waiting: Deferred[Any], kind: type[Exception], seconds: float = 0.0) -> Exception:
        """The error of something, after C{seconds}."""
        self.reactor.settle(seconds)
        return self.failureResultOf(waiting, kind).value

    def watched(self, guest: QemuPrimaryGuest) -> QemuPrimaryGuest:
        """A guest whose news are kept."""
        guest.onLost = self.lost.append
        guest.onCheckpointWanted = self.wanted.append
        return guest

    def launched(self) -> QemuPrimaryGuest:
        """A running guest."""
        guest = self.watched(self.factory.createPrimary())
        self.done(guest.launch())
        return guest

    @property
    def qemu(self) -> FakeQemu:
        """The last QEMU started."""
        return self.reactor.qemus[-1]

    def loaded(self) -> QemuPrimaryGuest:
        """A guest whose initial stream is out."""
        guest = self.launched()
        self.done(guest.transferInitial(_Sink()))
        return guest

    def protected(self) -> QemuPrimaryGuest:
        """A guest that runs protected."""
        guest = self.loaded()
        self.done(guest.start())
        return guest


class LaunchTests(_GuestCase):
    """Starting a guest, and its end."""

    def test_interfaces(self):
        """The interfaces are kept."""
        verifyObject(IGuestFactory, self.factory)
        verifyObject(IPrimaryGuest, self.factory.createPrimary())
        verifyClass(ISecondaryGuest, PassiveSecondary)
        verifyObject(ISecondaryGuest, self.factory.createStandby())

    def test_launch(self):
        """The guest runs, its NIC is connected, its size known, its sockets are nobody else's."""
        guest = self.watched(self.factory.createPrimary())
        self.assertIs(guest.runState, RunState.PRELAUNCH)
        self.assertEqual(self.reactor.qemus, [])
        self.done(guest.launch())
        self.assertIs(guest.runState, RunState.RUNNING)
        self.assertTrue(guest.port.connected)
        self.assertEqual(guest.ramBytes, BLOCKS[0].length)
        self.assertEqual(self.qemu.environment["LD_PRELOAD"], "x.so")
        self.assertEqual(self.qemu.environment["PATH"], os.environ["PATH"])
        (directory,) = os.listdir(self.settings.runtimeDirectory)
        mode = os.stat(os.path.join(self.settings.runtimeDirectory, directory)).st_mode
        self.assertEqual(mode & 0o777, 0o700)

    def test_stoppedByArguments(self):
        """-S among the arguments does not keep the guest from running."""
        self.reactor.prepare = lambda qemu: setattr(qemu, "status", "prelaunch")
        self.launched()
        self.assertEqual(self.qemu.status, "running")

    def test_noBinary(self):
        """A QEMU that is not there is the operator's error."""
        guest = QemuPrimaryGuest(self.reactor, QemuSettings([], "run", binary="/no/qemu"))
        self.assertIn("/no/qemu", str(self.failed(guest.launch(), ConfigError)))

    def test_diesAtStart(self):
        """QEMU's own words come with the failure, which is no loss of a guest."""
        self.reactor.prepare = lambda qemu: setattr(qemu, "failing", "-foo: invalid option")
        guest = self.watched(self.factory.createPrimary())
        self.assertIn("-foo: invalid option", str(self.failed(guest.launch(), GuestLost)))
        self.assertEqual(self.lost, [])
        self.assertEqual(os.listdir(self.settings.runtimeDirectory), [])

    def test_neverAnswers(self):
        """A QEMU without a word on its QMP socket is given up, and killed."""
        self.reactor.prepare = lambda qemu: qemu.silent.add("qmp_capabilities")
        guest = self.watched(self.factory.createPrimary())
        launching = guest.launch()
        self.reactor.settle(29)
        self.assertNoResult(launching)
        self.reactor.settle(1)
        self.failed(launching, GuestTimeout, 10)
        self.assertFalse(self.qemu.alive)

    def test_dies(self):
        """A QEMU that dies is reported once, with its words."""
        guest = self.launched()
        self.qemu.die("segmentation fault in a nice device")
        self.reactor.settle()
        (error,) = self.lost
        self.assertIsInstance(error, GuestLost)
        self.assertIn("nice device", str(error))
        self.assertIs(guest.runState, RunState.SHUTDOWN)
        self.failed(guest.transferInitial(_Sink()), GuestLost)
        self.done(guest.shutdown())
        self.assertEqual(len(self.lost), 1)

    def test_shutsDown(self):
        """A guest that shuts itself down is lost, too; that QEMU then ends is no second loss."""
        self.launched()
        self.qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        self.reactor.settle()
        self.qemu.die()
        self.reactor.settle()
        (error,) = self.lost
        self.assertIn("guest-shutdown", str(error))

    def test_boundedWords(self):
        """However much QEMU says, its end is what is told."""
        self.launched()
        for _ in range(100):
            self.qemu.protocol.childDataReceived(2, b"x" * 1000 + b"\n")
        self.qemu.protocol.childDataReceived(1, b"y" * 1000)
        self.assertLess(len(self.qemu.protocol._tail), 5000)
        self.qemu.die("the last word")
        self.assertLess(len(str(self.lost[0])), 700)
        self.assertIn("the last word", str(self.lost[0]))

    def test_shutdown(self):
        """QEMU is asked to quit; its directory is removed; nobody takes it for a loss."""
        guest = self.launched()
        self.done(guest.shutdown())
        self.assertEqual(self.qemu.named("quit"), [{}])
        self.assertFalse(self.qemu.alive)
        self.assertEqual(os.listdir(self.settings.runtimeDirectory), [])
        self.assertEqual(self.lost, [])
        self.assertIs(guest.runState, RunState.SHUTDOWN)
        self.done(guest.shutdown())

    def test_shutdownByForce(self):
        """A QEMU that does not quit is killed."""
        guest = self.launched()
        self.qemu.silent.add("quit")
        self.qemu.do_quit = dict  # type: ignore[method-assign]
        ending = guest.shutdown()
        self.reactor.settle()
        self.assertTrue(self.qemu.alive)
        self.done(ending, 3)
        self.assertFalse(self.qemu.alive)

    def test_neverLaunched(self):
        """A guest that was never launched can be ended, and has no protection to end."""
        guest = self.factory.createPrimary()
        self.done(guest.endProtection())
        self.failed(guest.transferInitial(_Sink()), GuestError)
        self.done(guest.shutdown())


class ProtectionTests(_GuestCase):
    """The exchange, when QEMU behaves."""

    def test_initial(self):
        """The initial stream goes to the sink byte by byte, and the guest waits for start."""
        guest = self.launched()
        sink = _Sink()
        self.done(guest.transferInitial(sink))
        self.assertIs(guest.runState, RunState.COLO)
        self.assertEqual(self.qemu.answers, [])
        reader = InitialReader(RamReader())
        reader.feed(sink.data)
        assert reader.complete is not None
        self.assertEqual((reader.complete.machine, reader.complete.deviceState), (MACHINE, blob(0)))
        self.done(guest.start())
        self.assertEqual(self.qemu.answers, [READY])
        self.assertIs(guest.runState, RunState.RUNNING)

    def test_setUp(self):
        """COLO on, everything it cannot be with off, what does not matter left alone; our own timer."""
        self.loaded()
        (given,) = self.qemu.named("migrate-set-capabilities")
        states = {entry["capability"]: entry["state"] for entry in given["capabilities"]}
        off = ("return-path", "postcopy-ram", "multifd", "x-ignore-shared")
        self.assertEqual(states, {"x-colo": True, **dict.fromkeys(off, False)})
        (parameters,) = self.qemu.named("migrate-set-parameters")
        self.assertEqual(parameters["x-checkpoint-delay"], 4294967295)

    def test_checkpoints(self):
        """Checkpoint after checkpoint: stopped, RAM as it came, device state, and on it goes."""
        guest = self.protected()
        for number in range(1, 4):
            self.done(guest.stop())
            self.assertIs(guest.runState, RunState.COLO)
            self.assertEqual(self.qemu.status, "colo")
            self.assertEqual(self.qemu.answers[-1], REPLY)
            sink = _Sink()
            self.done(guest.transferLive(sink))
            writer = RamWriter()
            expected = b"".join([*writer.end([page("pc.ram", 5, number)]), b"\0"])
            self.assertEqual(len(sink.data), len(expected) - (7 if number > 1 else 0))
            self.assertEqual(self.done(guest.saveDeviceState()), blob(number))
            self.done(guest.start())
            self.assertEqual(self.qemu.answers[-1], RUN_ON)
            self.assertIs(guest.runState, RunState.RUNNING)
        self.done(guest.start())
        self.assertEqual(len(self.qemu.answers), 1 + 3 * 2)
        self.assertEqual(self.wanted, [])

    def test_impatience(self):
        """A guest too busy to be copied is stopped for longer and longer, until it is."""
        guest = self.launched()
        self.qemu.silent.add("initial")
        waiting = guest.transferInitial(_Sink())
        self.reactor.settle()
        whole = self.qemu.initial()
        section = b"".join(self.qemu.writer.part([page("pc.ram", 7, fill) for fill in range(64)]))
        head, tail = whole[: whole.index(b"\x02\0\0\0\x02")], whole[whole.index(b"\x02\0\0\0\x02") :]
        self.qemu.tell(head)
        for _ in range(3):
            self.qemu.tell(section)
            self.reactor.settle()
        self.assertNoResult(waiting)
        self.qemu.tell(tail)
        self.done(waiting)
        limits = [given.get("downtime-limit") for given in self.qemu.named("migrate-set-parameters")]
        self.assertEqual(limits, [300, 600, 1200, 2400])

    def test_wanted(self):
        """A request of QEMU's own is passed on, and used: QEMU is not asked again."""
        guest = self.protected()
        self.qemu.request()
        self.reactor.settle()
        self.assertEqual(len(self.wanted), 1)
        nudges = len(self.qemu.named("migrate-set-parameters"))
        self.done(guest.stop())
        self.assertEqual(len(self.qemu.named("migrate-set-parameters")), nudges)

    def test_twice(self):
        """A protected guest must be released before it is protected again."""
        guest = self.protected()
        self.failed(guest.transferInitial(_Sink()), GuestError)
        self.done(guest.endProtection(), 1)
        self.done(guest.transferInitial(_Sink()))
        self.done(guest.start())
        self.done(guest.stop())

    def test_order(self):
        """Calls out of order are refused and harm nothing."""
        guest = self.launched()
        self.done(guest.start())
        for call in (guest.stop, lambda: guest.transferLive(_Sink()), guest.saveDeviceState):
            self.failed(maybeDeferred(call), GuestError)
        guest = self.protected()
        for call in (lambda: guest.transferLive(_Sink()), guest.saveDeviceState):
            self.failed(maybeDeferred(call), GuestError)
        self.done(guest.stop())
        self.failed(guest.saveDeviceState(), GuestError)
        self.done(guest.transferLive(_Sink()))


class MisbehaviourTests(_GuestCase):
    """A QEMU that does not do its part."""

    def test_neverConnects(self):
        """A migration that does not begin ends in a time-out."""
        guest = self.launched()
        self.qemu.silent.add("connect")
        self.failed(guest.transferInitial(_Sink()), GuestTimeout, 10)

    def test_initialStalls(self):
        """One that stalls, too."""
        guest = self.launched()
        self.qemu.silent.add("initial")
        waiting = guest.transferInitial(_Sink())
        self.reactor.settle()
        self.qemu.tell(self.qemu.initial()[:100])
        self.reactor.settle(9)
        self.assertNoResult(waiting)
        self.failed(waiting, GuestTimeout, 10)

    def test_migrateRefused(self):
        """QEMU's own words when it will not migrate; the guest is not protected then."""
        guest = self.launched()
        self.qemu.refusing.add("migrate")
        self.assertIn("no migrate today", str(self.failed(guest.transferInitial(_Sink()), QmpError)))
        self.done(guest.endProtection())
        self.qemu.refusing.clear()
        self.done(guest.transferInitial(_Sink()))

    def test_notAsked(self):
        """A QEMU that does not ask for the checkpoint it was nudged to: the guest runs on, and may stop yet."""
        guest = self.protected()
        self.qemu.silent.add("request")
        self.failed(guest.stop(), GuestTimeout, 10)
        self.assertIs(guest.runState, RunState.RUNNING)
        self.qemu.silent.clear()
        self.done(guest.stop())

    def test_nudgeRefused(self):
        """One that refuses the nudge says why."""
        guest = self.protected()
        self.qemu.refusing.add("migrate-set-parameters")
        self.failed(guest.stop(), QmpError)
        self.qemu.refusing.clear()
        self.done(guest.stop())

    def test_doesNotStop(self):
        """One that does not stop after REPLY may do so later: it is taken out of COLO, and the guest runs."""
        guest = self.protected()
        self.qemu.silent.add("send")
        waiting = guest.stop()
        self.reactor.settle(10.25)
        self.failed(waiting, GuestTimeout)
        self.assertIs(guest.runState, RunState.RUNNING)
        self.assertEqual(len(self.qemu.named("x-colo-lost-heartbeat")), 1)
        self.failed(guest.stop(), GuestError)

    def test_leaves(self):
        """One that closes the channel is found out at once, not at the next checkpoint."""
        guest = self.protected()
        assert self.qemu.colo is not None
        self.qemu.colo.transport.loseConnection()
        self.reactor.settle()
        self.assertEqual(len(self.wanted), 1)
        self.failed(guest.stop(), GuestError)

    def test_hugeState(self):
        """A device state beyond all measure is refused before memory is taken."""
        guest = self.protected()
        self.done(guest.stop())
        sink = _Sink()
        self.qemu.silent.add("send")
        self.done(guest.transferLive(sink))
        self.done(guest.saveDeviceState())
        self.done(guest.start())
        waiting = guest.stop()
        self.reactor.settle()
        self.qemu.tell(encodeMessage(ColoMessage.VMSTATE_SEND) + self.qemu.live())
        self.qemu.tell(encodeMessage(ColoMessage.VMSTATE_SIZE, 2**62))
        self.done(waiting)
        self.done(guest.transferLive(sink))
        self.assertIn(str(2**62), str(self.failed(guest.saveDeviceState(), GuestError)))

    @settings(max_examples=60, deadline=None)
    @given(st.binary(min_size=4, max_size=40))
    def test_garbage(self, garbage):
        """Whatever QEMU says instead of its part is an error of the guest or a time-out, and the guest runs again."""
        self.setUp()
        guest = self.protected()
        self.qemu.silent.add("send")
        waiting = guest.stop()
        self.reactor.settle()
        self.qemu.halt("colo")
        self.qemu.tell(garbage)
        self.reactor.settle(10.5)
        if not waiting.called:
            self.fail("stop never ended")
        outcome: list[Any] = []
        waiting.addBoth(outcome.append)
        self.done(guest.endProtection(), 1)
        self.assertEqual(self.qemu.status, "running")

    def test_sinkFails(self):
        """What the sink raises comes out as it is: it is not QEMU's fault."""
        guest = self.launched()
        gone = PeerLost("the link is gone")
        self.assertIs(self.failed(guest.transferInitial(_Sink(gone)), PeerLost), gone)


class EndProtectionTests(_GuestCase):
    """Leaving COLO, at any point."""

    def ended(self, guest: QemuPrimaryGuest) -> None:
        """End the protection, and see that the guest runs."""
        ending = guest.endProtection()
        self.reactor.settle(0.5)
        self.successResultOf(ending)
        self.assertEqual(self.qemu.status, "running")
        self.assertIs(guest.runState, RunState.RUNNING)
        self.assertNotIn(self.settings.runtimeDirectory + "/colo", self.reactor.listening)
        self.assertEqual([path for path in self.reactor.listening if path.endswith("colo")], [])

    def test_initially(self):
        """While the initial stream is under way its channel is closed, and the migration fails by itself."""
        guest = self.launched()
        self.qemu.silent.add("initial")
        waiting = guest.transferInitial(_Sink())
        self.reactor.settle()
        self.qemu.tell(self.qemu.initial()[:100])
        self.reactor.settle()
        self.ended(guest)
        self.failed(waiting, GuestError)
        self.assertEqual(self.qemu.named("migrate_cancel"), [])
        self.assertEqual(self.qemu.named("x-colo-lost-heartbeat"), [])

    def test_initiallyUnconnected(self):
        """Before QEMU even connected, a migration that does not end is cancelled at last."""
        guest = self.launched()
        self.qemu.silent.add("connect")
        waiting = guest.transferInitial(_Sink())
        self.reactor.settle()
        ending = guest.endProtection()
        self.reactor.settle(0.6)
        self.assertNoResult(ending)
        self.failed(waiting, GuestError)
        self.reactor.settle(0.75)
        self.successResultOf(ending)
        self.assertEqual(len(self.qemu.named("migrate_cancel")), 1)

    def test_afterInitial(self):
        """While QEMU waits for READY."""
        self.ended(self.loaded())

    def test_running(self):
        """While the guest runs: the channel's end is no request for a checkpoint."""
        self.ended(self.protected())
        self.assertEqual(self.wanted, [])

    def test_whileStopping(self):
        """While QEMU is asked to stop: the wait fails."""
        guest = self.protected()
        self.qemu.silent.add("request")
        waiting = guest.stop()
        self.reactor.settle()
        self.ended(guest)
        self.failed(waiting, GuestError)

    def test_stopped(self):
        """At every point between stop and start."""
        for steps in range(3):
            guest = self.protected()
            self.done(guest.stop())
            if steps > 0:
                self.done(guest.transferLive(_Sink()))
            if steps > 1:
                self.done(guest.saveDeviceState())
            self.ended(guest)

    def test_startInstead(self):
        """A start before the state was taken cannot be had within COLO: it ends the protection."""
        guest = self.protected()
        self.done(guest.stop())
        starting = guest.start()
        self.reactor.settle(0.25)
        self.successResultOf(starting)
        self.assertEqual(self.qemu.status, "running")
        self.failed(guest.stop(), GuestError)

    def test_refusedHeartbeat(self):
        """A QEMU that will not take the request: its guest is made to run all the same, or we say that it is not."""
        guest = self.protected()
        self.done(guest.stop())
        self.qemu.refusing.add("x-colo-lost-heartbeat")
        ending = guest.endProtection()
        self.reactor.settle(12.5)
        self.failureResultOf(ending, GuestTimeout)

    def test_frozen(self):
        """A guest that stands still although its migration is over is told to run."""
        guest = self.protected()
        self.done(guest.stop())
        self.qemu.do_x_colo_lost_heartbeat = lambda: setattr(  # type: ignore[method-assign]
            self.qemu, "migration", "completed"
        )
        ending = guest.endProtection()
        self.reactor.settle(1.5)
        self.successResultOf(ending)
        self.assertEqual(self.qemu.status, "running")

    def test_dead(self):
        """A QEMU that is gone is said to be gone."""
        guest = self.protected()
        waiting = guest.stop()
        self.qemu.die()
        self.failed(guest.endProtection(), GuestLost)
        self.failed(waiting, GuestError)
        self.assertEqual(len(self.lost), 1)


class RestoreTests(_GuestCase):
    """From a checkpoint to a running guest."""

    def image(self) -> CheckpointImage:
        """A checkpoint."""
        cache = RamCache()
        cache.stageInitial([Blocks(BLOCKS), page("pc.ram", 3, 0x33), page("pc.bios", 0, 0xB0)])
        cache.commit(blob(9))
        list(cache.flush())
        return CheckpointImage(MACHINE, RamWriter().configuration(MACHINE), cache, cache.deviceState)

    def restorable(self, image: CheckpointImage) -> QemuPrimaryGuest:
        """A guest that will go on from a checkpoint."""
        guest = self.watched(QemuPrimaryGuest(self.reactor, self.settings))
        guest.adopt(image)
        return guest

    def read(self, stream: bytes) -> tuple[bytes, list[str]]:
        """@return: device state of a stream, and the blocks pages came for."""
        ram = RamReader()
        reader = InitialReader(ram)
        events = reader.feed(bytes(stream))
        assert reader.complete is not None
        return reader.complete.deviceState, [event.block for event in events if hasattr(event, "block")]

    def test_mapped(self):
        """QEMU maps the image, gets the rest as a stream, and afterwards sends its RAM like any other guest."""
        image = self.image()
        path = image.ram.imagePath("pc.ram")
        guest = self.restorable(image)
        self.assertIs(guest.runState, RunState.INMIGRATE)
        seen: list[bool] = []
        self.reactor.prepare = lambda qemu: setattr(
            qemu, "restored", lambda: (seen.append(qemu.capabilities["x-ignore-shared"]), qemu.run())
        )
        self.done(guest.launch())
        self.assertIn(f"mem-path={path}", " ".join(self.qemu.command))
        self.assertEqual(seen, [True])
        self.assertFalse(self.qemu.capabilities["x-ignore-shared"])
        state, blocks = self.read(self.qemu.incoming)
        self.assertEqual(state, blob(9))
        self.assertNotIn("pc.ram", blocks)
        self.assertIn("pc.bios", blocks)
        self.assertIs(guest.runState, RunState.RUNNING)
        self.assertTrue(guest.port.connected)
        self.assertFalse(os.path.exists(path))
        self.done(guest.transferInitial(_Sink()))

    def test_copied(self):
        """A QEMU that cannot have it this way gets a copy."""
        image = self.image()
        guest = self.restorable(image)
        self.reactor.prepare = lambda qemu: setattr(
            qemu, "failingRestore", "" if len(self.reactor.qemus) > 1 else "cannot map this"
        )
        self.done(guest.launch())
        first, second = self.reactor.qemus
        self.assertFalse(first.alive)
        self.assertTrue(second.alive)
        self.assertNotIn("memory-backend", " ".join(second.command))
        self.assertFalse(second.capabilities["x-ignore-shared"])
        state, blocks = self.read(second.incoming)
        self.assertEqual(state, blob(9))
        self.assertIn("pc.ram", blocks)
        self.assertEqual(self.lost, [])
        self.assertTrue(guest.port.connected)

    def test_ownMemory(self):
        """A machine whose RAM the user defined gets a copy without a try."""
        settings = QemuSettings(
            ["-machine", "pc,memory-backend=m"], self.settings.runtimeDirectory, binary="true"
        )
        guest = QemuPrimaryGuest(self.reactor, settings)
        guest.adopt(self.image())
        self.done(guest.launch())
        self.assertEqual(len(self.reactor.qemus), 1)
        self.assertNotIn("memory-backend-file", " ".join(self.qemu.command))

    def test_impossible(self):
        """A checkpoint that no way brings back is an error with QEMU's words; it can be tried again."""
        self.reactor.prepare = lambda qemu: setattr(qemu, "failingRestore", "error while loading state")
        guest = self.restorable(self.image())
        self.assertIn("error while loading state", str(self.failed(guest.launch(), GuestLost)))
        self.assertEqual(self.lost, [])
        self.reactor.prepare = lambda qemu: None
        self.done(guest.launch())

    def test_neverRuns(self):
        """A restore that does not end is given up."""
        self.reactor.prepare = lambda qemu: setattr(qemu, "restored", lambda: None)
        guest = self.restorable(self.image())
        launching = guest.launch()
        self.reactor.settle(30)
        self.failed(launching, GuestTimeout, 30)
        self.assertEqual([qemu.alive for qemu in self.reactor.qemus], [False, False])

    def test_unwanted(self):
        """A restored guest that is never launched gives its memory back."""
        image = self.image()
        path = image.ram.imagePath("pc.ram")
        guest = self.restorable(image)
        self.done(guest.shutdown())
        self.assertFalse(os.path.exists(path))


class StandbyTests(_GuestCase):
    """The QEMU that waits for a failover."""

    def synchronise(self, standby: Any, number: int) -> None:
        """An initial transfer, whole."""
        standby.stageInitial(b"", [Blocks(BLOCKS), page("pc.ram", 3, number)])
        standby.describe(MACHINE, RamWriter().configuration(MACHINE))
        self.done(standby.commit(blob(number)))
        self.done(standby.settle())

    def synchronised(self) -> Any:
        """A standby that holds a checkpoint."""
        standby = self.factory.createStandby()
        self.assertEqual(self.reactor.qemus, [])
        self.synchronise(standby, 1)
        return standby

    def promoted(self, standby: Any) -> QemuPrimaryGuest:
        """The guest made of it, running."""
        guest = self.watched(self.done(standby.promote()))
        self.done(guest.launch())
        self.assertIs(guest.runState, RunState.RUNNING)
        return guest

    def test_ready(self):
        """It is started at the first checkpoint and no other, and goes on from the last one."""
        standby = self.synchronised()
        self.assertIn("-incoming defer", " ".join(self.qemu.command))
        self.assertEqual(self.qemu.named("migrate-incoming"), [])
        standby.stageLive(b"", [page("pc.ram", 4, 0x44)])
        self.done(standby.commit(blob(2)))
        self.done(standby.settle())
        guest = self.promoted(standby)
        (qemu,) = self.reactor.qemus
        self.assertIn(blob(2), qemu.incoming)
        self.done(standby.close())
        self.assertTrue(qemu.alive)
        self.assertEqual(self.lost, [])
        qemu.die()
        self.assertEqual(len(self.lost), 1)
        self.done(guest.shutdown())

    def test_stillStarting(self):
        """A failover before it is ready waits for it."""
        self.reactor.prepare = lambda qemu: qemu.silent.add("qmp_capabilities")
        guest = self.done(self.synchronised().promote())
        launching = guest.launch()
        self.reactor.settle()
        self.assertNoResult(launching)
        assert self.qemu.qmp is not None
        self.qemu.qmp.send({"id": 1, "return": {}})
        self.done(launching)
        self.assertEqual(len(self.reactor.qemus), 1)

    def test_died(self):
        """One that died while it waited, or never started, is replaced at the failover."""
        for failing in ("", "address in use"):
            self.reactor.prepare = lambda qemu, failing=failing: setattr(qemu, "failing", failing)
            standby = self.synchronised() if not failing else self.factory.createStandby()
            if failing:
                self.synchronise(standby, 1)
            count = len(self.reactor.qemus)
            self.qemu.die()
            self.reactor.settle()
            self.reactor.prepare = lambda qemu: None
            self.promoted(standby)
            self.assertEqual(len(self.reactor.qemus), count + 1)
            self.assertEqual(self.lost, [])

    def test_synchronisedAnew(self):
        """A new initial transfer needs a new one; before it is whole the old one stays good."""
        standby = self.synchronised()
        first = self.qemu
        standby.stageInitial(b"", [Blocks(BLOCKS)])
        self.done(standby.settle())
        standby.abandon()
        self.done(standby.settle())
        self.assertEqual(self.reactor.qemus, [first])
        self.synchronise(standby, 2)
        self.assertFalse(first.alive)
        self.promoted(standby)
        self.assertEqual(len(self.reactor.qemus), 2)
        self.assertIn(blob(2), self.qemu.incoming)

    def test_closed(self):
        """It ends with the standby."""
        standby = self.synchronised()
        self.done(standby.close())
        self.assertFalse(self.qemu.alive)
        self.assertEqual(os.listdir(self.settings.runtimeDirectory), [])

    def test_ownMemory(self):
        """With guest RAM of the user's own there is nothing to wait with: it is started at the failover."""
        arguments = ["-machine", "pc,memory-backend=m"]
        settings = QemuSettings(arguments, self.settings.runtimeDirectory, binary="true")
        self.factory = QemuGuestFactory(self.reactor, settings)
        standby = self.synchronised()
        self.assertEqual(self.reactor.qemus, [])
        self.promoted(standby)
        self.assertEqual(len(self.reactor.qemus), 1)
