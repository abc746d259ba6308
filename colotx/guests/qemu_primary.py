"""
A guest in a QEMU: its life from power-on, or from a checkpoint, to its end.

colotx starts the QEMU, talks QMP to it, carries its NIC's frames, and is the COLO peer of it on a local socket. This
module puts these parts together behind L{IPrimaryGuest}; what each is made of is in the modules beside it. It does not
know the other host.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.logger import Logger
from zope.interface import implementer

from colotx._qmp_codec import JsonObject
from colotx.errors import ColoError, GuestError, GuestLost, GuestTimeout
from colotx.guests.qemu_arguments import MappedRam, QemuSettings, SocketPaths
from colotx.guests.qemu_capabilities import enableColo
from colotx.guests.qemu_colo import ColoExchange, Phase
from colotx.guests.qemu_process import QemuProcess
from colotx.guests.qemu_release import release
from colotx.guests.qemu_restore import cacheOf, feed, forgetSharing, mappedRam
from colotx.interfaces import CheckpointImage, IPrimaryGuest, RunState, Sink
from colotx.ports import StreamPort

_NEVER = 2**32 - 1
"""
The longest x-checkpoint-delay, ms (49 days): colotx decides when a checkpoint is due. QEMU adds it to the time of day
and counts nanoseconds in 63 bits (C{timer_mod}), which leaves room for two centuries.
"""

_BANDWIDTH = 2**40
"""max-bandwidth of the initial stream, bytes/s. QEMU's default of 128 MiB/s slows what the sink throttles anyway."""

_FIRST_DOWNTIME, _LONGEST_DOWNTIME = 300, 2_000_000
"""downtime-limit of the initial transfer, ms: at first, as is QEMU's default, and at most, as QEMU takes."""


@implementer(IPrimaryGuest)
class QemuPrimaryGuest:
    """
    One guest in one QEMU.

    @ivar port: the NIC's frames. C{launch} opens it, C{shutdown} closes it.
    """

    _log = Logger()

    def __init__(self, reactor: Any, settings: QemuSettings) -> None:
        """
        @param reactor: provides C{IReactorProcess}, C{IReactorUNIX} and C{IReactorTime}.
        """
        self._reactor = reactor
        self._settings = settings
        self._image: CheckpointImage | None = None
        self._paths = SocketPaths.under(settings.runtimeDirectory)
        self._process: QemuProcess | None = None
        self._exchange: ColoExchange | None = None
        self._resumed: Deferred[None] | None = None
        self._prepared: Deferred[MappedRam | None] | None = None
        self._inColo = False
        self.port: Any = StreamPort(reactor, self._paths.nic)
        self.runState = RunState.PRELAUNCH
        self.ramBytes = 0
        self.onLost: Callable[[GuestError], None] | None = None
        self.onCheckpointWanted: Callable[[str], None] | None = None

    def prepare(self, ram: MappedRam) -> None:
        """
        Start a QEMU ahead of time that waits, with C{ram} mapped, for the state of a checkpoint to L{adopt}. It does
        not touch the RAM as long as it waits. Whether it starts is seen at C{launch}, which can do without it.
        """
        self.runState = RunState.INMIGRATE
        self._prepared = ensureDeferred(self._prepare(ram))

    def adopt(self, image: CheckpointImage) -> None:
        """C{launch} is to go on from this checkpoint. Its RAM cache is ours, and is closed when the guest runs."""
        self.runState = RunState.INMIGRATE
        self._image = image

    def inherit(self, process: QemuProcess, port: Any, ramBytes: int) -> None:
        """
        C{launch} is to make the guest of this QEMU go on, a COLO secondary whose exchange was shut down. QEMU itself
        stays in COLO until the next protection: to leave it, it stops the guest and frees a copy of all of its RAM,
        which takes long (20 to 40 ms for 256 MiB in small pages, the more the larger).

        @param port: its NIC's L{TranslatingPort}, open, paused.
        @param ramBytes: its guest's RAM.
        """
        self.runState = RunState.INMIGRATE
        self._inColo = True
        self._process, self._paths, self.port, self.ramBytes = process, process.paths, port, ramBytes
        process.watch(self._lost, self._event)

    def launch(self) -> Deferred[None]:
        """@raise ConfigError: there is no such QEMU, or the runtime directory cannot be used."""
        return ensureDeferred(self._launch())

    def stop(self) -> Deferred[None]:
        """As L{IRunControl.stop}."""
        return ensureDeferred(self._stop())

    def start(self) -> Deferred[None]:
        """As L{IRunControl.start}. In the middle of a transfer QEMU can only go on by leaving COLO, and does."""
        return ensureDeferred(self._start())

    def pause(self) -> Deferred[None]:
        """As L{IRunControl.pause}."""
        return ensureDeferred(self._running().execute("stop"))

    def unpause(self) -> Deferred[None]:
        """As L{IRunControl.unpause}."""
        return ensureDeferred(self._running().execute("cont"))

    def transferInitial(self, sink: Sink) -> Deferred[None]:
        """As L{ILiveState.transferInitial}."""
        return ensureDeferred(self._transferInitial(sink))

    def transferLive(self, sink: Sink) -> Deferred[None]:
        """As L{ILiveState.transferLive}."""
        return ensureDeferred(self._protection().live(sink))

    def saveDeviceState(self) -> Deferred[bytes]:
        """As L{IDeviceState.saveDeviceState}."""
        return ensureDeferred(self._protection().device())

    def endProtection(self) -> Deferred[None]:
        """@raise GuestError: QEMU is gone, or does not let its guest run on."""
        return ensureDeferred(self._endProtection())

    def shutdown(self) -> Deferred[None]:
        """QEMU is told to quit: no power button is pressed."""
        return ensureDeferred(self._shutdown())

    # -- from nothing to a running guest

    async def _launch(self) -> None:
        try:
            if self._inColo:
                self.port.replay()
                self.port.resume()
                await self._untilResume(self._goOn("cont"), self._settings.stopTimeout, "let its guest go on")
            else:
                await self._begin()
        except BaseException:
            await self._discard()
            raise
        self.runState = RunState.RUNNING

    async def _begin(self) -> None:
        """From power-on or from an image."""
        if self._image is None:
            process = self._newProcess()
            await process.start()
            await self.port.open()
        else:
            process = await self._revive(self._image)
        summary = await process.execute("query-memory-size-summary")
        self.ramBytes = summary["base-memory"]
        # An operator's -S among the arguments does not hold up a guest that is to run.
        if not (await process.execute("query-status"))["running"]:
            await process.execute("cont")

    async def _goOn(self, command: str) -> None:
        """Tell a QEMU that was a secondary to let its guest run."""
        process = self._running()
        await process.execute(command)
        if self._resumed is not None and (await process.execute("query-status"))["running"]:
            # Between two checkpoints the guest never stood still, and nothing says that it goes on.
            self._event("RESUME", {})

    async def _revive(self, image: CheckpointImage) -> QemuProcess:
        """Make a guest of the image, by mapping it or else by a copy."""
        ram = mappedRam(cacheOf(image), self._settings.arguments)
        try:
            process = await self._restore(image, ram)
        except GuestError as error:
            if ram is None:
                raise
            self._log.warn("QEMU cannot map the image, restoring by a copy: {error}", error=error)
            await self._discard()
            process = await self._restore(image, None)
        # What QEMU mapped stays its own.
        cacheOf(image).close()
        self._image = None
        return process

    async def _restore(self, image: CheckpointImage, ram: MappedRam | None) -> QemuProcess:
        process = await self._waitingProcess(ram)
        # The guest speaks in its first moment, and a NIC that nobody is connected to drops what it says.
        await self.port.open()
        timeout = self._settings.startTimeout
        shared = () if ram is None else (ram.block,)
        feeding = feed(self._reactor, process, self._paths.incoming, image, shared, timeout)
        await self._untilResume(feeding, timeout, "go on from the checkpoint")
        if shared:
            await forgetSharing(process)
        return process

    async def _prepare(self, ram: MappedRam) -> MappedRam | None:
        """@return: what the QEMU that waits now has mapped; None: there is no such QEMU."""
        try:
            await self._newProcess().start(restoring=True, ram=ram)
        except ColoError as error:
            self._log.warn("QEMU does not start ahead of a failover: {error}", error=error)
            return None
        return ram

    async def _waitingProcess(self, ram: MappedRam | None) -> QemuProcess:
        """A QEMU that waits for its state."""
        if self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            if await prepared == ram and self._process is not None and self._process.lost is None:
                return self._process
            await self._discard()
        process = self._newProcess()
        await process.start(restoring=True, ram=ram)
        return process

    def _newProcess(self) -> QemuProcess:
        self._process = QemuProcess(self._reactor, self._settings, self._paths, self._lost, self._event)
        return self._process

    async def _discard(self) -> None:
        """Back to before the start."""
        await self.port.close()
        if self._process is not None:
            await self._process.end()

    # -- protection

    async def _transferInitial(self, sink: Sink) -> None:
        process = self._running()
        if self._exchange is not None:
            raise GuestError("the guest is protected already: end that protection first")
        if self._inColo:
            leaving = self._goOn("x-colo-lost-heartbeat")
            await self._untilResume(leaving, self._settings.stopTimeout, "leave COLO")
            self._inColo = False
        exchange = ColoExchange(
            self._reactor, self._paths.colo, self._settings.stopTimeout, self._wantCheckpoint
        )
        exchange.listen()
        self._exchange = exchange
        await enableColo(process)
        parameters: JsonObject = {
            "x-checkpoint-delay": _NEVER,
            "max-bandwidth": _BANDWIDTH,
            "downtime-limit": _FIRST_DOWNTIME,
        }
        await process.execute("migrate-set-parameters", parameters)
        await process.execute("migrate", {"uri": f"unix:{self._paths.colo}"})
        await exchange.initial(_Impatient(sink, process, self.ramBytes))
        self.runState = RunState.COLO

    async def _stop(self) -> None:
        exchange, process = self._protection(), self._running()

        def nudge() -> Deferred[object]:
            # Setting it, even to the value it has, makes QEMU ask for a checkpoint within a millisecond or two.
            return process.qmp.execute("migrate-set-parameters", {"x-checkpoint-delay": _NEVER})

        try:
            await exchange.stop(nudge)
        except GuestError:
            if exchange.phase is Phase.STOPPING:
                # It may stop yet, with nobody left to let it go on.
                await self._endProtection()
            raise
        self.runState = RunState.COLO

    async def _start(self) -> None:
        exchange = self._exchange
        if exchange is None or exchange.phase is Phase.RUNNING:
            return
        if not exchange.answerDue:
            await self._endProtection()
            return
        await self._untilResume(exchange.answer(), self._settings.stopTimeout, "let its guest run on")

    async def _endProtection(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.end(GuestError("the guest's protection was ended"))
        if self._process is None or self.runState is RunState.PRELAUNCH:
            return
        await release(self._reactor, self._process, self._settings.stopTimeout)
        self.runState = RunState.RUNNING

    # -- the end

    async def _shutdown(self) -> None:
        if self._exchange is not None:
            self._exchange.end(GuestError("the guest is shut down"))
            self._exchange = None
        await self._discard()
        self.runState = RunState.SHUTDOWN
        if self._image is not None:
            cacheOf(self._image).close()
            self._image = None

    def _lost(self, error: GuestLost) -> None:
        if self._resumed is not None:
            resumed, self._resumed = self._resumed, None
            resumed.errback(error)
        if self.runState in (RunState.PRELAUNCH, RunState.INMIGRATE):
            return  # launching fails, and says so
        self._log.error("{error}", error=error)
        self.runState = RunState.SHUTDOWN
        if self._exchange is not None:
            self._exchange.end(error)
        if self.onLost is not None:
            self.onLost(error)

    # -- what QEMU says

    def _event(self, name: str, data: JsonObject) -> None:
        if name == "RESUME":
            self.runState = RunState.RUNNING
            if self._resumed is not None:
                resumed, self._resumed = self._resumed, None
                resumed.callback(None)
        elif name == "STOP":
            self.runState = RunState.PAUSED if self._exchange is None else RunState.COLO

    def _wantCheckpoint(self, reason: str) -> None:
        if self.onCheckpointWanted is not None:
            self.onCheckpointWanted(reason)

    async def _untilResume(self, action: Coroutine[Any, Any, None], seconds: float, what: str) -> None:
        """Do what makes QEMU let its guest run, and see it run."""

        def late(_: object, timeout: float) -> None:
            raise GuestTimeout(f"QEMU did not {what} within {timeout:g} s")

        resumed: Deferred[None] = Deferred()
        self._resumed = resumed
        try:
            await action
            await resumed.addTimeout(seconds, self._reactor, late)
        finally:
            self._resumed = None
            resumed.addErrback(lambda failure: None)  # nobody waits if the action failed

    def _running(self) -> QemuProcess:
        if self._process is None:
            raise GuestError("the guest was not launched")
        return self._process

    def _protection(self) -> ColoExchange:
        if self._exchange is None:
            raise GuestError("the guest is not protected: its initial transfer comes first")
        return self._exchange


class _Impatient:
    """
    Passes an initial stream on. A guest that changes its RAM faster than the link carries it would never be
    protected: QEMU gets leave to stop it for twice as long each time all of its RAM has passed once more.
    """

    def __init__(self, sink: Sink, process: QemuProcess, ramBytes: int) -> None:
        self._sink = sink
        self._process = process
        self._ramBytes = ramBytes
        self._left = ramBytes
        self._downtime = _FIRST_DOWNTIME

    async def write(self, data: bytes | memoryview) -> None:
        """As L{Sink.write}."""
        self._left -= len(data)
        if self._left < 0:
            self._left = self._ramBytes
            self._downtime = min(2 * self._downtime, _LONGEST_DOWNTIME)
            await self._process.execute("migrate-set-parameters", {"downtime-limit": self._downtime})
        await self._sink.write(data)


__all__ = ["QemuPrimaryGuest"]
