"""The output gate."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from colotx.gate import GateLimits, OutputGate
from colotx.interfaces import IOutputGate


class GateTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.left: list[bytes] = []
        self.wanted: list[str] = []
        self.throttled: list[bool] = []
        self.gate = OutputGate(
            self.left.extend, self.wanted.append, self.throttled.append, GateLimits(10, 20)
        )

    def test_interface(self) -> None:
        verifyObject(IOutputGate, self.gate)

    def test_openLetsPass(self) -> None:
        self.gate.hold([b"a"])
        self.assertEqual(self.left, [b"a"])

    def test_shutHoldsUntilTheEpochIsReleased(self) -> None:
        self.gate.shut()
        self.gate.hold([b"a", b"b"])
        first = self.gate.closeEpoch()
        self.gate.hold([b"c"])
        self.assertEqual(self.left, [])
        self.gate.release(first)
        self.assertEqual(self.left, [b"a", b"b"])
        self.gate.release(first)
        self.gate.release(self.gate.closeEpoch())
        self.assertEqual(self.left, [b"a", b"b", b"c"])

    def test_releaseTakesEarlierEpochsAlong(self) -> None:
        self.gate.shut()
        for frame in (b"a", b"b", b"c"):
            self.gate.hold([frame])
            epoch = self.gate.closeEpoch()
        self.gate.release(epoch - 1)
        self.assertEqual(self.left, [b"a", b"b"])

    def test_openReleasesAll(self) -> None:
        self.gate.shut()
        self.gate.hold([b"a"])
        self.gate.closeEpoch()
        self.gate.hold([b"b"])
        self.gate.open()
        self.gate.hold([b"c"])
        self.assertEqual(self.left, [b"a", b"b", b"c"])
        self.assertEqual(self.gate.statistics.heldBytes, 0)

    def test_highWaterAsksOnceAnEpoch(self) -> None:
        self.gate.shut()
        self.gate.hold([bytes(10)])
        self.assertEqual(self.wanted, [])
        self.gate.hold([b"x"])
        self.gate.hold([b"x"])
        self.assertEqual(len(self.wanted), 1)
        self.gate.closeEpoch()
        self.gate.hold([b"x"])
        self.assertEqual(len(self.wanted), 2)

    def test_limitThrottlesAndReleaseRelaxes(self) -> None:
        self.gate.shut()
        self.gate.hold([bytes(15)])
        epoch = self.gate.closeEpoch()
        self.gate.hold([bytes(6)])
        self.gate.hold([bytes(1)])
        self.assertEqual(self.throttled, [True])
        self.gate.release(epoch)
        self.assertEqual(self.throttled, [True, False])
        self.assertEqual(self.gate.statistics.throttled, 1)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.sampled_from(["hold", "close", "release", "releaseOld", "open", "shut"]), max_size=40))
    def test_everyFrameLeavesOnceInOrderAndNeverEarly(self, steps: list[str]) -> None:
        left: list[bytes] = []
        gate = OutputGate(left.extend, lambda reason: None, lambda on: None)
        sent, allowed, closed = 0, 0, [(0, 0)]
        for step in steps:
            if step == "hold":
                gate.hold([b"%d" % sent])
                sent += 1
            elif step == "close":
                closed.append((gate.closeEpoch(), sent))
            elif step.startswith("release"):
                epoch, covered = closed[-1 if step == "release" else len(closed) // 2]
                gate.release(epoch)
                allowed = max(allowed, covered)
            else:
                getattr(gate, step)()
            if gate.isOpen:
                allowed = sent
            self.assertEqual(left, [b"%d" % n for n in range(len(left))])
            self.assertLessEqual(len(left), allowed)
        gate.open()
        self.assertEqual(left, [b"%d" % n for n in range(sent)])
        self.assertEqual(gate.statistics.heldFrames, 0)
