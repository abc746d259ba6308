"""
Guests to be measured: a QEMU alone with the bare peer, and a pair of daemons. Both run the same QEMU with the same
arguments, a second monitor among them, and tell by QEMU's own events when it stopped its guest and let it run on.

Everything blocks: what is measured happens in other processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from colotx._qmp_blocking import BlockingQmp
from colotx.certificates import LOCAL_NAMES, initAuthority, issue
from colotx.errors import ColoError
from colotx.guests import emulation
from colotx.guests.qemu_arguments import QemuSettings, SocketPaths, commandLine
from colotx.lab.guestimage import READY, GuestFiles, kernelArguments, qemuArguments, qemuBinary
from colotx.lab.processes import writeToml

SOURCE = Path(__file__).parents[1]
CACHE = SOURCE / ".cache" / "guest"

NEVER = 2**32 - 1
"""The longest x-checkpoint-delay, ms."""

BOOT_LIMIT = 240.0
"""Seconds until a guest serves or is protected; software emulation is slow."""
STOP_LIMIT = 10.0


class Broken(Exception):
    """The benchmark cannot go on."""


class Monitor:
    """
    A QMP connection to a QEMU.

    @ivar downtimes: when the guest was stopped (seconds of C{time.time}, by QEMU's clock) and for how long (ms).
    """

    def __init__(self, path: Path) -> None:
        self.downtimes: list[tuple[float, float]] = []
        self._answers: list[dict[str, Any]] = []
        self._told = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX)
        waitFor(f"a monitor at {path}", BOOT_LIMIT, lambda: self._connected(path))
        threading.Thread(target=self._read, daemon=True).start()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """Carry out a command. @raise Broken: QEMU refused, or did not answer."""
        with self._told:
            self._answers.clear()
            message = {"execute": command, "arguments": arguments}
            self._socket.sendall(json.dumps(message).encode() + b"\n")
            if not self._told.wait_for(lambda: self._answers, STOP_LIMIT):
                raise Broken(f"QEMU did not answer {command}")
            answer = self._answers[0]
        if "return" not in answer:
            raise Broken(f"QEMU refused {command}: {answer}")
        return answer["return"]

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _connected(self, path: Path) -> bool:
        try:
            self._socket.connect(os.fspath(path))
        except OSError:
            return False
        return True

    def _read(self) -> None:
        stopped = 0.0
        with self._socket.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                message = json.loads(line)
                name = message.get("event")
                if name in ("STOP", "RESUME"):
                    stamp = message["timestamp"]
                    when = stamp["seconds"] + stamp["microseconds"] / 1e6
                    if name == "STOP":
                        stopped = when
                    else:
                        self.downtimes.append((stopped, (when - stopped) * 1000))
                elif name is None and "QMP" not in message:
                    with self._told:
                        self._answers.append(message)
                        self._told.notify()


class Machine:
    """
    A protected guest.

    @ivar name: what it is called in the results.
    @ivar monitor: of the QEMU that runs the guest.
    """

    monitor: Monitor

    def __init__(self, name: str, directory: Path, files: GuestFiles, patternBytes: int) -> None:
        """
        @param directory: made here; a short path.
        @param patternBytes: what the guest writes anew again and again; 0: it is idle.
        """
        self.name = name
        self.directory = directory
        self._patternBytes = patternBytes
        self._running: list[tuple[subprocess.Popen[str], Path]] = []
        self._stack = contextlib.ExitStack()
        self.arguments = [
            # Relative to QEMU's working directory: the arguments of all machines are the same.
            *qemuArguments(files, kernelArguments(patternBytes=patternBytes), serial="serial.log"),
            *("-chardev", "socket,id=m2,path=m2,server=on,wait=off", "-mon", "chardev=m2,mode=control"),
        ]
        directory.mkdir(parents=True)

    def protect(self) -> None:
        """Wait until the guest serves and checkpoints may be taken; then take none."""
        raise NotImplementedError

    def setDelay(self, milliseconds: int) -> None:
        """Set x-checkpoint-delay, which also asks for a checkpoint."""
        raise NotImplementedError

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def rest(self) -> None:
        """Take no more checkpoints and let the guest stand still, so that another machine has the processors."""
        known = len(self.monitor.downtimes)
        self.setDelay(NEVER)
        # Told to stop in the middle of a checkpoint, QEMU might not end it.
        waitFor(
            "the checkpoint that the delay brings", BOOT_LIMIT, lambda: len(self.monitor.downtimes) > known
        )
        self._quiet()
        self.monitor.execute("stop")

    def wake(self, delay: int) -> None:
        """Undo L{rest}. @param delay: x-checkpoint-delay (ms)."""
        self.monitor.execute("cont")
        self.setDelay(delay)

    def _quiet(self) -> None:
        """Wait until the last checkpoint is over."""
        seen = -1
        while len(self.monitor.downtimes) != seen:
            seen = len(self.monitor.downtimes)
            time.sleep(0.7)

    def _check(self) -> None:
        """@raise Broken: one of the processes ended."""
        for process, log in self._running:
            if process.poll() is not None:
                words = log.read_text(errors="replace").strip().rpartition("\n")[2]
                raise Broken(f"{log.parent}: a process ended with status {process.returncode}: {words}")

    def _serves(self, directory: Path) -> bool:
        self._check()
        with contextlib.suppress(OSError):
            console = (directory / "serial.log").read_text(errors="replace")
            return READY in console and (
                not self._patternBytes or re.search("colotx: [2-9] ok", console) is not None
            )
        return False

    def _spawn(
        self, command: list[str], log: Path, variables: Mapping[str, str] | None = None, talks: bool = False
    ) -> subprocess.Popen[str]:
        """Run a program beside its log until L{close}. @param talks: its standard output is read, not logged."""
        paths = [os.fspath(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(variables or {})}
        with log.open("ab") as output:
            process = subprocess.Popen(
                # It ends with us, however we end.
                ["setpriv", "--pdeathsig", "TERM", "--", *command],
                cwd=log.parent,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if talks else output,
                stderr=output,
                text=True,
            )
        self._stack.callback(_end, process)
        self._running.append((process, log))
        return process


class Bare(Machine):
    """A QEMU whose COLO peer answers at once and does nothing else."""

    def __init__(self, name: str, directory: Path, files: GuestFiles, patternBytes: int) -> None:
        super().__init__(name, directory, files, patternBytes)
        self._paths = paths = SocketPaths.under(os.fspath(directory))
        Path(paths.directory).mkdir()
        environment = {} if emulation.kvmUsable() else emulation.environment(CACHE)
        settings = QemuSettings(self.arguments, os.fspath(directory), qemuBinary(), environment=environment)
        self._spawn(commandLine(settings, paths), directory / "qemu.log", environment)
        self._peer = self._spawn(
            [sys.executable, "-m", "benchmarks.bare_peer", paths.colo], directory / "peer.log", talks=True
        )
        self._qmp = Monitor(Path(paths.qmp))
        self.monitor = Monitor(directory / "m2")

    def protect(self) -> None:
        waitFor(
            f"the boot of the guest in {self.directory}", BOOT_LIMIT, lambda: self._serves(self.directory)
        )
        readLine(self._peer)
        self._qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "x-colo", "state": True}])
        self._qmp.execute("migrate-set-parameters", **{"x-checkpoint-delay": NEVER, "max-bandwidth": 2**40})
        self._qmp.execute("migrate", uri=f"unix:{self._paths.colo}")
        waitFor("COLO mode", BOOT_LIMIT, lambda: self._qmp.execute("query-migrate").get("status") == "colo")
        self._quiet()

    def setDelay(self, milliseconds: int) -> None:
        self._qmp.execute("migrate-set-parameters", **{"x-checkpoint-delay": milliseconds})

    def close(self) -> None:
        self._qmp.close()
        self.monitor.close()
        super().close()


class Pair(Machine):
    """
    Two daemons on loopback, TLS and all.

    @ivar shaped: what the link between them is slowed to: Mbit/s and ms each way; None: it is not.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        files: GuestFiles,
        patternBytes: int,
        shaped: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(name, directory, files, patternBytes)
        initAuthority(directory / "ca")
        port = _freePort()
        target = port
        if shaped is not None:
            target = self._shape(port, *shaped)
        for role, keys in {
            "secondary": {"listen": f"127.0.0.1:{port}", "peer-name": "127.0.0.1"},
            "primary": {"peer": f"127.0.0.1:{target}"},
        }.items():
            self._daemon(role, keys)

    def _shape(self, port: int, bandwidth: float, delay: float) -> int:
        command = [sys.executable, "-m", "colotx.lab.shaper", "0", "127.0.0.1", str(port)]
        command += ["--bandwidth", str(bandwidth), "--delay", str(delay)]
        return int(
            json.loads(readLine(self._spawn(command, self.directory / "shaper.log", talks=True)))["port"]
        )

    def _daemon(self, role: str, keys: Mapping[str, object]) -> None:
        place = self.directory / role
        place.mkdir()
        ca, certificate, key = issue(self.directory / "ca", LOCAL_NAMES, place / "tls")
        writeToml(
            place / "config.toml",
            {
                "role": role,
                "vm": "bench",
                "state-dir": os.fspath(place),
                "control": os.fspath(place / "control"),
                "ca": os.fspath(ca),
                "certificate": os.fspath(certificate),
                "key": os.fspath(key),
                "checkpoint-delay": NEVER,
                "heartbeat-limit": 5000,
                "guest": "qemu",
                "qemu-binary": qemuBinary(),
                "qemu-arguments": self.arguments,
                **keys,
            },
        )
        twistd = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
        command = [*twistd, "-n", "--pidfile=", "colo", "--config", "config.toml"]
        self._spawn(command, place / "daemon.log", {"TMPDIR": os.fspath(place)})

    def protect(self) -> None:
        place = self.directory / "primary"
        waitFor(f"the boot of the guest in {place}", BOOT_LIMIT, lambda: self._serves(place))
        waitFor(f"protection in {place}", BOOT_LIMIT, self._isProtected)
        self.monitor = Monitor(place / "m2")
        self._quiet()

    def setDelay(self, milliseconds: int) -> None:
        self.query("migrate-set-parameters", {"x-checkpoint-delay": milliseconds})

    def _isProtected(self) -> bool:
        self._check()
        return bool(self.query("query-colotx-status")["status"] == "protected")

    def query(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Ask the primary's daemon."""
        try:
            with BlockingQmp(os.fspath(self.directory / "primary" / "control")) as control:
                return control.execute(command, arguments)
        except ColoError as error:
            raise Broken(str(error)) from error

    def close(self) -> None:
        if hasattr(self, "monitor"):
            self.monitor.close()
        super().close()


def waitFor(what: str, limit: float, condition: Callable[[], bool]) -> None:
    """Ask again and again. @raise Broken: the condition did not come about in C{limit} seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(f"waited {limit:.0f} s in vain for {what}")
        time.sleep(0.05)


def readLine(process: subprocess.Popen[str]) -> str:
    """The next line of its standard output. @raise Broken: it ended."""
    output: IO[str] | None = process.stdout
    line = "" if output is None else output.readline()
    if not line:
        raise Broken(f"{process.args!r} ended with status {process.wait(STOP_LIMIT)}")
    return line


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_LIMIT)


def _freePort() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
