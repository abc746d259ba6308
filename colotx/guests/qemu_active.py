"""
The active secondary of a QEMU guest: a VM that runs beside the primary's, and is overwritten by each checkpoint.

This module knows which QEMU counts: the one that runs, and while a new initial stream arrives a fresh one that will
take its place. How such a QEMU is led is L{QemuFollower}'s; how a guest lives on its own L{QemuPrimaryGuest}'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, ensureDeferred
from twisted.logger import Logger
from zope.interface import implementer

from colotx.errors import FailoverError, GuestError, GuestLost, UnexpectedMessage
from colotx.guests.qemu_arguments import QemuSettings
from colotx.guests.qemu_follower import QemuFollower
from colotx.guests.qemu_nic import SwitchedPort
from colotx.guests.qemu_primary import QemuPrimaryGuest
from colotx.guests.translating import TranslatingPort
from colotx.interfaces import IActiveSecondary
from colotx.vmstate import RamEvent


@implementer(IActiveSecondary)
class ActiveQemuSecondary:
    """
    A QEMU that follows the primary's.

    @ivar onLost: None or a callable taking a L{GuestError}: called once when the VM that stands by died by itself.
    """

    kind = "active"
    _log = Logger()

    def __init__(self, reactor: Any, settings: QemuSettings) -> None:
        """
        @param reactor: provides C{IReactorProcess}, C{IReactorUNIX} and C{IReactorTime}.
        """
        self._reactor = reactor
        self._settings = settings
        self._nic = SwitchedPort()
        self._current: QemuFollower | None = None
        self._incoming: QemuFollower | None = None
        self._endings: list[Deferred[None]] = []
        self._over = ""
        self.port = TranslatingPort(self._nic, time.monotonic)
        self.checkpoint = 0
        self.onLost: Callable[[GuestError], None] | None = None

    @property
    def promotable(self) -> bool:
        """As L{ISecondaryGuest.promotable}."""
        return self._current is not None and self._current.failure is None

    async def stageInitial(self, raw: bytes | memoryview, events: Sequence[RamEvent]) -> None:
        """The initial stream goes into a QEMU of its own."""
        self._checkOpen()
        if self._incoming is None:
            self._incoming = incoming = self._newFollower()
            await incoming.start()
        await self._incoming.initial(raw)

    async def stageLive(self, raw: bytes | memoryview, events: Sequence[RamEvent]) -> None:
        """A checkpoint goes to the QEMU that runs, which puts it aside until it is whole."""
        await self._follower().live(raw)

    def describe(self, machine: str, configuration: bytes) -> None:
        """QEMU has read it itself."""

    def prepare(self) -> Deferred[None]:
        """@raise GuestError: QEMU does not stop its guest. What it goes on from is still its own state."""
        return ensureDeferred(self._follower().stop())

    def commit(self, deviceState: bytes) -> Deferred[None]:
        """@raise GuestError: QEMU did not take it; then its guest is lost, too, unless it never had all of it."""
        return ensureDeferred(self._commit(deviceState))

    def settle(self) -> Deferred[None]:
        """@raise GuestError: QEMU could not load it: there is nothing left to go on from."""
        return ensureDeferred(self._follower().loaded())

    def abandon(self) -> None:
        """Leave the exchange where it is. A fresh QEMU in it is ended, the one that counts left to itself."""
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            self._end(incoming)
        if self._current is not None:
            self._current.cut()

    def promote(self) -> Deferred[Any]:
        """
        Finish a load that is under way, then hand the VM over as it is.

        @raise FailoverError: there never was one, or its last load failed, or it died, or it was promoted or closed.
        """
        return ensureDeferred(self._promote())

    def close(self) -> Deferred[None]:
        """End the QEMUs. What a promotion handed over is not touched."""
        return ensureDeferred(self._close())

    async def _commit(self, deviceState: bytes) -> None:
        incoming = self._incoming
        if incoming is None:
            await self._follower().load(deviceState, self.port.checkpointLoaded)
        else:
            await incoming.begin()
            before, self._current, self._incoming = self._current, incoming, None
            self.port.checkpointLoaded()
            self._nic.use(incoming.port)
            if before is not None:
                self._end(before)
        self.checkpoint += 1

    async def _promote(self) -> QemuPrimaryGuest:
        self._checkOpen()
        current = self._current
        if current is None:
            raise FailoverError("no checkpoint was ever committed here: there is nothing to go on from")
        self.abandon()
        try:
            await current.loaded()
        except GuestError as error:
            self._log.error("{error}", error=error)
        current.cut()
        await current.exited()
        self._checkOpen()
        if current.failure is not None:
            raise FailoverError(f"the guest that stood by here cannot go on: {current.failure}")
        self._over, self._current = "promoted", None
        # What it says until somebody hears it waits.
        self.port.pause()
        self.port.promoted()
        guest = QemuPrimaryGuest(self._reactor, self._settings)
        guest.inherit(current.process, self.port, current.ramBytes)
        return guest

    async def _close(self) -> None:
        self._over = self._over or "closed"
        self.abandon()
        current, self._current = self._current, None
        if current is not None:
            self._end(current)
        await DeferredList(self._endings)

    def _newFollower(self) -> QemuFollower:
        follower = QemuFollower(self._reactor, self._settings, lambda error: self._lost(follower, error))
        return follower

    def _end(self, follower: QemuFollower) -> None:
        ending = ensureDeferred(follower.end())
        self._endings.append(ending)
        ending.addCallback(lambda _: self._endings.remove(ending))

    def _lost(self, follower: QemuFollower, error: GuestLost) -> None:
        """A fresh one that dies fails what waits for it; the one that counts may have nobody waiting for it."""
        if follower is not self._current:
            return
        self._log.error("the guest that stands by: {error}", error=error)
        onLost, self.onLost = self.onLost, None
        if onLost is not None:
            onLost(error)

    def _follower(self) -> QemuFollower:
        self._checkOpen()
        if self._current is None or self._incoming is not None:
            raise UnexpectedMessage("a checkpoint came before the initial transfer was committed")
        return self._current

    def _checkOpen(self) -> None:
        if self._over:
            raise FailoverError(f"this secondary was {self._over}")


__all__ = ["ActiveQemuSecondary"]
