"""
L{colotx.translate}: two guests with other initial sequence numbers and clocks, scapy to read what came out.
"""

import json
import struct
from dataclasses import dataclass

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, IPOption_NOP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import ProtocolError
from colotx.translate import JUMP, TranslateLimits, Translator

M = 1 << 32
u32 = st.integers(0, M - 1)
SHAPES = (
    "v4",
    "v4 options",
    "v4 vlan",
    "v6",
    "v6 extension",
    "v6 vlan",
    "v4 q-in-q",
    "v4 odd",
    "v4 priority",
)


def frame(shape, fromGuest, port=4711, flags="A", seq=0, ack=0, ts=None, sack=(), data=b""):
    """Build one with scapy, checksums included."""
    guest, client = ("10.0.0.2", "10.0.0.9") if "v4" in shape else ("fd00::2", "fd00::9")
    src, dst = (guest, client) if fromGuest else (client, guest)
    sport, dport = (80, port) if fromGuest else (port, 80)
    layer = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    if "vlan" in shape or "q-in-q" in shape:
        layer /= Dot1Q(vlan=7, prio=3 if fromGuest else 0)
    if "q-in-q" in shape:
        layer /= Dot1Q(vlan=9)
    if "priority" in shape and not fromGuest:
        layer /= Dot1Q(vlan=0, prio=5)
    if "v4" in shape:
        layer /= IP(src=src, dst=dst, options=[IPOption_NOP()] * 4 if "options" in shape else [])
    else:
        layer /= IPv6(src=src, dst=dst)
        if "extension" in shape:
            layer /= IPv6ExtHdrDestOpt()
    options = [("NOP", None)] if "odd" in shape else [("NOP", None)] * 2
    options = [*options, ("Timestamp", ts)] if ts is not None else []
    if sack:
        options += [("NOP", None), ("NOP", None), ("SAck", tuple(sack))]
    layer /= TCP(sport=sport, dport=dport, flags=flags, seq=seq % M, ack=ack % M, options=options)
    return bytes(layer / Raw(data) if data else layer)


def read(raw):
    """@return: scapy's TCP layer, whose checksum was verified against scapy's own."""
    packet = Ether(raw)
    tcp = packet[TCP]
    found = tcp.chksum
    again = packet.copy()
    del again[TCP].chksum
    assert Ether(bytes(again))[TCP].chksum == found, f"checksum {found:#x}"
    return tcp


def stamps(raw):
    return dict(read(raw).options).get("Timestamp")


@dataclass
class Pair:
    """One connection that the guest accepted: the primary's numbers and the secondary's."""

    translator: Translator
    shape: str = "v4"
    primary: int = 1000
    secondary: int = 5_000_000
    primaryTime: int = 70_000
    secondaryTime: int = 900_000
    port: int = 4711
    client: int = 333

    def out(self, **fields):
        (raw,) = self.translator.output([frame(self.shape, True, self.port, **fields)])
        return raw

    def into(self, **fields):
        (raw,) = self.translator.input([frame(self.shape, False, self.port, **fields)])
        return raw

    def accept(self):
        said = frame(
            self.shape, True, self.port, "SA", self.secondary, self.client + 1, (self.secondaryTime, 50)
        )
        assert self.translator.output([said])[0] is said
        return self.into(seq=self.client + 1, ack=self.primary + 1, ts=((51), self.primaryTime))

    def connect(self):
        said = frame(self.shape, True, self.port, "S", self.secondary, 0, (self.secondaryTime, 0))
        assert self.translator.output([said])[0] is said
        return self.into(flags="SA", seq=self.client, ack=self.primary + 1, ts=(51, self.primaryTime))


class TranslatorTests(SynchronousTestCase):
    def setUp(self):
        self.clock = Clock()
        self.translator = Translator(self.clock.seconds, TranslateLimits(connections=100))

    def pair(self, **fields):
        return Pair(self.translator, **fields)

    def test_accepts(self):
        for number, shape in enumerate(SHAPES):
            with self.subTest(shape):
                pair = self.pair(shape=shape, port=5000 + number)
                first = read(pair.accept())
                self.assertEqual(first.ack, pair.secondary + 1)
                self.assertEqual(dict(first.options)["Timestamp"], (51, pair.secondaryTime))
                said = read(
                    pair.out(seq=pair.secondary + 1, ack=400, ts=(pair.secondaryTime + 9, 51), data=b"x" * 7)
                )
                self.assertEqual((said.seq, said.ack), (pair.primary + 1, 400))
                self.assertEqual(dict(said.options)["Timestamp"], (pair.primaryTime + 9, 51))
                answer = read(
                    pair.into(
                        seq=400,
                        ack=pair.primary + 8,
                        ts=(60, pair.primaryTime + 9),
                        sack=(pair.primary + 20, pair.primary + 30, pair.primary + 50, pair.primary + 60),
                    )
                )
                self.assertEqual(answer.ack, pair.secondary + 8)
                self.assertEqual(dict(answer.options)["Timestamp"], (60, pair.secondaryTime + 9))
                self.assertEqual(
                    dict(answer.options)["SAck"], tuple(pair.secondary + n for n in (20, 30, 50, 60))
                )

    def test_connects(self):
        for number, shape in enumerate(SHAPES):
            with self.subTest(shape):
                pair = self.pair(shape=shape, port=5000 + number)
                answer = read(pair.connect())
                self.assertEqual(answer.ack, pair.secondary + 1)
                self.assertEqual(dict(answer.options)["Timestamp"][1], pair.secondaryTime)
                self.assertEqual(read(pair.out(seq=pair.secondary + 1)).seq, pair.primary + 1)

    def test_connectionRefused(self):
        pair = self.pair()
        pair.out(flags="S", seq=pair.secondary)
        self.assertEqual(read(pair.into(flags="RA", ack=pair.primary + 1)).ack, pair.secondary + 1)

    def test_challengeAckTellsNothing(self):
        """To a SYN, only a SYN-ACK or an RST is an answer; the guest resets what it did not expect."""
        pair = self.pair()
        pair.out(flags="S", seq=pair.secondary)
        self.assertEqual(read(pair.into(ack=777)).ack, 777)
        self.assertEqual(read(pair.into(flags="SA", ack=pair.primary + 1)).ack, pair.secondary + 1)

    def test_stragglerTellsNothing(self):
        """An ACK of the connection before on the same ports."""
        pair = self.pair()
        pair.out(flags="SA", seq=pair.secondary, ack=pair.client + 1)
        self.assertEqual(read(pair.into(seq=pair.client - 5, ack=99)).ack, 99)
        self.assertEqual(read(pair.into(seq=pair.client + 1, ack=pair.primary + 1)).ack, pair.secondary + 1)

    def test_simultaneousOpen(self):
        pair = self.pair()
        pair.out(flags="S", seq=pair.secondary)
        pair.into(flags="S", seq=pair.client)
        pair.out(flags="SA", seq=pair.secondary, ack=pair.client + 1)
        answer = pair.into(flags="SA", seq=pair.client, ack=pair.primary + 1)
        self.assertEqual(read(answer).ack, pair.secondary + 1)
        again = pair.out(flags="SA", seq=pair.secondary, ack=pair.client + 1)
        self.assertEqual(read(again).seq, pair.primary)

    def test_firstOfSeveralSynsCounts(self):
        """Whichever TSval the client echoes, the guest gets one it sent, and time never runs backwards."""
        for echoed in (0, 1000, 3000):
            with self.subTest(echoed):
                self.setUp()
                pair = self.pair()
                for later in (0, 1000, 3000):
                    pair.out(
                        flags="SA",
                        seq=pair.secondary,
                        ack=pair.client + 1,
                        ts=(pair.secondaryTime + later, 5),
                    )
                first = pair.into(
                    seq=pair.client + 1, ack=pair.primary + 1, ts=(6, pair.primaryTime + echoed)
                )
                self.assertEqual(stamps(first)[1], pair.secondaryTime)
                said = stamps(pair.out(seq=pair.secondary + 1, ts=(pair.secondaryTime + 3010, 6)))[0]
                self.assertGreaterEqual(said, pair.primaryTime + 3010)

    def test_withoutTimestamps(self):
        pair = self.pair()
        pair.out(flags="SA", seq=pair.secondary, ack=pair.client + 1)
        pair.into(seq=pair.client + 1, ack=pair.primary + 1)
        self.assertEqual(read(pair.out(seq=pair.secondary + 5)).seq, pair.primary + 5)

    def test_echoOfNothingIsWaitedOut(self):
        """A TSecr of 0 says nothing; the next one does."""
        pair = self.pair()
        pair.out(flags="SA", seq=pair.secondary, ack=pair.client + 1, ts=(pair.secondaryTime, 5))
        self.assertEqual(stamps(pair.into(seq=pair.client + 1, ack=pair.primary + 1, ts=(6, 0))), (6, 0))
        pair.into(seq=pair.client + 1, ack=pair.primary + 1, ts=(7, pair.primaryTime))
        self.assertEqual(stamps(pair.out(ts=(pair.secondaryTime + 4, 6))), (pair.primaryTime + 4, 6))

    def test_equalGuestsCostNothing(self):
        pair = self.pair(primary=7, secondary=7, primaryTime=20, secondaryTime=20)
        pair.accept()
        said = frame("v4", True, seq=8, ts=(30, 1))
        self.assertIs(self.translator.output([said])[0], said)
        heard = frame("v4", False, ack=8, ts=(30, 1))
        self.assertIs(self.translator.input([heard])[0], heard)
        self.assertEqual(len(self.translator), 0)

    def test_handshakeThatTheCheckpointHeld(self):
        """Its SYN-ACK is repeated with a later TSval than the client echoes: still the same clock."""
        pair = self.pair(primary=7, secondary=7, primaryTime=20, secondaryTime=1020)
        pair.accept()
        self.assertEqual(len(self.translator), 0)

    def test_onlyTheClockDiffers(self):
        pair = self.pair(primary=7, secondary=7, primaryTime=20, secondaryTime=1 << 30)
        pair.accept()
        self.assertEqual(stamps(pair.out(seq=8, ts=((1 << 30) + 3, 1)))[0], 23)

    def test_clockBehind(self):
        """The client heard a later TSval than ours would be: ours goes on from there, for good."""
        pair = self.pair()
        pair.accept()
        late = pair.into(seq=pair.client + 1, ack=pair.primary + 1, ts=(60, pair.primaryTime + 40))
        self.assertEqual(stamps(late)[1], pair.secondaryTime, "the guest said nothing later")
        first = stamps(pair.out(seq=pair.secondary + 1, ts=(pair.secondaryTime + 10, 60)))
        self.assertEqual(first[0], pair.primaryTime + 40)
        second = stamps(pair.out(seq=pair.secondary + 1, ts=(pair.secondaryTime + 15, 60)))
        self.assertEqual(second[0], pair.primaryTime + 45)
        echo = stamps(pair.into(ack=pair.primary + 1, ts=(61, pair.primaryTime + 45)))
        self.assertEqual(echo[1], pair.secondaryTime + 15)
        self.assertEqual(self.translator.statistics.raised, 1)

    def test_checksumOfZero(self):
        """It has two forms in one's complement; RFC 1624 wants the one that a sum anew gives."""
        pair = self.pair()
        pair.accept()
        plain = frame("v4", True, seq=pair.primary + 1, data=b"\0\0")
        out = pair.out(seq=pair.secondary + 1, data=plain[50:52])
        self.assertEqual(read(out).chksum, 0)

    def test_wrongChecksumStaysWrong(self):
        pair = self.pair()
        pair.accept()
        raw = bytearray(frame("v4", True, seq=pair.secondary + 1, ts=(pair.secondaryTime, 1)))
        raw[51] ^= 0x40
        (out,) = self.translator.output([bytes(raw)])
        self.assertRaises(AssertionError, read, out)

    def test_resets(self):
        pair = self.pair()
        pair.accept()
        self.assertEqual(read(pair.out(flags="R", seq=pair.secondary + 9)).seq, pair.primary + 9)
        self.assertEqual(read(pair.out(flags="RA", seq=0, ack=5)).seq, 0, "it answers a segment without ACK")
        self.assertEqual(read(pair.into(flags="RA", ack=pair.primary + 9)).ack, pair.secondary + 9)
        raw = frame("v4", False, flags="R", seq=5, ack=9)
        self.assertIs(self.translator.input([raw])[0], raw)

    def test_portReuse(self):
        pair = self.pair()
        pair.accept()
        second = self.pair(primary=55, secondary=9_999, client=888_888)
        second.accept()
        self.assertEqual(read(second.out(seq=10_000)).seq, 56)
        self.assertEqual(len(self.translator), 1)

    def test_synToALiveConnectionChangesNothing(self):
        pair = self.pair()
        pair.accept()
        pair.into(flags="S", seq=42)
        self.assertEqual(read(pair.out(seq=pair.secondary + 1)).seq, pair.primary + 1)

    def test_dataBeforeTheFirstAck(self):
        """TCP fast open: what the client acknowledges first is not the SYN alone."""
        pair = self.pair()
        pair.out(flags="SA", seq=pair.secondary, ack=pair.client + 1)
        pair.out(seq=pair.secondary + 1, data=b"early")
        self.assertEqual(read(pair.into(seq=pair.client + 1, ack=pair.primary + 6)).ack, pair.primary + 6)

    def test_otherFramesPassUntouched(self):
        self.pair().accept()
        for raw in (
            bytes(Ether(dst="02:00:00:00:00:02") / IP(src="10.0.0.9", dst="10.0.0.2") / ICMP()),
            bytes(Ether(dst="02:00:00:00:00:02", type=0x0806) / Raw(b"x" * 28)),
            frame("v4", False, port=9),
            b"",
            b"short",
        ):
            self.assertIs(self.translator.input([raw])[0], raw)
            self.assertIs(self.translator.output([raw])[0], raw)

    def test_firstFragment(self):
        pair = self.pair()
        pair.accept()
        whole = Ether(frame("v4", True, seq=pair.secondary + 1, data=bytes(range(200))))
        parts = whole[IP].fragment(120)
        first, second = (bytes(Ether(src=whole.src, dst=whole.dst) / part) for part in parts)
        outFirst, outSecond = self.translator.output([first, second])
        self.assertIs(outSecond, second)
        joined = Ether(outFirst)[IP].payload.original + Ether(outSecond)[IP].payload.original
        head = whole[IP].copy()
        del head.len, head.chksum
        head.remove_payload()
        self.assertEqual(
            read(bytes(Ether(dst="02:00:00:00:00:02") / head / Raw(joined))).seq, pair.primary + 1
        )

    def test_icmpErrors(self):
        pair = self.pair()
        pair.accept()
        sent = Ether(frame("v4", True, seq=pair.primary + 100))[IP]
        error = (
            Ether(dst="02:00:00:00:00:02")
            / IP(src="10.0.0.1", dst="10.0.0.2")
            / ICMP(type=3, code=4)
            / Raw(bytes(sent)[:28])
        )
        (out,) = self.translator.input([bytes(error)])
        again = Ether(out)
        found = again[ICMP].chksum
        self.assertEqual(struct.unpack(">I", bytes(again[ICMP].payload)[24:28])[0], pair.secondary + 100)
        del again[ICMP].chksum
        self.assertEqual(Ether(bytes(again))[ICMP].chksum, found)

    def test_icmpV6Errors(self):
        pair = self.pair(shape="v6")
        pair.accept()
        sent = Ether(frame("v6", True, seq=pair.primary + 100))[IPv6]
        error = (
            Ether(dst="02:00:00:00:00:02")
            / IPv6(src="fd00::1", dst="fd00::2")
            / ICMPv6PacketTooBig()
            / Raw(bytes(sent))
        )
        (out,) = self.translator.input([bytes(error)])
        again = Ether(out)[ICMPv6PacketTooBig]
        self.assertEqual(struct.unpack(">I", bytes(again.payload)[44:48])[0], pair.secondary + 100)
        found, again = again.cksum, Ether(out)
        del again[ICMPv6PacketTooBig].cksum
        self.assertEqual(Ether(bytes(again))[ICMPv6PacketTooBig].cksum, found)

    def test_reset(self):
        pair = self.pair()
        pair.accept()
        self.translator.reset()
        self.assertEqual(read(pair.out(seq=5)).seq, 5)
        self.assertEqual(read(pair.into(ack=5)).ack, 5)

    # After a failover

    def test_promoted(self):
        pair = self.pair()
        pair.accept()
        opening = self.pair(port=2)
        opening.out(flags="SA", seq=opening.secondary, ack=opening.client + 1)
        old = self.pair(port=3)
        key = frame("v4", True, 3)[26:38]
        self.translator.promoted([key])
        self.assertEqual(stamps(pair.out(ts=(pair.secondaryTime + 5, 0)))[0], pair.primaryTime + 5 + JUMP)
        answer = opening.into(seq=opening.client + 1, ack=opening.primary + 1)
        self.assertEqual(read(answer).ack, opening.secondary + 1, "a handshake under way is still learned")
        self.assertEqual(stamps(old.out(seq=8, ts=(70, 1))), (70 + JUMP, 1))
        self.assertEqual(stamps(old.into(ack=8, ts=(1, 70 + JUMP))), (1, 70))
        new = self.pair(port=4)
        new.accept()
        self.assertEqual(read(new.out(seq=5)).seq, 5)
        self.assertEqual(len(self.translator), 3)

    def test_newConnectionAfterPromotion(self):
        pair = self.pair()
        pair.accept()
        self.translator.promoted()
        pair.out(flags="SA", seq=12, ack=77)
        self.assertEqual(read(pair.out(seq=13)).seq, 13)

    def test_adopt(self):
        pair = self.pair()
        pair.accept()
        opening = self.pair(port=2)
        opening.out(flags="SA", seq=opening.secondary, ack=opening.client + 1)
        exported = json.loads(json.dumps(self.translator.export()))
        self.translator = pair.translator = opening.translator = Translator(self.clock.seconds)
        self.translator.adopt(exported)
        for _ in range(2):
            self.assertEqual(read(pair.out(seq=pair.secondary + 1)).seq, pair.primary + 1)
            self.assertEqual(read(pair.into(ack=pair.primary + 1)).ack, pair.secondary + 1)
            self.translator.reset()
        answer = opening.into(seq=opening.client + 1, ack=opening.primary + 1)
        self.assertEqual(read(answer).ack, opening.secondary + 1)
        pair.out(flags="SA", seq=12, ack=77)
        self.translator.reset()
        self.assertEqual(read(pair.out(seq=13)).seq, 13, "its ports had another connection since")
        self.translator.adopt([])
        self.assertEqual(self.translator.export(), [])

    def test_adoptNonsense(self):
        self.pair().accept()
        good = self.translator.export()
        for bad in (
            None,
            {},
            [1],
            [{}],
            good * 101,
            [{**good[0], "flow": "00"}],
            [{**good[0], "flow": 3}],
            [{**good[0], "flow": "zz" * 12}],
            [{**good[0], "sequence": -1}],
            [{**good[0], "sequence": True}],
            [{**good[0], "time": M}],
            [{**good[0], "iss": None, "sequence": None}],
            [{**good[0], "more": 1}],
        ):
            self.assertRaises(ProtocolError, self.translator.adopt, bad)
        self.assertEqual(self.translator.export(), good)

    # Bounds

    def test_endedConnectionsLinger(self):
        for end in ("fins", "reset"):
            with self.subTest(end):
                self.setUp()
                pair = self.pair()
                pair.accept()
                if end == "fins":
                    pair.out(flags="FA", seq=pair.secondary + 1)
                    pair.into(flags="FA", ack=pair.primary + 2)
                else:
                    pair.into(flags="R")
                self.clock.advance(119)
                self.assertEqual(read(pair.into(flags="FA", ack=pair.primary + 2)).ack, pair.secondary + 2)
                self.clock.advance(121)
                self.assertEqual(self.translator.export(), [])
                self.pair(port=9).accept()
                self.assertEqual(len(self.translator), 1)

    def test_resetThatNobodyTook(self):
        pair = self.pair()
        pair.accept()
        pair.into(flags="R")
        pair.out(seq=pair.secondary + 1)
        self.clock.advance(1000)
        self.assertEqual(len(self.translator.export()), 1)

    def test_fullTable(self):
        """Ended connections go first, then the one silent for longest; handshakes never push connections out."""
        for port in range(100):
            self.clock.advance(1)
            self.pair(port=port).accept()
        for port in range(1000, 1200):
            self.pair(port=port).out(flags="SA", seq=5, ack=6)
        self.assertEqual(len(self.translator), 100)
        self.pair(port=3).into(flags="R")
        self.pair(port=100).accept()
        self.assertEqual((len(self.translator), self.translator.statistics.evicted), (100, 0))
        self.assertEqual(read(self.pair(port=3).out(seq=5)).seq, 5)
        self.pair(port=101).accept()
        self.assertEqual((len(self.translator), self.translator.statistics.evicted), (100, 1))
        self.assertEqual(len(self.translator._inbound), 100 + len(self.translator._opening))


class PropertyTests(SynchronousTestCase):
    @settings(max_examples=40, deadline=None)
    @given(
        st.sampled_from(SHAPES),
        u32,
        u32,
        u32,
        u32,
        st.lists(st.integers(0, 1 << 20), max_size=4),
        st.booleans(),
    )
    @example("v4 odd", M - 1, 1, M - 1, 5, [1, 2], False)
    @example("v6", 0, M - 3, 9, M - 2, [5], True)
    def test_roundTrip(self, shape, primary, secondary, primaryTime, secondaryTime, steps, connects):
        """What the guest says reaches the client as the primary's; the client's answer to it reaches the guest."""
        assume(primary != secondary)
        pair = Pair(
            Translator(Clock().seconds), shape, primary, secondary, primaryTime or 1, secondaryTime or 1
        )
        pair.connect() if connects else pair.accept()
        for step in sorted(steps):
            said = read(
                pair.out(
                    seq=secondary + 1 + step, ts=((pair.secondaryTime + step) % M, 5), data=b"p" * (step % 5)
                )
            )
            self.assertEqual(said.seq, (primary + 1 + step) % M)
            value = dict(said.options)["Timestamp"][0]
            self.assertEqual(value, (pair.primaryTime + step) % M)
            sack = (said.seq, (said.seq + 9) % M)
            heard = read(pair.into(ack=said.seq, ts=(6, value), sack=sack))
            self.assertEqual(heard.ack, (secondary + 1 + step) % M)
            self.assertEqual(dict(heard.options)["Timestamp"][1], value and (pair.secondaryTime + step) % M)
            self.assertEqual(dict(heard.options)["SAck"], tuple((n + secondary - primary) % M for n in sack))

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.tuples(st.booleans(), st.integers(0, 50), st.integers(-30, 30)), max_size=30), u32, u32
    )
    def test_timeNeverRunsBackwards(self, steps, primaryTime, secondaryTime):
        """
        Two clocks that advance alike but are read at other moments: what the client would see after a failover is
        never below what it echoed; what the guest sees is never ahead of what it said.
        """
        pair = Pair(
            Translator(Clock().seconds), primaryTime=primaryTime or 1, secondaryTime=secondaryTime or 1
        )
        pair.accept()
        said, now, echoed = 0, 100, 0
        for speaks, passed, skew in steps:
            now += passed
            if speaks:
                said = max(said, now + skew)
                value = stamps(pair.out(seq=pair.secondary + 1, ts=((pair.secondaryTime + said) % M, 5)))[0]
                self.assertLess((value - pair.primaryTime - echoed) % M, 1 << 31)
            else:
                echoed = max(echoed, now)
                echo = (pair.primaryTime + now) % M
                value = stamps(pair.into(ack=pair.primary + 1, ts=(6, echo)))[1]
                if echo:
                    self.assertLess((pair.secondaryTime + said - value) % M, 1 << 31)

    @settings(max_examples=100, deadline=None)
    @given(st.sampled_from(SHAPES), st.data())
    def test_anyBytes(self, shape, data):
        translator = Translator(Clock().seconds)
        pair = Pair(translator, shape)
        pair.accept()
        raw = bytearray(frame(shape, data.draw(st.booleans()), ts=(1, 2), sack=(3, 4)))
        for _ in range(data.draw(st.integers(0, 4))):
            raw[data.draw(st.integers(12, len(raw) - 1))] = data.draw(st.integers(0, 255))
        broken = bytes(raw[: data.draw(st.integers(0, len(raw)))])
        self.assertEqual(len(translator.output([broken])[0]), len(broken))
        self.assertEqual(len(translator.input([broken])[0]), len(broken))
