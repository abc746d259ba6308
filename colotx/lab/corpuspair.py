"""
What two guests said of one flow, with what a correct comparer makes of it: the words of the corpus' flows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from colotx.lab.framekit import Path


class Verdict(Enum):
    """What a correct comparer does with a frame of the primary before a checkpoint."""

    LEAVES = "leaves"
    HELD = "is held"
    EITHER = "may leave"


@dataclass(frozen=True, slots=True)
class Pair:
    """
    What two guests said in one case.

    @ivar primary: frames, each with its verdict.
    @ivar wanted: whether a checkpoint must be asked for, at once or after a time-out; C{None}: it may be, and must
        be if a frame is held.
    @ivar ordered: whether the primary's order must be kept among those that leave.
    @ivar later: more frames of both guests, the same but for what may differ, of the same flow, said after the
        checkpoint that ends the case: the primary's all leave.
    """

    primary: tuple[tuple[bytes, Verdict], ...]
    secondary: tuple[bytes, ...]
    wanted: bool | None
    ordered: bool = True
    later: tuple[tuple[bytes, ...], tuple[bytes, ...]] = ((), ())


Maker = Callable[[random.Random, Path, tuple[int, int]], Pair | None]
"""Makes one flow's pair: from chance, the guest's path to the other one, and ports. C{None}: not on this path."""
