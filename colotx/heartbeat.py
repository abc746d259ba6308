"""
Is the peer alive? Decided from the clock alone.

L{HeartbeatMonitor} is told when bytes of the peer arrived and asked now and then for its opinion. It knows no
socket, no reactor and no message: whoever owns it (L{colotx.session.Session}) sends the heartbeats and calls
C{tick} when told. Silence alone never promotes anybody: a verdict here ends a session, and what follows is decided
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from colotx.errors import ConfigError, PeerTimeout

INTERVAL = 0.1
"""Default seconds between heartbeats."""

LIMIT = 0.3
"""Default seconds of silence after which the peer is lost."""

MAX_EXCUSES = 5
"""How many late checks in a row, with nothing heard in between, are blamed on this process."""


@dataclass(frozen=True, slots=True)
class Tick:
    """
    What to do now.

    @ivar beat: a heartbeat is due.
    @ivar wait: seconds until the next C{tick}.
    @ivar lost: the verdict, or None while the peer counts as alive. After one there are no more ticks.
    """

    beat: bool
    wait: float
    lost: PeerTimeout | None = None


class HeartbeatMonitor:
    """
    Watches one peer.

    Any byte counts as life. The trap is our own process: when it was blocked or paused, heartbeats may wait unread
    in the socket while the clock says that the limit has long passed. So a check that comes more than an interval
    late does not judge; the next one, an interval later and after the reactor has read its sockets, does.

    @ivar heard: when bytes of the peer last arrived, seconds of the owner's clock.
    @ivar silence: seconds between that and the verdict; None while there is none.
    """

    def __init__(self, now: float, interval: float = INTERVAL, limit: float = LIMIT) -> None:
        """
        @param now: the moment the peer was last known to live, seconds.
        @param interval: seconds between two heartbeats.
        @param limit: seconds of silence that mean death.
        @raise ConfigError: the limit leaves no room for one lost heartbeat.
        """
        if not 0 < interval * 2 <= limit:
            raise ConfigError(
                f"a heartbeat limit of {limit * 1000:g} ms needs an interval of at most half of it, "
                f"not {interval * 1000:g} ms"
            )
        self.heard = now
        self.silence: float | None = None
        self._interval = interval
        self._limit = limit
        self._nextBeat = now
        self._nextTick = now
        self._excuses = 0

    def life(self, now: float) -> None:
        """Bytes of the peer arrived, on whatever channel."""
        self.heard = now
        self._excuses = 0

    def tick(self, now: float) -> Tick:
        """Say what is due. Call it once after construction, then after each C{wait}."""
        late = now - self._nextTick > self._interval
        wait = self.heard + self._limit - now
        if wait <= 0:
            if not late or self._excuses >= MAX_EXCUSES:
                return Tick(False, 0, self._verdict(now))
            self._excuses += 1
            wait = self._interval
        beat = now >= self._nextBeat
        if beat:
            # From now, not from when it was due: a stall is not made up for by a burst.
            self._nextBeat = now + self._interval
        wait = min(wait, self._nextBeat - now)
        self._nextTick = now + wait
        return Tick(beat, wait)

    def end(self, now: float) -> float:
        """
        The peer was lost in another way (its connection ended).

        @return: seconds since it was last heard, which is then C{silence} too.
        """
        if self.silence is None:
            self.silence = now - self.heard
        return self.silence

    def _verdict(self, now: float) -> PeerTimeout:
        silence = self.end(now)
        return PeerTimeout(
            f"the peer was silent for {silence * 1000:.0f} ms (limit {self._limit * 1000:.0f} ms, "
            f"a heartbeat every {self._interval * 1000:.0f} ms)"
        )
