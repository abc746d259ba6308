"""
What QEMU's network filters and C{colo-compare} say to each other on their character devices, cut into records.

A record is a length (be32), with C{vnet_hdr_support} the length of the virtio-net header (be32), and so many bytes: the
header, which counts (C{net_fill_rstate} in QEMU's C{net/net.c}, C{filter_send} in C{net/filter-mirror.c}), and the
frame. A record is kept whole, so that sending it on is no work. This module does no I/O and knows no frames.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from colotx.errors import StreamError

MAX_RECORD = 4096 + 65536
"""Bytes of the longest record, without its lengths: QEMU's C{NET_BUFSIZE}; with more it ends the connection."""

_LENGTH = struct.Struct(">I")
_LENGTHS = struct.Struct(">II")

Take = Callable[[list[bytes], int], object]


class RecordSplitter:
    """
    Cuts one connection's bytes, in any chunking.

    What came in one piece is passed on in one call, for the sake of speed; only where the length of the virtio-net
    header changes a new one begins.
    """

    def __init__(self, take: Take, vnetHeader: bool) -> None:
        """
        @param take: called with whole records, and how many bytes of each are not the frame's.
        @param vnetHeader: whether C{vnet_hdr_support} is on.
        """
        self._take = take
        self._split = self._splitWithHeader if vnetHeader else self._splitPlain
        self._headerLength = 0
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """
        @param data: 64 KiB at most, or a record that is too long may be passed on.
        @raise StreamError: lengths that cannot be; what was whole before them was passed on. The splitter is of no
            use afterwards.
        """
        if self._rest:
            data = self._rest + data
        position = self._split(data)
        self._rest = data[position:]

    def _splitPlain(self, data: bytes) -> int:
        unpack = _LENGTH.unpack_from
        records: list[bytes] = []
        append = records.append
        start, size = 0, len(data)
        last = size - 4
        length = 0
        while start <= last:
            (length,) = unpack(data, start)
            end = start + 4 + length
            if end > size:
                break
            if length:
                append(data[start:end])
            start = end
        if records:
            self._take(records, 4)
        if length > MAX_RECORD:
            raise _tooLong(length)
        return start

    def _splitWithHeader(self, data: bytes) -> int:
        unpack = _LENGTHS.unpack_from
        records: list[bytes] = []
        current = self._headerLength
        start, size = 0, len(data)
        last = size - 8
        length = header = 0
        while start <= last:
            length, header = unpack(data, start)
            if header > length or length > MAX_RECORD:
                break
            end = start + 8 + length
            if end > size:
                break
            if header != current:
                if records:
                    self._take(records, 8 + current)
                    records = []
                self._headerLength = current = header
            if length:
                records.append(data[start:end])
            start = end
        if records:
            self._take(records, 8 + current)
        if length > MAX_RECORD:
            raise _tooLong(length)
        if header > length:
            raise StreamError(
                f"a record of {length} bytes with a virtio-net header of {header} was announced; "
                "vnet_hdr_support must be the same on both ends"
            )
        return start


def _tooLong(length: int) -> StreamError:
    return StreamError(
        f"a record of {length} bytes was announced, the limit is {MAX_RECORD}; "
        "vnet_hdr_support must be the same on both ends"
    )
