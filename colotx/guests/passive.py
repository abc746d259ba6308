"""
The passive secondary: no VM runs, the last checkpoint waits in memory. It serves every kind of guest, for all that is
particular to one is how it is made from a checkpoint.

It knows the RAM cache and the order of calls of L{ISecondaryGuest}; it must not know the peer or any hypervisor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Cooperator
from zope.interface import implementer

from colotx.errors import FailoverError, UnexpectedMessage
from colotx.interfaces import CheckpointImage, ISecondaryGuest
from colotx.ramcache import RamCache
from colotx.vmstate import RamEvent


@implementer(ISecondaryGuest)
class PassiveSecondary:
    """
    A committed checkpoint in a RAM cache, and while a new initial stream arrives a second cache that it is staged
    into: until that is whole and committed, the first stays what C{promote} goes on from. So a synchronisation that
    follows the first one takes the memory of two images while it lasts, one image at all other times.

    After C{promote} the cache belongs to the new guest, which closes it (C{CheckpointImage.ram.close()}) at its end.
    """

    kind = "passive"

    def __init__(
        self,
        clock: IReactorTime,
        newCache: Callable[[], RamCache],
        restore: Callable[[CheckpointImage], Any],
    ) -> None:
        """
        @param clock: schedules the slices of a flush; a reactor.
        @param newCache: makes an empty cache.
        @param restore: makes an L{colotx.interfaces.IPrimaryGuest}, not yet launched, of a checkpoint whose images
            are current.
        """
        self.checkpoint = 0
        self._newCache = newCache
        self._restore = restore
        # One slice a turn of the reactor: heartbeats wait for a millisecond at most.
        self._cooperator = Cooperator(
            terminationPredicateFactory=lambda: lambda: True, scheduler=lambda turn: clock.callLater(0, turn)
        )
        self._current: RamCache | None = None
        self._incoming: RamCache | None = None
        self._described = self._description = ("", b"")
        self._over = ""

    @property
    def promotable(self) -> bool:
        """As L{ISecondaryGuest.promotable}."""
        return self._current is not None and not self._over

    def stageInitial(self, raw: bytes | memoryview, events: Sequence[RamEvent]) -> None:
        """The initial stream goes into a cache of its own, until it is committed."""
        self._checkOpen()
        if self._incoming is None:
            self._incoming = self._newCache()
        self._incoming.stageInitial(events)

    def stageLive(self, raw: bytes | memoryview, events: Sequence[RamEvent]) -> None:
        """A checkpoint is staged on top of the committed one."""
        self._checkOpen()
        if self._current is None or self._incoming is not None:
            raise UnexpectedMessage("a checkpoint came before the initial transfer was committed")
        self._current.stage(events)

    def describe(self, machine: str, configuration: bytes) -> None:
        """Kept for the image that the next commit makes."""
        self._described = (machine, configuration)

    def prepare(self) -> Deferred[None]:
        """Nothing runs here that had to stop."""
        return succeed(None)

    def commit(self, deviceState: bytes) -> Deferred[None]:
        """
        Takes no time, however large the checkpoint is.

        @raise StorageError: staging had failed.
        """
        return ensureDeferred(self._commit(deviceState))

    def settle(self) -> Deferred[None]:
        """
        Apply the committed pages to the images, a slice a turn of the reactor.

        @raise StorageError: spilled pages cannot be read back.
        """
        return ensureDeferred(self._flush(self._current)) if self._current is not None else succeed(None)

    def abandon(self) -> None:
        """Back to the committed checkpoint."""
        if self._incoming is not None:
            self._incoming.close()
            self._incoming = None
        if self._current is not None:
            self._current.abandon()
        self._described = self._description

    def promote(self) -> Deferred[Any]:
        """
        Finish what C{settle} had to do, then hand the checkpoint over.

        @raise FailoverError: nothing was ever committed, or it was promoted or closed.
        """
        return ensureDeferred(self._promote())

    def close(self) -> Deferred[None]:
        """Free the memory. What a promotion handed over is not touched."""
        self._over = self._over or "closed"
        for cache in (self._incoming, self._current):
            if cache is not None:
                cache.close()
        self._incoming = self._current = None
        return succeed(None)

    async def _commit(self, deviceState: bytes) -> None:
        self._checkOpen()
        cache = self._incoming or self._current
        if cache is None:
            raise UnexpectedMessage("the initial transfer ended before it began")
        cache.commit(deviceState)
        if self._incoming is not None:
            if self._current is not None:
                self._current.close()
            self._current, self._incoming = self._incoming, None
        self._description = self._described
        self.checkpoint += 1

    async def _promote(self) -> Any:
        self._checkOpen()
        cache = self._current
        if cache is None:
            raise FailoverError("no checkpoint was ever committed here: there is nothing to go on from")
        self.abandon()
        self._over = "promoted"
        try:
            await self._flush(cache)
            if self._current is not cache:
                raise FailoverError("the secondary was closed while it was being promoted")
            machine, configuration = self._description
            guest = self._restore(CheckpointImage(machine, configuration, cache, cache.deviceState))
        except Exception:
            if self._current is cache:
                self._over = ""
            raise
        self._current = None
        return guest

    async def _flush(self, cache: RamCache) -> None:
        """
        Apply what is pending. The cache knows how far it is, so a second flush beside one under way only helps it.
        """
        slices: Iterator[int] = cache.flush()
        # Most checkpoints are one slice: those need no turn of the reactor.
        if next(slices, None) is not None:
            await self._cooperator.cooperate(slices).whenDone()

    def _checkOpen(self) -> None:
        if self._over:
            raise FailoverError(f"this secondary was {self._over}")


__all__ = ["PassiveSecondary"]
