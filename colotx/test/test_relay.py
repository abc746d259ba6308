"""Which VM gets which frame, in which epoch."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from colotx.frames import FrameChannel
from colotx.interfaces import IFrameRelay
from colotx.relay import HELD_INPUT, Inlet, NoRelay, PrimaryRelay, SecondaryRelay
from colotx.test.wires import PipeTransport


class Port:
    """Notes what is sent to it."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.paused = False
        self.receiver = None

    def send(self, frames) -> None:
        self.got += frames

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


class Gate:
    """Notes what is compared."""

    class compareLimits:
        expiredScanCycle = 1000

    def __init__(self) -> None:
        self.compared: list[bytes] = []
        self.scans = 0
        self.suspended = False

    def compare(self, frames) -> None:
        self.compared += frames

    def scan(self) -> None:
        self.scans += 1

    def suspend(self) -> None:
        self.suspended = True


class RelayTests(SynchronousTestCase):
    """Both relays, joined by channels that are carried by hand."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.outside, self.primary, self.secondary, self.gate = Port(), Port(), Port(), Gate()
        self.inlet = Inlet(self.outside, self.primary)
        self.left, self.right = FrameChannel(), FrameChannel()
        self.toRight, self.toLeft = PipeTransport(), PipeTransport()
        self.left.makeConnection(self.toRight)
        self.right.makeConnection(self.toLeft)
        self.a = PrimaryRelay(self.clock, self.left, self.inlet, self.gate)
        self.b = SecondaryRelay(self.right)

    def carry(self) -> None:
        self.right.dataReceived(self.toRight.take())
        self.left.dataReceived(self.toLeft.take())

    def protect(self) -> None:
        """The initial transfer, as the checkpoint processes drive it."""
        self.a.closeEpoch(0)
        self.a.resume(0)
        self.b.begin(self.secondary)

    def test_interfaces(self) -> None:
        verifyObject(IFrameRelay, self.a)
        verifyObject(IFrameRelay, NoRelay())

    def test_inputToBoth(self) -> None:
        self.inlet.take([b"before"])
        self.protect()
        self.inlet.take([b"one", b"two"])
        self.carry()
        self.assertEqual(self.primary.got, [b"before", b"one", b"two"])
        self.assertEqual(self.secondary.got, [b"one", b"two"])

    def test_inputBeforeTheSecondaryIsSaidToRun(self) -> None:
        self.a.closeEpoch(0)
        self.a.resume(0)
        self.inlet.take([b"early"])
        self.carry()
        self.assertEqual(self.secondary.got, [])
        self.b.begin(self.secondary)
        self.assertEqual(self.secondary.got, [b"early"])

    def test_outputIsCompared(self) -> None:
        self.protect()
        self.secondary.receiver([b"answer"])
        self.carry()
        self.assertEqual(self.gate.compared, [b"answer"])

    def test_inputWaitsForTheCheckpoint(self) -> None:
        self.protect()
        self.a.hold()
        self.inlet.take([b"held"])
        self.b.closeEpoch()
        self.a.closeEpoch(1)
        self.carry()
        self.assertEqual((self.primary.got, self.secondary.got), ([], []))
        self.a.resume(1)
        self.carry()
        self.assertEqual((self.primary.got, self.secondary.got), ([b"held"], [b"held"]))

    def test_lateInputIsCoveredByTheCheckpoint(self) -> None:
        """The primary got it before its stop: the state that the secondary loads has it."""
        self.protect()
        self.inlet.take([b"late"])
        self.a.hold()
        self.b.closeEpoch()
        self.carry()
        self.a.closeEpoch(1)
        self.a.resume(1)
        self.inlet.take([b"new"])
        self.carry()
        self.assertEqual(self.primary.got, [b"late", b"new"])
        self.assertEqual(self.secondary.got, [b"new"])

    def test_lateOutputIsCoveredByTheCheckpoint(self) -> None:
        self.protect()
        self.secondary.receiver([b"late"])
        self.a.hold()
        self.b.closeEpoch()
        self.a.closeEpoch(1)
        self.carry()
        self.assertEqual(self.gate.compared, [])
        self.a.resume(1)
        self.secondary.receiver([b"new"])
        self.carry()
        self.assertEqual(self.gate.compared, [b"new"])

    def test_muchHeldInputPausesTheOutside(self) -> None:
        self.protect()
        self.a.hold()
        while not self.outside.paused:
            self.inlet.take([bytes(65536)])
        self.assertLessEqual(self.inlet._heldBytes, HELD_INPUT + 65536)
        self.a.resume(1)
        self.assertFalse(self.outside.paused)

    def test_slowSecondaryPausesTheOutside(self) -> None:
        self.protect()
        self.left.pauseProducing()
        while not self.outside.paused:
            self.inlet.take([bytes(65536)])
        self.left.resumeProducing()
        self.assertFalse(self.outside.paused)

    def test_slowPrimaryPausesTheSecondary(self) -> None:
        self.protect()
        self.right.pauseProducing()
        while not self.secondary.paused:
            self.secondary.receiver([bytes(65536)])
        self.b.end()
        self.assertFalse(self.secondary.paused)

    def test_scans(self) -> None:
        self.protect()
        self.clock.advance(1)
        self.clock.advance(1)
        self.assertGreaterEqual(self.gate.scans, 2)
        self.a.end()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertTrue(self.gate.suspended)

    def test_endGivesTheGuestWhatWasHeld(self) -> None:
        self.protect()
        self.a.hold()
        self.inlet.take([b"held"])
        self.a.end()
        self.inlet.take([b"after"])
        self.carry()
        self.assertEqual(self.primary.got, [b"held", b"after"])
        self.assertEqual(self.secondary.got, [])
