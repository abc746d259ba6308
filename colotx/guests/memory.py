"""
The embedded guest: a small machine inside the daemon, protected by the same means as a VM, for trying out, for tests
and for measuring with no hypervisor.

It answers ping, echoes on port 7 (UDP, TCP) what real clients send through any L{colotx.interfaces.IFramePort}, and
checks its own memory. Two of them with the same state and input say the same, but for the random service on port 17: a
datagram is answered with 16 random bytes, a TCP stream with as many as it has.

This module is the way in; the C{memory_*} modules beside it are its hypervisor on the two hosts.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from colotx.guests._machine import MemorySettings
from colotx.guests.memory_active import ActiveMemorySecondary
from colotx.guests.memory_primary import MemoryPrimaryGuest
from colotx.guests.passive import PassiveSecondary
from colotx.interfaces import IGuestFactory
from colotx.ramcache import RamCache


@implementer(IGuestFactory)
class MemoryGuestFactory:
    """
    Makes embedded guests.

    @param newCache: makes the empty RAM cache of a standby.
    """

    def __init__(
        self,
        clock: IReactorTime,
        settings: MemorySettings | None = None,
        newCache: Callable[[], RamCache] = RamCache,
    ) -> None:
        self._clock = clock
        self._settings = settings or MemorySettings()
        self._newCache = newCache

    def createPrimary(self) -> MemoryPrimaryGuest:
        """As L{IGuestFactory.createPrimary}."""
        return MemoryPrimaryGuest.fresh(self._clock, self._settings)

    def createStandby(self, kind: str = "passive") -> PassiveSecondary:
        """As L{IGuestFactory.createStandby}."""
        if kind == "active":
            return ActiveMemorySecondary(self._clock, self._newCache)
        return PassiveSecondary(
            self._clock, self._newCache, lambda image: MemoryPrimaryGuest.fromImage(self._clock, image)
        )


__all__ = ["MemoryGuestFactory", "MemoryPrimaryGuest", "MemorySettings"]
