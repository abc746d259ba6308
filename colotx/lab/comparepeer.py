"""
Comparers to be talked to: QEMU's C{colo-compare} in a process with no machine, and ours in one of its own or in this
one, all fed and asked by the same words.

C{colo-compare} needs neither COLO nor a guest: its object in a C{-machine none} compares from the start, its iothread
runs, and with a C{notify_dev} it says DO_CHECKPOINT there and flushes when told COLO_CHECKPOINT (seen with QEMU 7.2).

Everything blocks, with a time-out: what is talked to is elsewhere. This module does not know what is right.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from colotx.comparer import CompareLimits, Comparer
from colotx.errors import ConfigError
from colotx.lab.guestimage import qemuBinary
from colotx.lab.processes import STOP_LIMIT, LabError

SOCKETS = ("primary_in", "secondary_in", "outdev", "notify_dev")
"""What a comparer listens on: unix sockets of these names in its directory."""

START_LIMIT = 20.0
ANSWER_LIMIT = 20.0
"""Seconds until a comparer listens, and until it has dealt with what it got; more than its own time-outs."""

_INIT, _INIT_ANSWER = b"COLO_USERSPACE_PROXY_INIT", b"COLO_COMPARE_GET_XEN_INIT"
_FLUSH, _WANTED = b"COLO_CHECKPOINT", b"DO_CHECKPOINT"
_PIECE = 1 << 16
_WORD = struct.Struct(">I")
_MARK = bytes.fromhex("020000000001020000000002080045")
_MARK_ADDRESSES = bytes([192, 0, 2, 253, 192, 0, 2, 254])


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """
    C{colo-compare}'s own options, with its defaults.

    @ivar compareTimeout: ms.
    @ivar expiredScanCycle: ms.
    @ivar maxQueueSize: frames a flow and side.
    @ivar vnetHeader: bytes of a virtio-net header in front of every frame; C{None}: C{vnet_hdr_support} is off.
    """

    compareTimeout: int = 3000
    expiredScanCycle: int = 1000
    maxQueueSize: int = 1024
    vnetHeader: int | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """
    What a comparer did since it was asked last.

    @ivar left: the frames that left, in their order.
    @ivar asked: whether it asked for a checkpoint.
    """

    left: tuple[bytes, ...]
    asked: bool


class ComparerPeer(Protocol):
    """Something that compares."""

    def primary(self, frames: Sequence[bytes]) -> None:
        """The primary's guest sent these."""

    def secondary(self, frames: Sequence[bytes]) -> None:
        """The secondary's guest sent these."""

    def settle(self) -> Seen:
        """@return: what came of everything told so far. @raise LabError: it does not answer."""

    def checkpoint(self) -> Seen:
        """Tell it that there was a checkpoint. @return: what came of that. @raise LabError: it does not answer."""

    def close(self) -> None:
        """End it."""


def qemuCommand(options: CompareOptions, binary: str = "") -> list[str]:
    """
    QEMU's comparer, its sockets in its working directory.

    @param binary: empty: what L{qemuBinary} says.
    @raise ConfigError: there is no such QEMU.
    """
    name = binary or qemuBinary()
    if shutil.which(name) is None:
        raise ConfigError(f"there is no QEMU {name}")
    command = [name, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-monitor", "none", "-serial", "none", "-object", "iothread,id=compare-thread"]
    for socketName in SOCKETS:
        command += ["-chardev", f"socket,id={socketName},path={socketName},server=on,wait=off"]
    properties = [
        *(f"{name}={name}" for name in SOCKETS),
        f"compare_timeout={options.compareTimeout}",
        f"expired_scan_cycle={options.expiredScanCycle}",
        f"max_queue_size={options.maxQueueSize}",
        f"vnet_hdr_support={'off' if options.vnetHeader is None else 'on'}",
    ]
    return [*command, "-object", ",".join(["colo-compare,id=compare,iothread=compare-thread", *properties])]


def ourCommand(options: CompareOptions) -> list[str]:
    """C{twistd colo --role=compare}, its sockets in its working directory."""
    # Not the twistd script: it may be elsewhere than this Python's modules.
    twistd = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
    return [
        *twistd,
        *("-n", "--pidfile=", "colo", "--role=compare", "--control=control"),
        *(f"--{name.replace('_', '-')}=unix:{name},server" for name in SOCKETS),
        f"--compare-timeout={options.compareTimeout}",
        f"--expired-scan-cycle={options.expiredScanCycle}",
        f"--max-queue-size={options.maxQueueSize}",
        f"--vnet-hdr-support={'off' if options.vnetHeader is None else 'on'}",
    ]


class CompareProcess:
    """
    A comparer in a process of its own.

    @ivar directory: where its sockets (L{SOCKETS}) and its log are.
    """

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        """
        Start it, and wait until it listens.

        @param directory: made here; a short path, for sockets are in it.
        @raise LabError: it does not listen.
        """
        self.directory = directory
        directory.mkdir(parents=True)
        self._log = directory / "compare.log"
        source = str(Path(__file__).parents[2])
        paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": paths},
            )
        deadline = time.monotonic() + START_LIMIT
        while not all((directory / name).exists() for name in SOCKETS):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise LabError(
                    f"{command[0]}: the comparer does not listen, see {self._log}: {self._words()}"
                )
            time.sleep(0.01)

    def connect(self, name: str) -> socket.socket:
        """@return: a connection to the socket C{name}. @raise LabError: refused."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(os.fspath(self.directory / name))
        except OSError as error:
            connection.close()
            raise LabError(f"{name}: {error}, see {self._log}: {self._words()}") from error
        return connection

    def cpuSeconds(self) -> float:
        """@return: what all its threads used so far."""
        total = 0
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def close(self) -> None:
        """End it, and wait for that."""
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _words(self) -> str:
        return self._log.read_text(errors="replace").strip()[-500:] or "it said nothing"


class RemoteComparer:
    """
    The conversation with a L{CompareProcess}.

    Its inputs are not ordered among each other. Two equal frames of a flow of their own, one on either input, leave
    when everything before them was dealt with: they mark the place in what leaves, and do not show.
    """

    def __init__(self, process: CompareProcess, options: CompareOptions) -> None:
        self._process = process
        self._vnet = options.vnetHeader
        with contextlib.ExitStack() as stack:
            self._connections = {
                name: stack.enter_context(contextlib.closing(process.connect(name))) for name in SOCKETS
            }
            self._stack = stack.pop_all()
        for connection in self._connections.values():
            connection.settimeout(ANSWER_LIMIT)
        self._unread = dict.fromkeys(SOCKETS, b"")
        self._marks = 0
        try:
            self._begin()
        except LabError:
            self.close()
            raise

    def primary(self, frames: Sequence[bytes]) -> None:
        self._connections["primary_in"].sendall(self.encode(frames))

    def secondary(self, frames: Sequence[bytes]) -> None:
        self._connections["secondary_in"].sendall(self.encode(frames))

    def connection(self, name: str) -> socket.socket:
        """@return: one of the L{SOCKETS}, for those who know better."""
        return self._connections[name]

    def newMark(self) -> bytes:
        """@return: a frame that leaves when both guests said it, and that was not said before."""
        self._marks += 1
        return _mark(self._marks)

    def settle(self) -> Seen:
        left = []
        # Order is kept within a flow only: what leaves together with the first mark may come after it.
        for mark in (self.newMark(), self.newMark()):
            self.primary([mark])
            self.secondary([mark])
            while (frame := self._receive("outdev", self._vnet)) != mark:
                left.append(frame)
        return Seen(tuple(left), self._asked())

    def checkpoint(self) -> Seen:
        self._say(_FLUSH)
        asked = self._asked()
        seen = self.settle()
        return Seen(seen.left, seen.asked or asked)

    def waitForRequest(self, seconds: float) -> bool:
        """@return: whether it asks for a checkpoint within so many seconds."""
        connection = self._connections["notify_dev"]
        connection.settimeout(seconds)
        try:
            return self._receive("notify_dev", None) == _WANTED
        except LabError:
            return False
        finally:
            connection.settimeout(ANSWER_LIMIT)

    def close(self) -> None:
        self._stack.close()
        self._process.close()

    def encode(self, frames: Sequence[bytes]) -> bytes:
        """@return: frames as the inputs take them."""
        if self._vnet is None:
            return b"".join(_WORD.pack(len(frame)) + frame for frame in frames)
        header = bytes(self._vnet)
        head = _WORD.pack(self._vnet) + header
        return b"".join(_WORD.pack(self._vnet + len(frame)) + head + frame for frame in frames)

    def _begin(self) -> None:
        # A connection is made before QEMU knows of it, and what QEMU writes until then is lost.
        self._connections["outdev"].settimeout(0.1)
        deadline = time.monotonic() + ANSWER_LIMIT
        while True:
            mark = self.newMark()
            self.primary([mark])
            self.secondary([mark])
            try:
                self._receive("outdev", self._vnet)
                break
            except LabError:
                if time.monotonic() > deadline:
                    raise
        self._connections["outdev"].settimeout(ANSWER_LIMIT)
        self.settle()

    def _asked(self) -> bool:
        self._say(_INIT)
        asked = False
        while (word := self._receive("notify_dev", None)) != _INIT_ANSWER:
            if word != _WANTED:
                raise LabError(f"notify_dev: an unknown word {word!r}")
            asked = True
        return asked

    def _say(self, word: bytes) -> None:
        # QEMU reads its notify_dev with the header's length in front, and writes it without.
        extra = b"" if self._vnet is None else _WORD.pack(0)
        self._connections["notify_dev"].sendall(_WORD.pack(len(word)) + extra + word)

    def _receive(self, name: str, vnet: int | None) -> bytes:
        (length,) = _WORD.unpack(self._take(name, 4))
        if vnet is None:
            return self._take(name, length)
        (header,) = _WORD.unpack(self._take(name, 4))
        return self._take(name, length)[header:]

    def _take(self, name: str, size: int) -> bytes:
        data = self._unread[name]
        while len(data) < size:
            try:
                piece = self._connections[name].recv(_PIECE)
            except OSError as error:
                self._unread[name] = data
                raise LabError(f"{name}: no answer: {error}") from error
            if not piece:
                raise LabError(f"{name}: the comparer hung up")
            data += piece
        self._unread[name] = data[size:]
        return data[:size]


class LocalComparer:
    """Ours in this process, with a clock that is set by hand."""

    def __init__(self, options: CompareOptions) -> None:
        limits = CompareLimits(options.compareTimeout, options.expiredScanCycle, options.maxQueueSize)
        self._header = options.vnetHeader or 0
        self._now = 0.0
        self._left: list[bytes] = []
        self._reasons: list[str] = []
        self.comparer = Comparer(lambda: self._now, self._left.extend, self._reasons.append, limits)

    def primary(self, frames: Sequence[bytes]) -> None:
        self.comparer.primary(self._encode(frames), self._header)

    def secondary(self, frames: Sequence[bytes]) -> None:
        self.comparer.secondary(self._encode(frames), self._header)

    def settle(self) -> Seen:
        seen = Seen(tuple(frame[self._header :] for frame in self._left), bool(self._reasons))
        self._left.clear()
        self._reasons.clear()
        return seen

    def checkpoint(self) -> Seen:
        self._left += self.comparer.flush()
        return self.settle()

    def wait(self, seconds: float) -> None:
        """Let time go by."""
        end = self._now + seconds
        while self._now < end:
            self._now += self.comparer.limits.expiredScanCycle / 1000
            self.comparer.scan()

    def close(self) -> None:
        pass

    def _encode(self, frames: Sequence[bytes]) -> list[bytes]:
        return [bytes(self._header) + frame for frame in frames]


def _mark(number: int) -> bytes:
    """An UDP datagram that differs from all others."""
    payload = struct.pack(">HHHHQ", 9, 9, 16, 0, number)
    return _MARK + struct.pack(">BHHHBBH", 0, 20 + len(payload), 0, 0, 64, 17, 0) + _MARK_ADDRESSES + payload
