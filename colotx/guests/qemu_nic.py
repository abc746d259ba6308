"""
One NIC in front of several QEMUs that follow each other.

Whoever carries a guest's frames keeps one port for all of its lives; this module puts the right one behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from colotx._portbase import BasePort
from colotx.interfaces import IFramePort
from colotx.ports import StreamPort


@implementer(IFramePort)
class SwitchedPort(BasePort):
    """The NIC of the QEMU that was given last. Before the first there is none, and frames for it are dropped."""

    def __init__(self) -> None:
        self._port: StreamPort | None = None
        self._paused = False

    def __str__(self) -> str:
        return "the guest's NIC"

    def use(self, port: StreamPort) -> None:
        """
        From now on this is the one. The one before is closed.

        @param port: open and paused.
        """
        before, self._port = self._port, port
        if before is not None:
            before.receiver = before.onLost = None
            before.close()
        port.receiver, port.onLost = self._deliver, self._fail
        if not self._paused:
            port.resume()

    @property
    def congested(self) -> bool:
        """As L{IFramePort}."""
        return self._port is not None and self._port.congested

    def send(self, frames: Sequence[bytes]) -> None:
        """As L{IFramePort.send}."""
        if self._port is None:
            self._drop(len(frames), "no guest runs yet")
        else:
            self._port.send(frames)

    def pause(self) -> None:
        """As L{IFramePort.pause}."""
        self._paused = True
        if self._port is not None:
            self._port.pause()

    def resume(self) -> None:
        """As L{IFramePort.resume}."""
        self._paused = False
        if self._port is not None:
            self._port.resume()

    def drain(self) -> None:
        """As L{IFramePort.drain}."""
        if self._port is not None:
            self._port.drain()

    def open(self) -> Deferred[None]:
        """The QEMUs' ports come here open."""
        return succeed(None)

    def close(self) -> Deferred[None]:
        """As L{IFramePort.close}."""
        return succeed(None) if self._port is None else self._port.close()


__all__ = ["SwitchedPort"]
