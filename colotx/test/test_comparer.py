"""Tests for L{colotx.comparer} and its parts: each rule once, by frames."""

from __future__ import annotations

import struct

from twisted.trial.unittest import SynchronousTestCase

from colotx.compare import CompareLimits
from colotx.test.framekit import (
    ACK,
    CLIENT6,
    FIN,
    GUEST6,
    PSH,
    RST,
    SYN,
    Bench,
    ethernet,
    ip,
    segment,
    tcp,
    udp,
)

SIX = {"source": GUEST6, "destination": CLIENT6}


class Agreement(SynchronousTestCase):
    """What both said leaves, whoever was first."""

    def both(self, ours: bytes, theirs: bytes) -> None:
        for primaryFirst in (True, False):
            bench = Bench()
            # twice, since the first frame of a flow takes the general way
            for _ in range(2):
                if primaryFirst:
                    self.assertEqual(bench.primary(ours), [])
                    self.assertEqual(bench.secondary(theirs), [ours])
                else:
                    self.assertEqual(bench.secondary(theirs), [])
                    self.assertEqual(bench.primary(ours), [ours])
                bench.comparer.flush()
            self.assertEqual(bench.asked, [])
            self.assertEqual(bench.comparer.statistics.released, 2)

    def never(self, ours: bytes, theirs: bytes) -> None:
        for primaryFirst in (True, False):
            bench = Bench()
            calls = [(bench.primary, ours), (bench.secondary, theirs)]
            for call, frame in calls if primaryFirst else reversed(calls):
                self.assertEqual(call(frame), [])
            bench.wait(4)
            self.assertEqual(bench.left, [])
            self.assertEqual(len(bench.asked), 1)
            self.assertEqual(bench.comparer.flush(), [ours])

    def test_tcp(self) -> None:
        for how in ({}, SIX, {"vlan": 7}, {"vlan": 7, **SIX}, {"options": b"\1" * 4}, {"pad": True}):
            with self.subTest(how):
                self.both(
                    tcp(9, b"x", stamp=1, ident=1, ttl=64, **how),
                    tcp(9, b"x", stamp=2, ident=2, ttl=63, **how),
                )
                self.both(tcp(9, b"", **how), tcp(9, b"", flags=ACK | PSH, **how))
                self.never(tcp(9, b"x", **how), tcp(9, b"y", **how))
                self.never(tcp(9, b"x", **how), tcp(10, b"x", **how))
                self.never(tcp(9, b"x", ack=2, **how), tcp(9, b"x", ack=1, **how))
                self.never(tcp(9, b"x", **how), tcp(9, b"x", port=4712, **how))

    def test_paddingIsNoPayload(self) -> None:
        self.never(tcp(9, b"x\0", pad=True), tcp(9, b"x", pad=True))
        self.both(tcp(9, b"x", pad=True), tcp(9, b"x"))

    def test_udp(self) -> None:
        for how in ({}, SIX, {"vlan": 7}, {"options": b"\1" * 4}):
            with self.subTest(how):
                self.both(udp(b"x", ident=1, ttl=64, **how), udp(b"x", ident=2, ttl=63, **how))
                self.never(udp(b"x", **how), udp(b"y", **how))
                self.never(udp(b"x", **how), udp(b"xy", **how))
                self.never(udp(b"x", **how), udp(b"x", port=1, **how))
                self.never(udp(b"x", **{**how, "vlan": 8}), udp(b"x", **{**how, "vlan": 9}))

    def test_portProtocols(self) -> None:
        for protocol in (33, 132, 136):
            body = struct.pack(">HH", 1, 2) + bytes(12)
            self.both(ip(protocol, body + b"a", ident=1), ip(protocol, body + b"a", ident=2))
            self.never(ip(protocol, body + b"a"), ip(protocol, body + b"b"))

    def test_icmp(self) -> None:
        for how, protocol, kind in (({}, 1, 0), (SIX, 58, 129)):
            ping = struct.pack(">BBHHH", kind, 0, 0, 77, 1)
            other = struct.pack(">BBHHH", kind, 0, 0, 78, 1)
            self.both(ip(protocol, ping + b"a", ident=1, **how), ip(protocol, ping + b"a", ident=2, **how))
            self.never(ip(protocol, ping + b"a", **how), ip(protocol, ping + b"b", **how))
            bench = Bench()
            bench.primary(ip(protocol, ping, **how), ip(protocol, other, **how))
            self.assertEqual(bench.secondary(ip(protocol, other, **how)), [ip(protocol, other, **how)])

    def test_everythingElse(self) -> None:
        arp = b"\0\1\x08\0\6\4\0\2" + bytes(20)
        for one, two in (
            (ethernet(0x0806, arp), ethernet(0x0806, arp[:-1] + b"\1")),
            (ethernet(0x88CC, b"lldp"), ethernet(0x88CC, b"LLDP")),
            (ip(47, b"gre"), ip(47, b"GRE")),
            (b"short", b"SHORT"),
        ):
            self.both(one, one)
            self.never(one, two)

    def test_truncated(self) -> None:
        whole = tcp(9, b"hello")
        for length in range(len(whole)):
            self.both(whole[:length], whole[:length])

    def test_offset(self) -> None:
        for frame in (
            tcp(9, b"x"),
            tcp(9, b"x", **SIX),
            udp(b"x"),
            udp(b"x", vlan=3),
            ethernet(0x88CC, b"x"),
        ):
            bench = Bench()
            for _ in range(2):
                bench.comparer.secondary([b"B" * 12 + frame], 12)
                bench.comparer.primary([b"A" * 12 + frame], 12)
            self.assertEqual(bench.left, [b"A" * 12 + frame] * 2)


class TcpRules(SynchronousTestCase):
    """Sequence space."""

    def test_otherBoundaries(self) -> None:
        bench = Bench()
        bench.secondary(tcp(100, b"abcdefgh"), tcp(108, b"ij"))
        frames = [tcp(100, b"abc"), tcp(103, b"defghi"), tcp(109, b"j")]
        self.assertEqual(bench.primary(*frames), frames)

    def test_longerRepetition(self) -> None:
        bench = Bench()
        bench.primary(tcp(1, b"ab"), tcp(3, b"cd"))
        self.assertEqual(bench.secondary(tcp(1, b"ab")), [tcp(1, b"ab")])
        self.assertEqual(bench.secondary(tcp(1, b"abcd")), [tcp(3, b"cd")])

    def test_secondaryFarAhead(self) -> None:
        bench = Bench()
        said = [tcp(at, b"x") for at in range(600)]
        bench.secondary(said[0])
        bench.primary(said[0])
        for one in said[1:]:
            bench.secondary(one)
        self.assertEqual(bench.primary(*said[1:]), said[1:])

    def test_differentForGood(self) -> None:
        bench = Bench()
        bench.secondary(tcp(1, b"aX"))
        bench.primary(tcp(1, b"ab"))
        self.assertEqual(bench.secondary(tcp(1, b"abc")), [])
        self.assertEqual(len(bench.asked), 1)

    def test_retransmissionIsJudgedByWhatWasSeen(self) -> None:
        bench = Bench()
        bench.secondary(tcp(100, b"abcd"), tcp(104, b"efgh"))
        bench.primary(tcp(100, b"abcd"), tcp(104, b"efgh"))
        self.assertEqual(bench.primary(tcp(102, b"cdef")), [tcp(102, b"cdef")])
        self.assertEqual(bench.primary(tcp(102, b"cdEf")), [])
        self.assertEqual(len(bench.asked), 1)

    def test_orderIsKept(self) -> None:
        bench = Bench()
        frames = [tcp(100, b"abcd"), tcp(104, b"efgh"), tcp(108)]
        bench.primary(*frames)
        self.assertEqual(bench.secondary(tcp(104, b"efgh")), [])
        self.assertEqual(bench.primary(tcp(104, b"efgh")), [])
        self.assertEqual(bench.secondary(tcp(100, b"abcd")), [*frames, tcp(104, b"efgh")])

    def test_wrap(self) -> None:
        bench = Bench()
        bench.secondary(tcp(0xFFFFFFFE, b"abcdef", ack=0xFFFFFFFF), tcp(4, b"g", ack=3))
        frames = [tcp(0xFFFFFFFE, b"abc", ack=0xFFFFFFF0), tcp(1, b"defg", ack=2)]
        self.assertEqual(bench.primary(*frames), frames)
        self.assertEqual(bench.primary(tcp(5, ack=4)), [])

    def test_pureAckWaits(self) -> None:
        bench = Bench()
        self.assertEqual(bench.primary(tcp(1, ack=50)), [])
        self.assertEqual(bench.secondary(tcp(1, ack=49)), [])
        self.assertEqual(bench.secondary(tcp(1, ack=80)), [tcp(1, ack=50)])
        self.assertEqual(bench.secondary(tcp(1, ack=60)), [])
        self.assertEqual(bench.primary(tcp(1, ack=80)), [tcp(1, ack=80)])
        self.assertEqual(bench.asked, [])

    def test_finAtTheSamePlace(self) -> None:
        bench = Bench()
        bench.primary(tcp(1, b"ab", flags=ACK | FIN))
        self.assertEqual(bench.secondary(tcp(1, b"ab")), [])
        self.assertEqual(bench.secondary(tcp(3, flags=ACK | FIN)), [tcp(1, b"ab", flags=ACK | FIN)])

    def test_finElsewhere(self) -> None:
        for theirs in ([tcp(1, b"abc")], [tcp(1, b"a", flags=ACK | FIN)], [tcp(1, b"abc", flags=ACK | FIN)]):
            bench = Bench()
            bench.primary(tcp(1, b"ab", flags=ACK | FIN))
            self.assertEqual(bench.secondary(*theirs), [])
            self.assertEqual(bench.evidence.reasons, {"length": 1})

    def test_synWithAnotherNumber(self) -> None:
        bench = Bench()
        ours = tcp(1000, ack=7, flags=SYN | ACK)
        self.assertEqual(bench.primary(ours), [])
        self.assertEqual(bench.secondary(tcp(5000, ack=7, flags=SYN | ACK)), [ours])
        self.assertEqual(bench.primary(ours), [ours])
        bench.secondary(tcp(1001, b"hi", ack=7))
        self.assertEqual(bench.primary(tcp(1001, b"hi", ack=7)), [tcp(1001, b"hi", ack=7)])

    def test_synNeedsTheSame(self) -> None:
        ours = tcp(1000, ack=7, flags=SYN | ACK)
        for theirs in (tcp(1, ack=8, flags=SYN | ACK), tcp(1, ack=7, flags=SYN), tcp(1, ack=7)):
            bench = Bench()
            bench.primary(ours)
            self.assertEqual(bench.secondary(theirs), [])

    def test_synBeginsAfresh(self) -> None:
        bench = Bench()
        first, second = tcp(1000, flags=SYN), tcp(7000, flags=SYN)
        bench.secondary(tcp(1, flags=SYN), tcp(1001, b"old"))
        self.assertEqual(bench.primary(first, tcp(1001, b"old")), [first, tcp(1001, b"old")])
        self.assertEqual(bench.primary(second), [], "the secondary began only one")
        self.assertEqual(bench.secondary(tcp(2, flags=SYN)), [second])
        self.assertEqual(bench.primary(tcp(1001, b"old")), [])

    def test_rstEachNeedsOne(self) -> None:
        bench = Bench()
        reset = tcp(1, flags=RST)
        self.assertEqual(bench.primary(reset), [])
        self.assertEqual(bench.secondary(reset), [reset])
        self.assertEqual(bench.primary(reset), [])
        answer = tcp(0, ack=77, flags=RST | ACK)
        bench = Bench()
        bench.primary(answer)
        self.assertEqual(bench.secondary(tcp(0, ack=70, flags=RST | ACK)), [])
        self.assertEqual(bench.secondary(answer), [answer])

    def test_differenceHoldsUntilTheCheckpoint(self) -> None:
        bench = Bench()
        ours = [tcp(100, b"hello world"), tcp(111, b"more"), tcp(115)]
        bench.primary(*ours)
        theirs = [tcp(100, b"hello WORLD"), tcp(111, b"more"), tcp(115)]
        self.assertEqual(bench.secondary(*theirs, tcp(106, b"world")), [])
        self.assertEqual(bench.wait(9), [])
        self.assertEqual(len(bench.asked), 1)
        (exhibit,) = bench.evidence.exhibits
        self.assertEqual(exhibit.flow, "tcp 10.0.0.2:80 > 10.0.0.9:4711")
        self.assertEqual(exhibit.difference.offset, 6)
        self.assertEqual(bench.comparer.flush(), ours)
        bench.secondary(tcp(115, b"on"))
        self.assertEqual(bench.primary(tcp(115, b"on")), [tcp(115, b"on")])

    def test_aLongStream(self) -> None:
        bench = Bench()
        for at in range(0, 40000, 4):
            bench.secondary(tcp(at, b"abcd"))
            self.assertEqual(len(bench.primary(tcp(at, b"abcd"))), 1)
        (flow,) = bench.comparer._tcp.values()
        self.assertLess(len(flow.theirs), 200)
        self.assertEqual(bench.asked, [])


class DatagramRules(SynchronousTestCase):
    """UDP as an example of all that is no stream."""

    def test_anyOfTheQueue(self) -> None:
        bench = Bench()
        bench.secondary(udp(b"b"), udp(b"c"), udp(b"a"))
        self.assertEqual(bench.primary(udp(b"a"), udp(b"b"), udp(b"c")), [udp(b"a"), udp(b"b"), udp(b"c")])

    def test_eachServesOnce(self) -> None:
        bench = Bench()
        bench.secondary(udp(b"a"))
        self.assertEqual(bench.primary(udp(b"a"), udp(b"a")), [udp(b"a")])
        bench = Bench()
        bench.secondary(udp(b"b"), udp(b"a"))
        bench.now += 1
        self.assertEqual(bench.primary(udp(b"a"), udp(b"a")), [udp(b"a")])

    def test_orderIsKept(self) -> None:
        bench = Bench()
        bench.secondary(udp(b"b"))
        bench.now += 1
        self.assertEqual(bench.primary(udp(b"a"), udp(b"b")), [])
        self.assertEqual(bench.asked, [])
        self.assertEqual(bench.secondary(udp(b"a")), [udp(b"a"), udp(b"b")])

    def test_saidTogetherAndDifferent(self) -> None:
        bench = Bench()
        bench.secondary(udp(b"at 12:00:01"))
        bench.primary(udp(b"at 12:00:02"))
        self.assertEqual(bench.evidence.reasons, {"content": 1})
        self.assertEqual(bench.evidence.guesses, {"time stamp": 1})
        self.assertEqual(bench.secondary(udp(b"at 12:00:02")), [udp(b"at 12:00:02")], "late, but the same")
        self.assertEqual(len(bench.asked), 1)

    def test_secondaryAloneTriggersNothingAndExpires(self) -> None:
        bench = Bench()
        bench.secondary(udp(b"a"))
        bench.wait(4)
        self.assertEqual(bench.primary(udp(b"a")), [])
        self.assertEqual(bench.asked, [])


class Fragments(SynchronousTestCase):
    """Compared as the datagram they make."""

    def pieces(self, body: bytes, size: int, ident: int, protocol: int = 17, **how: str) -> list[bytes]:
        starts = range(0, len(body), size)
        return [
            ip(protocol, body[at : at + size], ident=ident, place=at | (at + size < len(body)), **how)  # type: ignore[arg-type]
            for at in starts
        ]

    def test_cutDifferently(self) -> None:
        body = struct.pack(">HHHH", 53, 99, 108, 0) + bytes(range(100))
        for how in ({}, SIX):
            ours, theirs = self.pieces(body, 40, 5, **how), self.pieces(body, 64, 6, **how)
            bench = Bench()
            self.assertEqual(bench.primary(*ours), [])
            self.assertEqual(bench.secondary(theirs[1]), [])
            self.assertEqual(bench.secondary(theirs[0]), ours)
            self.assertEqual(bench.primary(ours[2], ours[0]), [])
            bench.secondary(*theirs)
            self.assertEqual(bench.primary(ours[1]), [ours[2], ours[0], ours[1]])
            self.assertEqual((bench.comparer.heldFrames, bench.comparer.heldBytes), (0, 0))

    def test_wholeAgainstCut(self) -> None:
        body = segment(100, b"abcdefghijkl")
        bench = Bench()
        bench.primary(*self.pieces(body, 16, 1, 6))
        self.assertEqual(len(bench.secondary(ip(6, body))), 2)

    def test_differ(self) -> None:
        body = bytes(80)
        bench = Bench()
        bench.secondary(*self.pieces(body, 40, 5))
        self.assertEqual(bench.primary(*self.pieces(body[:-1] + b"x", 40, 5)), [])
        self.assertEqual(len(bench.asked), 1)

    def test_overlapping(self) -> None:
        bench = Bench()
        whole = self.pieces(bytes(32), 8, 5)
        overlapping = [ip(17, bytes(16), ident=6, place=1), ip(17, bytes(8), ident=6, place=8 | 1)]
        overlapping.append(ip(17, bytes(8), ident=6, place=24))
        bench.secondary(*whole)
        self.assertEqual(bench.primary(*overlapping), [])
        self.assertEqual(bench.comparer.flush(), overlapping)

    def test_incompleteTimesOutAndIsFlushed(self) -> None:
        bench = Bench()
        ours = self.pieces(bytes(80), 40, 5)[:1]
        bench.primary(*ours)
        bench.wait(4)
        self.assertEqual(len(bench.asked), 1)
        self.assertEqual(bench.comparer.flush(), ours)

    def test_bounded(self) -> None:
        bench = Bench(maxDatagrams=2)
        first = [self.pieces(bytes(80), 40, ident)[0] for ident in range(5)]
        bench.secondary(*first)
        bench.primary(*first)
        self.assertEqual(bench.asked, ["queue-full: all flows (too many incomplete datagrams)"])
        self.assertEqual(bench.comparer.flush(), first)


class Bounds(SynchronousTestCase):
    """Full: a checkpoint is asked for, and nothing is lost."""

    def test_timeOut(self) -> None:
        bench = Bench()
        bench.primary(tcp(1, b"a"), udp(b"b"))
        bench.wait(2.9)
        self.assertEqual(bench.asked, [])
        bench.comparer.limits = CompareLimits(compareTimeout=2000)
        bench.wait(0)
        bench.wait(5)
        self.assertEqual(len(bench.asked), 2)
        self.assertEqual(bench.evidence.reasons, {"time-out": 2})
        self.assertEqual(bench.secondary(tcp(1, b"a")), [tcp(1, b"a")], "late is not different")

    def test_primaryQueue(self) -> None:
        bench = Bench(maxQueueSize=3)
        ours = [udp(bytes([at])) for at in range(6)]
        bench.primary(*ours)
        self.assertEqual(len(bench.asked), 1)
        self.assertEqual(bench.secondary(*ours[:2]), ours[:2])
        self.assertEqual(bench.comparer.flush(), ours[2:])

    def test_secondaryQueueTcp(self) -> None:
        bench = Bench(maxQueueSize=200)
        said = [tcp(at, b"x") for at in range(400)]
        bench.secondary(*said)
        self.assertEqual(len(bench.asked), 1)
        left = bench.primary(*said)
        self.assertEqual(left, said[: len(left)])
        self.assertEqual(left + bench.comparer.flush(), said)
        self.assertGreater(bench.comparer.statistics.forgotten, 0)

    def test_secondaryQueueUdp(self) -> None:
        bench = Bench(maxQueueSize=3)
        said = [udp(bytes([at])) for at in range(6)]
        bench.secondary(*said)
        self.assertEqual(len(bench.asked), 1)
        self.assertEqual(bench.primary(*said), said[:3])
        self.assertEqual(bench.comparer.flush(), said[3:])

    def test_table(self) -> None:
        bench = Bench(maxFlows=2)
        ours = [tcp(1, b"x", port=port) for port in range(4)]
        bench.primary(*ours)
        self.assertEqual(len(bench.asked), 1)
        self.assertEqual(bench.secondary(*ours), ours[:2])
        self.assertEqual(bench.comparer.heldFrames, 2)
        self.assertEqual(bench.comparer.flush(), ours[2:])

    def test_nothingPassesWhatFoundNoRoom(self) -> None:
        bench = Bench(maxFlows=1)
        first, second = tcp(1, b"x", port=1), tcp(2, b"y", port=1)
        bench.secondary(tcp(1, ack=9))
        bench.primary(first)
        bench.now += 5
        self.assertEqual(bench.secondary(second), [])
        self.assertEqual(bench.primary(second), [])
        self.assertEqual(bench.comparer.flush(), [first, second])

    def test_idleFlowsMakeRoom(self) -> None:
        bench = Bench(maxFlows=2)
        for port in range(10):
            bench.secondary(tcp(1, b"x", port=port))
            self.assertEqual(len(bench.primary(tcp(1, b"x", port=port))), 1)
            bench.now += 2
        self.assertEqual(bench.asked, [])
        bench.wait(100)
        self.assertEqual(bench.comparer.describe()["flows"], 0)

    def test_bytes(self) -> None:
        bench = Bench(maxHeldBytes=100)
        bench.primary(tcp(1, bytes(200)))
        self.assertEqual(bench.evidence.reasons, {"memory-full": 1})
        self.assertEqual(bench.secondary(tcp(1, bytes(200))), [tcp(1, bytes(200))])
        bench = Bench(maxSecondaryBytes=1000)
        said = [tcp(at, bytes(100)) for at in range(0, 2000, 100)]
        for one in said:
            bench.secondary(one)
        left = bench.primary(*said)
        self.assertEqual(bench.evidence.reasons, {"memory-full": 1})
        self.assertEqual(left + bench.comparer.flush(), said)

    def test_judgedBytesMakeRoom(self) -> None:
        bench = Bench(maxSecondaryBytes=40000)
        for at in range(0, 400000, 1000):
            bench.secondary(udp(bytes(1000)), tcp(at, bytes(1000), port=at % 3))
            self.assertEqual(len(bench.primary(udp(bytes(1000)), tcp(at, bytes(1000), port=at % 3))), 2)
        self.assertEqual(bench.asked, [])

    def test_flushInOrderOfArrival(self) -> None:
        bench = Bench()
        ours = [
            tcp(1, b"a"),
            udp(b"b"),
            tcp(9, b"c", port=1),
            ethernet(0x88CC, b"d"),
            tcp(2, b"e"),
            udp(b"f"),
        ]
        for one in ours:
            bench.primary(one)
        self.assertEqual(bench.comparer.flush(), ours)
        self.assertEqual(bench.comparer.flush(), [])

    def test_mayFlushWhenAsked(self) -> None:
        bench = Bench()
        bench.comparer._wantCheckpoint = lambda reason: bench.left.extend(bench.comparer.flush())
        bench.primary(tcp(1, b"a"))
        bench.secondary(tcp(1, b"b"))
        self.assertEqual(bench.left, [tcp(1, b"a")])
        self.assertEqual(bench.comparer.statistics.flushes, 1)

    def test_describe(self) -> None:
        bench = Bench()
        bench.primary(tcp(1, b"a"))
        described = bench.comparer.describe()
        self.assertEqual((described["held-frames"], described["waiting-flows"]), (1, 1))
        self.assertEqual(described["limits"]["compareTimeout"], 3000)  # type: ignore[index]
