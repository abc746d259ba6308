"""
The passive secondary of a QEMU guest: a checkpoint in memory, and a QEMU that is ready to go on from it.

This module knows when to start that QEMU and whom to give it to. What a checkpoint is and how it comes here is
L{PassiveSecondary}'s, how a guest is made of one L{QemuPrimaryGuest}'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred

from colotx.guests.passive import PassiveSecondary
from colotx.guests.qemu_arguments import QemuSettings
from colotx.guests.qemu_primary import QemuPrimaryGuest
from colotx.guests.qemu_restore import mappedRam
from colotx.interfaces import CheckpointImage
from colotx.ramcache import RamCache


class QemuStandby(PassiveSecondary):
    """
    A passive secondary with a QEMU that waits beside it, its RAM cache's image mapped: at a failover nothing has to
    be started.
    """

    def __init__(self, reactor: Any, settings: QemuSettings, newCache: Callable[[], RamCache]) -> None:
        super().__init__(reactor, self._makeCache, self._restored)
        self._reactor = reactor
        self._settings = settings
        self._makesCache = newCache
        self._newest: RamCache | None = None
        self._waiting: QemuPrimaryGuest | None = None
        self._waitsFor: RamCache | None = None

    def settle(self) -> Deferred[None]:
        """After the first checkpoint of an initial transfer: start the QEMU that may be needed."""
        return super().settle().addCallback(self._prepare)

    def close(self) -> Deferred[None]:
        """End the QEMU that was not needed, too."""
        return ensureDeferred(self._close())

    def _makeCache(self) -> RamCache:
        self._newest = self._makesCache()
        return self._newest

    def _prepare(self, result: None) -> None:
        cache = self._newest
        if cache is None or cache is self._waitsFor or not cache.generation:
            return
        ram = mappedRam(cache, self._settings.arguments)
        before, self._waiting, self._waitsFor = self._waiting, None, cache
        if before is not None:
            before.shutdown()
        if ram is not None:
            self._waiting = QemuPrimaryGuest(self._reactor, self._settings)
            self._waiting.prepare(ram)

    def _restored(self, image: CheckpointImage) -> QemuPrimaryGuest:
        guest, self._waiting = self._waiting, None
        if guest is None:
            guest = QemuPrimaryGuest(self._reactor, self._settings)
        guest.adopt(image)
        return guest

    async def _close(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            await waiting.shutdown()
        await super().close()


__all__ = ["QemuStandby"]
