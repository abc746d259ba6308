"""
One QEMU that follows: started with C{-incoming defer} and x-colo, it is the secondary of QEMU's own COLO exchange, and
colotx is its primary on a local socket. The order is that of QEMU-FACTS, "The COLO message exchange".

This module knows one such QEMU from its start until it is handed over or ended, and above all whether its guest may
go on. QEMU keeps what it is sent apart from the guest until the device state is whole (C{colo_flush_ram_cache} in
C{migration/colo.c}): a guest whose checkpoint was cut off before that is as it was. From then on it is what the
checkpoint says, or nothing. It does not know the other host, nor that there may be two of its kind for a while.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.error import ConnectError
from twisted.internet.protocol import Factory

from colotx._qmp_codec import JsonObject
from colotx.errors import GuestError, GuestLost
from colotx.guests.qemu_arguments import QemuSettings, SocketPaths
from colotx.guests.qemu_capabilities import enableColo
from colotx.guests.qemu_colo import asGuestErrors
from colotx.guests.qemu_process import QemuProcess
from colotx.ports import StreamPort
from colotx.protocol import ColoConnection, ColoMessage


class Phase(enum.Enum):
    """Where the exchange is."""

    WAITING = "QEMU waits for its initial state"
    INITIAL = "the initial stream is under way"
    RUNNING = "the guest runs"
    STOPPING = "QEMU was told to stop the guest"
    STOPPED = "the guest is stopped"
    STAGING = "QEMU takes a checkpoint"
    LOADING = "QEMU loads a checkpoint"
    CUT = "QEMU is left to itself"


_STATELESS = frozenset({Phase.WAITING, Phase.INITIAL})
"""While it is in one of these, its guest is in no state that could go on."""


class QemuFollower:
    """
    @ivar process: the QEMU.
    @ivar port: the NIC's frames, paused.
    @ivar ramBytes: the guest's RAM, once QEMU was started.
    @ivar phase: where the exchange is.
    """

    def __init__(self, reactor: Any, settings: QemuSettings, onLost: Callable[[GuestLost], None]) -> None:
        """@param onLost: called once when QEMU ended, or its guest shut down, without L{end}."""
        self._reactor = reactor
        self._settings = settings
        self._onLost = onLost
        self._connection = ColoConnection(reactor, settings.stopTimeout)
        self._loading = DeferredLock()
        self._failure: GuestError | None = None
        self._exited: Deferred[None] = Deferred()
        paths = SocketPaths.under(settings.runtimeDirectory)
        self.process = QemuProcess(reactor, settings, paths, self._lost, self._event)
        self.port = StreamPort(reactor, paths.nic)
        self.port.pause()
        self.ramBytes = 0
        self.phase = Phase.WAITING

    @property
    def failure(self) -> GuestError | None:
        """Why its guest cannot go on; None: it can, or a load is under way whose end will tell."""
        if self._failure is not None:
            # Words of QEMU's that follow its complaint on the QMP connection are there by now.
            return self._failure if self.process.lost else self.process.withWords(self._failure)
        return GuestError(self.phase.value) if self.phase in _STATELESS else None

    # -- the initial state

    async def start(self) -> None:
        """
        Start QEMU and make it listen for its state.

        @raise ConfigError: there is no such QEMU, or the runtime directory cannot be used.
        @raise GuestError: it did not start, with its own words.
        """
        process, timeout = self.process, self._settings.startTimeout
        await process.start(restoring=True)
        # The guest speaks in its first moment, and a NIC that nobody is connected to drops what it says.
        await self.port.open()
        await enableColo(process)
        self.ramBytes = (await process.execute("query-memory-size-summary"))["base-memory"]
        path = process.paths.incoming
        await process.execute("migrate-incoming", {"uri": f"unix:{path}"})
        endpoint: Any = UNIXClientEndpoint(self._reactor, path, timeout)  # type: ignore[no-untyped-call]
        try:
            await endpoint.connect(Factory.forProtocol(lambda: self._connection))
        except ConnectError as error:
            raise process.lost or GuestError(f"QEMU does not take its initial state: {error}") from error
        self._advance(Phase.WAITING, Phase.INITIAL)

    async def initial(self, raw: bytes | memoryview) -> None:
        """Pass the next bytes of the initial stream on."""
        self._require(Phase.INITIAL)
        with asGuestErrors():
            await self._connection.write(raw)

    async def begin(self) -> None:
        """All of the initial stream was passed on: see QEMU load it, after which its guest runs."""
        self._require(Phase.INITIAL)
        with self._judged():
            await self._receive(ColoMessage.CHECKPOINT_READY, self._settings.startTimeout)
            self._advance(Phase.INITIAL, Phase.RUNNING)

    # -- checkpoints

    async def stop(self) -> None:
        """Have the guest stopped for a checkpoint; what it said until then is with the port's receiver."""
        self._advance(Phase.RUNNING, Phase.STOPPING)
        with asGuestErrors():
            self._connection.sendMessage(ColoMessage.CHECKPOINT_REQUEST)
            await self._receive(ColoMessage.CHECKPOINT_REPLY, self._settings.stopTimeout)
        self._advance(Phase.STOPPING, Phase.STOPPED)
        self.port.drain()

    async def live(self, raw: bytes | memoryview) -> None:
        """Pass the next bytes of a checkpoint's RAM on."""
        with asGuestErrors():
            if self.phase is not Phase.STAGING:
                self._advance(Phase.STOPPED, Phase.STAGING)
                self._connection.sendMessage(ColoMessage.VMSTATE_SEND)
            await self._connection.write(raw)

    async def load(self, deviceState: bytes, committing: Callable[[], None]) -> None:
        """
        Complete the checkpoint. When this fires QEMU has all of it, and loads it.

        @param committing: called when all was given to QEMU but the last byte: the guest will not go on from its own
            state any more, and does not run yet.
        """
        self._require(Phase.STAGING)
        async with self._loading:
            with self._judged():
                self._connection.sendMessage(ColoMessage.VMSTATE_SIZE, value=len(deviceState))
                await self._connection.write(deviceState[:-1])
                self._advance(Phase.STAGING, Phase.LOADING)
                committing()
                await self._connection.write(deviceState[-1:])
                await self._receive(ColoMessage.VMSTATE_RECEIVED, self._settings.startTimeout)

    async def loaded(self) -> None:
        """If a checkpoint is being loaded, see it done, after which the guest runs."""
        async with self._loading:
            if self.phase is not Phase.LOADING:
                return
            with self._judged():
                await self._receive(ColoMessage.VMSTATE_LOADED, self._settings.startTimeout)
                self._advance(Phase.LOADING, Phase.RUNNING)

    # -- the end

    def cut(self) -> None:
        """
        Shut the exchange down both ways, so that QEMU waits for nothing. A load under way is not touched, for only
        its end tells whether the guest can go on. Harmless when it was cut.
        """
        if self.phase is not Phase.LOADING:
            self._leave(GuestError("the exchange with the local QEMU was cut off"))

    async def exited(self) -> None:
        """After L{cut}, wait until QEMU is aware of it: only then nothing that it was told before stops the guest."""
        self._exited.addTimeout(self._settings.stopTimeout, self._reactor, lambda _, timeout: None)
        await self._exited

    async def end(self) -> None:
        """End it for good. Never fails."""
        self._leave(GuestError("the QEMU that followed was ended"))
        await self.port.close()
        await self.process.end()

    def _leave(self, error: GuestError) -> None:
        if self.phase is Phase.CUT:
            return
        if self.phase is Phase.LOADING:
            self._failure = GuestError(f"its last load failed: {error}")
        elif self.phase in _STATELESS:
            self._failure = error
        self.phase = Phase.CUT
        self._connection.abort(error)

    def _lost(self, error: GuestLost) -> None:
        self._leave(error)
        self._failure = error
        self._noticed()
        self._onLost(error)

    def _event(self, name: str, data: JsonObject) -> None:
        if name == "COLO_EXIT":
            # It does not close its socket, and would be waited for.
            self._leave(GuestError("QEMU left COLO with an error"))
            self._noticed()

    def _noticed(self) -> None:
        if not self._exited.called:
            self._exited.callback(None)

    # -- inside

    async def _receive(self, message: ColoMessage, timeout: float) -> None:
        await self._connection.receiveMessage(message, timeout)

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """What fails in here leaves a guest that is in no state."""
        try:
            with asGuestErrors():
                yield
        except GuestError as error:
            self._leave(error)
            raise

    def _require(self, phase: Phase) -> None:
        if self.phase is not phase:
            raise self._failure or GuestError(
                f"the exchange with the QEMU that follows is out of order: {self.phase.value}, not {phase.value}"
            )

    def _advance(self, before: Phase, after: Phase) -> None:
        self._require(before)
        self.phase = after


__all__ = ["Phase", "QemuFollower"]
