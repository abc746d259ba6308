"""
The words on C{colo-compare}'s C{notify_dev} (C{net/colo-compare.c}), framed as records without any C{NUL}. No I/O.

With C{vnet_hdr_support} QEMU expects a (meaningless) length of a virtio-net header in the words it B{reads} here, and
sends none. Whoever speaks to it does the same or does not know that; both are understood.
"""

from __future__ import annotations

import struct

from colotx.errors import StreamError

INIT = b"COLO_USERSPACE_PROXY_INIT"
INIT_ANSWER = b"COLO_COMPARE_GET_XEN_INIT"
CHECKPOINT = b"COLO_CHECKPOINT"
"""There was a checkpoint: what is held may leave."""
WANTED = b"DO_CHECKPOINT"
"""A checkpoint, please."""

MAX_WORD = 1024

_LENGTH = struct.Struct(">I")
_BEGINNING = b"COLO"


def encodeWord(word: bytes) -> bytes:
    """@return: as it is sent."""
    return _LENGTH.pack(len(word)) + word


class WordDecoder:
    """Cuts one connection's bytes, in any chunking."""

    def __init__(self, vnetHeader: bool) -> None:
        """@param vnetHeader: whether C{vnet_hdr_support} is on."""
        self._vnetHeader = vnetHeader
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """
        @return: the words that became complete.
        @raise StreamError: one that is too long. The decoder is of no use afterwards.
        """
        data = self._rest + data
        words = []
        head = 8 if self._vnetHeader else 4
        while len(data) >= head:
            (length,) = _LENGTH.unpack_from(data)
            if length > MAX_WORD:
                raise StreamError(f"a word of {length} bytes was announced, the limit is {MAX_WORD}")
            start = 4 if data[4:8] == _BEGINNING else head
            if len(data) < start + length:
                break
            words.append(data[start : start + length])
            data = data[start + length :]
        self._rest = data
        return words
