"""Ethernet frames for tests, built by hand: no checksums, nothing the code under test builds or reads itself."""

from __future__ import annotations

import struct
from ipaddress import ip_address

from colotx.comparer import CompareLimits, Comparer
from colotx.evidence import Evidence

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
GUEST, CLIENT = "10.0.0.2", "10.0.0.9"
GUEST6, CLIENT6 = "fd00::2", "fd00::9"
_MACS = bytes.fromhex("52540000000952540000000a")


def ethernet(etherType: int, body: bytes, vlan: int | None = None, pad: bool = False) -> bytes:
    tag = b"" if vlan is None else struct.pack(">HH", 0x8100, vlan)
    frame = _MACS + tag + struct.pack(">H", etherType) + body
    return frame.ljust(60, b"\0") if pad else frame


def ip(
    protocol: int,
    body: bytes,
    source: str = GUEST,
    destination: str = CLIENT,
    ident: int = 0,
    ttl: int = 64,
    place: int = 0,
    options: bytes = b"",
    vlan: int | None = None,
    pad: bool = False,
) -> bytes:
    """A frame with an IPv4 or IPv6 datagram. @param place: fragment offset in bytes, and 1 for "more"."""
    ends = ip_address(source).packed + ip_address(destination).packed
    if len(ends) == 32:
        if place:
            body = struct.pack(">BBHI", protocol, 0, place, ident) + body
            protocol = 44
        header = struct.pack(">IHBB", 0x60000000 | ident, len(body), protocol, ttl) + ends
        return ethernet(0x86DD, header + body, vlan, pad)
    words = (place & ~7) >> 3 | (place & 1) << 13
    length = 20 + len(options) + len(body)
    header = struct.pack(
        ">BBHHHBBH", 0x45 + len(options) // 4, 0, length, ident & 0xFFFF, words, ttl, protocol, ident & 0xFFFF
    )
    return ethernet(0x0800, header + ends + options + body, vlan, pad)


def segment(
    seq: int, payload: bytes = b"", ack: int = 1, flags: int = ACK, port: int = 4711, stamp: int | None = None
) -> bytes:
    """A TCP header and its payload."""
    options = b"" if stamp is None else b"\1\1\x08\x0a" + struct.pack(">II", stamp & 0xFFFFFFFF, 0)
    words = (80, port, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 0x50 + len(options) * 4, flags, 512, stamp or 0, 0)
    return struct.pack(">HHIIBBHHH", *words) + options + payload


def tcp(
    seq: int, payload: bytes = b"", ack: int = 1, flags: int = ACK, port: int = 4711, **how: object
) -> bytes:
    stamp = how.pop("stamp", None)
    return ip(6, segment(seq, payload, ack, flags, port, stamp), **how)  # type: ignore[arg-type]


def udp(payload: bytes, port: int = 4711, **how: object) -> bytes:
    return ip(17, struct.pack(">HHHH", 53, port, 8 + len(payload), 0) + payload, **how)  # type: ignore[arg-type]


class Bench:
    """
    A comparer with nothing around it.

    @ivar left: frames that left, in order.
    @ivar asked: reasons for which checkpoints were asked for.
    """

    def __init__(self, **limits: int) -> None:
        self.now = 1000.0
        self.left: list[bytes] = []
        self.asked: list[str] = []
        self.evidence = Evidence(clock=lambda: 1.7e9)
        self.comparer = Comparer(
            lambda: self.now, self.left.extend, self.asked.append, CompareLimits(**limits), self.evidence
        )

    def primary(self, *frames: bytes) -> list[bytes]:
        """@return: what left because of them."""
        before = len(self.left)
        self.comparer.primary(frames)
        return self.left[before:]

    def secondary(self, *frames: bytes) -> list[bytes]:
        before = len(self.left)
        self.comparer.secondary(frames)
        return self.left[before:]

    def wait(self, seconds: float) -> list[bytes]:
        before = len(self.left)
        self.now += seconds
        self.comparer.scan()
        return self.left[before:]
