"""
Real VMs: a stock QEMU as the guest of the primary, and one restored from a checkpoint on the secondary's host.

This module is the way in; each C{qemu_*} module beside it knows one thing about such guests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zope.interface import implementer

from colotx.guests.qemu_active import ActiveQemuSecondary
from colotx.guests.qemu_arguments import QemuSettings
from colotx.guests.qemu_primary import QemuPrimaryGuest
from colotx.guests.qemu_standby import QemuStandby
from colotx.interfaces import IGuestFactory
from colotx.ramcache import RamCache


@implementer(IGuestFactory)
class QemuGuestFactory:
    """Makes guests of one machine, on the primary's host and on the secondary's."""

    def __init__(
        self, reactor: Any, settings: QemuSettings, newCache: Callable[[], RamCache] = RamCache
    ) -> None:
        """@param newCache: makes the RAM cache of a standby."""
        self._reactor = reactor
        self._settings = settings
        self._newCache = newCache

    def createPrimary(self) -> QemuPrimaryGuest:
        """As L{IGuestFactory.createPrimary}."""
        return QemuPrimaryGuest(self._reactor, self._settings)

    def createStandby(self, kind: str = "passive") -> QemuStandby | ActiveQemuSecondary:
        """As L{IGuestFactory.createStandby}."""
        if kind == "active":
            return ActiveQemuSecondary(self._reactor, self._settings)
        return QemuStandby(self._reactor, self._settings, self._newCache)


__all__ = ["ActiveQemuSecondary", "QemuGuestFactory", "QemuPrimaryGuest", "QemuSettings", "QemuStandby"]
