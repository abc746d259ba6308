"""
One flow that is no TCP connection, as the comparer judges it: datagrams, messages, frames.

A datagram of the primary is equal when the secondary sent one of the same flow with the same content; each of the
secondary's serves once. It is looked for among all that the secondary sent and the primary did not, so the
secondary may say things in another order. What leaves keeps the primary's order: an equal one waits behind one that
is not.

Two datagrams said at about the same time that differ are a difference at once, not only after the time-out; should
the secondary say the right one after all, it counts. This module knows no frames and no clock.
"""

from __future__ import annotations

from collections import deque

from colotx.evidence import Difference
from colotx.packets import Flow

TOGETHER = 0.2
"""Seconds. What the two guests say within this time is taken for the answer to the same cause."""

Datagram = tuple[int, float, tuple[bytes, ...], bytes]
"""Held: number of arrival, time of arrival (s), frames, content."""


class DatagramFlow:
    """
    One flow without a stream.

    @ivar theirs: (content, time of arrival) that the secondary said and the primary did not, in order.
    @ivar flow, waiting, seen, asked: as of L{colotx._compare_tcp.TcpFlow}.
    """

    __slots__ = ("asked", "flow", "seen", "theirs", "waiting")

    def __init__(self, flow: Flow, seen: float) -> None:
        self.flow = flow
        self.theirs: deque[tuple[bytes, float]] = deque()
        self.waiting: deque[Datagram] = deque()
        self.seen = seen
        self.asked = False

    def advance(self, leaving: list[bytes]) -> Difference | None:
        """As L{colotx._compare_tcp.TcpFlow.advance}, but what differs may agree later."""
        waiting, theirs = self.waiting, self.theirs
        while waiting:
            if theirs and theirs[0][0] == waiting[0][3]:
                theirs.popleft()  # the common case of judge()
            elif (verdict := self.judge(waiting[0])) is not True:
                if not verdict:
                    return None
                return verdict
            leaving += waiting.popleft()[2]
        return None

    def judge(self, datagram: Datagram) -> bool | Difference:
        """As L{colotx._compare_tcp.TcpFlow.judge}."""
        _, since, _, content = datagram
        for at, (theirs, _) in enumerate(self.theirs):
            if theirs == content:
                del self.theirs[at]
                return True
        for theirs, when in self.theirs:
            if when > since - TOGETHER:
                reason = "content" if len(theirs) == len(content) else "length"
                wrong = next(
                    (at for at, pair in enumerate(zip(theirs, content, strict=False)) if pair[0] != pair[1]),
                    0,
                )
                first = max(0, wrong - 16)
                return Difference(reason, wrong, content[first:], theirs[first:])
        return False

    def lacking(self, datagram: Datagram) -> Difference:
        """As L{colotx._compare_tcp.TcpFlow.lacking}."""
        return Difference("time-out", 0, datagram[3], b"", "the secondary did not send it")

    def expire(self, before: float) -> None:
        """Forget what the secondary said before this time."""
        theirs = self.theirs
        while theirs and theirs[0][1] < before:
            theirs.popleft()
