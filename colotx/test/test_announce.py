"""Tests of L{colotx.announce}, with scapy as the independent eye."""

from __future__ import annotations

import json
from ipaddress import ip_address

from hypothesis import example, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6NDOptDstLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from colotx.announce import AddressTable, Announcer, Sighting, announcements, learn
from colotx.errors import ProtocolError

MAC = "52:54:00:12:34:56"
RAW_MAC = bytes.fromhex(MAC.replace(":", ""))
OTHER = "52:54:00:00:00:01"


def seen(address=None, vlans=(), router=False):
    return Sighting(RAW_MAC, address and ip_address(address), vlans, router)


def out(*layers):
    """A frame sent by the guest."""
    packet = Ether(src=MAC, dst=OTHER)
    for layer in layers:
        packet = packet / layer
    return bytes(packet)


class LearnTests(SynchronousTestCase):
    """What a frame tells about its sender."""

    def check(self, frame, expected):
        self.assertEqual(learn(frame), expected)

    def test_arp(self):
        """The sender of an ARP is the guest, unless it only probes, or speaks for another MAC."""
        self.check(out(ARP(op=1, hwsrc=MAC, psrc="10.0.0.5", pdst="10.0.0.1")), seen("10.0.0.5"))
        self.check(out(ARP(op=2, hwsrc=MAC, psrc="10.0.0.5")), seen("10.0.0.5"))
        self.check(out(ARP(op=1, hwsrc=MAC, psrc="0.0.0.0", pdst="10.0.0.5")), seen())
        self.check(out(ARP(op=1, hwsrc=OTHER, psrc="10.0.0.5")), seen())

    def test_ipv4(self):
        """The source of a unicast IPv4 packet is the guest, unless it was forwarded or is no address."""
        self.check(out(IP(src="10.0.0.5", ttl=64), TCP()), seen("10.0.0.5"))
        self.check(out(IP(src="10.0.0.5", ttl=63), TCP()), seen())
        for nonsense in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "0.0.0.9"]:
            self.check(out(IP(src=nonsense), TCP()), seen())
        broadcast = b"\xff" * 6 + out(IP(src="10.0.0.5"), TCP())[6:]
        self.check(broadcast, seen())

    def test_ipv6(self):
        """IPv6 sources, neighbour solicitations and advertisements, and who is a router."""
        self.check(out(IPv6(src="fd00::5", hlim=64), TCP()), seen("fd00::5"))
        self.check(out(IPv6(src="fd00::5", hlim=63), TCP()), seen())
        self.check(out(IPv6(src="fe80::5", hlim=255), ICMPv6ND_NS(tgt="fd00::1")), seen("fe80::5"))
        self.check(out(IPv6(src="::", hlim=255), ICMPv6ND_NS(tgt="fd00::5")), seen())
        self.check(out(IPv6(src="fe80::5", hlim=255), ICMPv6ND_NA(tgt="fd00::5", R=0)), seen("fd00::5"))
        self.check(
            out(IPv6(src="fe80::5", hlim=255), ICMPv6ND_NA(tgt="fd00::5", R=1)), seen("fd00::5", router=True)
        )
        self.check(out(IPv6(src="fe80::5", hlim=255), ICMPv6ND_RA()), seen("fe80::5", router=True))

    def test_vlans(self):
        """Up to two tags, of which the VLAN id counts."""
        arp = ARP(op=1, hwsrc=MAC, psrc="10.0.0.5")
        self.check(out(Dot1Q(vlan=7, prio=5), arp), seen("10.0.0.5", ((0x8100, 7),)))
        self.check(out(Dot1AD(vlan=9), Dot1Q(vlan=7), arp), seen("10.0.0.5", ((0x88A8, 9), (0x8100, 7))))

    def test_nothingToLearn(self):
        """A group or zero source, or no whole header."""
        self.assertIsNone(learn(b"\xff" * 20))
        self.assertIsNone(learn(b"\xff" * 6 + bytes(20)))
        self.assertIsNone(learn(out()[:13]))
        self.check(out()[:12] + b"\x88\xb5", seen())

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=120))
    @example(bytes(12) + b"\x81\0")
    def test_anything(self, tail):
        """No bytes make it fail."""
        for kind in [b"", b"\x08\6", b"\x08\0\x45", b"\x86\xdd\x60", b"\x81\0\0\1\x86\xdd"]:
            learn(out()[:12] + kind + tail)
        learn(tail)


class AddressTableTests(SynchronousTestCase):
    """The memory of what was seen."""

    def test_bound(self):
        """The newest stay, the oldest go; one seen again is new."""
        table = AddressTable(limit=3)
        for n in [1, 2, 3, 1, 4]:
            table.add(seen(f"10.0.0.{n}"))
        self.assertEqual([str(s.address) for s in table.sightings], ["10.0.0.3", "10.0.0.1", "10.0.0.4"])

    def test_routerStays(self):
        """Once a router, the guest stays one: ordinary packets do not say."""
        table = AddressTable()
        table.observe([out(IPv6(src="fe80::5", hlim=255), ICMPv6ND_RA()), out(IPv6(src="fe80::5"), TCP())])
        self.assertEqual(table.sightings, [seen("fe80::5", router=True)])

    def test_tellsWhatIsNew(self):
        """It says whether something came that was not known: then the standby has to be told."""
        table = AddressTable()
        arp, packet = out(ARP(op=1, hwsrc=MAC, psrc="10.0.0.5")), out(IP(src="10.0.0.5"), TCP())
        answers = [table.observe(frames) for frames in [[arp], [packet], [], [out(), packet], [out(), arp]]]
        self.assertEqual(answers, [True, False, False, True, False])
        advertisement = IPv6(src="fe80::5", hlim=255) / ICMPv6ND_RA()
        self.assertTrue(table.observe([out(IPv6(src="fe80::5"), TCP())]))
        self.assertTrue(table.observe([out(advertisement)]))
        self.assertFalse(table.observe([out(advertisement)]))

    def test_forgottenAndSeenAgain(self):
        """An address pushed out of the table by others is in it again with its next packet."""
        table = AddressTable(limit=2)
        frames = [out(IP(src=f"10.0.0.{n}"), TCP()) for n in [1, 2, 3]]
        table.observe(frames)
        self.assertTrue(table.observe([frames[0]]))
        self.assertEqual([str(s.address) for s in table.sightings], ["10.0.0.3", "10.0.0.1"])

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=6), st.booleans())
    def test_shortCut(self, flips, six):
        """Knowing a frame by its headers never hides what another one tells."""
        one = out(IPv6(src="fd00::5", hlim=64) if six else IP(src="10.0.0.5"), TCP(), b"x" * 20)
        other = bytearray(one)
        for place, value in flips:
            other[place] = value
        table = AddressTable()
        table.observe([one])
        table.observe([bytes(other)])
        expected = AddressTable()
        for frame in [one, bytes(other)]:
            if sighting := learn(frame):
                expected.add(sighting)
        self.assertEqual(set(table.sightings), set(expected.sightings))

    def test_codec(self):
        """Through JSON and back it is the same table."""
        table = AddressTable()
        for sighting in [seen(), seen("10.0.0.5", ((0x8100, 7),)), seen("fe80::5", router=True)]:
            table.add(sighting)
        decoded = AddressTable.decode(json.loads(json.dumps(table.encode())))
        self.assertEqual(decoded.sightings, table.sightings)

    def test_decodeRefuses(self):
        """What a peer may not send."""
        good = AddressTable()
        good.add(seen("10.0.0.5"))
        (entry,) = good.encode()
        for wrong in [
            None,
            7,
            [7],
            [{}],
            [entry | {"mac": "52:54"}],
            [entry | {"mac": 5}],
            [entry | {"address": "10.0.0"}],
            [entry | {"vlans": [[1, 2]]}],
            [entry | {"vlans": [[0x8100, 5000]]}],
            [entry | {"vlans": [[0x8100, 5]] * 3}],
        ]:
            self.assertRaises(ProtocolError, AddressTable.decode, wrong)


class AnnouncementsTests(SynchronousTestCase):
    """The frames, as scapy reads them."""

    def test_ipv4(self):
        """Gratuitous ARP: request, then reply."""
        request, reply = map(Ether, announcements([seen(), seen("10.0.0.5")]))
        for frame, op, target in [(request, 1, "00:00:00:00:00:00"), (reply, 2, MAC)]:
            self.assertEqual((frame.src, frame.dst, len(frame)), (MAC, "ff:ff:ff:ff:ff:ff", 60))
            arp = frame[ARP]
            self.assertEqual((arp.op, arp.hwsrc, arp.psrc), (op, MAC, "10.0.0.5"))
            self.assertEqual((arp.hwdst, arp.pdst), (target, "10.0.0.5"))

    def test_ipv6(self):
        """An unsolicited neighbour advertisement with override, right to the checksum."""
        for router in [False, True]:
            (raw,) = announcements([seen("fd00::5", router=router)])
            frame = Ether(raw)
            self.assertEqual((frame.src, frame.dst), (MAC, "33:33:00:00:00:01"))
            self.assertEqual(
                (frame[IPv6].src, frame[IPv6].dst, frame[IPv6].hlim), ("fd00::5", "ff02::1", 255)
            )
            na = frame[ICMPv6ND_NA]
            self.assertEqual((na.R, na.S, na.O, na.tgt), (int(router), 0, 1, "fd00::5"))
            self.assertEqual(frame[ICMPv6NDOptDstLLAddr].lladdr, MAC)
            built = frame.copy()
            del built[IPv6].plen, built[ICMPv6ND_NA].cksum
            self.assertEqual(bytes(built), raw)

    def test_rarp(self):
        """With no address known, what QEMU's announce-self sends."""
        (raw,) = announcements([seen()])
        expected = (
            "ffffffffffff525400123456" + "8035" + "0001080006040003" + ("525400123456" + "00000000") * 2
        )
        self.assertEqual(raw, bytes.fromhex(expected).ljust(60, b"\0"))

    def test_vlan(self):
        """The frames carry the tags the guest used; an address in one VLAN says nothing for another."""
        tagged = seen("10.0.0.5", ((0x88A8, 9), (0x8100, 7)))
        frames = list(map(Ether, announcements([tagged, seen()])))
        self.assertEqual((frames[0][Dot1AD].vlan, frames[0][Dot1Q].vlan, frames[0][ARP].op), (9, 7, 1))
        self.assertEqual([len(frames), frames[2].type], [3, 0x8035])

    @settings(max_examples=100, deadline=None)
    @given(st.ip_addresses(), st.binary(min_size=6, max_size=6))
    def test_learnedAgain(self, address, mac):
        """What is announced is what one learns from it, wherever one could learn at all."""
        sighting = Sighting(mac, address)
        for frame in announcements([sighting]):
            again = learn(frame)
            if again is not None and again.address is not None:
                self.assertEqual(again, sighting)


class AnnouncerTests(SynchronousTestCase):
    """The rounds."""

    def setUp(self):
        self.clock = Clock()
        self.sent = []
        self.table = AddressTable()
        self.announcer = Announcer(self.clock, self, self.table)

    def send(self, frames):
        self.sent.append((round(self.clock.seconds(), 3), len(frames)))

    def test_rounds(self):
        """QEMU's five rounds; what is learned meanwhile is said as well."""
        self.table.add(seen())
        done = self.announcer.start()
        self.clock.pump([0.01] * 10)
        self.table.add(seen("10.0.0.5"))
        self.clock.pump([0.01] * 69)
        self.assertNoResult(done)
        self.clock.pump([0.01] * 2)
        self.successResultOf(done)
        self.assertEqual(self.sent, [(0, 1), (0.05, 1), (0.2, 2), (0.45, 2), (0.8, 2)])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop(self):
        """Stopped, it sends no more."""
        self.table.add(seen())
        done = self.announcer.start()
        self.announcer.stop()
        self.announcer.stop()
        self.successResultOf(done)
        self.clock.advance(10)
        self.assertEqual(len(self.sent), 1)

    def test_startAgain(self):
        """Starting anew begins from the first round."""
        self.table.add(seen())
        first = self.announcer.start()
        self.clock.advance(0.05)
        second = self.announcer.start()
        self.successResultOf(first)
        self.clock.pump([0.01] * 100)
        self.successResultOf(second)
        self.assertEqual(len(self.sent), 7)

    def test_nothingKnown(self):
        """With an empty table nothing is sent."""
        self.announcer.start()
        self.clock.pump([0.1] * 20)
        self.assertEqual(self.sent, [])
