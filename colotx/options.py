"""The command line of C{twistd colo}: options, and the TOML file that can hold the same."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from typing import Any

from twisted.python import usage

from colotx.comparesettings import ROLE as COMPARE
from colotx.comparesettings import CompareSettings, buildCompareSettings, compareKeys
from colotx.errors import ConfigError
from colotx.settings import ROLES, Settings, buildSettings, keyOf

_D = Settings()
_C = CompareSettings()


def _row(field: str, help: str) -> list[Any]:
    default = getattr(_D if hasattr(_D, field) else _C, field)
    if isinstance(default, bool):
        default = "yes" if default else "no"
    shown = "" if default in ("", None, ()) else f" [default: {default}]"
    return [keyOf(field), None, None, help + shown]


class Options(usage.Options):
    """
    Options of all roles. What is not given here is taken from C{--config}, then from the defaults.

    @ivar settings: the checked values, once parsing is done.
    """

    synopsis = "[--role=primary|secondary|compare] [--config FILE.toml] [options]"
    longdesc = """Keeps a virtual machine's service running through the death of its host. One daemon runs on each of
two hosts: the primary runs the guest and sends checkpoints of it to the secondary, which makes the guest go on when
the primary host dies. Start the secondary with --role=secondary, the primary with --role=primary --peer=SECONDARY.
Without further options both run on this machine and protect a small embedded guest. Every option can stand in the
TOML file under the same name, such as checkpoint-delay = 200; an option given here overrides it.
Ask a running daemon with `colo status`. --role=compare is something apart: QEMU's colo-compare object as a process of
its own."""

    settings: Settings | CompareSettings

    optParameters = [
        ["config", "c", None, "TOML file with these options as keys"],
        _row("role", "primary: run the guest; secondary: stand by for it; compare: only compare output"),
        _row("vm", "name of the protected VM, the same on both hosts"),
        _row("peer", "HOST[:PORT] where the other daemon listens; a primary dials it"),
        _row("listen", "ADDRESS[:PORT] where a secondary waits for the primary"),
        _row("peerName", "name or IP address in the peer's certificate [default: host of peer]"),
        _row("ca", "certificate of the CA, PEM; needed unless the link is on loopback"),
        _row("certificate", "certificate of this host, PEM"),
        _row("key", "its private key, PEM"),
        _row("onLostPeer", "hold: wait for an operator; failover: go on alone, on silence alone"),
        _row("heartbeatInterval", "time between heartbeats, ms"),
        _row("heartbeatLimit", "silence after which the peer is lost, ms"),
        _row("checkpointDelay", "x-checkpoint-delay: time between two checkpoints, ms"),
        _row("checkpointFloor", "time the guest runs at least between two checkpoints, ms"),
        _row("secondary", "passive: the secondary keeps a RAM image; active: its VM runs in lock-step"),
        _row("guest", "memory: a small embedded guest; qemu: a virtual machine"),
        _row("qemuBinary", "the QEMU to start"),
        _row(
            "qemuArguments",
            "its arguments but for QMP, NIC and COLO, in one string; a list of strings in TOML",
        ),
        _row("nicModel", "QEMU device of the guest's NIC"),
        _row("mac", "the guest's MAC address"),
        _row("outside", "where its frames go: tap:NAME[,bridge=BRIDGE], unix:PATH or none"),
        _row("memorySize", "RAM of the embedded guest, with K, M or G"),
        _row("memoryAddress", "IPv4 address and prefix length of the embedded guest"),
        _row("memoryDirty", "pages the embedded guest rewrites in each tick"),
        _row(
            "stateDir",
            "directory of what must survive a restart [default: /var/lib/colotx/VM, or the user's]",
        ),
        _row(
            "control", "path of the control socket [default: /run/colotx/VM[-secondary].sock, or the user's]"
        ),
        _row(
            "scheduling",
            "realtime: real-time priority where allowed: a busy host must not look dead; normal",
        ),
        _row("trace", "yes: log every message and phase of every checkpoint"),
        _row("spoolMemory", "memory for checkpoints on their way to the peer, bytes; more goes to spill-dir"),
        _row("stagingMemory", "memory for a checkpoint being received, bytes; more goes to spill-dir"),
        _row("spillDir", "directory for what does not fit into memory"),
        _row("primaryIn", "compare: unix:PATH or tcp:HOST:PORT, and ',server' to listen: primary's frames"),
        _row("secondaryIn", "compare: the same for the secondary's frames"),
        _row("outdev", "compare: the same for what may leave"),
        _row("notifyDev", "compare: the same for asking for checkpoints, and being told of them"),
        _row("vnetHdrSupport", "compare: yes: frames have a virtio-net header, and its length before"),
        _row("compareTimeout", "time after which an unmatched frame of one VM asks for a checkpoint, ms"),
        _row("expiredScanCycle", "time between two searches for such frames, ms"),
        _row("maxQueueSize", "frames of a connection that wait before a checkpoint is asked for"),
    ]

    def parseArgs(self, *arguments: str) -> None:
        """@raise usage.UsageError: there are any: a forgotten dash must not end in a default."""
        if arguments:
            raise usage.UsageError(f"{arguments[0]!r} is no option; options begin with --")

    def postOptions(self) -> None:
        """Join file and command line, and check. @raise usage.UsageError: what is wrong, in one line."""
        try:
            values = self._fromFile(self["config"]) if self["config"] else {}
            values.update(
                {key: value for key, value in self.items() if key != "config" and value is not None}
            )
            self.settings = _build(values)
        except ConfigError as error:
            raise usage.UsageError(str(error)) from None

    def _fromFile(self, path: str) -> dict[str, Any]:
        try:
            with open(path, "rb") as file:
                return tomllib.load(file)
        except OSError as error:
            raise ConfigError(f"config: {path} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"config: {path} is no TOML: {error}") from None


def _build(values: dict[str, Any]) -> Settings | CompareSettings:
    role = values.get("role", "")
    if role == COMPARE:
        return buildCompareSettings(values)
    known = {keyOf(field.name) for field in fields(Settings)}
    if foreign := sorted(compareKeys() & values.keys() - known):
        raise ConfigError(f"{foreign[0]}: only a daemon with --role={COMPARE} has it")
    if role not in ROLES and values.keys() <= known:
        raise ConfigError(f"role: {role!r} is none of {', '.join([*ROLES, COMPARE])}")
    return buildSettings(values)
