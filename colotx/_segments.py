"""
TCP segments in Ethernet frames, for those who rewrite them: where a header is, what its options are, how a field is
changed with the checksum kept.

The common shapes (no tag, no IP option or extension header, no fragment) are found by a few slices; for the rest
L{colotx.packets} is asked. Nothing here raises on any bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from colotx.packets import ICMP, ICMPV6, TCP, fragmentOf, locate

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10

HALF = 1 << 31
MASK = (1 << 32) - 1

_END, _NOTHING, _SCALE, _SACK, _TIMESTAMP = 0, 1, 3, 5, 8
_MAX_SCALE = 14
_LINUX_TIMESTAMP = b"\x01\x01\x08\x0a"
_WHOLE = (b"\x40\x00", b"\x00\x00")
_VLAN_ID = 0x0FFF
_TAGS = (b"\x81\x00", b"\x88\xa8", b"\x91\x00")
_DONT_FRAGMENT = 0x4000
_ERRORS = frozenset((3, 4, 11, 12))
"""ICMP types that quote the datagram they are about."""

_u16 = struct.Struct(">H")
_u32 = struct.Struct(">I")
word = _u32.unpack_from


class Segment(NamedTuple):
    """
    Where a TCP segment is in its frame.

    @ivar key: addresses and ports in the order of the wire, then the VLAN ids: 12 or 36 bytes and 2 for each id.
    @ivar start: index of the TCP header.
    @ivar data: index after its options.
    @ivar end: index after the IP datagram, without Ethernet padding.
    """

    key: bytes
    start: int
    data: int
    end: int


def find(frame: bytes) -> Segment | None:
    """@return: the segment, or None when the frame has no TCP header that can be read."""
    kind = frame[12:15]
    if kind == b"\x08\x00\x45":
        if frame[23:24] != b"\x06":
            return None
        if frame[20:22] in _WHOLE:
            end = 14 + (frame[16] << 8 | frame[17])
            if 54 <= end <= len(frame):
                data = 34 + (frame[46] >> 4) * 4
                return Segment(frame[26:38], 34, data, end) if 54 <= data <= end else None
    elif kind[:2] == b"\x86\xdd" and frame[20:21] == b"\x06":
        end = 54 + (frame[18] << 8 | frame[19])
        if 74 <= end <= len(frame):
            data = 54 + (frame[66] >> 4) * 4
            return Segment(frame[22:58], 54, data, end) if 74 <= data <= end else None
    return _search(frame)


def _search(frame: bytes) -> Segment | None:
    layers = locate(frame)
    if not layers.version or layers.protocol != TCP:
        return None
    start = layers.transport
    if start < 0:
        # The first fragment of a segment holds its header, and the checksum of the whole.
        if not layers.fragmented or layers.end - layers.body < 20 or fragmentOf(frame, layers).start:
            return None
        start = layers.body
    data = start + (frame[start + 12] >> 4) * 4
    if not start + 20 <= data <= layers.end:
        return None
    return Segment(_key(frame, layers.network, layers.network, start), start, data, layers.end)


def _key(frame: bytes, outer: int, network: int, ports: int) -> bytes:
    if frame[network] >> 4 == 4:
        key = frame[network + 12 : network + 20]
    else:
        key = frame[network + 8 : network + 40]
    key += frame[ports : ports + 4]
    for tag in range(14, outer, 4):
        # An id of 0 is a priority without a VLAN (802.1Q): the answer may come without the tag.
        if identifier := _u16.unpack_from(frame, tag)[0] & _VLAN_ID:
            key += _u16.pack(identifier)
    return key


class Quote(NamedTuple):
    """
    The beginning of a segment that an ICMP error is about.

    @ivar key: of the segment quoted, as L{Segment.key}.
    @ivar sequence: index of its sequence number.
    @ivar start: index of the ICMP header; the checksum 2 bytes on covers all that follows.
    """

    key: bytes
    sequence: int
    start: int


def findQuote(frame: bytes) -> Quote | None:
    """@return: what an ICMP error (RFC 792, RFC 4443) quotes of a TCP segment, else None."""
    layers = locate(frame)
    start, inner = layers.transport, layers.transport + 8
    if start < 0 or layers.end < inner + 28:
        return None
    if layers.protocol == ICMP and frame[start] in _ERRORS and frame[inner] >> 4 == 4:
        ports = inner + (frame[inner] & 15) * 4
        hasPorts = not _u16.unpack_from(frame, inner + 6)[0] & 0x1FFF
        protocol = frame[inner + 9]
    elif layers.protocol == ICMPV6 and 1 <= frame[start] < 128 and frame[inner] >> 4 == 6:
        ports, hasPorts, protocol = inner + 40, True, frame[inner + 6]
    else:
        return None
    if not hasPorts or protocol != TCP or not inner + 20 <= ports <= layers.end - 8:
        return None
    return Quote(_key(frame, layers.network, inner, ports), ports + 4, start)


def isKey(key: bytes) -> bool:
    """@return: whether C{key} could be a L{Segment}'s."""
    return len(key) in (12, 14, 16, 36, 38, 40)


def reverse(key: bytes) -> bytes:
    """The key of the other direction."""
    size = 4 if len(key) < 36 else 16
    ports = 2 * size
    return (
        key[size:ports] + key[:size] + key[ports + 2 : ports + 4] + key[ports : ports + 2] + key[ports + 4 :]
    )


def ahead(number: int, other: int) -> int:
    """How far C{number} is ahead of C{other}, modulo 2^32; 0 when it is not."""
    distance = (number - other) & MASK
    return distance if distance < HALF else 0


def timestamps(frame: bytes, segment: Segment) -> int:
    """@return: index of TSval, with TSecr 4 bytes after it; 0 when there is no such option (RFC 7323, 3.2)."""
    start = segment.start + 20
    if frame[start : start + 4] == _LINUX_TIMESTAMP and segment.data >= start + 12:
        return start + 4
    return 0 if start == segment.data else options(frame, segment)[0]


def options(frame: bytes, segment: Segment) -> tuple[int, list[int]]:
    """@return: as L{timestamps}; and the indexes of the sequence numbers of the SACK blocks (RFC 2018)."""
    timestamp = 0
    blocks: list[int] = []
    for kind, position, length in _options(frame, segment):
        if kind == _TIMESTAMP and length == 10:
            timestamp = position + 2
        elif kind == _SACK and length % 8 == 2:
            blocks.extend(range(position + 2, position + length, 4))
    return timestamp, blocks


def windowScale(frame: bytes, segment: Segment) -> int:
    """@return: of a SYN: the shift of the windows to come (RFC 7323, 2.2); 0 when there is no such option."""
    for kind, position, length in _options(frame, segment):
        if kind == _SCALE and length == 3:
            return min(frame[position + 2], _MAX_SCALE)
    return 0


def _options(frame: bytes, segment: Segment) -> Iterator[tuple[int, int, int]]:
    """Kind, index and length of each option but those of one byte."""
    position, end = segment.start + 20, segment.data
    while position < end:
        kind = frame[position]
        if kind == _NOTHING:
            position += 1
            continue
        if kind == _END or position + 1 >= end:
            break
        length = frame[position + 1]
        if length < 2 or position + length > end:
            break
        yield kind, position, length
        position += length


def rewrite(frame: bytes, start: int, checksum: int, changes: Iterable[tuple[int, int, int]]) -> bytes:
    """
    Change 32-bit fields, and the checksum with them (RFC 1624, equation 3). A wrong checksum stays wrong.

    Modulo 65535 a 32-bit number is the sum of its halves, and one at an odd index is 256 times itself.

    @param start: where what the checksum covers begins.
    @param checksum: index of the checksum.
    @param changes: (index, old, new) of every field.
    """
    result = bytearray(frame)
    total = 0xFFFF - _u16.unpack_from(frame, checksum)[0]
    for index, old, new in changes:
        _u32.pack_into(result, index, new)
        total += (new - old) << 8 if (index - start) & 1 else new - old
    # 0xFFFF, not 0: no sum over a pseudo header is zero.
    _u16.pack_into(result, checksum, 0xFFFF - (total % 0xFFFF or 0xFFFF))
    return bytes(result)


def acknowledgement(header: bytes, segment: Segment, sequence: int) -> bytes | None:
    """
    Make a segment that says nothing but what a header acknowledges.

    @param header: a frame up to C{segment.data}.
    @param sequence: the sequence number it gets.
    @return: a frame, or None when it has IPv6 extension headers.
    """
    start = segment.start
    network = 14
    while header[network - 2 : network] in _TAGS:
        network += 4
    frame = bytearray(header)
    size = len(frame) - start
    frame[start + 13] = ACK
    _u32.pack_into(frame, start + 4, sequence)
    if frame[network] >> 4 == 4:
        _u16.pack_into(frame, network + 2, len(frame) - network)
        _u16.pack_into(frame, network + 6, _DONT_FRAGMENT)
        _u16.pack_into(frame, network + 10, 0)
        _u16.pack_into(frame, network + 10, _checksum(frame[network:start]))
        addresses = frame[network + 12 : network + 20]
    elif frame[network + 6] == TCP:
        _u16.pack_into(frame, network + 4, size)
        addresses = frame[network + 8 : network + 40]
    else:
        return None
    _u16.pack_into(frame, start + 16, 0)
    pseudo = addresses + _u16.pack(TCP) + _u16.pack(size)
    _u16.pack_into(frame, start + 16, _checksum(pseudo + frame[start:]))
    return bytes(frame)


def _checksum(data: bytes | bytearray) -> int:
    # An even number of bytes (RFC 1071): modulo 65535 a number is the sum of its 16-bit digits.
    return -int.from_bytes(data, "big") % 0xFFFF
