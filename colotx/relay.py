"""
Who gets which frame, and when: the guest's input to both VMs in one order, what the two VMs say to the comparer.

An active secondary must get exactly the input that its primary gets after the checkpoint both went on from, no frame
of before and none twice. So the primary's side holds the input back around each stop, and both sides mark where an
epoch begins on the frames channel; what comes late from an epoch that ended is dropped, for the checkpoint covers it.

This module knows frames and epochs; it does not know the COLO exchange, guests or links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer

from colotx.frames import FrameChannel
from colotx.interfaces import IFrameRelay

if TYPE_CHECKING:
    from colotx.lockstep import LockstepGate

HELD_INPUT = 1 << 20
"""Bytes of input held during a checkpoint from which on the outside port is paused; its own queue holds the rest."""

MAX_EARLY = 1024
"""Frames kept for a VM that was not said to run yet; what it misses it will be heard not to have got."""


class Inlet:
    """
    The way of frames from outside to the guest, and to its active secondary while there is one.

    @ivar copyTo: takes what the guest gets, or None.
    """

    def __init__(self, outside: Any, port: Any) -> None:
        """
        @param outside: the L{colotx.interfaces.IFramePort} that clients are on.
        @param port: the guest's.
        """
        self._outside = outside
        self._port = port
        self._held: list[bytes] = []
        self._heldBytes = 0
        self._holding = False
        self._paused = False
        self._congested = False
        self.copyTo: Callable[[Sequence[bytes]], None] | None = None

    def take(self, frames: list[bytes]) -> None:
        """Clients sent these."""
        if self._holding:
            self._held += frames
            self._heldBytes += sum(map(len, frames))
            self._pace()
            return
        # The secondary's copy first: it has the longer way.
        if self.copyTo is not None:
            self.copyTo(frames)
        self._port.send(frames)

    def hold(self) -> None:
        """Frames wait from now on."""
        self._holding = True

    def resume(self) -> None:
        """What waited goes on, and what comes. Harmless when nothing is held."""
        self._holding = False
        held, self._held, self._heldBytes = self._held, [], 0
        if held:
            self.take(held)
        self._pace()

    def congested(self, on: bool) -> None:
        """The secondary does not take its copy as fast: hold clients back, or go on."""
        self._congested = on
        self._pace()

    def _pace(self) -> None:
        pause = self._congested or self._heldBytes > HELD_INPUT
        if pause is not self._paused:
            self._paused = pause
            if pause:
                self._outside.pause()
            else:
                self._outside.resume()


@implementer(IFrameRelay)
class NoRelay:
    """A passive secondary gets no frames: nothing waits."""

    def hold(self) -> None:
        """Input goes on."""

    def closeEpoch(self, number: int) -> None:
        """There is no second stream to cut."""

    def resume(self, number: int) -> None:
        """Nothing was held."""

    def end(self) -> None:
        """Nothing to end."""


@implementer(IFrameRelay)
class PrimaryRelay:
    """One session's relay on the primary's side."""

    def __init__(self, clock: IReactorTime, channel: FrameChannel, inlet: Inlet, gate: LockstepGate) -> None:
        self._clock = clock
        self._channel = channel
        self._inlet = inlet
        self._gate = gate
        self._scanning: IDelayedCall | None = None
        self._epoch = 0
        self._arrived = 0
        channel.onFrames = self._said
        channel.onMark = self._marked
        channel.onCongested = inlet.congested

    def hold(self) -> None:
        """Before REQUEST: what both VMs have got by now is before the checkpoint."""
        self._inlet.hold()

    def closeEpoch(self, number: int) -> None:
        """Both VMs are stopped: frames of the secondary count again when its mark of C{number} has come."""
        self._epoch = number

    def resume(self, number: int) -> None:
        """Both VMs run."""
        self._channel.mark(number)
        self._inlet.copyTo = self._channel.send
        self._inlet.resume()
        if self._scanning is None:
            self._scan()

    def end(self) -> None:
        """The guest goes on without a secondary."""
        self._channel.onFrames = self._channel.onMark = self._channel.onCongested = _nothing
        self._inlet.copyTo = None
        self._inlet.congested(False)
        self._inlet.resume()
        self._gate.suspend()
        if self._scanning is not None:
            self._scanning.cancel()
            self._scanning = None

    def _scan(self) -> None:
        # First the timer: what the scan asks for may end this relay.
        self._scanning = self._clock.callLater(self._gate.compareLimits.expiredScanCycle / 1000, self._scan)
        self._gate.scan()

    def _said(self, frames: list[bytes]) -> None:
        if self._arrived == self._epoch:
            self._gate.compare(frames)

    def _marked(self, number: int) -> None:
        self._arrived = number


class SecondaryRelay:
    """
    One session's relay on the secondary's side.

    Frames from the primary wait until L{begin}; then those after the mark of the epoch under way go to the VM.
    """

    def __init__(self, channel: FrameChannel) -> None:
        self._channel = channel
        self._port: Any = None
        self._epoch = 0
        self._arrived = -1
        self._early: list[bytes] = []
        channel.onFrames = self._toGuest
        channel.onMark = self._marked

    def begin(self, port: Any) -> None:
        """@param port: of the VM that runs from the initial transfer on."""
        self._port = port
        port.receiver = self._channel.send
        self._channel.onCongested = lambda on: port.pause() if on else port.resume()
        early, self._early = self._early, []
        if early:
            port.send(early)

    def closeEpoch(self) -> None:
        """The VM is stopped for a checkpoint and its port read dry."""
        self._epoch += 1
        self._channel.mark(self._epoch)

    def end(self) -> None:
        """The VM's frames go nowhere from now on."""
        self._channel.onFrames = self._channel.onMark = self._channel.onCongested = _nothing
        if self._port is not None:
            self._port.receiver = _nothing
            self._port.resume()

    def _toGuest(self, frames: list[bytes]) -> None:
        if self._arrived != self._epoch:
            return
        if self._port is None:
            # The primary's guest runs since READY, which it got before we could say that ours does: a few frames.
            self._early += frames[: MAX_EARLY - len(self._early)]
        else:
            self._port.send(frames)

    def _marked(self, number: int) -> None:
        self._arrived = number


def _nothing(*_: object) -> None:
    pass


__all__ = ["Inlet", "NoRelay", "PrimaryRelay", "SecondaryRelay"]
