"""
What two guests in lock-step send, as a comparer gets it: the same flows twice, by stacks that differ as those of two
virtual machines do.

Of the secondary's frames all IP identifications and, where a connection has them, all TCP time stamps differ, as they
do from guest to guest; some segments are cut otherwise or repeated, some acknowledgements come at another
place, and what different flows say mixes in another order. It lags behind by some frames, or runs ahead in bursts.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from colotx.lab.corpustcp import Segment, Stack
from colotx.lab.framekit import ACK, ARP, ICMP, ICMPV6, UDP, Path

RECUT, REPEATED = 0.03, 0.01
"""
The share of the data segments to which this happens. None overtakes another one of its connection: a guest hardly does
that, and it can wedge a connection in QEMU's comparer, which would then have less to do.
"""

IPV6 = 0.15
STAMPED = 0.7
"""The share of the flows with IPv6, and of the connections with time stamps."""

LAG, AHEAD = 40, 0.15
"""Frames the secondary is behind at most, and how often it is as much ahead."""

CHUNK = 32
"""Frames that come at once at most."""

_WORD = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Profile:
    """
    @ivar frames: of the primary.
    @ivar flows: of each kind.
    @ivar kinds: what a burst is, and how often.
    @ivar sizes: of a frame with payload: from, to, and how often.
    @ivar burst: segments of one connection in a row, at most.
    """

    frames: int
    flows: int
    kinds: dict[str, int]
    sizes: tuple[tuple[int, int, int], ...]
    burst: int


_IMIX = ((64, 100, 7), (576, 576, 4), (1514, 1514, 1))

PROFILES = {
    "small": Profile(
        150_000, 400, {"data": 12, "ack": 45, "udp": 40, "echo": 2, "arp": 1}, ((75, 100, 1),), 2
    ),
    "mixed": Profile(120_000, 400, {"data": 42, "ack": 40, "udp": 15, "echo": 2, "arp": 1}, _IMIX, 4),
    "mtu": Profile(60_000, 32, {"data": 90, "ack": 9, "udp": 1}, ((1514, 1514, 1),), 8),
    "flows": Profile(120_000, 2000, {"data": 42, "ack": 40, "udp": 16, "echo": 2}, _IMIX, 2),
}


class _Connection:
    """A TCP connection of both guests."""

    def __init__(self, chance: random.Random, path: Path, port: int) -> None:
        base, theirs = chance.randrange(1 << 32), chance.randrange(1 << 32)
        self.stacks = [Stack(chance, path, (80, port), base, theirs) for _ in range(2)]
        stamped = chance.random() < STAMPED
        for stack in self.stacks:
            stack.stamps = stamped
        self.head = (54 if path.version == 4 else 74) + 12 * stamped
        self.offset = 0
        self.acknowledged = 0


class _Frames:
    """Makes bursts: the primary's frames and the secondary's."""

    def __init__(self, chance: random.Random, profile: Profile) -> None:
        self._chance, self._profile = chance, profile
        self._ident = [chance.randrange(1 << 16) for _ in range(2)]
        paths = [_path(chance, number) for number in range(2 * profile.flows)]
        self._senders, self._receivers = (
            [_Connection(chance, path, 1024 + number) for number, path in enumerate(part)]
            for part in (paths[::2], paths[1::2])
        )
        self._paths = paths

    def burst(self) -> tuple[object, list[bytes], list[bytes]]:
        """@return: the flow, and what either guest says of it now."""
        profile = self._profile
        (kind,) = self._chance.choices(list(profile.kinds), list(profile.kinds.values()))
        if kind == "data":
            return self._data(self._chance.choice(self._senders))
        if kind == "ack":
            return self._acknowledgement(self._chance.choice(self._receivers))
        path = self._chance.choice(self._paths)
        if kind == "arp":
            path = replace(path, version=4, source=path.source[-4:], destination=path.destination[-4:])
            addresses = path.sourceMac + path.source + path.destinationMac + path.destination
            frame = path.ethernet(ARP, struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2) + addresses)
            return frame, [frame], [frame]
        if kind == "udp":
            body = self._chance.randbytes(self._size() - (42 if path.version == 4 else 62))
            protocol = UDP
            # All flows together must fit into a comparer's table: 16384.
            port = 1024 + self._chance.randrange(max(1, 4000 // len(self._paths)))
            payload = path.withPorts(UDP, 53, port, body)
        else:
            protocol, reply = (ICMP, 0) if path.version == 4 else (ICMPV6, 129)
            payload = path.icmp(reply, 0, self._chance.randbytes(22))
        for side in range(2):
            self._ident[side] += 1
        first, second = (path.ip(protocol, payload, ident) for ident in self._ident)
        return payload, [first], [second]

    def _data(self, connection: _Connection) -> tuple[object, list[bytes], list[bytes]]:
        chance = self._chance
        segments = []
        for _ in range(chance.randrange(1, self._profile.burst + 1)):
            data = chance.randbytes(max(1, self._size() - connection.head))
            segments.append(Segment(connection.offset, data, connection.acknowledged))
            connection.offset += len(data)
        connection.acknowledged += chance.choice((0, 0, 0, 120))
        sides = [segments, list(segments)]
        for side in sides:
            for place in reversed(range(len(side))):
                happens = chance.random()
                segment = side[place]
                if happens < RECUT and len(segment.data) > 1:
                    cut = chance.randrange(1, len(segment.data))
                    rest = replace(segment, offset=segment.offset + cut, data=segment.data[cut:])
                    side[place : place + 1] = [replace(segment, data=segment.data[:cut]), rest]
                elif happens < RECUT + REPEATED:
                    side.append(segment)
        first, second = (
            list(stack.frames(side)) for stack, side in zip(connection.stacks, sides, strict=True)
        )
        return connection, first, second

    def _acknowledgement(self, connection: _Connection) -> tuple[object, list[bytes], list[bytes]]:
        start = connection.acknowledged
        connection.acknowledged += 2 * 1448
        places = [connection.acknowledged, connection.acknowledged]
        if self._chance.random() < 0.2:
            # One guest was quicker, and will say the rest with the next one.
            places[self._chance.randrange(2)] = start + 1448
        first, second = (
            [stack.frame(Segment(0, b"", place, ACK))]
            for stack, place in zip(connection.stacks, places, strict=True)
        )
        return connection, first, second

    def _size(self) -> int:
        sizes = self._profile.sizes
        ((low, high, _),) = self._chance.choices(sizes, [share for *_, share in sizes])
        return self._chance.randrange(low, high + 1)


@dataclass(frozen=True, slots=True)
class Traffic:
    """
    What is written to a comparer.

    @ivar chunks: in turn: which input (0: the primary's), and records for it.
    @ivar primary: frames of the primary.
    @ivar secondary: frames of the secondary.
    @ivar bytes: of the primary's frames.
    """

    chunks: list[tuple[int, bytes]]
    primary: int
    secondary: int
    bytes: int


def traffic(profile: Profile, seed: str) -> Traffic:
    """@return: the same for the same seed."""
    chance = random.Random(seed)
    frames = _Frames(chance, profile)
    first: list[bytes] = []
    # The secondary's, by when it says them, which keeps the order of each flow.
    second: list[tuple[float, int, bytes]] = []
    last: dict[object, float] = {}
    while len(first) < profile.frames:
        flow, ours, theirs = frames.burst()
        when = max(last.get(flow, 0.0), len(first) + chance.random() * 16)
        last[flow] = when
        first += ours
        second += [(when, len(second) + place, frame) for place, frame in enumerate(theirs)]
    streams = first, [frame for *_, frame in sorted(second)]
    chunks = [
        (side, b"".join(_WORD.pack(len(frame)) + frame for frame in streams[side][start:end]))
        for side, start, end in _turns(chance, len(streams[0]), len(streams[1]))
    ]
    return Traffic(chunks, len(streams[0]), len(streams[1]), sum(map(len, streams[0])))


def _turns(chance: random.Random, primary: int, secondary: int) -> Iterator[tuple[int, int, int]]:
    done = [0, 0]
    while done != [primary, secondary]:
        distance = chance.randrange(LAG)
        if chance.random() < AHEAD:
            distance = -distance
        goal = min(primary, done[0] + chance.randrange(1, CHUNK + 1))
        # As far in its own stream, which has another number of frames.
        other = (
            secondary
            if goal == primary
            else max(done[1], min(secondary, goal * secondary // primary - distance))
        )
        for side, end in (0, goal), (1, other):
            if end > done[side]:
                yield side, done[side], end
                done[side] = end


def _path(chance: random.Random, number: int) -> Path:
    guest, client = 0x0A000002, 0x0A010000 + number
    if chance.random() >= IPV6:
        return Path(4, guest.to_bytes(4, "big"), client.to_bytes(4, "big"))
    prefix = b"\xfd" + bytes(11)
    return Path(6, prefix + guest.to_bytes(4, "big"), prefix + client.to_bytes(4, "big"))
