"""
Evidence: what the two guests said differently, kept for the operator.

Bounded: the last differences in a ring, counters by reason and by guess, and the flows that cost most checkpoints.
It knows no frames: it is given a flow, and what of it differed.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from colotx.packets import Flow, describeFlow

_FEW = 32
"""How many bytes of each side are kept."""
_MAX_FLOWS = 256

_CLOCK_TIME = re.compile(rb"\d\d:\d\d:\d\d|\d{4}-\d\d-\d\d|(?<!\d)1\d{9}(?!\d)|(?<!\d)1\d{12}(?!\d)")
_IDENTIFIER = re.compile(rb"[0-9a-fA-F]{8,}|[0-9a-fA-F]{4}-[0-9a-fA-F]{4}|[A-Za-z0-9+/_-]{20,}")
_AN_HOUR = 3600
_PLAUSIBLE_TIMES = range(1_000_000_000, 4_000_000_000)
"""Seconds since 1970 that a 32 bit number may mean."""


class Difference(NamedTuple):
    """
    What differed, or what was missing.

    @ivar reason: C{content}, C{length}, C{time-out}, C{queue-full}, C{table-full} or C{memory-full}: why a checkpoint
        was asked for.
    @ivar offset: where in the flow's stream or datagram, bytes; None: not known.
    @ivar primary: what the primary said there.
    @ivar secondary: what the secondary said there; empty: nothing.
    @ivar note: in words, what more is known.
    """

    reason: str
    offset: int | None
    primary: bytes
    secondary: bytes
    note: str = ""


@dataclass(frozen=True, slots=True)
class Exhibit:
    """
    One piece of evidence.

    @ivar time: when, seconds since 1970.
    @ivar flow: which flow, see L{describeFlow}.
    @ivar difference: what differed.
    @ivar guess: why, see L{guessCause}.
    """

    time: float
    flow: str
    difference: Difference
    guess: str

    def describe(self) -> dict[str, object]:
        """@return: JSON-able; bytes in hexadecimal."""
        difference = self.difference
        return {
            "time": self.time,
            "flow": self.flow,
            "direction": "guest to client",
            "reason": difference.reason,
            "guess": self.guess,
            "offset": difference.offset,
            "primary": difference.primary[:_FEW].hex(),
            "secondary": difference.secondary[:_FEW].hex(),
            "note": difference.note,
        }


class Evidence:
    """
    The collection.

    @ivar reasons: how many differences of each reason, since the start.
    @ivar guesses: how many of each guess.
    """

    def __init__(self, ring: int = 64, clock: Callable[[], float] = time.time) -> None:
        """
        @param ring: how many exhibits are kept.
        @param clock: seconds since 1970.
        """
        self._clock = clock
        self._ring: deque[Exhibit] = deque(maxlen=ring)
        self.reasons: Counter[str] = Counter()
        self.guesses: Counter[str] = Counter()
        self._flows: Counter[str] = Counter()

    def record(self, flow: Flow | None, difference: Difference) -> Exhibit:
        """
        A flow asked for a checkpoint.

        @param flow: None: it was no one flow's fault.
        """
        name = "all flows" if flow is None else describeFlow(flow)
        few = difference._replace(primary=difference.primary[:_FEW], secondary=difference.secondary[:_FEW])
        exhibit = Exhibit(self._clock(), name, few, guessCause(difference))
        self._ring.append(exhibit)
        self.reasons[difference.reason] += 1
        self.guesses[exhibit.guess] += 1
        self._flows[name] += 1
        if len(self._flows) > _MAX_FLOWS:
            self._flows = Counter(dict(self._flows.most_common(_MAX_FLOWS // 2)))
        return exhibit

    @property
    def exhibits(self) -> list[Exhibit]:
        """The last ones, oldest first."""
        return list(self._ring)

    def describe(self) -> dict[str, object]:
        """@return: JSON-able: C{reasons}, C{guesses}, C{flows} (those that cost most first), C{last}."""
        return {
            "reasons": dict(self.reasons),
            "guesses": dict(self.guesses),
            "flows": [{"flow": name, "checkpoints": count} for name, count in self._flows.most_common(16)],
            "last": [exhibit.describe() for exhibit in self._ring],
        }


def guessCause(difference: Difference) -> str:
    """
    Guess from the bytes around a difference why two guests in lock-step said different things.

    @return: C{time stamp}, C{id}, C{ordering}, C{length}, C{content}; or the reason when it is about no bytes.
    """
    ours, theirs = difference.primary[:_FEW], difference.secondary[:_FEW]
    if difference.reason not in ("content", "length"):
        return difference.reason
    if _CLOCK_TIME.search(ours) and _CLOCK_TIME.search(theirs):
        return "time stamp"
    if _binaryTimes(ours, theirs):
        return "time stamp"
    if difference.reason == "length":
        return "length"
    if sorted(ours) == sorted(theirs):
        return "ordering"
    if _IDENTIFIER.search(ours) and _IDENTIFIER.search(theirs):
        return "id"
    return "content"


def _binaryTimes(ours: bytes, theirs: bytes) -> bool:
    """Whether 32 bits around the first differing byte may be two times less than an hour apart."""
    wrong = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if wrong is None:
        return False
    for first in range(max(0, wrong - 3), wrong + 1):
        if first + 4 > min(len(ours), len(theirs)) or all(
            0x20 <= byte < 0x7F for byte in ours[first : first + 4]
        ):
            break
        for order in ("big", "little"):
            a = int.from_bytes(ours[first : first + 4], order)
            b = int.from_bytes(theirs[first : first + 4], order)
            if a in _PLAUSIBLE_TIMES and b in _PLAUSIBLE_TIMES and abs(a - b) < _AN_HOUR:
                return True
    return False
