"""
Network namespaces: two hosts, the link between them and a client, on one machine.

This module knows the C{ip} command and what a small data centre looks like; it knows nothing of daemons, guests
or what runs inside. Its commands are synchronous on purpose: each takes a few milliseconds, happens before or
after the thing that is measured, and tearing down must work in every C{finally}, also when no reactor runs.

Everything made here carries this process' id in its name; nothing else is ever touched.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from colotx.errors import ConfigError

GUEST_ADDRESS = "10.77.0.10/24"
"""The protected guest on the service LAN."""
GUEST_ADDRESS6 = "fd77::10/64"
CLIENT_ADDRESS = "10.77.0.1/24"
CLIENT_ADDRESS6 = "fd77::1/64"
LINK_ADDRESSES = {"primary": "10.88.0.1", "secondary": "10.88.0.2"}
"""The two hosts on their private link (a /24)."""

_NETNS = Path("/run/netns")
_COMMAND_LIMIT = 10.0
_INSIDE = "COLOTX_LAB_INSIDE"
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21
_serial = itertools.count(1)


def _run(command: Sequence[str], batch: str = "") -> None:
    """
    Run a set-up command.

    @param batch: what it reads from its standard input.
    @raise ConfigError: it failed, is missing, or took longer than 10 seconds.
    """
    try:
        done = subprocess.run(
            command, input=batch, capture_output=True, text=True, timeout=_COMMAND_LIMIT, check=False
        )
    except FileNotFoundError:
        raise ConfigError(f"the command {command[0]!r} is missing: install iproute2 and util-linux") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{' '.join(command)} took longer than {_COMMAND_LIMIT:.0f} s") from None
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")


def isPrivileged() -> bool:
    """@return: whether this process may make network namespaces as it is."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            capabilities = int(line.split()[1], 16)
            return bool(capabilities >> _CAP_NET_ADMIN & capabilities >> _CAP_SYS_ADMIN & 1)
    return False


def becomePrivileged(module: str, argv: Sequence[str]) -> None:
    """
    Make sure that this process may make network namespaces: return when it may, else replace it by
    C{python -m module argv} in a user namespace of its own, where it may.

    @raise ConfigError: the kernel or the administrator forbids user namespaces.
    """
    if _INSIDE in os.environ:
        # The namespaces' names live in /run/netns, which is the real root's: cover it, or /run when it is missing.
        _run(["mount", "-t", "tmpfs", "colotx-lab", str(_NETNS if _NETNS.is_dir() else _NETNS.parent)])
        _NETNS.mkdir(exist_ok=True)
        return
    if isPrivileged():
        return
    unshare = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--"]
    try:
        _run([*unshare, "true"])
    except ConfigError as error:
        raise ConfigError(
            f"network namespaces need root, or a kernel that lets users make user namespaces ({error}); "
            "run it with sudo, or allow them (sysctl kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0)"
        ) from None
    os.environ[_INSIDE] = "1"
    os.execvp(unshare[0], [*unshare, sys.executable, "-m", module, *argv])


class Namespace:
    """
    One network namespace, made when constructed.

    @ivar name: its name for C{ip netns}.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        _run(["ip", "netns", "add", name])
        self.ip("link set lo up")

    def ip(self, *lines: str) -> None:
        """Run C{ip} commands, given without the word ip, inside."""
        _run(["ip", "-netns", self.name, "-batch", "-"], "\n".join(lines) + "\n")

    def command(self, *arguments: str) -> list[str]:
        """
        @return: the command line that runs C{arguments} inside. It stays one process (its id is the program's),
            has a session of its own (so that a terminal's Ctrl-C reaches only us) and dies with its parent.
        """
        return ["setsid", "setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.name, *arguments]

    def processes(self) -> list[int]:
        """@return: the ids of all processes inside."""
        inode = (_NETNS / self.name).stat().st_ino
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            # Processes end while we look, and other users' are closed to us: neither is one of ours.
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "ns/net").stat().st_ino == inode:
                    found.append(int(entry.name))
        return found

    def close(self) -> None:
        """Kill what still runs inside (it has one second to go) and remove the namespace."""
        if not (_NETNS / self.name).exists():
            return
        deadline = time.monotonic() + 1.0
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        _run(["ip", "netns", "del", self.name])


class Lab:
    """
    Two hosts and a client::

        client: bridge lan 10.77.0.1 --- primary:   br0 (the daemon's TAP joins it)    link0 10.88.0.1
                           fd77::1 \\-- secondary: br0 (the daemon's TAP joins it)    link0 10.88.0.2

    Use it as a context manager, or call C{close}.

    @ivar client: the namespace of the client.
    @ivar hosts: the namespaces of the hosts, by role (C{primary}, C{secondary}).
    """

    def __init__(self) -> None:
        prefix = f"colo{os.getpid()}-{next(_serial)}"
        self._made: list[Namespace] = []
        try:
            self.client = self._make(f"{prefix}-client")
            self.hosts = {role: self._make(f"{prefix}-{role}") for role in LINK_ADDRESSES}
            self._connect()
        except BaseException:
            self.close()
            raise

    def _make(self, name: str) -> Namespace:
        namespace = Namespace(name)
        self._made.append(namespace)
        return namespace

    def _connect(self) -> None:
        self.client.ip(
            "link add lan type bridge",
            f"addr add {CLIENT_ADDRESS} dev lan",
            # With no other host of that address there is nothing to wait for.
            f"addr add {CLIENT_ADDRESS6} dev lan nodad",
            "link set lan up",
        )
        for role, host in self.hosts.items():
            self.client.ip(
                f"link add {role} type veth peer name lan0 netns {host.name}",
                f"link set {role} master lan up",
            )
            host.ip("link add br0 type bridge", "link set br0 up", "link set lan0 master br0 up")
        first, second = self.hosts.values()
        first.ip(f"link add link0 type veth peer name link0 netns {second.name}")
        for role, host in self.hosts.items():
            host.ip(f"addr add {LINK_ADDRESSES[role]}/24 dev link0", "link set link0 up")

    def cutLink(self) -> None:
        """Take the link between the hosts down. Both see no carrier, but no connection is told anything."""
        for host in self.hosts.values():
            host.ip("link set link0 down")

    def mendLink(self) -> None:
        """Bring the link up again."""
        for host in self.hosts.values():
            host.ip("link set link0 up")

    def close(self) -> None:
        """Remove everything. Harmless when done before; one failure does not keep the rest."""
        with contextlib.ExitStack() as stack:
            for namespace in self._made:
                stack.callback(namespace.close)
        self._made.clear()

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
