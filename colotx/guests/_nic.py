"""
The embedded guest's NIC and the part of IP it speaks: ARP, ICMP echo, UDP echo (RFC 862) and, through
L{colotx.guests._tinytcp}, TCP echo. IPv4 only, no fragments.

Port 17 is no echo: it answers with random bytes, so two guests in the same state say different things there.

It answers to where a frame came from, so it needs no ARP table and works behind a router.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from ipaddress import IPv4Address

from colotx.guests._tinytcp import PORTS, RANDOM_PORT, Memory, TcpEcho

MTU = 1500
_BROADCAST = b"\xff" * 6
_ARP_HEADER = b"\0\1\x08\0\6\4"
_ICMP, _TCP, _UDP = 1, 6, 17
_RANDOM_BYTES = 16


def checksum(data: bytes) -> int:
    """
    The internet checksum (RFC 1071): 0 over data that holds its own right one.

    Modulo 65535 a number and the sum of its 16-bit digits are the same, which leaves the work to C code.
    """
    return -int.from_bytes(data + b"\0" * (len(data) & 1), "big") % 0xFFFF


class Nic:
    """
    @ivar mac: 6 bytes.
    @ivar address: the guest's IPv4 address.
    @param memory: where the TCP connections live, from C{base} on, in C{slots} slots.
    @param transmit: takes a frame that leaves.
    """

    def __init__(
        self,
        mac: bytes,
        address: IPv4Address,
        memory: Memory,
        base: int,
        slots: int,
        transmit: Callable[[bytes], None],
    ) -> None:
        self.mac = mac
        self.address = address
        self._ip = address.packed
        self._transmit = transmit
        self._tcp = TcpEcho(memory, base, slots, MTU - 40, self._sendTcp)

    def announce(self) -> None:
        """A gratuitous ARP, as after power-on."""
        body = _ARP_HEADER + b"\0\1" + self.mac + self._ip + bytes(6) + self._ip
        self._transmit((_BROADCAST + self.mac + b"\x08\6" + body).ljust(60, b"\0"))

    def tick(self, now: int) -> None:
        """Guest time went on: see to retransmissions."""
        self._tcp.tick(now)

    def receive(self, frame: bytes, now: int) -> None:
        """A frame arrived, at guest time C{now} (ms). What is not for us or broken is ignored."""
        destination, source, kind, body = frame[:6], frame[6:12], frame[12:14], frame[14:]
        if destination not in (self.mac, _BROADCAST) or len(source) < 6 or source[0] & 1:
            return
        if kind == b"\x08\6":
            self._receiveArp(source, body)
        elif kind == b"\x08\0" and destination == self.mac:
            self._receiveIp(source, body, now)

    def _receiveArp(self, source: bytes, body: bytes) -> None:
        if len(body) >= 28 and body[:8] == _ARP_HEADER + b"\0\1" and body[24:28] == self._ip:
            reply = _ARP_HEADER + b"\0\2" + self.mac + self._ip + body[8:18]
            self._transmit((source + self.mac + b"\x08\6" + reply).ljust(60, b"\0"))

    def _receiveIp(self, source: bytes, packet: bytes, now: int) -> None:
        if len(packet) < 20 or packet[0] >> 4 != 4:
            return
        start = (packet[0] & 15) * 4
        total, _, fragment = struct.unpack_from(">HHH", packet, 2)
        if not 20 <= start <= total <= len(packet) or fragment & 0x3FFF or checksum(packet[:start]):
            return
        protocol, peer, target = packet[9], packet[12:16], packet[16:20]
        payload = packet[start:total]
        if target != self._ip or peer[0] >= 224 or peer[0] in (0, 127):
            return
        if protocol == _ICMP:
            if len(payload) >= 8 and payload[:2] == b"\x08\0" and not checksum(payload):
                body = payload[4:]
                answer = struct.pack(">BBH", 0, 0, checksum(b"\0\0\0\0" + body)) + body
                self._sendIp(source, peer, _ICMP, answer)
        elif protocol == _UDP:
            self._receiveUdp(source, peer, payload)
        elif protocol == _TCP and not checksum(self._pseudo(peer, _TCP, len(payload)) + payload):
            self._tcp.receive(source, peer, payload, now)

    def _receiveUdp(self, source: bytes, peer: bytes, payload: bytes) -> None:
        if len(payload) < 8:
            return
        peerPort, port, length, given = struct.unpack_from(">HHHH", payload)
        payload = payload[:length]
        if port not in PORTS or peerPort in PORTS or not 8 <= length == len(payload):
            return  # two such services would answer each other for ever
        if given and checksum(self._pseudo(peer, _UDP, length) + payload):
            return
        data = os.urandom(_RANDOM_BYTES) if port == RANDOM_PORT else payload[8:]
        header = struct.pack(">HHH", port, peerPort, 8 + len(data))
        pseudo = self._pseudo(peer, _UDP, 8 + len(data))
        mark = checksum(pseudo + header + b"\0\0" + data) or 0xFFFF
        self._sendIp(source, peer, _UDP, header + struct.pack(">H", mark) + data)

    def _sendTcp(self, mac: bytes, peer: bytes, segment: bytes) -> None:
        mark = checksum(self._pseudo(peer, _TCP, len(segment)) + segment)
        self._sendIp(mac, peer, _TCP, segment[:16] + struct.pack(">H", mark) + segment[18:])

    def _pseudo(self, peer: bytes, protocol: int, length: int) -> bytes:
        return peer + self._ip + struct.pack(">HH", protocol, length)

    def _sendIp(self, mac: bytes, peer: bytes, protocol: int, payload: bytes) -> None:
        # Never fragmented (DF), so the identification may stay 0 (RFC 6864).
        start = struct.pack(">BBHHHBB", 0x45, 0, 20 + len(payload), 0, 0x4000, 64, protocol)
        mark = checksum(start + b"\0\0" + self._ip + peer)
        header = start + struct.pack(">H", mark) + self._ip + peer
        self._transmit((mac + self.mac + b"\x08\0" + header + payload).ljust(60, b"\0"))
