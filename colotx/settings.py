"""
What an operator can set, as checked values. Where they come from (command line, TOML) is L{colotx.options}'s.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from ipaddress import AddressValueError, IPv4Interface, NetmaskValueError, ip_address
from typing import Any

from colotx.errors import ConfigError
from colotx.ports import parseOutside

DEFAULT_PORT = 7800
"""TCP port of the link between the two daemons."""

ROLES = ("primary", "secondary")
GUESTS = ("memory", "qemu")
KINDS = ("passive", "active")
ON_LOST_PEER = ("hold", "failover")
SCHEDULING = ("realtime", "normal")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_SIZE = re.compile(r"(\d+)([KMG]?)")


@dataclass(frozen=True, slots=True)
class HostPort:
    """
    A TCP address.

    @ivar host: a DNS name or an IP address, without brackets.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> HostPort:
        """C{HOST}, C{HOST:PORT}, C{[IPv6]:PORT}. @raise ConfigError: anything else."""
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::(\d{1,5}))?", text.strip())
        if match is None:
            raise ConfigError(f"{text!r} is no HOST, HOST:PORT or [IPv6]:PORT")
        port = int(match[3] or DEFAULT_PORT)
        if not 0 < port < 65536:
            raise ConfigError(f"{text!r}: the port must be 1 to 65535")
        return cls(match[1] or match[2], port)

    @property
    def isLoopback(self) -> bool:
        """Whether it can only be reached on this machine."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Settings:
    """
    The settings of one daemon.

    @ivar role: C{primary} runs the guest, C{secondary} stands by for it.
    @ivar vm: name of the protected VM; both daemons must use the same.
    @ivar stateDir: directory of what must survive a restart (epoch) and of the local CA.
    @ivar control: path of the control socket; empty: the default place for this VM.
    @ivar listen: where a secondary waits for the primary.
    @ivar peer: where the other daemon listens; a primary dials it.
    @ivar peerName: DNS name or IP address in the peer's certificate; empty: the host part of C{peer}.
    @ivar ca: path of the CA's certificate (PEM); empty: the local CA, on loopback only.
    @ivar certificate: path of this daemon's certificate (PEM).
    @ivar key: path of its private key (PEM).
    @ivar guest: kind of guest.
    @ivar secondary: kind of secondary: C{passive} is a RAM image, C{active} a VM that runs in step.
    @ivar checkpointDelay: x-checkpoint-delay (ms).
    @ivar checkpointFloor: time the guest runs at least between two checkpoints, whatever asks for them (ms).
    @ivar compareTimeout: how long a frame of an active pair waits for its counterpart before it asks for a
        checkpoint (ms).
    @ivar expiredScanCycle: how often that is looked at (ms).
    @ivar maxQueueSize: frames of one connection that wait before they ask for a checkpoint.
    @ivar heartbeatInterval: time between two heartbeats (ms).
    @ivar heartbeatLimit: silence after which the peer is lost (ms).
    @ivar onLostPeer: C{hold}: wait for the operator; C{failover}: go on alone.
    @ivar outside: where the guest's frames go: C{tap:NAME[,bridge=BR]}, C{unix:PATH} or C{none}.
    @ivar mac: the guest's MAC address.
    @ivar scheduling: C{realtime}: with real-time priority where the system allows it, so that a busy host does not look
        like a dead one; C{normal}.
    @ivar trace: log every message and phase of every checkpoint.
    @ivar spoolMemory: bytes of memory for checkpoints on their way to the peer; what is beyond goes to disk.
    @ivar stagingMemory: bytes of memory for a checkpoint being received; what is beyond goes to disk.
    @ivar spillDir: directory for what is beyond.
    @ivar qemuBinary: the QEMU to start.
    @ivar qemuArguments: its arguments, but for QMP, NIC and COLO set-up, which colotx adds.
    @ivar nicModel: QEMU device of the guest's NIC.
    @ivar memorySize: RAM of the embedded guest, bytes.
    @ivar memoryAddress: IPv4 address and prefix length of the embedded guest.
    @ivar memoryDirty: pages the embedded guest rewrites in each tick of its workload.
    """

    role: str = ""
    vm: str = "guest0"
    stateDir: str = ""
    control: str = ""
    listen: HostPort = HostPort("127.0.0.1", DEFAULT_PORT)
    peer: HostPort | None = None
    peerName: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""
    guest: str = "memory"
    secondary: str = "passive"
    checkpointDelay: int = 20000
    checkpointFloor: int = 20
    compareTimeout: int = 3000
    expiredScanCycle: int = 1000
    maxQueueSize: int = 1024
    heartbeatInterval: int = 100
    heartbeatLimit: int = 300
    onLostPeer: str = "hold"
    outside: str = "none"
    mac: str = "52:54:00:c0:10:01"
    scheduling: str = "realtime"
    trace: bool = False
    spoolMemory: int = 64 * 1024 * 1024
    stagingMemory: int = 256 * 1024 * 1024
    spillDir: str = "/var/tmp"
    qemuBinary: str = "qemu-system-x86_64"
    qemuArguments: tuple[str, ...] = ()
    nicModel: str = "virtio-net-pci"
    memorySize: int = 16 * 1024 * 1024
    memoryAddress: str = "10.0.0.10/24"
    memoryDirty: int = 16

    @property
    def peerAddress(self) -> HostPort:
        """Where the other daemon listens; by default on this machine."""
        return self.peer or HostPort("127.0.0.1", DEFAULT_PORT)

    @property
    def link(self) -> HostPort:
        """The address the link's certificates must fit: where we listen or what we dial."""
        return self.peerAddress if self.role == "primary" else self.listen


def stateRoot() -> str:
    """/var/lib/colotx for root, else below XDG_STATE_HOME."""
    if os.geteuid() == 0:
        return "/var/lib/colotx"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return f"{home}/colotx"


def defaultStateDir(settings: Settings) -> str:
    """
    One directory a VM, whatever the role: the epoch in it must be found again when the role changes. Only where both
    daemons run on one machine, to try it out, each role has its own.
    """
    name = f"{settings.vm}-{settings.role}" if settings.link.isLoopback else settings.vm
    return f"{stateRoot()}/{name}"


def keyOf(field: str) -> str:
    """The option and TOML key of a setting: C{checkpointDelay} is C{checkpoint-delay}."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", field).lower()


def parseSize(text: str | int) -> int:
    """Bytes, or with K, M, G. @raise ConfigError: anything else."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ConfigError(f"{text!r} is no size: write bytes, or a number with K, M or G")
    return int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]]


def parseWhole(value: Any) -> int:
    """@raise ConfigError: it is no whole number."""
    # A fraction or a yes of a TOML file would pass int() with another value than the operator meant.
    if isinstance(value, bool) or not re.fullmatch(r"-?\d+", str(value).strip()):
        raise ConfigError(f"{value!r} is no whole number")
    return int(value)


def parseFields(
    kind: Any, values: Mapping[str, Any], parse: Callable[[str, Any], Any], unknown: str
) -> dict[str, Any]:
    """
    Values by option key (C{checkpoint-delay}) to values by the field of a settings class.

    @param kind: the class.
    @param parse: makes a field's value of what the operator wrote.
    @param unknown: what to say of a key that is no field's: C{{0}} is the key, C{{1}} those there are.
    @raise ConfigError: naming the key.
    """
    known = {keyOf(field.name): field.name for field in fields(kind)}
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(unknown.format(key, ", ".join(sorted(known))))
        try:
            parsed[known[key]] = parse(known[key], value)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    return parsed


def _parse(field: str, value: Any) -> Any:
    default = Settings.__dataclass_fields__[field].default
    if field in ("listen", "peer"):
        return HostPort.parse(str(value))
    if field in ("memorySize", "spoolMemory", "stagingMemory"):
        return parseSize(value)
    if field == "qemuArguments":
        if isinstance(value, str):
            try:
                return tuple(shlex.split(value))
            except ValueError as error:
                raise ConfigError(f"cannot be split into arguments: {error}") from None
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ConfigError("must be one string, or a list of strings")
        return tuple(value)
    if isinstance(default, bool):
        if value in (True, False):
            return bool(value)
        if value in ("yes", "no"):
            return value == "yes"
        raise ConfigError(f"{value!r} is neither yes nor no")
    if isinstance(default, int):
        return parseWhole(value)
    if not isinstance(value, str):
        raise ConfigError(f"{value!r} must be a string")
    return value


def buildSettings(values: Mapping[str, Any]) -> Settings:
    """
    Check values by key, fill in the defaults.

    @param values: option keys (C{checkpoint-delay}) to values as written by the operator.
    @raise ConfigError: naming the key, what is wrong and what is right.
    """
    settings = Settings(**parseFields(Settings, values, _parse, "there is no option {0!r}; there are: {1}"))
    _check(settings)
    return settings


def _isInterface(text: str) -> bool:
    try:
        IPv4Interface(text)
    except (AddressValueError, NetmaskValueError):
        return False
    return True


def _check(settings: Settings) -> None:
    def need(good: bool, field: str, problem: str) -> None:
        if not good:
            raise ConfigError(f"{keyOf(field)}: {problem}")

    def choice(field: str, choices: tuple[str, ...]) -> None:
        value = getattr(settings, field)
        need(value in choices, field, f"{value!r} is none of {', '.join(choices)}")

    choice("role", ROLES)
    choice("guest", GUESTS)
    choice("secondary", KINDS)
    choice("onLostPeer", ON_LOST_PEER)
    choice("scheduling", SCHEDULING)
    need(_NAME.fullmatch(settings.vm) is not None, "vm", "use letters, digits, '-', '_' and '.', at most 64")
    need(_MAC.fullmatch(settings.mac) is not None, "mac", f"{settings.mac!r} is no MAC address")
    need(int(settings.mac[:2], 16) & 1 == 0, "mac", f"{settings.mac!r} is a multicast address")
    need(0 < settings.checkpointDelay < 1 << 32, "checkpointDelay", "must be 1 to 4294967295 ms")
    need(0 <= settings.checkpointFloor <= 60000, "checkpointFloor", "must be 0 to 60000 ms")
    need(1 <= settings.compareTimeout < 1 << 32, "compareTimeout", "must be 1 to 4294967295 ms")
    need(1 <= settings.expiredScanCycle < 1 << 32, "expiredScanCycle", "must be 1 to 4294967295 ms")
    need(1 <= settings.maxQueueSize <= 1 << 20, "maxQueueSize", "must be 1 to 1048576 frames")
    need(10 <= settings.heartbeatInterval <= 60000, "heartbeatInterval", "must be 10 to 60000 ms")
    need(
        settings.heartbeatLimit >= 2 * settings.heartbeatInterval,
        "heartbeatLimit",
        "must be at least twice heartbeat-interval, or one late heartbeat would be a death",
    )
    need(settings.memorySize >= 1 << 20, "memorySize", "must be at least 1M")
    need(settings.memorySize % 4096 == 0, "memorySize", "must be a multiple of 4096 bytes")
    address = settings.memoryAddress
    need(
        _isInterface(address),
        "memoryAddress",
        f"{address!r} is no IPv4 address and prefix length (10.0.0.10/24)",
    )
    try:
        # A secondary makes its port at the failover only, much too late for a wrong name.
        parseOutside(settings.outside)
    except ConfigError as error:
        need(False, "outside", str(error))
    need(settings.memoryDirty >= 0, "memoryDirty", "must not be negative")
    given = [bool(settings.ca), bool(settings.certificate), bool(settings.key)]
    need(all(given) or not any(given), "ca", "ca, certificate and key belong together: give all three")
    need(
        settings.role == "primary" or not all(given) or bool(settings.peerName or settings.peer),
        "peerName",
        "say which name or address the primary's certificate must be for (or give peer)",
    )
    need(
        all(given) or settings.link.isLoopback,
        "certificate",
        f"the link at {settings.link} leaves this machine and needs ca, certificate and key; "
        "`colo certs init` makes a CA and `colo certs issue` the certificate of each host",
    )
