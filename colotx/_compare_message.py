"""
The general way to see a frame as the comparer does: its flow, and what of it is judged.

Judged is the payload of TCP, see L{colotx._compare_tcp}; of every other IP datagram all that follows the fixed IP
header (IPv4 options, IPv6 extension headers and transport checksums included: they follow from nothing that may
differ); of a reassembled one what follows the IP headers; of every other frame all of it. So what may differ is in
the fixed IP header: identification, TTL or hop limit, type of service, flow label, IPv4 checksum.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from colotx.packets import TCP, UDP, Flow, Layers, findTransport, selectorOf

_tcp = struct.Struct(">4xIIBB").unpack_from


class Message(NamedTuple):
    """
    What one side said.

    @ivar flow: in which flow.
    @ivar segment: of TCP: sequence number, acknowledgement, flags, payload; else None.
    @ivar content: of everything else.
    """

    flow: Flow
    segment: tuple[int, int, int, bytes] | None
    content: bytes = b""

    @property
    def key(self) -> bytes | Flow:
        """The flow's key in its table. Of TCP and UDP the bytes that the fast path cuts out of a frame."""
        flow = self.flow
        if self.segment is not None or (flow.protocol == UDP and flow.version and flow.selector):
            return flow.tags + flow.source + flow.destination + flow.selector
        return flow


def messageOf(frame: bytes, layers: Layers, flow: Flow, offset: int) -> Message:
    """@param layers: of this frame, no fragment."""
    if layers.version and layers.protocol == TCP and layers.transport >= 0:
        return Message(flow, _segment(frame, layers.transport, layers.end))
    if layers.version:
        start = layers.network + (20 if layers.version == 4 else 40)
        return Message(flow, None, frame[start : layers.end])
    return Message(flow, None, frame[offset:])


def reassembled(flow: Flow, body: bytes) -> Message:
    """@param flow: of the fragments; C{body}: what they make."""
    transport = findTransport(body, flow.protocol, 0, len(body))
    flow = flow._replace(selector=selectorOf(body, flow.protocol, transport))
    if flow.protocol == TCP and transport == 0:
        return Message(flow, _segment(body, 0, len(body)))
    return Message(flow, None, body)


def _segment(data: bytes, start: int, end: int) -> tuple[int, int, int, bytes]:
    seq, ack, size, flags = _tcp(data, start)
    return seq, ack, flags, data[start + (size >> 4) * 4 : end]
