"""
What the daemons say on the control channel before anything else: frames, hellos and why a hello is refused.

A frame is a be32 length and that many bytes of one JSON object; an empty frame is a heartbeat. A hello says who a
daemon is and what it protects. Nothing here does I/O or knows which side it is on.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast
from uuid import UUID

from colotx.errors import HelloRefused, OversizeError, ProtocolError

PROTOCOL = 1
"""The version of everything that follows the TLS handshake. Daemons of different versions do not talk."""

MAX_FRAME = 64 * 1024
"""Bytes in a control frame, the length field not counted."""

MAX_EPOCH = 2**63 - 1

HEARTBEAT = bytes(4)
"""The empty frame."""

_LENGTH = struct.Struct(">I")

Role = Literal["primary", "secondary"]
Secondary = Literal["passive", "active"]
Message = dict[str, Any]


def encodeFrame(message: Message) -> bytes:
    """
    @raise OversizeError: it does not fit into a frame.
    """
    payload = json.dumps(message, separators=(",", ":")).encode()
    if len(payload) > MAX_FRAME:
        raise OversizeError(f"a control message of {len(payload)} bytes; the limit is {MAX_FRAME}")
    return _LENGTH.pack(len(payload)) + payload


class FrameDecoder:
    """Bytes in any chunking to messages. Keeps less than one frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """
        @return: the messages that are whole now; heartbeats are none.
        @raise OversizeError: a length above L{MAX_FRAME}.
        @raise ProtocolError: no JSON object.
        """
        self._buffer += data
        messages: list[Message] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME:
                raise OversizeError(
                    f"the peer announced a control message of {length} bytes; the limit is {MAX_FRAME}"
                )
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            if length:
                messages.append(_parse(bytes(self._buffer[start + _LENGTH.size : end])))
            start = end
        del self._buffer[:start]
        return messages


def _parse(payload: bytes) -> Message:
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError):
        raise ProtocolError("the peer sent a control message that is no JSON") from None
    if not isinstance(message, dict):
        raise ProtocolError("the peer sent a control message that is no JSON object")
    return message


@dataclass(frozen=True, slots=True)
class Hello:
    """
    Who a daemon is.

    @ivar vm: the name of the protected VM; both daemons must say the same.
    @ivar role: C{primary} or C{secondary}, as it is now.
    @ivar instance: a UUID made when the daemon started: tells a restarted daemon from the one before.
    @ivar epoch: the generation the daemon knows of; counts failovers.
    @ivar secondary: C{passive} (RAM image) or C{active} (COLO).
    @ivar frames: there is to be a channel for NIC frames; an active secondary needs it.
    @ivar session: a UUID, new for every session; made by the dialer, repeated by the listener.
    """

    vm: str
    role: Role
    instance: str
    epoch: int
    secondary: Secondary = "passive"
    frames: bool = False
    session: str = ""

    def toMessage(self) -> Message:
        """The control message that says it."""
        return {"type": "hello", "protocol": PROTOCOL, **asdict(self)}

    @classmethod
    def fromMessage(cls, message: Message) -> Hello:
        """
        @raise HelloRefused: another protocol version, or a field that is missing or makes no sense. Unknown
            fields are ignored.
        """
        if message.get("type") != "hello":
            raise HelloRefused(f"the peer said {str(message.get('type'))[:40]!r} before its hello")
        if message.get("protocol") != PROTOCOL:
            raise HelloRefused(
                f"the peer speaks version {str(message.get('protocol'))[:40]} of the link's protocol, this daemon "
                f"version {PROTOCOL}; run the same colotx on both hosts"
            )
        vm, epoch, frames = message.get("vm"), message.get("epoch"), message.get("frames")
        if not isinstance(vm, str) or not 0 < len(vm) <= 255:
            raise _badField("vm")
        if type(epoch) is not int or not 0 <= epoch <= MAX_EPOCH:
            raise _badField("epoch")
        if type(frames) is not bool:
            raise _badField("frames")
        role = _choice(message, "role", "primary", "secondary")
        secondary = _choice(message, "secondary", "passive", "active")
        return cls(
            vm,
            cast(Role, role),
            _uuid(message, "instance"),
            epoch,
            cast(Secondary, secondary),
            frames,
            _uuid(message, "session"),
        )

    def fault(self, peer: Hello) -> str | None:
        """
        The reason why C{peer} does not fit to us, as far as the link itself can tell; None: it fits.
        """
        if peer.vm != self.vm:
            return f"the peer protects the VM {peer.vm!r}, this daemon {self.vm!r}"
        if peer.role == self.role:
            return f"both daemons are {self.role}"
        if peer.instance == self.instance:
            return "the peer is this very daemon; check the peer's address"
        if peer.secondary != self.secondary:
            return f"the peer is set up with secondary={peer.secondary}, this daemon with secondary={self.secondary}"
        if self.secondary == "active" and not (peer.frames and self.frames):
            return "an active secondary needs the frames channel, which one side did not ask for"
        return None


def _badField(name: str) -> HelloRefused:
    return HelloRefused(f"the peer's hello has no usable {name!r}")


def _choice(message: Message, name: str, *allowed: str) -> str:
    value = message.get(name)
    if not isinstance(value, str) or value not in allowed:
        raise _badField(name)
    return value


def _uuid(message: Message, name: str) -> str:
    value = message.get(name)
    try:
        if isinstance(value, str) and str(UUID(value)) == value:
            return value
    except ValueError:
        pass
    raise _badField(name)
