"""
Pairs of frame streams as two guests in lock-step send them, or nearly so, and what a correct comparer makes of each.

What is right follows from output commit alone, not from any comparer's ways: a frame of the primary may leave before a
checkpoint if the secondary's guest, taking over in this moment, would have said the same and will not be asked for
what it never had. For TCP: every byte of the segment (FIN is one) is among the bytes the secondary sent, and what it
acknowledges the secondary acknowledged. For everything else: the same payload, between the same two.

Every case comes from a seed and has addresses and ports of its own. What leaves in the end does not depend on which
of the two guests is ahead. The flows themselves are in L{colotx.lab.corpustcp} and L{colotx.lab.corpusother}.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from colotx.lab.corpusother import OTHER
from colotx.lab.corpuspair import Pair, Verdict
from colotx.lab.corpustcp import TCP_FLOWS
from colotx.lab.framekit import Path


@dataclass(frozen=True, slots=True)
class Case:
    """
    A pair with a name.

    @ivar category: what it is about, such as C{tcp-segmentation}.
    @ivar name: the category and the variety, such as C{tcp-segmentation ipv6 vlan 2}.
    """

    category: str
    name: str
    pair: Pair

    def judge(self, left: Sequence[bytes], all_: bool = False) -> list[str]:
        """
        @param left: what a comparer let out.
        @param all_: there was a checkpoint: everything must have left by now.
        @return: what is wrong with that: C{foreign} (not the primary's, or more often than the primary said it),
            C{leaked} (to be held), C{kept} (to leave), C{order}. Empty: nothing.
        """
        most, least = Counter[bytes](), Counter[bytes]()
        said = Counter(frame for frame, _ in self.pair.primary)
        for frame, verdict in self.pair.primary:
            most[frame] += all_ or verdict is not Verdict.HELD
            least[frame] += all_ or verdict is Verdict.LEAVES
        counted = Counter(left)
        wrong = []
        if counted - said:
            wrong.append("foreign")
        if (counted & said) - most:
            wrong.append("leaked")
        if least - counted:
            wrong.append("kept")
        if self.pair.ordered and not all_ and not wrong and not _inOrder(left, self.pair.primary):
            wrong.append("order")
        return wrong


def _inOrder(left: Sequence[bytes], primary: Sequence[tuple[bytes, Verdict]]) -> bool:
    rest = iter(frame for frame, _ in primary)
    return all(any(frame == said for said in rest) for frame in left)


def corpus(seed: int, varieties: int = 3) -> Iterator[Case]:
    """
    All cases.

    @param varieties: how many of each category on each kind of network.
    """
    number = 0
    for category, maker in (*TCP_FLOWS.items(), *OTHER.items()):
        for version in (4, 6):
            for tags in ((), (7,), (100, 7)):
                for variety in range(varieties if not tags else 1):
                    number += 1
                    chance = random.Random(f"{seed} {number}")
                    pair = maker(chance, _path(version, tags, number), _ports(number))
                    if pair is not None:
                        network = f"ipv{version}" + ("", " vlan", " qinq")[len(tags)]
                        yield Case(category, f"{category} {network} {variety}", pair)


def _path(version: int, tags: tuple[int, ...], number: int) -> Path:
    guest, client = 0x0A000002, 0x0A010000 + number
    if version == 4:
        return Path(4, guest.to_bytes(4, "big"), client.to_bytes(4, "big"), tags)
    prefix = bytes.fromhex("fd000000000000000000000000")[:12]
    return Path(6, prefix + guest.to_bytes(4, "big"), prefix + client.to_bytes(4, "big"), tags)


def _ports(number: int) -> tuple[int, int]:
    return 80, 20000 + number
