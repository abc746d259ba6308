"""
The corpus' other flows: datagrams, messages, neighbours, fragments, and what nobody knows.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace

from colotx.lab.corpuspair import Maker, Pair, Verdict
from colotx.lab.framekit import (
    ARP,
    DCCP,
    GRE,
    ICMP,
    ICMPV6,
    SCTP,
    UDP,
    UDPLITE,
    Path,
    flipped,
)

LEAVES, HELD, EITHER = Verdict.LEAVES, Verdict.HELD, Verdict.EITHER

_ROUTER_ALERT = bytes([0x94, 4, 0, 0])
_UNKNOWN_KIND = 0x88B5
"""The first of IEEE's two EtherTypes for experiments."""

Datagrams = Callable[[random.Random, Path, tuple[int, int], int], list[tuple[int, bytes]] | None]
"""So many IP payloads of one flow, each with its protocol; C{None}: not with this version of IP."""


def _udp(chance: random.Random, path: Path, ports: tuple[int, int], count: int) -> list[tuple[int, bytes]]:
    return [
        (UDP, path.withPorts(UDP, *ports, chance.randbytes(chance.randrange(8, 1400)))) for _ in range(count)
    ]


def _udpLite(
    chance: random.Random, path: Path, ports: tuple[int, int], count: int
) -> list[tuple[int, bytes]]:
    datagrams = _udp(chance, path, ports, count)
    return [(UDPLITE, path.withPorts(UDPLITE, *ports, payload[8:])) for _, payload in datagrams]


def _sctp(chance: random.Random, path: Path, ports: tuple[int, int], count: int) -> list[tuple[int, bytes]]:
    tag, serial = chance.randrange(1 << 32), chance.randrange(1 << 31)
    packets = []
    for number in range(count):
        data = chance.randbytes(4 * chance.randrange(2, 300))
        chunk = struct.pack(">BBHIHHI", 0, 3, 16 + len(data), serial + number, 1, number, 0) + data
        # The checksum is a CRC-32C, which nobody here looks at.
        packets.append((SCTP, struct.pack(">HHII", *ports, tag, 0) + chunk))
    return packets


def _dccp(chance: random.Random, path: Path, ports: tuple[int, int], count: int) -> list[tuple[int, bytes]]:
    packets = []
    for number in range(count):
        # Type Data with a long sequence number: 16 bytes of header.
        head = struct.pack(">HHBBHBBHI", *ports, 4, 0, 0, 2 << 1 | 1, 0, 0, number)
        packets.append((DCCP, head + chance.randbytes(chance.randrange(8, 500))))
    return packets


def _echo(chance: random.Random, path: Path, ports: tuple[int, int], count: int) -> list[tuple[int, bytes]]:
    protocol, reply = (ICMP, 0) if path.version == 4 else (ICMPV6, 129)
    head = (struct.pack(">HH", ports[1], number) for number in range(count))
    return [(protocol, path.icmp(reply, 0, start + chance.randbytes(56))) for start in head]


def _unreachable(
    chance: random.Random, path: Path, ports: tuple[int, int], count: int
) -> list[tuple[int, bytes]]:
    """Port unreachable, each with the client's datagram in it."""
    protocol, kind, code = (ICMP, 3, 3) if path.version == 4 else (ICMPV6, 1, 4)
    client = replace(path, source=path.destination, destination=path.source, tags=())
    asked = [client.withPorts(UDP, ports[1], ports[0], chance.randbytes(20)) for _ in range(count)]
    quoted = [client.ip(UDP, payload, ident)[14:] for ident, payload in enumerate(asked)]
    return [(protocol, path.icmp(kind, code, bytes(4) + datagram)) for datagram in quoted]


def _neighbour(
    chance: random.Random, path: Path, ports: tuple[int, int], count: int
) -> list[tuple[int, bytes]] | None:
    """Neighbour advertisements for several addresses of the guest."""
    if path.version == 4:
        return None
    targets = [path.source[:-1] + bytes([number]) for number in range(count)]
    option = bytes([2, 1]) + path.sourceMac
    return [(ICMPV6, path.icmp(136, 0, bytes([0x60, 0, 0, 0]) + target + option)) for target in targets]


def _gre(chance: random.Random, path: Path, ports: tuple[int, int], count: int) -> list[tuple[int, bytes]]:
    return [(GRE, b"\0\0\x08\0" + chance.randbytes(chance.randrange(30, 800))) for _ in range(count)]


class _Sides:
    """Puts the same datagrams on the wire twice, as two guests do: other identifications, another TTL or not."""

    def __init__(self, chance: random.Random, path: Path) -> None:
        self._chance, self._path = chance, path
        self._idents = [chance.randrange(1 << 15), chance.randrange(1 << 15)]
        self.options = b""

    def frames(self, side: int, datagrams: Sequence[tuple[int, bytes]]) -> list[bytes]:
        frames = []
        for protocol, payload in datagrams:
            self._idents[side] += 1
            ident = self._idents[side]
            frames.append(self._path.ip(protocol, payload, ident, 64, self.options))
        return frames


def _equal(make: Datagrams, options: bool = False) -> Maker:
    def maker(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair | None:
        datagrams = make(chance, path, ports, chance.randrange(4, 12))
        if datagrams is None:
            return None
        sides = _Sides(chance, path)
        if options:
            sides.options = _ROUTER_ALERT if path.version == 4 else bytes([0x1E, 4]) + bytes(4)
        first, second = sides.frames(0, datagrams), sides.frames(1, datagrams)
        more = make(chance, path, ports, 2) or []
        later = tuple(sides.frames(0, more)), tuple(sides.frames(1, more))
        return Pair(tuple((frame, LEAVES) for frame in first), tuple(second), False, later=later)

    return maker


def _reordered(make: Datagrams) -> Maker:
    def maker(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair | None:
        datagrams = make(chance, path, ports, 8)
        if datagrams is None:
            return None
        sides = _Sides(chance, path)
        first = sides.frames(0, datagrams)
        place = chance.randrange(7)
        datagrams[place : place + 2] = datagrams[place + 1], datagrams[place]
        second = sides.frames(1, datagrams)
        # A comparer that sees one where the other is may take it for a difference: it cannot know what comes.
        verdicts = [LEAVES] * place + [EITHER] * (8 - place)
        return Pair(tuple(zip(first, verdicts, strict=True)), tuple(second), None, ordered=False)

    return maker


def _differing(make: Datagrams, change: Callable[[random.Random, bytes], bytes | None]) -> Maker:
    """@param change: what the secondary says instead of one IP payload; C{None}: nothing."""

    def maker(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair | None:
        datagrams = make(chance, path, ports, 8)
        if datagrams is None:
            return None
        sides = _Sides(chance, path)
        first = sides.frames(0, datagrams)
        place = chance.randrange(8)
        protocol, payload = datagrams[place]
        instead = change(chance, payload)
        datagrams[place : place + 1] = [] if instead is None else [(protocol, instead)]
        verdicts = [LEAVES] * place + [HELD] + [EITHER] * (7 - place)
        primary = tuple(zip(first, verdicts, strict=True))
        more = make(chance, path, ports, 2) or []
        later = tuple(sides.frames(0, more)), tuple(sides.frames(1, more))
        secondary = tuple(sides.frames(1, datagrams))
        return Pair(primary, secondary, True, ordered=False, later=later)

    return maker


def _byte(chance: random.Random, payload: bytes) -> bytes:
    # Beyond the header: a changed port would be another flow, which is another case.
    return flipped(payload, chance.randrange(12, len(payload)), 1 << chance.randrange(8))


def _port(chance: random.Random, payload: bytes) -> bytes:
    return flipped(payload, 3, 1)


def _longer(chance: random.Random, payload: bytes) -> bytes:
    return payload + b"\0"


def _nothing(chance: random.Random, payload: bytes) -> None:
    return None


def _repeated(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair:
    """The primary says a datagram twice, the secondary once."""
    datagrams = _udp(chance, path, ports, 4)
    sides = _Sides(chance, path)
    twice = [*datagrams, datagrams[-1]]
    first, second = sides.frames(0, twice), sides.frames(1, datagrams)
    # The two say the same: which one waits is no matter, but one does.
    verdicts = [LEAVES, LEAVES, LEAVES, EITHER, HELD if first[-1] == first[-2] else EITHER]
    return Pair(tuple(zip(first, verdicts, strict=True)), tuple(second), True, ordered=False)


def _padding(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair:
    """Short frames, filled up to Ethernet's 60 bytes with whatever was there."""
    datagrams = [(UDP, path.withPorts(UDP, *ports, bytes([number]))) for number in range(4)]
    sides = _Sides(chance, path)
    first, second = (
        [frame + chance.randbytes(max(8, 60 - len(frame))) for frame in frames]
        for frames in (sides.frames(0, datagrams), sides.frames(1, datagrams))
    )
    return Pair(tuple((frame, LEAVES) for frame in first), tuple(second), False)


def _fragmented(
    change: Callable[[list[bytes], random.Random], int | None] | None, mixed: bool = False
) -> Maker:
    """
    Datagrams in fragments, with identifications of the guest's own.

    @param change: changes the secondary's fragments of one datagram; returns which one is not right now.
    @param mixed: the secondary sends the fragments of two datagrams among each other.
    """

    def maker(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair:
        payloads = [
            path.withPorts(UDP, *ports, chance.randbytes(chance.randrange(3000, 9000))) for _ in range(3)
        ]
        idents = chance.randrange(1, 1 << 15), chance.randrange(1, 1 << 15)
        first, second = (
            [path.fragments(UDP, payload, ident + n) for n, payload in enumerate(payloads)]
            for ident in idents
        )
        wrong = None if change is None else change(second[1], chance)
        primary = []
        for number, frames in enumerate(first):
            for place, frame in enumerate(frames):
                verdict = LEAVES if change is None or number == 0 else EITHER
                primary.append((frame, HELD if number == 1 and place == wrong else verdict))
        if mixed:
            both = second[0] + second[1][:-1]
            chance.shuffle(both)
            # The datagrams become whole in their order.
            second = [both, second[1][-1:], second[2]]
        secondary = tuple(frame for frames in second for frame in frames)
        return Pair(tuple(primary), secondary, change is not None, ordered=not mixed and change is None)

    return maker


def _fragmentChanged(frames: list[bytes], chance: random.Random) -> int:
    place = chance.randrange(len(frames))
    frames[place] = flipped(frames[place], len(frames[place]) - 1 - chance.randrange(40), 1)
    return place


def _fragmentLost(frames: list[bytes], chance: random.Random) -> int:
    place = chance.randrange(len(frames))
    del frames[place]
    return place


def _arp(alike: bool) -> Maker:
    def maker(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair | None:
        if path.version == 6:
            return None
        frames = []
        for operation in (1, 2, 2):
            target = chance.randbytes(6) + bytes([10, 1, *chance.randbytes(2)])
            body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation) + path.sourceMac + path.source + target
            frames.append(path.ethernet(ARP, body))
        second = list(frames)
        if not alike:
            # Another hardware address for the guest's own.
            second[2] = flipped(second[2], len(second[2]) - 15)
        verdicts = [LEAVES, LEAVES, LEAVES if alike else HELD]
        return Pair(tuple(zip(frames, verdicts, strict=True)), tuple(second), not alike, ordered=alike)

    return maker


def _unknown(alike: bool) -> Maker:
    def maker(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair:
        path = replace(path, destinationMac=b"\x03" + path.destination[-2:] + bytes(3))
        frames = [path.ethernet(_UNKNOWN_KIND, chance.randbytes(chance.randrange(20, 200))) for _ in range(3)]
        second = list(frames)
        if not alike:
            second[1] = flipped(second[1], len(second[1]) - 1)
        verdicts = [LEAVES, LEAVES if alike else HELD, LEAVES if alike else EITHER]
        return Pair(tuple(zip(frames, verdicts, strict=True)), tuple(second), not alike, ordered=alike)

    return maker


def _cut(alike: bool, inPorts: bool) -> Maker:
    """
    Frames that end in the middle of a header.

    @param inPorts: in that of UDP; else in that of IP.
    """

    def maker(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair:
        path = replace(path, destinationMac=b"\x02" + path.destination[-2:] + bytes(3))
        whole = path.ip(UDP, path.withPorts(UDP, *ports, chance.randbytes(30)), 5)
        network, transport = 14 + 4 * len(path.tags), len(whole) - 38
        places = range(transport, transport + 8) if inPorts else range(network + 1, transport)
        frames = [whole[:size] for size in sorted(chance.sample(places, 4))]
        verdict = LEAVES if alike else HELD
        return Pair(tuple((frame, verdict) for frame in frames), tuple(frames) if alike else (), not alike)

    return maker


def _otherTag(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair | None:
    """The secondary says the same in another VLAN."""
    if not path.tags:
        return None
    other = replace(path, tags=(*path.tags[:-1], path.tags[-1] + 1))
    datagrams = _udp(chance, path, ports, 4)
    first, second = _Sides(chance, path).frames(0, datagrams), _Sides(chance, other).frames(1, datagrams)
    return Pair(tuple((frame, HELD) for frame in first), tuple(second), True)


def _crowd(chance: random.Random, path: Path, ports: tuple[int, int]) -> Pair:
    """Many flows at once; one of them differs, which is no matter of the others."""
    victim = chance.randrange(20)
    flows = []
    for number in range(20):
        datagrams = _udp(chance, path, (1000 + number, ports[1]), 5)
        sides = _Sides(chance, path)
        verdict = HELD if number == victim else LEAVES
        first = [(frame, verdict) for frame in sides.frames(0, datagrams)]
        if number == victim:
            datagrams = [(protocol, _byte(chance, payload)) for protocol, payload in datagrams]
        flows.append((first, sides.frames(1, datagrams)))
    primary = [frame for row in zip(*(first for first, _ in flows), strict=True) for frame in row]
    chance.shuffle(flows)
    secondary = [frame for row in zip(*(second for _, second in flows), strict=True) for frame in row]
    return Pair(tuple(primary), tuple(secondary), True, ordered=False)


_DATAGRAMS: dict[str, Datagrams] = {
    "udp": _udp,
    "udplite": _udpLite,
    "sctp": _sctp,
    "dccp": _dccp,
    "icmp-echo": _echo,
    "icmp-unreachable": _unreachable,
    "nd": _neighbour,
    "gre": _gre,
}

OTHER: dict[str, Maker] = {
    **{f"{name}-same": _equal(make) for name, make in _DATAGRAMS.items()},
    **{f"{name}-corrupted": _differing(make, _byte) for name, make in _DATAGRAMS.items()},
    **{f"{name}-lost": _differing(make, _nothing) for name, make in _DATAGRAMS.items()},
    "udp-options": _equal(_udp, options=True),
    "udp-reordered": _reordered(_udp),
    "udp-repeated": _repeated,
    "udp-longer": _differing(_udp, _longer),
    "udp-port": _differing(_udp, _port),
    "udp-crowd": _crowd,
    "padding": _padding,
    "icmp-echo-reordered": _reordered(_echo),
    "fragments-same": _fragmented(None),
    "fragments-mixed": _fragmented(None, mixed=True),
    "fragments-corrupted": _fragmented(_fragmentChanged),
    "fragments-lost": _fragmented(_fragmentLost),
    "arp-same": _arp(True),
    "arp-corrupted": _arp(False),
    "unknown-same": _unknown(True),
    "unknown-corrupted": _unknown(False),
    "cut-address-same": _cut(True, False),
    "cut-address-alone": _cut(False, False),
    "cut-ports-same": _cut(True, True),
    "cut-ports-alone": _cut(False, True),
    "vlan-other": _otherTag,
}
