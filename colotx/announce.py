"""
Tell the network where a guest lives now.

After a failover the guest has the MAC and IP addresses it always had, but behind another switch port. The frames
made here (a gratuitous ARP, an unsolicited neighbour advertisement, or at least a RARP as QEMU's C{announce-self}
sends it) make switches and neighbours notice before their own time-outs do.

What to announce is learned from the guest's own output, on the host where it runs; the table travels to the
standby as plain values. This module knows headers, not sockets.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import deferLater

from colotx.errors import ProtocolError

_ARP, _RARP, _IPV4, _IPV6 = 0x0806, 0x8035, 0x0800, 0x86DD
_VLAN_TYPES = (0x8100, 0x88A8)
_ICMPV6 = 58
_DIGESTS = 1024
_BROADCAST = b"\xff" * 6
_ALL_NODES = IPv6Address("ff02::1").packed
_ROUTER_ADVERTISEMENT, _NEIGHBOUR_ADVERTISEMENT = 134, 136
_FRESH_HOPS = (32, 64, 128, 255)
"""TTLs hosts start with. A packet with any other was forwarded by the guest, its source is somebody else."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """
    An address seen in use by the guest.

    @ivar mac: 6 bytes.
    @ivar address: the IP address, or None when the frame told none.
    @ivar vlans: the VLAN tags in front, outermost first, as (TPID, VLAN id).
    @ivar router: the guest called itself an IPv6 router; an advertisement that forgot that would make its
        neighbours stop routing through it (RFC 4861, 7.2.5).
    """

    mac: bytes
    address: IPv4Address | IPv6Address | None
    vlans: tuple[tuple[int, int], ...] = ()
    router: bool = False


def learn(frame: bytes) -> Sighting | None:
    """
    Look at a frame the guest sent.

    @return: the source it shows; its C{address} is None when there is none in it that is surely the guest's own;
        None when not even the MAC address is of use.
    """
    mac = frame[6:12]
    if len(frame) < 14 or mac[0] & 1 or not any(mac):
        return None
    position = 12
    vlans: list[tuple[int, int]] = []
    (kind,) = struct.unpack_from(">H", frame, position)
    while kind in _VLAN_TYPES and len(vlans) < 2 and len(frame) >= position + 6:
        tag, following = struct.unpack_from(">HH", frame, position + 2)
        vlans.append((kind, tag & 0xFFF))
        kind, position = following, position + 4
    seen = Sighting(mac, None, tuple(vlans))
    body = frame[position + 2 :]
    if kind == _ARP:
        return _learnArp(seen, body)
    if kind == _IPV4:
        return _learnIPv4(seen, body) if not frame[0] & 1 else seen
    if kind == _IPV6:
        return _learnIPv6(seen, body)
    return seen


def _learnArp(seen: Sighting, body: bytes) -> Sighting:
    if len(body) < 28 or body[:6] != b"\0\1\x08\0\6\4" or body[8:14] != seen.mac:
        return seen
    return _withAddress(seen, IPv4Address(body[14:18]))


def _learnIPv4(seen: Sighting, body: bytes) -> Sighting:
    if len(body) < 20 or body[0] >> 4 != 4 or body[8] not in _FRESH_HOPS:
        return seen
    return _withAddress(seen, IPv4Address(body[12:16]))


def _learnIPv6(seen: Sighting, body: bytes) -> Sighting:
    if len(body) < 40 or body[0] >> 4 != 6 or body[7] not in _FRESH_HOPS:
        return seen
    seen = _withAddress(seen, IPv6Address(body[8:24]))
    if body[6] != _ICMPV6 or len(body) < 48:
        return seen
    if body[40] == _ROUTER_ADVERTISEMENT:
        return replace(seen, router=True)
    if body[40] == _NEIGHBOUR_ADVERTISEMENT and len(body) >= 64:
        return _withAddress(replace(seen, router=bool(body[44] & 0x80)), IPv6Address(body[48:64]))
    return seen


def _withAddress(seen: Sighting, address: IPv4Address | IPv6Address) -> Sighting:
    useless = address.is_multicast or address.is_unspecified or address.is_loopback
    if useless or (isinstance(address, IPv4Address) and address.packed[0] in (0, 255)):
        return seen
    return replace(seen, address=address)


def _digest(frame: bytes) -> bytes:
    """
    Nearly every frame of a busy guest tells what the one before told, so it must not cost much.

    @return: what L{learn} looks at in a plain IP packet; nothing for other frames.
    """
    kind = frame[12:14]
    if kind == b"\x08\0" and len(frame) >= 34:
        return frame[:15] + frame[22:23] + frame[26:30]
    if kind == b"\x86\xdd" and len(frame) >= 54 and frame[20] != _ICMPV6:
        return frame[:15] + frame[21:38]
    return b""


class AddressTable:
    """
    What the guest is known by: the newest sightings, at most C{limit} of them.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._seen: OrderedDict[tuple[Any, ...], Sighting] = OrderedDict()
        self._digests: set[bytes] = set()

    @property
    def sightings(self) -> list[Sighting]:
        """All of them, the newest last."""
        return list(self._seen.values())

    def observe(self, frames: Iterable[bytes]) -> bool:
        """
        Learn from frames the guest sent.

        @return: whether they showed anything new.
        """
        fresh = False
        for frame in frames:
            digest = _digest(frame)
            if digest in self._digests:
                continue
            seen = learn(frame)
            if seen is not None:
                fresh |= self.add(seen)
            if digest:
                if len(self._digests) >= _DIGESTS:
                    self._digests.clear()
                self._digests.add(digest)
        return fresh

    def add(self, seen: Sighting) -> bool:
        """Take one more; the oldest is forgotten when the table is full. @return: whether it is new."""
        key = (seen.mac, seen.vlans, seen.address)
        before = self._seen.get(key)
        if before is not None and before.router:
            seen = before
        self._seen[key] = seen
        self._seen.move_to_end(key)
        if len(self._seen) > self._limit:
            self._seen.popitem(last=False)
            self._digests.clear()
        return seen != before

    def encode(self) -> list[dict[str, object]]:
        """The table as JSON values, for the standby."""
        return [
            {
                "mac": seen.mac.hex(":"),
                "address": None if seen.address is None else str(seen.address),
                "vlans": [list(vlan) for vlan in seen.vlans],
                "router": seen.router,
            }
            for seen in self._seen.values()
        ]

    @classmethod
    def decode(cls, values: Any, limit: int = 64) -> AddressTable:
        """
        The reverse of L{encode}.

        @raise ProtocolError: these values are no table.
        """
        table = cls(limit)
        try:
            for value in values[-limit:]:
                mac = bytes.fromhex(value["mac"].replace(":", ""))
                address = None if value["address"] is None else ip_address(value["address"])
                vlans = tuple((int(kind), int(tag)) for kind, tag in value["vlans"])
                known = all(kind in _VLAN_TYPES and 0 <= tag <= 0xFFF for kind, tag in vlans)
                if len(mac) != 6 or len(vlans) > 2 or not known:
                    raise ValueError(f"impossible MAC address or VLAN tags in {value!r:.200}")
                table.add(Sighting(mac, address, vlans, bool(value["router"])))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"the peer's table of guest addresses makes no sense: {error}") from error
        return table


def announcements(sightings: Sequence[Sighting]) -> list[bytes]:
    """
    The frames of one round. For an IPv4 address a gratuitous ARP in request and in reply form (RFC 5227, 3; some
    hosts heed only one of them), for an IPv6 address an unsolicited neighbour advertisement (RFC 4861, 7.2.6), for
    a MAC address with no known IP address a RARP.
    """
    named = {(seen.mac, seen.vlans) for seen in sightings if seen.address is not None}
    frames = []
    for seen in sightings:
        if isinstance(seen.address, IPv4Address):
            own = seen.mac + seen.address.packed
            frames.append(_arp(seen, _ARP, 1, own, bytes(6) + seen.address.packed))
            frames.append(_arp(seen, _ARP, 2, own, own))
        elif isinstance(seen.address, IPv6Address):
            frames.append(_neighbourAdvertisement(seen, seen.address))
        elif (seen.mac, seen.vlans) not in named:
            bare = seen.mac + bytes(4)
            frames.append(_arp(seen, _RARP, 3, bare, bare))
    return frames


def _ethernet(seen: Sighting, destination: bytes, kind: int, body: bytes) -> bytes:
    tags = b"".join(struct.pack(">HH", *vlan) for vlan in seen.vlans)
    return (destination + seen.mac + tags + struct.pack(">H", kind) + body).ljust(60, b"\0")


def _arp(seen: Sighting, kind: int, operation: int, sender: bytes, target: bytes) -> bytes:
    header = struct.pack(">HHBBH", 1, _IPV4, 6, 4, operation)
    return _ethernet(seen, _BROADCAST, kind, header + sender + target)


def _neighbourAdvertisement(seen: Sighting, address: IPv6Address) -> bytes:
    flags = 0x20000000 | (0x80000000 if seen.router else 0)  # override, and router if it is one
    rest = struct.pack(">I", flags) + address.packed + b"\2\1" + seen.mac
    pseudo = address.packed + _ALL_NODES + struct.pack(">II", 4 + len(rest), _ICMPV6)
    header = struct.pack(">IHBB", 6 << 28, 4 + len(rest), _ICMPV6, 255)
    start = struct.pack(">BB", _NEIGHBOUR_ADVERTISEMENT, 0)
    # Modulo 65535 a number and the sum of its 16-bit digits (RFC 1071) are the same.
    checksum = -int.from_bytes(pseudo + start + b"\0\0" + rest, "big") % 0xFFFF
    message = start + struct.pack(">H", checksum) + rest
    return _ethernet(seen, b"\x33\x33\0\0\0\1", _IPV6, header + address.packed + _ALL_NODES + message)


class Announcer:
    """
    Sends announcements in rounds, as QEMU's C{announce-self} does with its defaults: at once, then after 50, 150,
    250 and 350 ms. Each round says what the table holds then, so what the guest shows meanwhile is included.

    @param clock: an C{IReactorTime}.
    @param port: the L{colotx.interfaces.IFramePort} of the outside.
    """

    rounds = 5
    initial = 0.050
    step = 0.100
    maximum = 0.550

    def __init__(self, clock: Any, port: Any, table: AddressTable) -> None:
        self._clock = clock
        self._port = port
        self._table = table
        self._running: Deferred[None] | None = None

    def start(self) -> Deferred[None]:
        """
        Begin from the first round, also when rounds are under way.

        @return: a Deferred that fires after the last round or L{stop}.
        """
        self.stop()
        done: Deferred[None] = Deferred()
        self._running = ensureDeferred(self._run())
        self._running.addBoth(lambda result: done.callback(None))
        return done

    def stop(self) -> None:
        """Send no more. Harmless when nothing is under way."""
        if self._running is not None:
            self._running.cancel()
            self._running = None

    async def _run(self) -> None:
        for number in range(self.rounds):
            frames = announcements(self._table.sightings)
            if frames:
                self._port.send(frames)
            if number < self.rounds - 1:
                await deferLater(self._clock, min(self.initial + number * self.step, self.maximum))


__all__ = ["AddressTable", "Announcer", "Sighting", "announcements", "learn"]
