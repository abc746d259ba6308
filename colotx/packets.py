"""
Reading Ethernet frames: where the layers are, and which flow a frame belongs to.

Exact and slow: the comparer's and the translator's fast paths have their own shortcuts for the common shapes and
come here for the rest. Nothing here raises on any bytes: what cannot be read is a frame of "other" kind
(C{version} 0), or an IP datagram without a transport header.

Read: Ethernet II, up to two tags (802.1Q, 802.1ad), ARP, IPv4 with options, IPv6 with extension headers (RFC 8200,
RFC 4302, RFC 6275, RFC 7401, RFC 5533), fragments of both, TCP, UDP, UDP-Lite, SCTP, DCCP, ICMP, ICMPv6.

Positions are indexes into the frame as given; C{offset} is the number of bytes before the Ethernet header that are
not the frame's (a virtio-net header).
"""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import NamedTuple

ETHERNET_HEADER = 14
ETHER_IPV4 = 0x0800
ETHER_ARP = 0x0806
ETHER_IPV6 = 0x86DD

ICMP = 1
TCP = 6
UDP = 17
DCCP = 33
FRAGMENT = 44
ICMPV6 = 58
SCTP = 132
UDPLITE = 136

_TAGS = frozenset((0x8100, 0x88A8, 0x9100))
_MAX_TAGS = 2
_NAMES = {
    ICMP: "icmp",
    TCP: "tcp",
    UDP: "udp",
    DCCP: "dccp",
    ICMPV6: "icmpv6",
    SCTP: "sctp",
    UDPLITE: "udplite",
}
_EXTENSIONS = frozenset((0, 43, 60, 135, 139, 140))
"""IPv6 headers whose length is in units of 8 bytes after the first 8."""
_AUTHENTICATION = 51
_SHORTEST = {ICMP: 4, TCP: 20, UDP: 8, DCCP: 12, ICMPV6: 4, SCTP: 12, UDPLITE: 8}
"""What a transport header has at least, bytes."""
_PORTS = frozenset((TCP, UDP, DCCP, SCTP, UDPLITE))
_WITH_IDENTIFIER = frozenset((0, 8, 13, 14, 15, 16, 17, 18))
"""ICMP types that carry an identifier: echo, time stamp, information, address mask (RFC 792, RFC 950)."""
_ECHO_V6 = frozenset((128, 129))
_NEIGHBOUR = frozenset((135, 136))

_u16 = struct.Struct(">H").unpack_from
_u32 = struct.Struct(">I").unpack_from


class Layers(NamedTuple):
    """
    Where the layers of one frame are.

    @ivar version: 4 or 6; 0: no IP datagram that can be read.
    @ivar network: index of the IP header, or of what follows the Ethernet type.
    @ivar protocol: the IP protocol of the body, or the Ethernet type when C{version} is 0.
    @ivar transport: index of the transport header when it is one of those read here and whole (of TCP: with its
        options); else -1. Fragments have none.
    @ivar end: index after the last byte of the IP datagram, without Ethernet padding.
    @ivar fragmented: it is a fragment.
    @ivar body: index of what follows the IP headers, a fragment's data included.
    """

    version: int
    network: int
    protocol: int
    transport: int
    end: int
    fragmented: bool
    body: int


class Fragment(NamedTuple):
    """
    One fragment's place in its datagram.

    @ivar identification: what all fragments of a datagram share.
    @ivar start: byte position of its data in the datagram's body.
    @ivar more: it is not the last one.
    """

    identification: int
    start: int
    more: bool


class Flow(NamedTuple):
    """
    What tells one flow of frames from another.

    @ivar tags: the 802.1Q tags, 4 bytes each (type and control information).
    @ivar version: as in L{Layers}.
    @ivar protocol: as in L{Layers}.
    @ivar source: address of the sender, 4, 6 (Ethernet) or 16 bytes.
    @ivar destination: address of the receiver.
    @ivar selector: ports, 4 bytes; or type and identifier of ICMP; or operation of ARP; or empty.
    """

    tags: bytes
    version: int
    protocol: int
    source: bytes
    destination: bytes
    selector: bytes


def locate(frame: bytes, offset: int = 0) -> Layers:
    """Find the layers of a frame."""
    size = len(frame)
    kind = offset + ETHERNET_HEADER - 2
    if size < kind + 2:
        return Layers(0, min(kind, size), 0, -1, size, False, min(kind, size))
    etherType = int(_u16(frame, kind)[0])
    for _ in range(_MAX_TAGS):
        if etherType not in _TAGS or size < kind + 6:
            break
        kind += 4
        etherType = _u16(frame, kind)[0]
    network = kind + 2
    layers = None
    if etherType == ETHER_IPV4:
        layers = _ipv4(frame, network)
    elif etherType == ETHER_IPV6:
        layers = _ipv6(frame, network)
    return layers or Layers(0, network, etherType, -1, size, False, network)


def _ipv4(frame: bytes, network: int) -> Layers | None:
    size = len(frame) - network
    if size < 20 or frame[network] >> 4 != 4:
        return None
    header = (frame[network] & 15) * 4
    length = _u16(frame, network + 2)[0] or size  # 0: more than 64 KiB in one, left to segmentation offload
    if not 20 <= header <= length <= size:
        return None
    body, end = network + header, network + length
    fragmented = bool(_u16(frame, network + 6)[0] & 0x3FFF)
    protocol = frame[network + 9]
    transport = -1 if fragmented else findTransport(frame, protocol, body, end)
    return Layers(4, network, protocol, transport, end, fragmented, body)


def _ipv6(frame: bytes, network: int) -> Layers | None:
    size = len(frame) - network
    if size < 40 or frame[network] >> 4 != 6:
        return None
    length = _u16(frame, network + 4)[0] or size - 40
    if length + 40 > size:
        return None
    body, end = network + 40, network + 40 + length
    protocol = frame[network + 6]
    while body + 8 <= end:
        following = frame[body]
        if protocol in _EXTENSIONS:
            header = frame[body + 1] * 8 + 8
        elif protocol == _AUTHENTICATION:
            header = frame[body + 1] * 4 + 8
        elif protocol == FRAGMENT:
            if _u16(frame, body + 2)[0] & 0xFFF9:
                return Layers(6, network, following, -1, end, True, body + 8)
            header = 8  # an atomic fragment (RFC 6946): the whole datagram
        else:
            break
        if body + header > end:
            break
        protocol, body = following, body + header
    return Layers(6, network, protocol, findTransport(frame, protocol, body, end), end, False, body)


def findTransport(frame: bytes, protocol: int, body: int, end: int) -> int:
    """@return: C{body} if a whole transport header of this protocol begins there, else -1; see L{Layers}."""
    shortest = _SHORTEST.get(protocol)
    if shortest is None or end - body < shortest:
        return -1
    if protocol == TCP and not 20 <= (frame[body + 12] >> 4) * 4 <= end - body:
        return -1
    return body


def fragmentOf(frame: bytes, layers: Layers) -> Fragment:
    """@param layers: of this frame, C{fragmented}."""
    if layers.version == 4:
        (place,) = _u16(frame, layers.network + 6)
        return Fragment(_u16(frame, layers.network + 4)[0], (place & 0x1FFF) * 8, bool(place & 0x2000))
    (place,) = _u16(frame, layers.body - 6)
    return Fragment(_u32(frame, layers.body - 4)[0], place & 0xFFF8, bool(place & 1))


def flowOf(frame: bytes, layers: Layers, offset: int = 0) -> Flow:
    """
    The flow a frame belongs to. ARP by operation and addresses; IP by addresses and protocol and, where there is a
    transport header, by ports or by ICMP type and identifier (neighbour discovery: type and target); everything
    else by Ethernet addresses and type. Fragments of one datagram have one flow.
    """
    network = layers.network
    tags = frame[offset + 12 : network - 2]
    if layers.version:
        first, length = (12, 4) if layers.version == 4 else (8, 16)
        source = frame[network + first : network + first + length]
        destination = frame[network + first + length : network + first + 2 * length]
        selector = selectorOf(frame, layers.protocol, layers.transport)
    elif (
        layers.protocol == ETHER_ARP
        and len(frame) >= network + 28
        and frame[network + 2 : network + 6] == b"\x08\x00\x06\x04"
    ):
        source, destination = frame[network + 14 : network + 18], frame[network + 24 : network + 28]
        selector = frame[network + 6 : network + 8]
    else:
        source, destination = frame[offset + 6 : offset + 12], frame[offset : offset + 6]
        selector = b""
    return Flow(tags, layers.version, layers.protocol, source, destination, selector)


def selectorOf(frame: bytes, protocol: int, transport: int) -> bytes:
    """What a transport header adds to the addresses of a flow. @param transport: its index, or -1."""
    if transport < 0:
        return b""
    if protocol in _PORTS:
        return frame[transport : transport + 4]
    kind = frame[transport]
    if protocol == ICMP:
        return frame[transport : transport + 1] + (
            frame[transport + 4 : transport + 6] if kind in _WITH_IDENTIFIER else b""
        )
    if kind in _NEIGHBOUR:
        return frame[transport : transport + 1] + frame[transport + 8 : transport + 24]
    return frame[transport : transport + 1] + (
        frame[transport + 4 : transport + 6] if kind in _ECHO_V6 else b""
    )


def describeFlow(flow: Flow) -> str:
    """@return: such as C{tcp 10.0.0.2:80 > 10.0.0.9:4711} or C{vlan 7 icmp 10.0.0.2 > 10.0.0.9 type 0 id 77}."""
    vlans = [str(_u16(flow.tags, at)[0] & 0xFFF) for at in range(2, len(flow.tags) - 1, 4)]
    words = [f"vlan {'.'.join(vlans)}"] if vlans else []
    selector = flow.selector
    if flow.version:
        source, destination = str(ip_address(flow.source)), str(ip_address(flow.destination))
        words.append(_NAMES.get(flow.protocol, f"ip-protocol {flow.protocol}"))
        if flow.protocol in _PORTS and len(selector) == 4:
            if flow.version == 6:
                source, destination = f"[{source}]", f"[{destination}]"
            source, destination = f"{source}:{_u16(selector, 0)[0]}", f"{destination}:{_u16(selector, 2)[0]}"
        words += [source, ">", destination]
        if flow.protocol in (ICMP, ICMPV6) and selector:
            words += ["type", str(selector[0])]
            if len(selector) == 3:
                words += ["id", str(_u16(selector, 1)[0])]
            elif len(selector) == 17:
                words += ["target", str(ip_address(selector[1:]))]
    elif selector:
        words += ["arp", str(ip_address(flow.source)), ">", str(ip_address(flow.destination))]
        words += ["operation", str(_u16(selector, 0)[0])]
    else:
        words += [f"ethernet 0x{flow.protocol:04x}", flow.source.hex(":"), ">", flow.destination.hex(":")]
    return " ".join(words)
