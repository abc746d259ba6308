"""
The NIC of a running secondary guest as the primary's clients would see it.

Joins L{colotx.translate} and L{colotx.replay} to a port; what they do with frames is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from zope.interface import implementer

from colotx._portbase import BasePort
from colotx.interfaces import IFramePort
from colotx.replay import ReplayBuffer
from colotx.translate import Translator


@implementer(IFramePort)
class TranslatingPort(BasePort):
    """
    A guest's port with a L{Translator} and a L{ReplayBuffer} in both directions.

    @ivar translator: the L{Translator}: C{export} and C{adopt} are called there.
    """

    def __init__(self, inner: Any, clock: Callable[[], float]) -> None:
        """
        @param inner: the guest's L{IFramePort}; its C{receiver} and C{onLost} are taken.
        @param clock: monotonic seconds.
        """
        self.translator = Translator(clock)
        self._buffer: ReplayBuffer | None = ReplayBuffer()
        self._replay: list[bytes] = []
        self._adopting: list[object] | None = None
        self._inner = inner
        inner.receiver, inner.onLost = self._said, self._fail

    def __str__(self) -> str:
        return str(self._inner)

    def adopt(self, entries: list[object]) -> None:
        """
        From the next checkpoint on the guest has connections whose primary translates them: what its
        C{translator.export} said.

        @raise ProtocolError: it is nothing of the kind.
        """
        Translator(lambda: 0.0).adopt(entries)
        self._adopting = entries

    def checkpointLoaded(self) -> None:
        """The guest is the primary's as of now. To be called before it runs."""
        if self._adopting is None:
            self.translator.reset()
        else:
            self.translator.adopt(self._adopting)
            self._adopting = None
        if self._buffer is not None:
            self._buffer.reset()

    def promoted(self) -> None:
        """The guest goes on alone. To be called before it runs; nothing more is remembered for a replay."""
        if self._buffer is not None:
            self._replay = self._buffer.replay()
            self.translator.promoted(self._buffer.withTimestamps())
            self._buffer = None

    def replay(self) -> None:
        """Give C{receiver}, once, what clients may have missed: to be called after L{promoted}, with the way open."""
        frames, self._replay = self._replay, []
        self._deliver(frames)

    def _said(self, frames: list[bytes]) -> None:
        frames = self.translator.output(frames)
        if self._buffer is not None:
            self._buffer.output(frames)
        self._deliver(frames)

    def send(self, frames: Sequence[bytes]) -> None:
        """As L{IFramePort.send}."""
        if self._buffer is not None:
            self._buffer.input(frames)
        self._inner.send(self.translator.input(frames))

    @property
    def congested(self) -> bool:
        """As L{IFramePort}."""
        return bool(self._inner.congested)

    def pause(self) -> None:
        """As L{IFramePort.pause}."""
        self._inner.pause()

    def resume(self) -> None:
        """As L{IFramePort.resume}."""
        self._inner.resume()

    def drain(self) -> None:
        """As L{IFramePort.drain}."""
        self._inner.drain()

    def open(self) -> Deferred[None]:
        """As L{IFramePort.open}."""
        opened: Deferred[None] = self._inner.open()
        return opened

    def close(self) -> Deferred[None]:
        """As L{IFramePort.close}."""
        closed: Deferred[None] = self._inner.close()
        return closed
