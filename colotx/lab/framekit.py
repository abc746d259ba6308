"""
Ethernet frames as guests send them, made from their parts: the words the corpus is written in.

Everything on the wire is right here: lengths, checksums, order of headers. What is to be wrong is made wrong
afterwards. This module does not know what a comparer does.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

TCP, UDP, ICMP, ICMPV6, SCTP, DCCP, UDPLITE, GRE = 6, 17, 1, 58, 132, 33, 136, 47
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
IPV4, IPV6, ARP, VLAN, QINQ = 0x0800, 0x86DD, 0x0806, 0x8100, 0x88A8

HOP_BY_HOP, DESTINATION, _FRAGMENT = 0, 60, 44
SEQUENCES = 1 << 32


def checksum(data: bytes) -> int:
    """The Internet checksum of RFC 1071."""
    # The sum of the words with end-around carry is the number's remainder, but for the two faces of zero.
    number = int.from_bytes(data if len(data) % 2 == 0 else data + b"\0", "big")
    return 0xFFFF if not number else ~(number % 0xFFFF or 0xFFFF) & 0xFFFF


@dataclass(frozen=True, slots=True)
class Path:
    """
    From a guest to somebody.

    @ivar version: 4 or 6.
    @ivar source: the guest's address, as many bytes as the version wants.
    @ivar tags: VLAN ids, the outer one first.
    """

    version: int
    source: bytes
    destination: bytes
    tags: tuple[int, ...] = ()
    sourceMac: bytes = b"\x52\x54\x00\x12\x34\x56"
    destinationMac: bytes = b"\x02\x00\x00\x00\x00\x01"

    def ethernet(self, kind: int, payload: bytes) -> bytes:
        """@param kind: the EtherType."""
        head = self.destinationMac + self.sourceMac
        for place, tag in enumerate(self.tags):
            outer = place < len(self.tags) - 1
            head += struct.pack(">HH", QINQ if outer else VLAN, tag)
        return head + struct.pack(">H", kind) + payload

    def ip(self, protocol: int, payload: bytes, ident: int = 0, ttl: int = 64, options: bytes = b"") -> bytes:
        """
        A datagram in one frame.

        @param ident: IPv4's identification; IPv6 has none.
        @param options: IPv4: padded to words; IPv6: one extension header with these, of the destination options.
        """
        if self.version == 4:
            return self.ethernet(
                IPV4, self._header4(protocol, len(payload), ident, 0x4000, ttl, options) + payload
            )
        if options:
            payload = _extension(protocol, options) + payload
            protocol = DESTINATION
        return self.ethernet(IPV6, self._header6(protocol, len(payload), ttl) + payload)

    def fragments(
        self, protocol: int, payload: bytes, ident: int, size: int = 1480, ttl: int = 64
    ) -> list[bytes]:
        """@param size: of a fragment's payload, a multiple of 8."""
        frames = []
        for offset in range(0, len(payload), size):
            piece = payload[offset : offset + size]
            more = offset + size < len(payload)
            if self.version == 4:
                word = (0x2000 if more else 0) | offset >> 3
                header = self._header4(protocol, len(piece), ident, word, ttl, b"")
                frames.append(self.ethernet(IPV4, header + piece))
            else:
                piece = struct.pack(">BBHI", protocol, 0, offset | more, ident) + piece
                frames.append(self.ethernet(IPV6, self._header6(_FRAGMENT, len(piece), ttl) + piece))
        return frames

    def withPorts(self, protocol: int, source: int, destination: int, payload: bytes) -> bytes:
        """@return: the transport header of UDP or UDP-Lite, and the payload."""
        length = 8 + len(payload)
        head = struct.pack(">HHH", source, destination, length)
        total = checksum(self._pseudo(protocol, length) + head + b"\0\0" + payload)
        return head + struct.pack(">H", total or 0xFFFF) + payload

    def icmp(self, kind: int, code: int, body: bytes) -> bytes:
        """@return: an ICMP or ICMPv6 message, without IP."""
        head = bytes([kind, code])
        pseudo = b"" if self.version == 4 else self._pseudo(ICMPV6, 4 + len(body))
        return head + struct.pack(">H", checksum(pseudo + head + b"\0\0" + body)) + body

    def tcp(
        self,
        ports: tuple[int, int],
        sequence: int,
        acknowledged: int,
        flags: int,
        payload: bytes = b"",
        window: int = 502,
        options: bytes = b"",
    ) -> bytes:
        """@return: a segment, without IP. @param options: padded to words here."""
        options += b"\x01" * (-len(options) % 4)
        offset = (20 + len(options)) << 2
        head = struct.pack(
            ">HHIIBBH", *ports, sequence % SEQUENCES, acknowledged % SEQUENCES, offset, flags, window
        )
        tail = b"\0\0" + options + payload
        total = checksum(self._pseudo(TCP, len(head) + 2 + len(tail)) + head + b"\0\0" + tail)
        return head + struct.pack(">H", total) + tail

    def _header4(self, protocol: int, size: int, ident: int, word: int, ttl: int, options: bytes) -> bytes:
        options += b"\0" * (-len(options) % 4)
        first = 0x45 + len(options) // 4
        length = 20 + len(options) + size
        head = struct.pack(">BBHHHBB", first, 0, length, ident & 0xFFFF, word, ttl, protocol)
        tail = self.source + self.destination + options
        return head + struct.pack(">H", checksum(head + tail)) + tail

    def _header6(self, protocol: int, size: int, ttl: int) -> bytes:
        return struct.pack(">IHBB", 0x60000000, size, protocol, ttl) + self.source + self.destination

    def _pseudo(self, protocol: int, length: int) -> bytes:
        tail = (
            struct.pack(">BBH", 0, protocol, length)
            if self.version == 4
            else struct.pack(">II", length, protocol)
        )
        return self.source + self.destination + tail


def _extension(following: int, options: bytes) -> bytes:
    padding = -(2 + len(options)) % 8
    # Pad1 or PadN of RFC 8200.
    fill = b"" if not padding else b"\0" if padding == 1 else bytes([1, padding - 2]) + bytes(padding - 2)
    body = options + fill
    return bytes([following, (2 + len(body)) // 8 - 1]) + body


def timestamps(value: int, echoed: int) -> bytes:
    """TCP's time stamp option, as Linux lays it out."""
    return struct.pack(">BBBBII", 1, 1, 8, 10, value % SEQUENCES, echoed % SEQUENCES)


def selective(blocks: Sequence[tuple[int, int]]) -> bytes:
    """TCP's SACK option, as Linux lays it out."""
    pairs = b"".join(struct.pack(">II", left % SEQUENCES, right % SEQUENCES) for left, right in blocks)
    return bytes([1, 1, 5, 2 + len(pairs)]) + pairs


def flipped(data: bytes, place: int, mask: int = 0x20) -> bytes:
    """@return: the data with the byte at C{place} changed. Checksums are as they were."""
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]
