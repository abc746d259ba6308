"""
A comparer as a daemon of its own: what QEMU's C{colo-compare} object is, outside of QEMU.

Records of both guests come in on two lines, what may leave goes out on a third, checkpoints are asked for and reported
on a fourth (C{net/colo-compare.c} in QEMU). The judging is L{colotx.compare}'s.

Nothing of the primary is dropped, and nothing grows without bound: with L{HELD_LIMIT} bytes held for one reason or
another, C{primary_in} is not read any more. That is the last resort and no everyday flow control, because QEMU's
filters block their whole QEMU when nobody reads (C{qemu_chr_fe_write_all}): it could then neither take the checkpoint
nor read C{outdev}. So a slow reader of C{outdev}, and one that is away, is waited for with the inputs still being read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from colotx._line import Line, Receiver
from colotx._notify import CHECKPOINT, INIT, INIT_ANSWER, WANTED, WordDecoder, encodeWord
from colotx._records import RecordSplitter
from colotx.compare import CompareLimits, Comparer
from colotx.comparecontrol import commandTable
from colotx.comparesettings import CompareSettings, Endpoint
from colotx.control import ControlSocket, defaultControlPath
from colotx.errors import ColoError
from colotx.evidence import Evidence

HELD_LIMIT = 64 << 20
"""Bytes held from which on C{primary_in} is not read; one read of it may come on top."""

STOP_TIMEOUT = 5.0
"""Seconds the connections may take to end."""

_PIECE = 256
"""Records written at a time after a checkpoint: what a connection took and did not send is lost with it."""


class CompareDaemon(MultiService):
    """
    The comparer with its lines and its control socket.

    @ivar comparer: the judge.
    @ivar evidence: what it saw.
    """

    log = Logger()

    def __init__(
        self,
        settings: CompareSettings,
        reactor: Any,
        quit: Callable[[int], None],
        monotonic: Callable[[], float] = time.monotonic,
        heldLimit: int = HELD_LIMIT,
    ) -> None:
        """
        @param quit: ends the process with an exit code.
        @param monotonic: seconds, for time-outs.
        @param heldLimit: see L{HELD_LIMIT}.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        assert settings.primaryIn and settings.secondaryIn and settings.outdev
        self._settings = settings
        self._reactor = reactor
        self._quit = quit
        self._heldLimit = heldLimit
        self._wanted: str | None = None
        self._asked = self._checkpoints = 0
        self.evidence = Evidence()
        limits = CompareLimits(
            compareTimeout=settings.compareTimeout,
            expiredScanCycle=settings.expiredScanCycle,
            maxQueueSize=settings.maxQueueSize,
        )
        self.comparer = Comparer(monotonic, self._release, self._wantCheckpoint, limits, self.evidence)
        self._primaryIn = self._inputLine("primary-in", settings.primaryIn, self._primary)
        self._secondaryIn = self._inputLine("secondary-in", settings.secondaryIn, self._secondary)
        self._outdev = self._line("outdev", settings.outdev, self._outdevOpened)
        self._lines = [self._primaryIn, self._secondaryIn, self._outdev]
        self._notifyDev: Line | None = None
        if settings.notifyDev is not None:
            self._notifyDev = self._line("notify-dev", settings.notifyDev, self._notifyOpened)
            self._lines.append(self._notifyDev)
        self._said: list[tuple[list[bytes], int]] = []
        self._judging: IDelayedCall | None = None
        self._scanning = LoopingCall(self._scan)
        self._scanning.clock = reactor
        path = settings.control or defaultControlPath(f"{settings.vm}-compare")
        self._control = ControlSocket(reactor, path, commandTable(self))
        self._control.setServiceParent(self)  # type: ignore[no-untyped-call]

    # -- beginning and end

    def startService(self) -> None:
        """Start; a failure ends the process with exit code 1 and one line that says why."""
        try:
            super().startService()  # type: ignore[no-untyped-call]
            for line in self._lines:
                line.start()
        except ColoError as error:
            self.log.critical("cannot start: {reason}", reason=error)
            self._quit(1)
            return
        self._scanning.start(self.comparer.limits.expiredScanCycle / 1000, now=False)
        if self._notifyDev is None:
            self.log.warn(
                "no notify-dev: checkpoints are asked for, and reported, on the control socket only"
            )

    def stopService(self) -> Deferred[None]:
        """
        Close everything. What is held stays unsaid: nobody saw it equal, no checkpoint covers it.

        @return: a Deferred that never fails and fires within L{STOP_TIMEOUT}.
        """
        done = ensureDeferred(self._stop())
        done.addTimeout(STOP_TIMEOUT, self._reactor)
        done.addErrback(lambda failure: self.log.failure("the end was not orderly", failure))
        return done

    async def _stop(self) -> None:
        if self._scanning.running:
            self._scanning.stop()
        self._judge()
        for line in self._lines:
            await line.stop()
        await MultiService.stopService(self)  # type: ignore[no-untyped-call]

    # -- frames

    def _line(self, name: str, endpoint: Endpoint, opened: Callable[[], Receiver]) -> Line:
        return Line(self._reactor, name, endpoint, opened, lambda: None, self._balance)

    def _inputLine(self, name: str, endpoint: Endpoint, take: Callable[[list[bytes], int], None]) -> Line:
        known = False

        def opened() -> Receiver:
            nonlocal known
            if known:
                # What was said in between will never come.
                self._wantCheckpoint(f"{name} was away")
            known = True
            return RecordSplitter(take, self._settings.vnetHdrSupport).feed

        def lost() -> None:
            self._wantCheckpoint(f"{name} was lost")

        return Line(self._reactor, name, endpoint, opened, lost, self._balance)

    def _outdevOpened(self) -> Receiver:
        return lambda data: None

    def _primary(self, records: list[bytes], offset: int) -> None:
        """
        Judged when the secondary's frames that came in the same turn are known: then most need not be held.
        """
        self._said.append((records, offset))
        if self._judging is None:
            self._judging = self._reactor.callLater(0, self._judge)

    def _judge(self) -> None:
        if self._judging is not None and self._judging.active():
            self._judging.cancel()
        self._judging = None
        said, self._said = self._said, []
        for records, offset in said:
            self.comparer.primary(records, offset)
        self._balance()

    def _secondary(self, records: list[bytes], offset: int) -> None:
        self.comparer.secondary(records, offset)
        if self._primaryIn.paused:
            self._balance()

    def _release(self, records: Sequence[bytes]) -> None:
        self._outdev.write(b"".join(records))

    def _balance(self) -> None:
        """Of the secondary the comparer itself forgets what is too much: it never leaves anyway."""
        held, line = self.comparer.heldBytes + self._outdev.waiting, self._primaryIn
        if held > self._heldLimit and not line.paused:
            self.log.warn("{line}: not read any more, {held} bytes are held", line=line, held=held)
            line.pause()
            self._wantCheckpoint(f"{held} bytes are held")
        elif line.paused and held <= self._heldLimit // 2:
            self.log.info("{line}: read again", line=line)
            line.resume()

    # -- checkpoints

    def _notifyOpened(self) -> Receiver:
        decoder = WordDecoder(self._settings.vnetHdrSupport)
        if self._wanted is not None:
            self._ask()

        def receive(data: bytes) -> None:
            for word in decoder.feed(data):
                self._obey(word)

        return receive

    def _obey(self, word: bytes) -> None:
        if word == CHECKPOINT:
            self.checkpointDone()
        elif word == INIT:
            self._say(INIT_ANSWER)
        else:
            self.log.error("notify-dev: {word!r} is not understood", word=word)

    def _wantCheckpoint(self, reason: str) -> None:
        """One request between two checkpoints; it is repeated with every scan, as QEMU does."""
        if self._wanted is None:
            self._wanted = reason
            self._control.emit("COLOTX_CHECKPOINT_WANTED", {"reason": reason})
            self._ask()

    def _ask(self) -> None:
        self._asked += 1
        self._say(WANTED)

    def _say(self, word: bytes) -> None:
        # What nobody reads is not piled up: a request is repeated anyway.
        if self._notifyDev is not None and self._notifyDev.connected and not self._notifyDev.waiting:
            self._notifyDev.write(encodeWord(word))

    def checkpointDone(self) -> None:
        """There was a checkpoint: what the primary's guest said leaves, what the secondary's said is forgotten."""
        self._checkpoints += 1
        self._wanted = None
        self._judge()
        records = self.comparer.flush()
        for start in range(0, len(records), _PIECE):
            self._release(records[start : start + _PIECE])
        self._balance()

    def _scan(self) -> None:
        wanted = self._wanted is not None
        self.comparer.scan()
        if wanted:
            self._ask()

    # -- behind the control socket

    def setLimit(self, name: str, value: int) -> None:
        """@param name: a field of L{CompareLimits}. @param value: ms, or frames."""
        self.comparer.limits = replace(self.comparer.limits, **{name: value})
        if self._scanning.running:
            self._scanning.stop()
            self._scanning.start(self.comparer.limits.expiredScanCycle / 1000, now=False)

    def properties(self) -> dict[str, object]:
        """What C{qom-get} knows, under the names of QEMU's object."""
        settings, limits = self._settings, self.comparer.limits
        return {
            "primary_in": str(settings.primaryIn),
            "secondary_in": str(settings.secondaryIn),
            "outdev": str(settings.outdev),
            "notify_dev": str(settings.notifyDev or ""),
            "vnet_hdr_support": settings.vnetHdrSupport,
            "compare_timeout": limits.compareTimeout,
            "expired_scan_cycle": limits.expiredScanCycle,
            "max_queue_size": limits.maxQueueSize,
        }

    def describeStatus(self) -> dict[str, object]:
        """C{query-colotx-status}."""
        absent = [line.name for line in self._lines if not line.connected]
        return {
            "vm": self._settings.vm,
            "role": self._settings.role,
            "status": "waiting" if absent else "comparing",
            "why": f"nobody is connected to {', '.join(absent)}" if absent else "all lines are connected",
            "checkpoint-wanted": self._wanted,
        }

    def describeStatistics(self) -> dict[str, object]:
        """C{query-colotx-stats}."""
        return {
            "checkpoints": self._checkpoints,
            "checkpoint-requests": self._asked,
            "waiting-bytes": self._outdev.waiting,
            **self.comparer.describe(),
        }

    def quit(self) -> None:
        """C{quit}: soon, so that the answer gets out."""
        self._reactor.callLater(0, self._quit, 0)
