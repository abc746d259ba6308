"""When a checkpoint is due."""

from __future__ import annotations

from twisted.internet.defer import ensureDeferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from colotx.trigger import CheckpointTrigger


class TriggerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.trigger = CheckpointTrigger(self.clock, 100)

    def due(self) -> str | None:
        d = ensureDeferred(self.trigger.wait())
        if d.called:
            self.trigger.reset()
            return self.successResultOf(d)
        d.addErrback(lambda failure: None)
        d.cancel()
        return None

    def test_timer(self) -> None:
        self.trigger.arm()
        self.clock.advance(0.099)
        self.assertIsNone(self.due())
        self.clock.advance(0.001)
        self.assertEqual(self.due(), "timer")

    def test_waiterWakes(self) -> None:
        self.trigger.arm()
        d = ensureDeferred(self.trigger.wait())
        self.assertNoResult(d)
        self.clock.advance(0.1)
        self.assertEqual(self.successResultOf(d), "timer")

    def test_keepsToTheGrid(self) -> None:
        """Late timers do not add up: 10 s at 100 ms are 100 checkpoints."""
        self.trigger.arm()
        count = 0
        for _ in range(10_000 // 7):
            self.clock.advance(0.007)
            count += self.due() is not None
        self.assertIn(count, (99, 100))

    def test_aLongStallIsNotMadeUpFor(self) -> None:
        self.trigger.arm()
        self.clock.advance(1.05)
        self.assertEqual(self.due(), "timer")
        self.assertIsNone(self.due())
        self.clock.advance(0.05)
        self.assertIsNone(self.due())

    def test_requestsCoalesceUntilReset(self) -> None:
        self.trigger.notify("one")
        self.trigger.notify("two")
        self.assertEqual(self.due(), "one")
        self.assertIsNone(self.due())
        self.assertEqual(self.trigger.early, 2)

    def test_requestRearmsTheTimer(self) -> None:
        self.trigger.arm()
        self.clock.advance(0.09)
        self.trigger.notify("early")
        self.assertEqual(self.due(), "early")
        self.clock.advance(0.09)
        self.assertIsNone(self.due())
        self.clock.advance(0.01)
        self.assertEqual(self.due(), "timer")

    def test_settingTheDelayNotifiesAtOnce(self) -> None:
        self.trigger.arm()
        self.trigger.delay = 500
        self.assertEqual(self.due(), "x-checkpoint-delay was set")
        self.clock.advance(0.499)
        self.assertIsNone(self.due())
        self.clock.advance(0.001)
        self.assertEqual(self.due(), "timer")

    def test_settingTheDelayWhileDisarmedWaits(self) -> None:
        self.trigger.delay = 500
        self.assertIsNone(self.due())

    def test_disarmForgets(self) -> None:
        self.trigger.arm()
        self.trigger.notify("early")
        self.trigger.disarm()
        self.assertIsNone(self.due())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_floor(self) -> None:
        """However often it is notified, the guest gets its time between two checkpoints."""
        self.trigger.floor = 20
        self.trigger.arm()
        self.clock.advance(0.05)
        self.trigger.resumed()
        self.trigger.notify("a difference")
        self.trigger.notify("another")
        d = ensureDeferred(self.trigger.wait())
        self.clock.advance(0.019)
        self.assertNoResult(d)
        self.clock.advance(0.001)
        self.assertEqual(self.successResultOf(d), "a difference")
        self.assertEqual((self.trigger.early, self.trigger.deferred), (2, 1))

    def test_floorIsPast(self) -> None:
        self.trigger.floor = 20
        self.trigger.arm()
        self.trigger.resumed()
        self.clock.advance(0.03)
        self.trigger.notify("a difference")
        self.assertEqual(self.due(), "a difference")
        self.assertEqual(self.trigger.deferred, 0)
