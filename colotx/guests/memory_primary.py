"""
The embedded guest's hypervisor: run control, the network port, and the migration stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from colotx._portbase import BasePort
from colotx.errors import GuestError
from colotx.guests._machine import DESCRIPTION, Machine, MemorySettings
from colotx.guests._nic import MTU
from colotx.guests.translating import TranslatingPort
from colotx.interfaces import CheckpointImage, IFramePort, IPrimaryGuest, RunState, Sink
from colotx.vmstate import PAGE_SIZE, Pages, RamBlock, RamWriter, Zeros

log = Logger()

MACHINE = "colotx-memory"
BLOCK = "memory.ram"

_RING = 1024
"""Frames that wait for the guest; what comes on top is dropped, as by a NIC whose ring is full."""
_TURN = 64
_SLICE = 512
"""Pages (2 MiB) written to a sink before the reactor gets a turn."""
_ROUNDS = 4
_FEW = 256
"""Pages: with no more left the initial transfer stops the guest and sends the rest, also after C{_ROUNDS} rounds."""


@implementer(IFramePort)
class MemoryPort(BasePort):
    """
    The embedded guest's NIC seen from outside. Frames for the guest wait here while it is stopped. Paused, the
    guest's network stands still, so nothing it said is ever in between: there is nothing to drain.

    @ivar wake: called when the guest may have something to do.
    """

    def __init__(self) -> None:
        self.wake: Callable[[], object] = lambda: None
        self._waiting: deque[bytes] = deque()
        self.paused = False

    def __str__(self) -> str:
        return "memory guest"

    @property
    def congested(self) -> bool:
        return len(self._waiting) > _RING // 2

    def send(self, frames: Sequence[bytes]) -> None:
        for frame in frames:
            if len(self._waiting) >= _RING or len(frame) > MTU + 18:
                self._drop(1, "the guest's ring is full, or the frame is larger than its MTU")
            else:
                self._waiting.append(frame)
        self.wake()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        self.wake()

    def drain(self) -> None:
        """Everything was delivered when the guest sent it."""

    def open(self) -> Deferred[None]:
        return succeed(None)

    def close(self) -> Deferred[None]:
        return succeed(None)

    def take(self, count: int) -> list[bytes]:
        """The next frames for the guest."""
        return [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]

    def clear(self) -> None:
        """Forget the frames for the guest."""
        self._waiting.clear()

    @property
    def waiting(self) -> bool:
        """Whether there are any."""
        return bool(self._waiting)

    def deliver(self, frames: list[bytes]) -> None:
        """The guest sent these."""
        self._deliver(frames)


def checkMachine(machine: str, blocks: Sequence[RamBlock]) -> None:
    """@raise GuestError: a checkpoint of another kind of guest."""
    if machine != MACHINE or [block.name for block in blocks] != [BLOCK]:
        raise GuestError(f"a checkpoint of machine {machine!r} is no memory guest's")


@implementer(IPrimaryGuest)
class MemoryPrimaryGuest:
    """
    A L{Machine} that runs.

    @ivar machine: the machine, for statistics and tests.
    """

    def __init__(
        self,
        clock: IReactorTime,
        makeMachine: Callable[[Callable[[bytes], None]], Machine],
        nic: MemoryPort | None = None,
        port: Any = None,
    ) -> None:
        """
        @param makeMachine: makes the machine from what takes the frames it sends.
        @param nic: the port that was this guest's before, if it had one.
        @param port: the L{IFramePort} that others see instead of C{nic}.
        """
        self._clock = clock
        self._output: list[bytes] = []
        self.machine = makeMachine(self._output.append)
        self._ticking: Any = None
        self._polling: Any = None
        self._transfer: Deferred[None] | None = None
        self._writer = RamWriter()
        self._nic = nic or MemoryPort()
        self._nic.wake = self._wake
        self.port = port or self._nic
        self.runState = RunState.PRELAUNCH
        self.onLost: Callable[[GuestError], object] | None = None
        self.onCheckpointWanted: Callable[[str], object] | None = None

    @classmethod
    def fresh(cls, clock: IReactorTime, settings: MemorySettings) -> MemoryPrimaryGuest:
        """A guest that will boot."""
        return cls(clock, lambda transmit: Machine.powerOn(settings, transmit))

    @classmethod
    def fromImage(cls, clock: IReactorTime, image: CheckpointImage) -> MemoryPrimaryGuest:
        """
        A guest that will go on from a checkpoint. It takes a copy of the RAM, and closes the cache.

        @raise GuestError: the checkpoint is of another kind of guest, or damaged.
        """
        ram: Any = image.ram
        checkMachine(image.machine, ram.blocks)
        content = np.frombuffer(ram.image(BLOCK), np.uint8).copy()
        guest = cls(clock, lambda transmit: Machine.restore(content, image.deviceState, transmit))
        ram.close()
        return guest

    @property
    def ramBytes(self) -> int:
        return self.machine.settings.ramBytes

    # Run control

    def launch(self) -> Deferred[None]:
        if isinstance(self.port, TranslatingPort):
            self.port.replay()
        return self.start()

    def stop(self) -> Deferred[None]:
        if self.runState is RunState.RUNNING:
            self.runState = RunState.COLO
            self._ticking.cancel()
        return succeed(None)

    def start(self) -> Deferred[None]:
        if self.runState in (RunState.PRELAUNCH, RunState.COLO):
            self.runState = RunState.RUNNING
            self._ticking = self._clock.callLater(self.machine.settings.tickMs / 1000, self._tick)
            self._wake()
        return succeed(None)

    def pause(self) -> Deferred[None]:
        if self.runState is RunState.RUNNING:
            self.runState = RunState.PAUSED
            self._ticking.cancel()
        return succeed(None)

    def unpause(self) -> Deferred[None]:
        if self.runState is RunState.PAUSED:
            self.runState = RunState.COLO
        return self.start()

    def endProtection(self) -> Deferred[None]:
        if self._transfer is not None:
            self._transfer.cancel()
        return self.start()

    def shutdown(self) -> Deferred[None]:
        self.stop()
        self.runState = RunState.SHUTDOWN
        if self._polling is not None:
            self._polling.cancel()
            self._polling = None
        if self._transfer is not None:
            self._transfer.cancel()
        return succeed(None)

    def _tick(self) -> None:
        self._ticking = self._clock.callLater(self.machine.settings.tickMs / 1000, self._tick)
        self._run(lambda: self.machine.tick(network=not self._nic.paused))

    def _wake(self) -> None:
        idle = self.runState is not RunState.RUNNING or self._nic.paused or self._polling is not None
        if not idle and self._nic.waiting:
            # Not at once: two guests that answer each other must not do so on one stack.
            self._polling = self._clock.callLater(0, self._poll)

    def _poll(self) -> None:
        self._polling = None
        if self.runState is RunState.RUNNING and not self._nic.paused:
            frames = self._nic.take(_TURN)
            self._run(lambda: self.machine.receive(frames))
            self._wake()

    def _run(self, step: Callable[[], object]) -> None:
        """Let the machine do something, and hand over what it sent."""
        try:
            step()
        except GuestError as error:
            log.critical("the memory guest crashed: {error}", error=error)
            self.shutdown()
            if self.onLost is not None:
                self.onLost(error)
        frames, self._output[:] = self._output[:], []
        self._nic.deliver(frames)

    # State

    def transferInitial(self, sink: Sink) -> Deferred[None]:
        return self._transferring(self._initial(sink))

    def transferLive(self, sink: Sink) -> Deferred[None]:
        return self._transferring(self._live(sink))

    def saveDeviceState(self) -> Deferred[bytes]:
        return succeed(self.machine.deviceState())

    def _transferring(self, work: Coroutine[Deferred[Any], Any, None]) -> Deferred[None]:
        async def transfer() -> None:
            try:
                await work
            except CancelledError:
                raise GuestError(
                    "the transfer of the guest's state was broken off: its protection ended"
                ) from None
            finally:
                self._transfer = None

        self._transfer = None
        running = ensureDeferred(transfer())
        if not running.called:
            self._transfer = running
        return running

    async def _initial(self, sink: Sink) -> None:
        memory = self.machine.memory
        writer = self._writer = RamWriter()
        await sink.write(writer.header() + writer.configuration(MACHINE) + writer.enableColo())
        await sink.write(writer.start([RamBlock(BLOCK, self.ramBytes)]))
        memory.dirty[:] = True
        for _ in range(_ROUNDS):
            await self._write(sink, writer.part(self._contents(memory.takeDirty())))
            if np.count_nonzero(memory.dirty) <= _FEW:
                break
        await self.stop()
        await self._live(sink, last=self.machine.deviceState())
        await sink.write(writer.vmdesc(DESCRIPTION))

    async def _live(self, sink: Sink, last: bytes | None = None) -> None:
        """@param last: what follows the RAM: the device state with its EOF, or just an EOF."""
        await self._write(sink, self._writer.end(self._contents(self.machine.memory.takeDirty())))
        await sink.write(self._writer.eof() if last is None else last)

    async def _write(self, sink: Sink, pieces: Iterator[bytes | memoryview]) -> None:
        written = 0
        for piece in pieces:
            await sink.write(piece)
            written += len(piece)
            if written > _SLICE * PAGE_SIZE:
                written = 0
                await deferLater(self._clock, 0)

    def _contents(self, numbers: NDArray[np.intp]) -> Iterator[Pages | Zeros]:
        for start in range(0, len(numbers), _SLICE):
            some = numbers[start : start + _SLICE]
            pages = self.machine.memory.pages[some]
            addresses = some.astype(np.uint64) * np.uint64(PAGE_SIZE)
            used = pages.view(np.uint64).any(axis=1)
            yield Zeros(BLOCK, addresses[~used], 0)
            yield Pages(BLOCK, addresses[used], pages if used.all() else pages[used])


__all__ = ["BLOCK", "MACHINE", "MemoryPort", "MemoryPrimaryGuest", "checkMachine"]
