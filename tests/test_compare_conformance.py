"""
What leaves our comparer and what leaves QEMU's, of the same frames; and ours against what is right.

Every difference is one of L{DELIBERATE}, and docs/compare.md says why.
"""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from colotx.errors import ConfigError
from colotx.lab.comparepeer import (
    CompareOptions,
    CompareProcess,
    ComparerPeer,
    LocalComparer,
    RemoteComparer,
    ourCommand,
    qemuCommand,
)
from colotx.lab.corpus import Case, corpus

SEED = 1
DOCUMENT = Path(__file__).parents[1] / "docs" / "compare.md"

QEMU, OURS, ORDER = "QEMU lets more out", "ours lets more out", "the same in another order"

Turn = tuple[bool, Sequence[bytes]]
"""Whether the primary says it, and what."""


@dataclass(frozen=True, slots=True)
class Deliberate:
    """
    A difference that is meant.

    @ivar name: in docs/compare.md, too.
    @ivar kinds: what the difference is.
    @ivar categories: a pattern of the cases' categories.
    @ivar always: it can be seen every time, and does not depend on chance.
    """

    name: str
    kinds: frozenset[str]
    categories: str
    always: bool = True


DELIBERATE = (
    Deliberate("unseen", frozenset({QEMU}), r".*"),
    Deliberate("no-payload", frozenset({QEMU}), r"tcp-(accept-refused|fin-early)"),
    Deliberate("acknowledged", frozenset({QEMU}), r"tcp-ack-ahead-data"),
    Deliberate("repeated-otherwise", frozenset({QEMU}), r"tcp-retransmitted-other"),
    Deliberate("other-vlan", frozenset({QEMU}), r"vlan-other"),
    Deliberate("in-order", frozenset({QEMU}), r"(udp|icmp\w*)-\w+(-\w+)?"),
    Deliberate("whole-datagrams", frozenset({QEMU}), r"fragments-(corrupted|lost)"),
    Deliberate("newest-first", frozenset({OURS, ORDER}), r"(udp|icmp|fragments)-.*"),
    Deliberate("ip-header", frozenset({OURS}), r"(udplite|sctp|dccp|gre)-.*"),
    Deliberate("padding", frozenset({OURS}), r"padding"),
    Deliberate("waits-for-more", frozenset({OURS}), r"tcp-(ack|keepalive|fin|lost-at-primary|wrap-ack)"),
    Deliberate(
        "cut-otherwise",
        frozenset({OURS}),
        r"tcp-(segmentation|offload|timestamps|wrap|reordered|retransmitted|fin|ack-piggyback)",
    ),
    Deliberate("sorted", frozenset({ORDER}), r"tcp-(reordered|retransmitted)"),
    Deliberate("backlog", frozenset({ORDER}), r".*", always=False),
    Deliberate("past-the-end", frozenset({QEMU, OURS}), r"cut-ports-.*", always=False),
)


def schedules(case: Case) -> Iterator[tuple[str, list[Turn]]]:
    """Who speaks when."""
    primary = [frame for frame, _ in case.pair.primary]
    secondary = case.pair.secondary
    yield "primary first", [(True, primary), (False, secondary)]
    yield "secondary first", [(False, secondary), (True, primary)]
    lockstep = []
    for ours, theirs in itertools.zip_longest(primary, secondary):
        lockstep += [(True, [ours])] if ours is not None else []
        lockstep += [(False, [theirs])] if theirs is not None else []
    yield "in lock-step", lockstep


def play(peer: ComparerPeer, turns: Sequence[Turn]) -> tuple[tuple[bytes, ...], bool]:
    """@return: what left, and whether a checkpoint was asked for."""
    left: tuple[bytes, ...] = ()
    asked = False
    for isPrimary, frames in turns:
        (peer.primary if isPrimary else peer.secondary)(frames)
        seen = peer.settle()
        left += seen.left
        asked = asked or seen.asked
    return left, asked


def isUnseen(case: Case) -> bool:
    """Whether QEMU takes the frames of this case for something it does not compare."""
    return bool(re.search(r" ipv6 | vlan |^(arp|unknown|cut-address)-", case.name))


def difference(ours: Sequence[bytes], qemu: Sequence[bytes]) -> set[str]:
    """@return: what differs."""
    counted, other = Counter(ours), Counter(qemu)
    kinds = {kind for kind, more in ((OURS, counted - other), (QEMU, other - counted)) if more}
    return kinds or ({ORDER} if list(ours) != list(qemu) else set())


def reasonFor(case: Case, kind: str) -> str | None:
    """@return: the name of what explains this difference."""
    for one in DELIBERATE:
        fits = kind in one.kinds and re.fullmatch(one.categories, case.category)
        if fits and (one.name != "unseen" or isUnseen(case)):
            return one.name
    return None


class ConformanceCase(SynchronousTestCase):
    """What the cases share: comparers, ended with the test."""

    def start(self, command: Sequence[str], options: CompareOptions) -> RemoteComparer:
        """@return: a comparer in a process."""
        directory = Path(tempfile.mkdtemp(prefix="colo-"))
        self.addCleanup(shutil.rmtree, directory, True)
        peer = RemoteComparer(CompareProcess(command, directory / "c"), options)
        self.addCleanup(peer.close)
        return peer

    def startQemu(self, options: CompareOptions) -> RemoteComparer:
        """@raise SkipTest: there is none."""
        try:
            command = qemuCommand(options)
        except ConfigError as error:
            raise SkipTest(str(error)) from None
        return self.start(command, options)


class RightTests(ConformanceCase):
    """Ours alone: nothing leaves that must not, everything that may does, and the checkpoint is asked for."""

    def check(self, case: Case, peer: ComparerPeer, turns: Sequence[Turn]) -> list[str]:
        """@return: what is wrong."""
        left, asked = play(peer, turns)
        wrong = case.judge(left)
        if asked and case.pair.wanted is False:
            wrong.append("asked for nothing")
        held = len(left) < len(case.pair.primary)
        if isinstance(peer, LocalComparer) and not asked and (held or case.pair.wanted):
            peer.wait(5)
            seen = peer.settle()
            if not seen.asked:
                wrong.append("not asked")
            if seen.left:
                wrong.append("left by a time-out")
        left += peer.checkpoint().left
        wrong += [f"after the checkpoint: {words}" for words in case.judge(left, all_=True)]
        primary, secondary = case.pair.later
        if primary:
            peer.primary(primary)
            peer.secondary(secondary)
            if peer.settle().left != primary:
                wrong.append("later: not all, or in another order")
            peer.checkpoint()
        return wrong

    def checkAll(self, peer: ComparerPeer, seed: int, varieties: int) -> None:
        """All cases, whoever is first."""
        wrong = []
        for case in corpus(seed, varieties):
            for schedule, turns in schedules(case):
                for words in self.check(case, peer, turns):
                    wrong.append(f"{case.name}, {schedule}: {words}")
        self.assertEqual(wrong, [])

    def test_inProcess(self) -> None:
        """With time-outs, and many varieties."""
        for seed in (SEED, 2, 3):
            self.checkAll(LocalComparer(CompareOptions()), seed, 4)

    def test_daemon(self) -> None:
        """As C{twistd colo --role=compare}."""
        options = CompareOptions()
        self.checkAll(self.start(ourCommand(options), options), SEED, 1)

    def test_daemonWithVirtioHeader(self) -> None:
        """With C{vnet_hdr_support}."""
        options = CompareOptions(vnetHeader=12)
        self.checkAll(self.start(ourCommand(options), options), SEED, 1)


class SameTests(ConformanceCase):
    """Ours and QEMU's."""

    def test_everyDifferenceIsDeliberate(self) -> None:
        """The whole corpus through both: what leaves differs only where it is meant to."""
        options = CompareOptions()
        ours, qemu = LocalComparer(options), self.startQemu(options)
        unlisted = []
        found: Counter[str] = Counter()
        same = 0
        for case in corpus(SEED):
            for schedule, turns in schedules(case):
                kinds = difference(play(ours, turns)[0], play(qemu, turns)[0])
                same += not kinds
                for kind in kinds:
                    reason = reasonFor(case, kind)
                    if reason is None:
                        unlisted.append(f"{case.name}, {schedule}: {kind}")
                    else:
                        found[reason] += 1
                ours.checkpoint()
                qemu.checkpoint()
        self.assertEqual(unlisted, [])
        self.assertGreater(same, 500)
        never = [one.name for one in DELIBERATE if one.always and not found[one.name]]
        self.assertEqual(never, [], "deliberate differences that are none")

    def test_documented(self) -> None:
        """docs/compare.md has all deliberate differences, and no other."""
        _, _, differences = DOCUMENT.read_text().partition("## How it differs")
        names = re.findall(r"^\| `([a-z-]+)` \|", differences, re.MULTILINE)
        self.assertEqual(names, [one.name for one in DELIBERATE])

    def test_notUnderstoodByQemuHasNoVerdict(self) -> None:
        """What is said of frames QEMU does not compare is true: all of them leave its comparer at once."""
        qemu = self.startQemu(CompareOptions())
        for case in corpus(SEED, 1):
            if isUnseen(case):
                frames = [frame for frame, _ in case.pair.primary]
                qemu.primary(frames)
                self.assertEqual(Counter(qemu.settle().left), Counter(frames), case.name)

    def test_timeOut(self) -> None:
        """A frame the secondary does not say: both ask for a checkpoint in time, again and again, and flush then."""
        options = CompareOptions(compareTimeout=400, expiredScanCycle=100)
        case = next(case for case in corpus(SEED, 1) if case.category == "tcp-behind")
        frames = [frame for frame, _ in case.pair.primary]
        for peer in (self.startQemu(options), self.start(ourCommand(options), options)):
            peer.primary(frames)
            seen = peer.settle()
            self.assertEqual((seen.left, seen.asked), ((), False))
            self.assertTrue(peer.waitForRequest(5))
            self.assertTrue(peer.waitForRequest(5))
            self.assertEqual(list(peer.checkpoint().left), frames)
