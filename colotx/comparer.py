"""
The comparer: two streams of frames in, what both guests said out.

What leaves is exactly what the primary said and the secondary was seen to say too, in the primary's order within
each flow. What cannot be judged is held: until the secondary says it, or until a checkpoint (L{Comparer.flush}). No
frame of the primary is dropped, none leaves unseen; when something differs, stays away too long or no longer fits, a
checkpoint is asked for. The rules are in L{colotx._compare_tcp}, L{colotx._compare_datagram} and
L{colotx._compare_fragments}.

L{Comparer.primary} and L{Comparer.secondary} carry every frame of the guest, so their loops are written out: one
C{unpack} finds all fields of the common shapes (TCP and UDP over plain IPv4 or IPv6), a dictionary keyed by the bytes
of addresses and ports finds the flow, a dictionary keyed by the sequence number finds the secondary's payload, and
whole payloads are compared. Everything else, and everything that cannot leave at once, takes the general way.

It takes frames and gives frames; it knows no port, and its time comes from the clock it is given.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import count
from operator import itemgetter
from typing import Any

from colotx._compare_datagram import DatagramFlow
from colotx._compare_fragments import Reassembly
from colotx._compare_limits import CompareLimits, CompareStatistics
from colotx._compare_message import Message, messageOf, reassembled
from colotx._compare_tcp import ACK, CONTROL, HALF, MASK, TcpFlow
from colotx.evidence import Difference, Evidence
from colotx.packets import (
    ETHERNET_HEADER,
    TCP,
    UDP,
    Flow,
    Layers,
    flowOf,
    fragmentOf,
    locate,
)

__all__ = ["CompareLimits", "CompareStatistics", "Comparer"]

_ipv4 = struct.Struct(">12xI H2xI 2x12sIIBB").unpack_from
"""
Type to TOS, total length, fragment to protocol, addresses and ports, then (of TCP) sequence, acknowledgement, data
offset, flags; with a header of 20 bytes.
"""
_ipv6 = struct.Struct(">12xI2xHBx36sIIBB").unpack_from
"""Type to flow label, payload length, next header, addresses and ports, then as above; without extension headers."""
_IPV4_MASK, _IPV4_PLAIN = 0xFFFFFF00, 0x08004500
_IPV6_MASK, _IPV6_PLAIN = 0xFFFFF000, 0x86DD6000
_UNFRAGMENTED = 0x3FFF00FF
"""Of the word with fragment, TTL and protocol: leaves the protocol if it is no fragment."""
_IPV4_BODY = ETHERNET_HEADER + 20
_IPV6_BODY = ETHERNET_HEADER + 40
_SIZES = [(size >> 4) * 4 if size >> 4 >= 5 else 1 << 20 for size in range(256)]
"""Length of a TCP header by its byte with the data offset; beyond any frame if it cannot be."""
_byArrival = itemgetter(0)

AnyFlow = TcpFlow | DatagramFlow


class Comparer:
    """
    Compares what two guests say.

    @ivar limits: L{CompareLimits}; may be replaced at any time.
    @ivar evidence: where differences are recorded.
    @ivar heldFrames: frames of the primary that wait now.
    @ivar heldBytes: their bytes.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        deliver: Callable[[list[bytes]], None],
        wantCheckpoint: Callable[[str], None],
        limits: CompareLimits | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        """
        @param clock: monotonic, seconds.
        @param deliver: takes the primary's frames that leave, once for each call of L{primary} and L{secondary}
            that releases any.
        @param wantCheckpoint: asked with a reason, at most once for each flow between two flushes. Called last
            thing, so it may flush.
        """
        self._clock = clock
        self._deliver = deliver
        self._wantCheckpoint = wantCheckpoint
        self.limits = limits or CompareLimits()
        self.evidence = evidence or Evidence()
        self.statistics = CompareStatistics()
        self._number = count(1).__next__  # of arrival, of those that wait
        self._forgetAll()

    def _forgetAll(self) -> None:
        self._tcp: dict[bytes, TcpFlow] = {}
        self._datagrams: dict[bytes | Flow, DatagramFlow] = {}
        self._waiting: dict[AnyFlow, None] = {}  # flows with frames that wait
        self._retry: dict[AnyFlow, None] = {}  # of these, those for which something came
        self._ours, self._theirs = Reassembly(), Reassembly()
        self._unjudged: list[tuple[int, tuple[bytes, ...]]] = []  # no room in the tables
        self._kept = 0  # bytes of the secondary, at least what the flows have
        self._deaf = False
        self._askedForAll: set[str] = set()
        self._asks: list[str] = []
        self.heldFrames = 0
        self.heldBytes = 0

    def primary(self, frames: Sequence[bytes], offset: int = 0) -> None:
        """
        Frames the primary guest sent, in order.

        @param offset: bytes before the Ethernet header of each.
        """
        now = self._clock()
        start4, body4, body6 = ETHERNET_HEADER + offset, _IPV4_BODY + offset, _IPV6_BODY + offset
        connections, datagrams = self._tcp, self._datagrams
        blocked, retry, number, queue = self._waiting, self._retry, self._number, self.limits.maxQueueSize
        leaving: list[bytes] = []
        release = leaving.append
        for frame in frames:
            try:
                kind, length, protocol, key, seq, ack, size, flags = _ipv4(frame, offset)
                if kind & _IPV4_MASK == _IPV4_PLAIN:
                    protocol &= _UNFRAGMENTED
                    body, end = body4, start4 + length
                elif kind & _IPV6_MASK == _IPV6_PLAIN:
                    _, length, protocol, key, seq, ack, size, flags = _ipv6(frame, offset)
                    body, end = body6, body6 + length
                else:
                    protocol = -1
            except struct.error:
                protocol = -1
            if protocol == TCP:
                flow = connections.get(key)
                if flow is not None and flags & CONTROL == ACK and (head := body + _SIZES[size]) <= end:
                    payload = frame[head:end]
                    waiting = flow.waiting
                    if not waiting:
                        if ack == flow.ack or (flow.ack is not None and (flow.ack - ack) & MASK < HALF):
                            if not payload:
                                release(frame)
                                continue
                            if flow.theirs.get(seq) == payload:
                                flow.reached = seq
                                flow.seen = now
                                release(frame)
                                continue
                        blocked[flow] = retry[flow] = None
                    waiting.append((number(), now, (frame,), seq, ack, flags, payload))
                    if len(waiting) > queue:
                        self._askFull(flow)
                    continue
            elif protocol == UDP:
                other = datagrams.get(key)
                if other is not None and end <= len(frame):
                    content = frame[body:end]
                    queued = other.waiting
                    if not queued:
                        theirs = other.theirs
                        if theirs and theirs[0][0] == content:
                            theirs.popleft()
                            other.seen = now
                            release(frame)
                            continue
                        blocked[other] = retry[other] = None
                    queued.append((number(), now, (frame,), content))
                    if len(queued) > queue:
                        self._askFull(other)
                    continue
            self._holdAny(frame, offset, now)
        self.statistics.primary += len(frames)
        self.statistics.held += len(frames) - len(leaving)
        self._finish(frames, leaving)

    def secondary(self, frames: Sequence[bytes], offset: int = 0) -> None:
        """
        Frames the secondary guest sent, in order.

        @param offset: as of L{primary}.
        """
        self.statistics.secondary += len(frames)
        self._kept += sum(map(len, frames))
        if self._kept > self.limits.maxSecondaryBytes and not self._spare():
            self.statistics.forgotten += len(frames)
            self._finish((), [])
            return
        now = self._clock()
        start4, body4, body6 = ETHERNET_HEADER + offset, _IPV4_BODY + offset, _IPV6_BODY + offset
        connections, datagrams, retry = self._tcp, self._datagrams, self._retry
        queue = self.limits.maxQueueSize
        for frame in frames:
            try:
                kind, length, protocol, key, seq, ack, size, flags = _ipv4(frame, offset)
                if kind & _IPV4_MASK == _IPV4_PLAIN:
                    protocol &= _UNFRAGMENTED
                    body, end = body4, start4 + length
                elif kind & _IPV6_MASK == _IPV6_PLAIN:
                    _, length, protocol, key, seq, ack, size, flags = _ipv6(frame, offset)
                    body, end = body6, body6 + length
                else:
                    protocol = -1
            except struct.error:
                protocol = -1
            if protocol == TCP:
                flow = connections.get(key)
                if flow is not None and flags & CONTROL == ACK and (head := body + _SIZES[size]) <= end:
                    flow.seen = now
                    if ack != flow.ack and (flow.ack is None or (ack - flow.ack) & MASK < HALF):
                        flow.ack = ack
                    if head != end:
                        said = flow.theirs
                        if seq in said:
                            flow.learn(seq, ack, flags, frame[head:end])
                        elif len(said) < flow.room or self._makeRoom(flow):
                            said[seq] = frame[head:end]
                    if flow.waiting:
                        retry[flow] = None
                    continue
            elif protocol == UDP:
                other = datagrams.get(key)
                if other is not None and len(other.theirs) < queue and end <= len(frame):
                    other.seen = now
                    other.theirs.append((frame[body:end], now))
                    if other.waiting:
                        retry[other] = None
                    continue
            self._learnAny(frame, offset, now)
        self._finish((), [])

    def scan(self) -> None:
        """
        To be called every C{limits.expiredScanCycle}: asks for a checkpoint where the primary waited too long, and
        forgets what is old.
        """
        now = self._clock()
        limits = self.limits
        late = now - limits.compareTimeout / 1000
        self._retry.update(self._waiting)
        self._finish((), [])
        for flow in self._waiting:
            if not flow.asked and flow.waiting[0][1] <= late:
                self._ask(flow, flow.lacking(flow.waiting[0]))  # type: ignore[arg-type]
        for (flowName, _), pieces in self._ours.incomplete.items():
            if pieces.since <= late:
                self._askForAll("time-out", "fragments of a datagram stayed away", flowName)
        self._theirs.expire(late)
        for other in self._datagrams.values():
            other.expire(late)
        self._sweep(now - limits.idle / 1000)
        self._finish((), [])

    def flush(self) -> list[bytes]:
        """
        A checkpoint: both guests are the same again.

        @return: all frames of the primary that waited, in their order of arrival. What the secondary said, and all
            that was known of flows, is forgotten.
        """
        held: list[tuple[int, Iterable[bytes]]] = [
            (waiting[0], waiting[2]) for flow in self._waiting for waiting in flow.waiting
        ]
        held += [(pieces.number, pieces.frames) for pieces in self._ours.incomplete.values()]
        held += self._unjudged
        held.sort(key=_byArrival)
        frames = [frame for _, parts in held for frame in parts]
        self._forgetAll()
        self.statistics.flushes += 1
        self.statistics.flushed += len(frames)
        return frames

    def describe(self) -> dict[str, object]:
        """@return: limits, counters and what is held now, JSON-able."""
        return {
            "held-frames": self.heldFrames,
            "held-bytes": self.heldBytes,
            "flows": len(self._tcp) + len(self._datagrams),
            "waiting-flows": len(self._waiting),
            "statistics": asdict(self.statistics),
            "limits": asdict(self.limits),
        }

    # Frames of any shape.

    def _holdAny(self, frame: bytes, offset: int, now: float) -> None:
        """The general way of a frame of the primary."""
        layers = locate(frame, offset)
        flow = flowOf(frame, layers, offset)
        number = self._number()
        if layers.fragmented:
            self._holdFragment(frame, layers, flow, number, now)
        else:
            self._holdMessage(messageOf(frame, layers, flow, offset), (frame,), number, now)

    def _holdFragment(self, frame: bytes, layers: Layers, flow: Flow, number: int, now: float) -> None:
        if len(self._ours.incomplete) >= self.limits.maxDatagrams:
            self._unjudged.append((number, (frame,)))
            self._askForAll("queue-full", "too many incomplete datagrams")
            return
        data = frame[layers.body : layers.end]
        whole = self._ours.add(frame, flow, fragmentOf(frame, layers), data, number, now)
        if whole is not None:
            pieces, body = whole
            self._holdMessage(reassembled(flow, body), tuple(pieces.frames), pieces.number, now)

    def _holdMessage(self, message: Message, frames: tuple[bytes, ...], number: int, now: float) -> None:
        flow = self._flowOf(message, now)
        if flow is None:
            self._unjudged.append((number, frames))
        elif isinstance(flow, TcpFlow):
            self._hold(flow, (number, now, frames, *(message.segment or ())))
        else:
            self._hold(flow, (number, now, frames, message.content))

    def _learnAny(self, frame: bytes, offset: int, now: float) -> None:
        """The general way of a frame of the secondary."""
        layers = locate(frame, offset)
        name = flowOf(frame, layers, offset)
        if not layers.fragmented:
            message = messageOf(frame, layers, name, offset)
        else:
            if len(self._theirs.incomplete) >= self.limits.maxDatagrams:
                self._theirs.forgetOldest()
                self.statistics.forgotten += 1
            data = frame[layers.body : layers.end]
            whole = self._theirs.add(frame, name, fragmentOf(frame, layers), data, 0, now)
            if whole is None:
                return
            message = reassembled(name, whole[1])
        flow = self._flowOf(message, now)
        if flow is None:
            self.statistics.forgotten += 1
            return
        flow.seen = now
        if isinstance(flow, TcpFlow):
            if len(flow.theirs) >= flow.room:
                self._makeRoom(flow)
            flow.learn(*(message.segment or ()))
        elif len(flow.theirs) < self.limits.maxQueueSize:
            flow.theirs.append((message.content, now))
        else:
            self.statistics.forgotten += 1
            self._ask(flow, Difference("queue-full", None, b"", b"", "the secondary said too much"))
        if flow.waiting:
            self._retry[flow] = None

    # Tables and bounds.

    def _flowOf(self, message: Message, now: float) -> AnyFlow | None:
        """@return: the flow, made if need be; None: no room in the table."""
        key = message.key
        table: dict[Any, Any] = self._datagrams if message.segment is None else self._tcp
        flow: AnyFlow | None = table.get(key)
        if flow is not None:
            return flow
        full = len(self._tcp) + len(self._datagrams) >= self.limits.maxFlows
        if full:
            self._sweep(now - self.limits.expiredScanCycle / 1000)
            full = len(self._tcp) + len(self._datagrams) >= self.limits.maxFlows
        if full or self._unjudged:  # a flow of which frames wait there must not pass them
            self._askForAll("table-full", f"{self.limits.maxFlows} flows")
            return None
        kind = DatagramFlow if message.segment is None else TcpFlow
        flow = table[key] = kind(message.flow, now)
        return flow

    def _sweep(self, before: float) -> None:
        """Forget flows of which nothing waits and nothing came since."""
        tables: tuple[dict[Any, Any], ...] = self._tcp, self._datagrams
        for table in tables:
            for key in [key for key, flow in table.items() if flow.seen < before and not flow.waiting]:
                del table[key]

    def _makeRoom(self, flow: TcpFlow) -> bool:
        """@return: whether one more segment of the secondary may be kept."""
        if not flow.deaf and flow.prune() >= self.limits.maxQueueSize:
            flow.deaf = True
            self._ask(flow, Difference("queue-full", None, b"", b"", "the secondary said too much"))
        if flow.deaf:
            flow.room = 0
            self.statistics.forgotten += 1
        return not flow.deaf

    def _spare(self) -> bool:
        """Forget what was judged. @return: whether more of the secondary may be kept."""
        if not self._deaf:
            for flow in self._tcp.values():
                flow.prune(history=0)
            self._kept = sum(sum(map(len, flow.theirs.values())) for flow in self._tcp.values())
            self._kept += sum(len(said) for flow in self._datagrams.values() for said, _ in flow.theirs)
            if self._kept > self.limits.maxSecondaryBytes // 2:
                self._deaf = True
                self._askForAll("memory-full", "the secondary said too much")
        return not self._deaf

    def _hold(self, flow: AnyFlow, item: tuple[Any, ...]) -> None:
        """A message of the primary waits, or is judged at the end of this batch."""
        waiting = flow.waiting
        if not waiting:
            self._waiting[flow] = self._retry[flow] = None
        waiting.append(item)
        if len(waiting) > self.limits.maxQueueSize:
            self._askFull(flow)

    def _advance(self, leaving: list[bytes]) -> None:
        """Judge again what waits in flows for which something came."""
        for flow in self._retry:
            difference = flow.advance(leaving)
            if difference is not None:
                self._ask(flow, difference)
            if not flow.waiting:
                del self._waiting[flow]
        self._retry.clear()

    def _finish(self, frames: Sequence[bytes], leaving: list[bytes]) -> None:
        """The end of a batch. @param frames: the primary's that came in it."""
        if self._retry:
            self._advance(leaving)
        if self.heldFrames or len(frames) != len(leaving):
            self.heldFrames += len(frames) - len(leaving)
            self.heldBytes += sum(map(len, frames)) - sum(map(len, leaving))
        if self.heldBytes > self.limits.maxHeldBytes:
            self._askForAll("memory-full", f"{self.heldBytes} bytes of output wait")
        if leaving:
            self.statistics.released += len(leaving)
            self._deliver(leaving)
        if self._asks:
            asks, self._asks = self._asks, []
            for reason in asks:
                self._wantCheckpoint(reason)

    def _askFull(self, flow: AnyFlow) -> None:
        self._ask(flow, Difference("queue-full", None, b"", b"", "the secondary said too little"))

    def _ask(self, flow: AnyFlow, difference: Difference) -> None:
        if not flow.asked:
            flow.asked = True
            self._askWith(flow.flow, difference)

    def _askForAll(self, reason: str, note: str, flow: Flow | None = None) -> None:
        """A reason that is no one flow's."""
        if reason not in self._askedForAll:
            self._askedForAll.add(reason)
            self._askWith(flow, Difference(reason, None, b"", b"", note))

    def _askWith(self, flow: Flow | None, difference: Difference) -> None:
        exhibit = self.evidence.record(flow, difference)
        asked = self.statistics.asked
        asked[difference.reason] = asked.get(difference.reason, 0) + 1
        words = f"{exhibit.guess}: {exhibit.flow}"
        self._asks.append(f"{words} ({difference.note})" if difference.note else words)
