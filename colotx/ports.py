"""
Where Ethernet frames enter and leave: implementations of L{colotx.interfaces.IFramePort}.

* L{StreamPort} is the client of a guest's C{-netdev stream,server=on} socket (QEMU 7.2 and later): every frame
  is a big-endian 32-bit length and the frame.
* L{ListeningStreamPort} speaks the same on a unix socket of its own: a switch, a test or another QEMU
  connects.
* L{TapPort} is a TAP device of the Linux kernel, in a bridge if wanted.
* L{NullPort} is a cable plugged into nothing.

What all of them share: a C{dropped} counter of frames that were given to C{send} and could not be taken
(nobody connected, queue full, device down) or arrived with no C{receiver} set, and C{onLost}, called once with
a L{colotx.errors.ColoError} when an open port broke for good. None of them knows what is in a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from colotx._portbase import BasePort
from colotx._streamport import FrameDecoder, ListeningStreamPort, StreamPort, encodeFrame
from colotx._tapport import TapPort, checkInterfaceName
from colotx.errors import ConfigError
from colotx.interfaces import IFramePort


@implementer(IFramePort)
class NullPort(BasePort):
    """A port nothing ever arrives at; what is sent to it is gone, and counted."""

    congested = False

    def send(self, frames: Sequence[bytes]) -> None:
        self.dropped += len(frames)

    def pause(self) -> None:
        """Nothing to hold back."""

    def resume(self) -> None:
        """Nothing was held back."""

    def drain(self) -> None:
        """Nothing can have arrived."""

    def open(self) -> Deferred[None]:
        return succeed(None)

    def close(self) -> Deferred[None]:
        return succeed(None)


def parseOutside(description: str) -> Callable[[Any], Any]:
    """
    Understand an operator's C{tap:NAME[,bridge=BRIDGE]}, C{unix:PATH} or C{none}.

    @return: a callable that makes the L{IFramePort} from a reactor; C{unix:PATH} is a L{ListeningStreamPort}.
    @raise ConfigError: it is none of these.
    """
    kind, _, rest = description.partition(":")
    if description == "none":
        return lambda reactor: NullPort()
    if kind == "unix" and rest:
        return lambda reactor: ListeningStreamPort(reactor, rest)
    if kind == "tap" and rest:
        name, comma, option = rest.partition(",")
        key, _, bridge = option.partition("=")
        if not comma or (key == "bridge" and bridge):
            checkInterfaceName(name)
            joins = checkInterfaceName(bridge) if comma else None
            return lambda reactor: TapPort(reactor, name, joins)
    raise ConfigError(f"{description!r} is no outside port: use tap:NAME[,bridge=BRIDGE], unix:PATH or none")


__all__ = [
    "FrameDecoder",
    "ListeningStreamPort",
    "NullPort",
    "StreamPort",
    "TapPort",
    "encodeFrame",
    "parseOutside",
]
