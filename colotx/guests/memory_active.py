"""
The embedded guest as an active secondary: a second machine that runs on the same input, and is made to be the primary's
by each checkpoint.

A checkpoint is staged and committed as a passive secondary's is. Loading it then costs the pages that differ: those it
brought, and those the machine here has written itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from twisted.internet.defer import Deferred, DeferredLock, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from colotx.errors import FailoverError, GuestError, UnexpectedMessage
from colotx.guests._machine import Machine
from colotx.guests.memory_primary import BLOCK, MemoryPort, MemoryPrimaryGuest, checkMachine
from colotx.guests.passive import PassiveSecondary
from colotx.guests.translating import TranslatingPort
from colotx.interfaces import IActiveSecondary
from colotx.ramcache import RamCache
from colotx.vmstate import PAGE_SIZE

_SLICE = 512
"""Pages (2 MiB) copied before the reactor gets a turn."""


@implementer(IActiveSecondary)
class ActiveMemorySecondary(PassiveSecondary):
    """
    A machine that runs, and its RAM twice: as it is, and as of the last checkpoint.

    @ivar guest: what runs, from the first C{settle} on.
    """

    kind = "active"

    def __init__(self, clock: IReactorTime, newCache: Callable[[], RamCache]) -> None:
        """@param newCache: makes an empty cache."""
        super().__init__(clock, newCache, lambda image: None)
        self._clock = clock
        self._nic = MemoryPort()
        self.port = TranslatingPort(self._nic, clock.seconds)
        self.guest: MemoryPrimaryGuest | None = None
        self._loaded: RamCache | None = None
        self._behind = False
        self._broken = ""
        # A failover finishes the load that is under way.
        self._loading = DeferredLock()

    @property
    def promotable(self) -> bool:
        """As L{ISecondaryGuest.promotable}."""
        return super().promotable and not self._broken

    def prepare(self) -> Deferred[None]:
        """
        Stop the machine.

        @raise GuestError: it crashed. The next initial transfer brings a new one.
        """
        return ensureDeferred(self._prepare())

    def settle(self) -> Deferred[None]:
        """
        Make the machine the committed checkpoint's, and let it run.

        @raise StorageError: spilled pages cannot be read back.
        @raise GuestError: the checkpoint is of another kind of guest, or damaged.
        """
        return self._loading.run(lambda: ensureDeferred(self._settle()))

    def promote(self) -> Deferred[MemoryPrimaryGuest]:
        """
        Stop the machine and hand it over as it is; if a checkpoint is being loaded, when it is loaded.

        @raise FailoverError: there is none, it crashed, or its last load failed.
        """
        return self._loading.run(lambda: ensureDeferred(self._promote()))

    def close(self) -> Deferred[None]:
        """Free everything but what a promotion handed over."""
        if not self._over and self.guest is not None:
            self.guest.shutdown()
        return super().close()

    async def _prepare(self) -> None:
        self._checkOpen()
        if self._broken:
            raise GuestError(f"{self._broken}: synchronise anew")
        if self.guest is not None:
            await self.guest.stop()

    async def _commit(self, deviceState: bytes) -> None:
        await super()._commit(deviceState)
        self._behind = True

    async def _settle(self) -> None:
        guest = await self._load()
        await guest.start()

    async def _promote(self) -> MemoryPrimaryGuest:
        self._checkOpen()
        if self._behind and not self._broken:
            await self._load()
        if self._broken:
            raise FailoverError(self._broken)
        if self.guest is None:
            raise FailoverError("no checkpoint was ever committed here: there is nothing to go on from")
        self.abandon()
        self._over = "promoted"
        self.guest.onLost = None
        # Nothing is said until C{launch}: then there is somebody who hears it.
        await self.guest.stop()
        self.port.promoted()
        await super().close()
        return self.guest

    async def _load(self) -> MemoryPrimaryGuest:
        """
        @return: a guest, not yet started, as of the committed checkpoint.
        @raise FailoverError: it was closed meanwhile.
        """
        self._checkOpen()
        cache = self._current
        if cache is None:
            raise UnexpectedMessage("a load before the initial transfer was committed")
        if self.guest is not None:
            await self.guest.shutdown()
        try:
            checkMachine(self._description[0], cache.blocks)
            await self._flush(cache)
            self._checkOpen()
            content = await self._contents(cache)
            self._checkOpen()
            guest = MemoryPrimaryGuest(
                self._clock,
                lambda transmit: Machine.restore(content, cache.deviceState, transmit),
                self._nic,
                self.port,
            )
        except Exception as error:
            # What is in the machine's memory now belongs to no moment of any guest.
            self._broken = f"the last checkpoint could not be loaded: {error}"
            raise
        # What both were given before the checkpoint is in it.
        self._nic.clear()
        self.port.checkpointLoaded()
        guest.onLost = self._crashed
        self.guest, self._loaded, self._behind, self._broken = guest, cache, False, ""
        return guest

    async def _contents(self, cache: RamCache) -> NDArray[np.uint8]:
        """@return: RAM as the images are, in the place of the machine's if it is the same guest's."""
        image = np.frombuffer(cache.image(BLOCK), np.uint8)
        if self.guest is not None and self._loaded is cache:
            memory = self.guest.machine.memory
            content = memory.pages.reshape(-1)
            differing = np.flatnonzero(memory.dirty | cache.dirtyBitmap(BLOCK))
        else:
            content = np.empty_like(image)
            differing = np.arange(len(image) // PAGE_SIZE)
        await self._cooperator.cooperate(_copy(image, content, differing)).whenDone()
        return content

    def _crashed(self, error: GuestError) -> None:
        self._broken = f"the machine that stands by crashed: {error}"


def _copy(source: NDArray[np.uint8], target: NDArray[np.uint8], numbers: NDArray[np.intp]) -> Iterator[None]:
    """Copy the pages of these numbers, a slice at a time."""
    old, new = target.reshape(-1, PAGE_SIZE), source.reshape(-1, PAGE_SIZE)
    for start in range(0, len(numbers), _SLICE):
        some = numbers[start : start + _SLICE]
        old[some] = new[some]
        yield


__all__ = ["ActiveMemorySecondary"]
