"""Tests for L{colotx.lab.framekit}, with scapy as the oracle."""

from __future__ import annotations

import random

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from twisted.trial.unittest import SynchronousTestCase

from colotx.lab import framekit
from colotx.lab.framekit import ACK, PSH, Path, checksum, flipped, selective, timestamps

V4 = Path(4, bytes([10, 0, 0, 2]), bytes([10, 0, 0, 9]))
V6 = Path(6, b"\xfd" + bytes(14) + b"\2", b"\xfd" + bytes(14) + b"\x09")


def again(frame: bytes) -> bytes:
    """The frame as scapy makes it of its own reading, with lengths and checksums worked out anew."""
    packet = Ether(frame)
    layer = packet
    while layer:
        for field in ("chksum", "cksum", "len", "plen", "ihl", "dataofs"):
            if field in layer.fields:
                delattr(layer, field)
        layer = layer.payload
    return bytes(packet)


class FrameTests(SynchronousTestCase):
    """Frames are as scapy would make them."""

    def test_udp(self) -> None:
        """With tags or without, of odd and even length."""
        for version, layer in ((V4, IP), (V6, IPv6)):
            for tags in ((), (7,), (100, 7)):
                path = Path(version.version, version.source, version.destination, tags)
                for data in (b"", b"odd", b"even"):
                    frame = path.ip(framekit.UDP, path.withPorts(framekit.UDP, 53, 4711, data), ident=77)
                    packet = Ether(frame)
                    self.assertEqual(again(frame), frame)
                    self.assertEqual((packet[UDP].sport, packet[UDP].dport), (53, 4711))
                    self.assertEqual(bytes(packet[UDP].payload), data)
                    self.assertEqual(Dot1Q in packet, bool(tags))
                    self.assertEqual(Dot1AD in packet, len(tags) == 2)
                    self.assertIn(layer, packet)

    def test_tcp(self) -> None:
        """With options, numbers taken modulo 2**32."""
        for path in (V4, V6):
            options = timestamps(2**32 + 5, 9) + selective([(1, 2)])
            segment = path.tcp((80, 99), 2**32 + 3, 4, ACK | PSH, b"data!", window=17, options=options)
            frame = path.ip(framekit.TCP, segment, ident=1, ttl=3)
            packet = Ether(frame)[TCP]
            self.assertEqual(again(frame), frame)
            self.assertEqual((packet.seq, packet.ack, packet.window, str(packet.flags)), (3, 4, 17, "PA"))
            self.assertIn(("Timestamp", (5, 9)), packet.options)
            self.assertIn(("SAck", (1, 2)), packet.options)
            self.assertEqual(bytes(packet.payload), b"data!")

    def test_icmp(self) -> None:
        """Echo replies of both versions."""
        four = V4.ip(framekit.ICMP, V4.icmp(0, 0, b"\0\1\0\2data"))
        six = V6.ip(framekit.ICMPV6, V6.icmp(129, 0, b"\0\1\0\2data"))
        self.assertEqual([again(four), again(six)], [four, six])
        self.assertEqual((Ether(four)[ICMP].id, Ether(four)[ICMP].seq), (1, 2))
        self.assertEqual((Ether(six)[ICMPv6EchoReply].id, Ether(six)[ICMPv6EchoReply].seq), (1, 2))

    def test_options(self) -> None:
        """IP options, and an extension header of destination options."""
        four = V4.ip(framekit.UDP, V4.withPorts(framekit.UDP, 1, 2, b"x"), options=bytes([0x94, 4, 0, 0]))
        six = V6.ip(framekit.UDP, V6.withPorts(framekit.UDP, 1, 2, b"x"), options=bytes([0x1E, 4]) + bytes(4))
        self.assertEqual(Ether(four)[IP].ihl, 6)
        self.assertIn(IPv6ExtHdrDestOpt, Ether(six))
        for frame in (four, six):
            self.assertEqual(again(frame), frame)
            self.assertEqual(Ether(frame)[UDP].dport, 2)

    def test_fragments(self) -> None:
        """Their data is the payload, at the places they say."""
        payload = random.Random(1).randbytes(4000)
        for path in (V4, V6):
            frames = path.fragments(framekit.UDP, payload, 5, size=1000)
            whole = b""
            for number, frame in enumerate(frames):
                packet = Ether(frame)
                if path is V4:
                    header, place, more = packet[IP], packet[IP].frag * 8, bool(packet[IP].flags.MF)
                else:
                    header = packet[IPv6ExtHdrFragment]
                    place, more = header.offset * 8, bool(header.m)
                self.assertEqual((header.id, place), (5, len(whole)))
                self.assertEqual(more, number < len(frames) - 1)
                whole += bytes(header.payload)
            self.assertEqual(whole, payload)

    def test_checksum(self) -> None:
        """RFC 1071's example, and the ends of the range."""
        self.assertEqual(checksum(bytes.fromhex("0001f203f4f5f6f7")), 0x220D)
        self.assertEqual([checksum(b""), checksum(bytes(4)), checksum(b"\xff\xff")], [0xFFFF, 0xFFFF, 0])

    def test_flipped(self) -> None:
        """One byte changes."""
        self.assertEqual(flipped(b"abc", 1), b"aBc")
