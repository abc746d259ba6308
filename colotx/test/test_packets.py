"""Tests for L{colotx.packets}: against scapy as the oracle, and against any bytes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from twisted.trial.unittest import SynchronousTestCase

from colotx.packets import Flow, describeFlow, flowOf, fragmentOf, locate

MACS = Ether(src="52:54:00:00:00:01", dst="52:54:00:00:00:02")
V4 = IP(src="10.0.0.2", dst="10.0.0.9")
V6 = IPv6(src="fd00::2", dst="fd00::9")


class Shapes(SynchronousTestCase):
    """Where things are, and what they are called."""

    def read(self, packet: object, offset: int = 0, padding: int = 0) -> tuple[object, Flow, bytes]:
        frame = bytes(offset) + bytes(packet) + bytes(padding)  # type: ignore[call-overload]
        layers = locate(frame, offset)
        return layers, flowOf(frame, layers, offset), frame

    def test_transports(self) -> None:
        cases = {
            "tcp 10.0.0.2:80 > 10.0.0.9:4711": V4 / TCP(sport=80, dport=4711) / b"abc",
            "udp 10.0.0.2:53 > 10.0.0.9:4711": IP(
                src="10.0.0.2", dst="10.0.0.9", options=[IPOption_Router_Alert()]
            )
            / UDP(sport=53, dport=4711)
            / b"abc",
            "tcp [fd00::2]:80 > [fd00::9]:4711": V6 / TCP(sport=80, dport=4711) / b"abc",
            "udp [fd00::2]:53 > [fd00::9]:7": V6
            / IPv6ExtHdrHopByHop()
            / IPv6ExtHdrDestOpt()
            / UDP(sport=53, dport=7)
            / b"abc",
            "icmp 10.0.0.2 > 10.0.0.9 type 0 id 77": V4 / ICMP(type=0, id=77) / b"abc",
            "icmp 10.0.0.2 > 10.0.0.9 type 3": V4 / ICMP(type=3) / b"abc",
            "icmpv6 fd00::2 > fd00::9 type 129 id 77": V6 / ICMPv6EchoReply(id=77, data=b"abc"),
            "icmpv6 fd00::2 > fd00::9 type 135 target fe80::1": V6 / ICMPv6ND_NS(tgt="fe80::1"),
            "ip-protocol 47 10.0.0.2 > 10.0.0.9": V4.copy() / b"abc",
        }
        cases["ip-protocol 47 10.0.0.2 > 10.0.0.9"].proto = 47
        for tag, words in (
            (None, ""),
            (Dot1Q(vlan=7), "vlan 7 "),
            (Dot1AD(vlan=9) / Dot1Q(vlan=7), "vlan 9.7 "),
        ):
            for offset, padding in ((0, 0), (12, 0), (0, 20)):
                for name, packet in cases.items():
                    whole = MACS / packet if tag is None else MACS / tag / packet
                    layers, flow, frame = self.read(whole, offset, padding)
                    self.assertEqual(describeFlow(flow), words + name)
                    self.assertEqual(layers.end, len(frame) - padding)
                    self.assertFalse(layers.fragmented)
                    if "ip-protocol" not in name:
                        upper = bytes(whole.lastlayer().underlayer or whole)
                        self.assertGreaterEqual(layers.transport, 0)
                        self.assertTrue(bytes(whole).endswith(frame[layers.transport : layers.end]), upper)

    def test_links(self) -> None:
        arp = MACS / ARP(op=2, psrc="10.0.0.2", pdst="10.0.0.9")
        self.assertEqual(describeFlow(self.read(arp)[1]), "arp 10.0.0.2 > 10.0.0.9 operation 2")
        other = MACS.copy()
        other.type = 0x88CC
        self.assertEqual(
            describeFlow(self.read(other / b"x")[1]), "ethernet 0x88cc 52:54:00:00:00:01 > 52:54:00:00:00:02"
        )

    def test_fragments(self) -> None:
        four = V4.copy()
        four.id, four.frag, four.flags, four.proto = 77, 3, "MF", 17
        layers, flow, frame = self.read(MACS / four / b"datadata")
        self.assertEqual((layers.fragmented, layers.transport), (True, -1))
        self.assertEqual(frame[layers.body : layers.end], b"datadata")
        self.assertEqual(fragmentOf(frame, layers), (77, 24, True))
        six = V6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrFragment(id=77, offset=3, m=0, nh=17) / b"datadata"
        layers, other, frame = self.read(MACS / six)
        self.assertEqual((layers.fragmented, layers.protocol, layers.transport), (True, 17, -1))
        self.assertEqual(frame[layers.body : layers.end], b"datadata")
        self.assertEqual(fragmentOf(frame, layers), (77, 24, False))
        atomic = V6 / IPv6ExtHdrFragment(id=77, nh=17) / UDP(sport=1, dport=2)
        layers, _, _ = self.read(MACS / atomic)
        self.assertEqual((layers.fragmented, layers.transport), (False, 62))

    def test_lengthsThatLie(self) -> None:
        frame = bytearray(bytes(MACS / V4 / TCP() / b"abc"))
        for position, value in ((17, 255), (14, 0x4F), (14, 0x44), (46, 0xF0), (46, 0x40)):
            wrong = bytearray(frame)
            wrong[position] = value
            self.assertEqual(locate(bytes(wrong)).transport, -1, position)

    @settings(max_examples=500, deadline=None)
    @given(
        st.sampled_from(
            [
                b"",
                bytes(12),
                bytes(12) + b"\x08\x00\x45",
                bytes(12) + b"\x86\xdd\x60",
                bytes(12) + b"\x08\x06",
                bytes(12) + b"\x81\0\0\1\x86\xdd\x60",
                bytes(MACS / V6 / IPv6ExtHdrHopByHop())[:-7],
            ]
        ),
        st.binary(max_size=90),
        st.sampled_from((0, 12)),
    )
    def test_anyBytes(self, start: bytes, rest: bytes, offset: int) -> None:
        frame = bytes(offset) + start + rest
        for length in (len(frame), len(frame) // 2, 3):
            cut = frame[:length]
            layers = locate(cut, offset)
            self.assertLessEqual(layers.end, len(cut))
            describeFlow(flowOf(cut, layers, offset))
            if layers.fragmented:
                fragmentOf(cut, layers)
            if layers.transport >= 0:
                self.assertLess(layers.transport, layers.end)
