"""
A TCP echo server (RFC 9293, RFC 862) whose whole state lies in a guest's RAM. On port 17 it answers with as many
random bytes instead.

Small, and correct towards any peer: in-order delivery (what comes early or twice is acknowledged and ignored), flow
control in both directions, retransmission with a doubling timer and slow start, zero-window probes, orderly close by
the peer, resets and stray segments as RFC 5961 wants them. It offers an MSS and no other option, and it never
closes first.

Echoing makes one ring per connection enough: what was received waits there until the peer acknowledged its echo,
and the free part is the receive window. This module sees segments; it knows no IP header and no clock but the
guest's own, in milliseconds.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter, itemgetter
from typing import Protocol

ECHO_PORT = 7
RANDOM_PORT = 17
PORTS = (ECHO_PORT, RANDOM_PORT)
RING = 32768
"""Bytes of a connection's ring: its largest receive window."""
SLOT = RING + 4096
"""Bytes of RAM a connection takes: one page for its numbers, then the ring."""

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
SYN_RECEIVED, ESTABLISHED, LAST_ACK = 1, 2, 3

_RTO = 200
_RTO_MAX = 10_000
_RETRIES = 15
_IDLE = 60_000
"""Milliseconds of silence after which a connection may lose its slot to a new one."""
_MOD = 1 << 32
_HEADER = struct.Struct(">HHIIBBHHH")
_NUMBERS = struct.Struct(">B6s4sHHH11IBQQ")

_Key = tuple[bytes, int, int]
"""The peer's address and port, and our port."""


class Memory(Protocol):
    """RAM that notes what is written."""

    def read(self, offset: int, length: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...


def distance(start: int, end: int) -> int:
    """How far C{end} is ahead of C{start} in sequence space; negative when it is behind."""
    return (end - start + (_MOD >> 1)) % _MOD - (_MOD >> 1)


@dataclass(slots=True)
class _Connection:
    """
    @ivar una: the oldest sequence number not acknowledged; the ring begins with it (but for a SYN).
    @ivar nxt: what is sent next; C{highest}: the highest C{nxt} ever was. They differ after a time-out.
    @ivar edge: the right edge of the window we advertised.
    @ivar head: where in the ring its first byte is; C{length}: how many there are.
    @ivar deadline: guest time of the retransmission, 0: none.
    """

    state: int
    peerMac: bytes
    peer: bytes
    peerPort: int
    port: int
    mss: int
    una: int
    nxt: int
    highest: int
    window: int
    windowSeq: int
    windowAck: int
    congestion: int
    received: int
    edge: int
    head: int
    length: int
    retries: int
    deadline: int
    heard: int


_values = attrgetter(*(field.name for field in fields(_Connection)))


class TcpEcho:
    """
    The server.

    @param base: offset in C{memory} of the first slot; there are C{slots} of L{SLOT} bytes. Connections that are
        there already go on.
    @param mss: the largest segment we take, bytes without headers.
    @param send: takes the peer's MAC and IP address and a segment whose checksum is still 0.
    """

    def __init__(
        self, memory: Memory, base: int, slots: int, mss: int, send: Callable[[bytes, bytes, bytes], None]
    ) -> None:
        self._memory = memory
        self._base = base
        self._mss = mss
        self._send = send
        self._free: set[int] = set()
        self._open: dict[_Key, tuple[int, _Connection]] = {}
        for slot in range(slots):
            connection = _Connection(*_NUMBERS.unpack(memory.read(base + slot * SLOT, _NUMBERS.size)))
            if connection.state:
                self._open[connection.peer, connection.peerPort, connection.port] = slot, connection
            else:
                self._free.add(slot)

    def receive(self, mac: bytes, peer: bytes, segment: bytes, now: int) -> None:
        """A segment came from C{peer}, its checksum was right. Answers go out before this returns."""
        if len(segment) < _HEADER.size:
            return
        source, port, seq, ack, offset, flags, window, _, _ = _HEADER.unpack_from(segment)
        start = (offset >> 4) * 4
        if not _HEADER.size <= start <= len(segment):
            return
        data = segment[start:]
        key = (peer, source, port)
        if key in self._open:
            slot, connection = self._open[key]
            connection.peerMac, connection.heard = mac, now
            if self._arrived(connection, seq, ack, flags, window, data, now):
                self._store(slot, connection)
            else:
                self._forget(key)
        elif port in PORTS and flags & (SYN | ACK | RST | FIN) == SYN:
            self._accept(mac, key, seq, window, segment[_HEADER.size : start], now)
        elif not flags & RST:
            self._refuse(mac, peer, source, port, seq, ack, flags, len(data))

    def tick(self, now: int) -> None:
        """Guest time went on."""
        due = [
            (slot, key, connection)
            for key, (slot, connection) in self._open.items()
            if connection.deadline and connection.deadline <= now
        ]
        # By slot: the order in which connections were opened is not part of the guest's state.
        for slot, key, connection in sorted(due, key=itemgetter(0)):
            if self._timedOut(connection, now):
                self._store(slot, connection)
            else:
                self._forget(key)

    # Opening and closing

    def _accept(self, mac: bytes, key: _Key, seq: int, window: int, options: bytes, now: int) -> None:
        if not self._free:
            # Clients that vanished must not lock others out for ever; with all slots busy the SYN is sent again.
            idle, (_, idlest) = min(self._open.items(), key=lambda item: (item[1][1].heard, item[1][0]))
            if now - idlest.heard < _IDLE:
                return
            self._forget(idle)
        peer, source, port = key
        first = (now * 250 + source * 65537 + int.from_bytes(peer, "big")) % _MOD
        mss = min(self._mss, max(64, _mssOption(options)))
        received = (seq + 1) % _MOD
        connection = _Connection(
            state=SYN_RECEIVED,
            peerMac=mac,
            peer=peer,
            peerPort=source,
            port=port,
            mss=mss,
            una=first,
            nxt=(first + 1) % _MOD,
            highest=(first + 1) % _MOD,
            window=window,
            windowSeq=seq,
            windowAck=first,
            congestion=10 * mss,
            received=received,
            edge=(received + RING) % _MOD,
            head=0,
            length=0,
            retries=0,
            deadline=now + _RTO,
            heard=now,
        )
        slot = min(self._free)
        self._free.remove(slot)
        self._open[key] = slot, connection
        self._store(slot, connection)
        self._sendSyn(connection)

    def _refuse(
        self, mac: bytes, peer: bytes, source: int, port: int, seq: int, ack: int, flags: int, length: int
    ) -> None:
        """A segment nobody waits for (RFC 9293, 3.5.2)."""
        if flags & ACK:
            header = _HEADER.pack(port, source, ack, 0, 5 << 4, RST, 0, 0, 0)
        else:
            follows = (seq + length + bool(flags & SYN) + bool(flags & FIN)) % _MOD
            header = _HEADER.pack(port, source, 0, follows, 5 << 4, RST | ACK, 0, 0, 0)
        self._send(mac, peer, header)

    def _forget(self, key: _Key) -> None:
        slot, _ = self._open.pop(key)
        self._free.add(slot)
        self._memory.write(self._base + slot * SLOT, bytes(_NUMBERS.size))

    def _store(self, slot: int, connection: _Connection) -> None:
        self._memory.write(self._base + slot * SLOT, _NUMBERS.pack(*_values(connection)))

    # Segments in. These return whether the connection lives on.

    def _arrived(
        self, c: _Connection, seq: int, ack: int, flags: int, window: int, data: bytes, now: int
    ) -> bool:
        if flags & RST:
            if seq == c.received:
                return False
            if 0 < distance(c.received, seq) < distance(c.received, c.edge):
                self._sendAck(c)
            return True
        if flags & SYN:
            if c.state == SYN_RECEIVED and seq == (c.received - 1) % _MOD:
                self._sendSyn(c)
            else:
                self._sendAck(c)
            return True
        if not flags & ACK:
            return True
        ahead = distance(c.una, ack)
        if ahead > distance(c.una, c.highest) or (c.state == SYN_RECEIVED and ahead != 1):
            if c.state == SYN_RECEIVED:
                self._refuse(c.peerMac, c.peer, c.peerPort, c.port, seq, ack, flags, len(data))
            else:
                self._sendAck(c)
            return True
        if ahead > 0 and not self._acknowledged(c, ack, ahead, now):
            return False
        if ahead >= 0 and (distance(c.windowSeq, seq), distance(c.windowAck, ack)) >= (0, 0):
            if not c.window:
                c.deadline = 0  # of a probe: far away
            c.window, c.windowSeq, c.windowAck = window, seq, ack
        c.retries = 0
        self._transmit(c, now, mustAnswer=self._take(c, seq, data, bool(flags & FIN)))
        return True

    def _acknowledged(self, c: _Connection, ack: int, ahead: int, now: int) -> bool:
        if c.state == SYN_RECEIVED:
            c.state = ESTABLISHED
            c.nxt = c.highest
        else:
            bytesGone = min(ahead, c.length)
            if ahead > bytesGone:
                return False  # only our FIN comes after the data: all is said and heard
            c.head = (c.head + bytesGone) % RING
            c.length -= bytesGone
            c.congestion = min(c.congestion + c.mss, RING)
        c.una = ack
        if distance(c.una, c.nxt) < 0:
            c.nxt = c.una
        c.deadline = 0
        return True

    def _take(self, c: _Connection, seq: int, data: bytes, fin: bool) -> bool:
        """
        Put what is new and in order into the ring.

        @return: whether the segment must be answered.
        """
        known = distance(seq, c.received)
        if not data and not fin:
            return not -RING <= known <= 0
        if c.state == LAST_ACK or not 0 <= known <= len(data):
            return True
        fresh = data[known:]
        taken = fresh[: max(0, distance(c.received, c.edge))]
        whole = len(taken) == len(fresh)
        if c.port == RANDOM_PORT:
            taken = os.urandom(len(taken))
        ring = self._ringOf(c)
        place = (c.head + c.length) % RING
        first = taken[: RING - place]
        if first:
            self._memory.write(ring + place, first)
        if len(first) < len(taken):
            self._memory.write(ring, taken[len(first) :])
        c.length += len(taken)
        c.received = (c.received + len(taken)) % _MOD
        if fin and whole:
            c.received = (c.received + 1) % _MOD
            c.state = LAST_ACK
        return True

    # Segments out

    def _transmit(self, c: _Connection, now: int, mustAnswer: bool) -> None:
        """Send what the peer's window and ours allow, at least an ACK if there must be an answer."""
        mustAnswer |= self._moveEdge(c)
        answered = False
        limit = min(c.window, c.congestion)
        while c.state != SYN_RECEIVED:
            offset = distance(c.una, c.nxt)
            if offset < c.length:
                count = min(c.mss, c.length - offset, limit - offset)
                # Waiting for more window beats a tiny segment, unless nothing else is on its way.
                if count <= 0 or (count < min(c.mss, c.length - offset) and offset):
                    break
                self._sendData(c, offset, count)
            elif c.state == LAST_ACK and offset == c.length:
                self._sendFin(c)
            else:
                break
            answered = True
        if not answered and mustAnswer:
            self._sendAck(c)
        if not c.length and c.state == ESTABLISHED:
            c.deadline = 0
        elif not c.deadline:
            c.deadline = now + _RTO

    def _timedOut(self, c: _Connection, now: int) -> bool:
        c.retries += 1
        if c.retries > _RETRIES:
            header = _HEADER.pack(c.port, c.peerPort, c.nxt, 0, 5 << 4, RST, 0, 0, 0)
            self._send(c.peerMac, c.peer, header)
            return False
        c.deadline = now + min(_RTO << c.retries, _RTO_MAX)
        c.congestion = c.mss
        if c.state == SYN_RECEIVED:
            self._sendSyn(c)
            return True
        c.nxt = c.una
        if c.length and not c.window:
            # A probe. If the window opens without taking it, sending begins with its byte again.
            self._sendData(c, 0, 1)
            c.nxt = c.una
        else:
            self._transmit(c, now, mustAnswer=False)
        return True

    def _moveEdge(self, c: _Connection) -> bool:
        """
        Open our window, only in steps that are worth a segment (RFC 9293, 3.8.6.2.2); never close it.

        @return: whether the peer should be told even if there is nothing else to say.
        """
        edge = (c.received + RING - c.length) % _MOD
        if distance(c.edge, edge) < min(c.mss, RING // 2):
            return False
        # With half a window left it will hear of the rest when it sends.
        short = distance(c.received, c.edge) < RING // 2
        c.edge = edge
        return short

    def _ringOf(self, c: _Connection) -> int:
        slot, _ = self._open[c.peer, c.peerPort, c.port]
        return self._base + slot * SLOT + SLOT - RING

    def _sendData(self, c: _Connection, offset: int, count: int) -> None:
        place = (c.head + offset) % RING
        ring = self._ringOf(c)
        data = self._memory.read(ring + place, min(count, RING - place))
        data += self._memory.read(ring, count - len(data))
        self._emit(c, ACK | PSH, data)

    def _sendFin(self, c: _Connection) -> None:
        self._emit(c, ACK | FIN, b"")

    def _sendAck(self, c: _Connection) -> None:
        # Beyond everything sent: an ACK from within what is sent again would be an old one to the peer.
        nxt, c.nxt = c.nxt, c.highest
        self._emit(c, ACK, b"")
        c.nxt = nxt

    def _sendSyn(self, c: _Connection) -> None:
        c.nxt = c.una
        self._emit(c, SYN | ACK, b"", struct.pack(">BBH", 2, 4, self._mss))

    def _emit(self, c: _Connection, flags: int, data: bytes, options: bytes = b"") -> None:
        window = max(0, distance(c.received, c.edge))
        offset = 5 + len(options) // 4 << 4
        header = _HEADER.pack(c.port, c.peerPort, c.nxt, c.received, offset, flags, window, 0, 0)
        c.nxt = (c.nxt + len(data) + bool(flags & (SYN | FIN))) % _MOD
        if distance(c.highest, c.nxt) > 0:
            c.highest = c.nxt
        self._send(c.peerMac, c.peer, header + options + data)


def _mssOption(options: bytes) -> int:
    """@return: the MSS the peer offers, or the default of RFC 9293 (3.7.1)."""
    position = 0
    while position < len(options) and options[position]:
        if options[position] == 1:
            position += 1
            continue
        length = options[position + 1] if position + 1 < len(options) else 0
        if length < 2:
            break
        if options[position] == 2 and length == 4 and position + 4 <= len(options):
            return int.from_bytes(options[position + 2 : position + 4], "big")
        position += length
    return 536
