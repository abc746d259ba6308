"""
Tests for L{colotx.heartbeat}: a clock and nothing else.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ConfigError, PeerTimeout
from colotx.heartbeat import MAX_EXCUSES, HeartbeatMonitor


class MonitorTests(SynchronousTestCase):
    """Times in seconds; interval 0.1, limit 0.3."""

    def setUp(self):
        self.monitor = HeartbeatMonitor(0.0, 0.1, 0.3)

    def run_(self, now, until):
        """Tick exactly when told, from C{now} to before C{until}; return the verdict and when it fell."""
        while now < until:
            tick = self.monitor.tick(now)
            if tick.lost is not None:
                return tick.lost, now
            now += tick.wait
        return None, now

    def test_beats(self):
        """A heartbeat is due at once and then every interval."""
        beats, now = [], 0.0
        while now < 0.95:
            self.monitor.life(now)
            tick = self.monitor.tick(now)
            if tick.beat:
                beats.append(round(now, 3))
            now += tick.wait
        self.assertEqual(beats, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])

    def test_lostAtLimit(self):
        """Silence is noticed when the limit has passed, not an interval later."""
        self.monitor.tick(0.0)
        self.monitor.life(0.05)
        lost, now = self.run_(0.1, 2.0)
        self.assertIsInstance(lost, PeerTimeout)
        self.assertAlmostEqual(now, 0.35)
        self.assertAlmostEqual(self.monitor.silence, 0.3)
        self.assertEqual(str(lost), "the peer was silent for 300 ms (limit 300 ms, a heartbeat every 100 ms)")

    def test_aliveJustBefore(self):
        self.monitor.tick(0.0)
        self.monitor.life(0.05)
        self.assertEqual(self.run_(0.1, 0.34)[0], None)
        self.monitor.life(0.34)
        self.assertEqual(self.run_(0.35, 0.63)[0], None)

    def test_ownStall(self):
        """A check that comes late does not judge; the peer's bytes, read right after it, save it."""
        self.monitor.tick(0.0)
        tick = self.monitor.tick(5.0)
        self.assertIsNone(tick.lost)
        self.assertTrue(tick.beat)
        self.assertAlmostEqual(tick.wait, 0.1)
        self.monitor.life(5.001)
        self.assertIsNone(self.monitor.tick(5.1).lost)

    def test_ownStallThenSilence(self):
        """When nothing was waiting unread, the verdict falls an interval after the stall."""
        self.monitor.tick(0.0)
        self.assertIsNone(self.monitor.tick(5.0).lost)
        self.assertIsInstance(self.monitor.tick(5.1).lost, PeerTimeout)
        self.assertAlmostEqual(self.monitor.silence, 5.1)

    def test_stallWithinTolerance(self):
        """A check that is late by less than an interval judges."""
        self.monitor.tick(0.0)
        self.monitor.tick(0.1)
        self.monitor.tick(0.2)
        self.assertIsInstance(self.monitor.tick(0.39).lost, PeerTimeout)

    def test_excusesEnd(self):
        """A process that is late all the time cannot put off the verdict for ever."""
        now = 0.0
        self.monitor.tick(now)
        for _ in range(MAX_EXCUSES):
            now += 1.0
            self.assertIsNone(self.monitor.tick(now).lost)
        self.assertIsInstance(self.monitor.tick(now + 1.0).lost, PeerTimeout)

    def test_excusesAreForgiven(self):
        now = 0.0
        self.monitor.tick(now)
        for _ in range(MAX_EXCUSES * 3):
            now += 1.0
            self.assertIsNone(self.monitor.tick(now).lost)
            self.monitor.life(now)

    def test_noBurst(self):
        """After a stall one heartbeat goes out, not all that were missed."""
        self.monitor.tick(0.0)
        self.monitor.tick(5.0)
        self.monitor.life(5.0)
        self.assertFalse(self.monitor.tick(5.05).beat)

    def test_end(self):
        """A connection that ended: the silence until then is kept."""
        self.monitor.life(1.0)
        self.assertAlmostEqual(self.monitor.end(1.04), 0.04)
        self.assertAlmostEqual(self.monitor.end(3.0), 0.04)
        self.assertAlmostEqual(self.monitor.silence, 0.04)

    def test_badSettings(self):
        for interval, limit in (0.1, 0.15), (0.0, 1.0), (-1.0, 1.0):
            error = self.assertRaises(ConfigError, HeartbeatMonitor, 0.0, interval, limit)
            self.assertIn("at most half", str(error))

    @given(
        st.lists(st.floats(0, 0.09), max_size=30),
        st.floats(0.05, 0.2),
        st.floats(2.0, 5.0),
    )
    def test_punctualPeer(self, lateness, interval, factor):
        """A peer that is heard every interval is never lost, however late (within an interval) we are."""
        monitor = HeartbeatMonitor(0.0, interval, interval * factor)
        now = 0.0
        for late in lateness:
            tick = monitor.tick(now)
            self.assertIsNone(tick.lost)
            self.assertGreater(tick.wait, 0)
            now += tick.wait + min(late, interval / 2)
            monitor.life(now)
