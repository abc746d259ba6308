"""
The least peer a COLO primary can have: it answers at once, keeps nothing, and of the RAM section only looks for the
end. What QEMU needs with it is what QEMU itself needs.

Usage: C{python -m benchmarks.bare_peer PATH}. It listens on the unix socket, prints C{listening}, and ends with QEMU.
"""

from __future__ import annotations

import socket
import sys

from colotx.protocol import ColoMessage, encodeMessage
from colotx.vmstate import InitialReader, RamReader

_EOS = b"\0\0\0\0\0\0\0\x10\x7e"
"""The end of the records of a RAM section, and the beginning of its footer."""
_AFTER = 4 + 1 + 12
"""Bytes behind it: the section's id, the end of the stream, and VMSTATE_SIZE with its value."""

_SIZE = encodeMessage(ColoMessage.VMSTATE_SIZE, 0)[:4]
_CHUNK = 1 << 20


class Peer:
    """One exchange on a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray(_CHUNK)
        self._view = memoryview(self._buffer)

    def serve(self) -> None:
        """Answer until QEMU closes the socket."""
        initial = InitialReader(RamReader())
        while initial.complete is None:
            initial.feed(self._some())
        self._say(ColoMessage.CHECKPOINT_READY)
        while True:
            self._expect(ColoMessage.CHECKPOINT_REQUEST)
            self._say(ColoMessage.CHECKPOINT_REPLY)
            self._expect(ColoMessage.VMSTATE_SEND)
            self._checkpoint()
            self._say(ColoMessage.VMSTATE_RECEIVED, ColoMessage.VMSTATE_LOADED)

    def _checkpoint(self) -> None:
        """Read over the RAM section, SIZE and the device state."""
        kept = 0
        while True:
            end = kept + len(self._some(kept))
            found = self._findSize(end)
            if found is not None:
                break
            kept = min(len(_EOS) + _AFTER - 1, end)
            self._buffer[:kept] = self._buffer[end - kept : end]
        left = int.from_bytes(self._buffer[found : found + 8], "big") - (end - found - 8)
        while left > 0:
            left -= len(self._some())

    def _findSize(self, end: int) -> int | None:
        """@return: where the value of VMSTATE_SIZE is, if that is whole in the first C{end} bytes of the buffer."""
        at = -1
        while (at := self._buffer.find(_EOS, at + 1, max(end - _AFTER, 0))) >= 0:
            size = at + len(_EOS) + 5
            if self._buffer[size : size + 4] == _SIZE:
                return size + 4
        return None

    def _some(self, at: int = 0) -> memoryview:
        size = self._socket.recv_into(self._view[at:])
        if not size:
            raise EOFError
        return self._view[at : at + size]

    def _expect(self, message: ColoMessage) -> None:
        wanted = encodeMessage(message)
        got = self._socket.recv(len(wanted), socket.MSG_WAITALL)
        if not got:
            raise EOFError
        if got != wanted:
            raise SystemExit(f"QEMU said {got.hex()} where {message.name} is due")

    def _say(self, *messages: ColoMessage) -> None:
        self._socket.sendall(b"".join(map(encodeMessage, messages)))


def main(path: str) -> None:
    """Serve one QEMU."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("listening", flush=True)
        connection, _ = listening.accept()
    with connection:
        try:
            Peer(connection).serve()
        except (EOFError, ConnectionError):
            return


if __name__ == "__main__":
    main(sys.argv[1])
