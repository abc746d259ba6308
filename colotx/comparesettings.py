"""
What an operator can set of a comparer of its own (role C{compare}), as checked values, under the names of QEMU's
C{colo-compare} object. Where they come from (command line, TOML) is L{colotx.options}'s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from colotx.errors import ConfigError
from colotx.settings import HostPort, keyOf, parseFields, parseWhole

ROLE = "compare"

MAX_PATH = 107
"""Bytes of the longest path of a unix socket (Linux, C{unix(7)})."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SWITCH = {"yes": True, "on": True, True: True, "no": False, "off": False, False: False}
_SERVER = {"": False, "server": True, "server=on": True, "server=off": False}
_FORM = "use unix:PATH or tcp:HOST:PORT, to listen there with ',server' behind it"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """
    One end of a stream.

    @ivar place: path of a unix socket, or a TCP address.
    @ivar server: listen there; else connect, again and again until somebody listens.
    """

    place: str | HostPort
    server: bool = False

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """
        C{unix:PATH[,server[=on|off]]} or C{tcp:HOST:PORT[,server[=on|off]]}, near to QEMU's C{-chardev} words.

        @raise ConfigError: anything else.
        """
        kind, _, rest = text.partition(":")
        place, comma, option = rest.partition(",")
        if (comma and not option) or option not in _SERVER:
            raise ConfigError(f"{text!r}: {option!r} is not understood; {_FORM}")
        if kind == "unix" and place:
            if len(os.fsencode(place)) > MAX_PATH:
                raise ConfigError(f"{text!r}: a unix socket's path has at most {MAX_PATH} bytes")
            return cls(place, _SERVER[option])
        if kind == "tcp" and re.search(r":\d+$", place):
            return cls(HostPort.parse(place), _SERVER[option])
        raise ConfigError(f"{text!r} is no endpoint; {_FORM}")

    def __str__(self) -> str:
        kind = "unix" if isinstance(self.place, str) else "tcp"
        return f"{kind}:{self.place}{',server' if self.server else ''}"


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """
    The settings of one comparer.

    @ivar role: C{compare}.
    @ivar vm: name of the VM whose output is compared; names the control socket.
    @ivar control: path of the control socket; empty: the default place for this VM.
    @ivar primaryIn: where what the primary's guest says comes from.
    @ivar secondaryIn: where what the secondary's guest says comes from.
    @ivar outdev: where what may leave goes.
    @ivar notifyDev: where checkpoints are asked for, and reported.
    @ivar vnetHdrSupport: records have the length of a virtio-net header.
    @ivar compareTimeout: time after which a frame nobody matched asks for a checkpoint (ms).
    @ivar expiredScanCycle: time between two searches for such frames (ms).
    @ivar maxQueueSize: frames of one connection and side after which a checkpoint is asked for.
    """

    role: str = ROLE
    vm: str = "guest0"
    control: str = ""
    primaryIn: Endpoint | None = None
    secondaryIn: Endpoint | None = None
    outdev: Endpoint | None = None
    notifyDev: Endpoint | None = None
    vnetHdrSupport: bool = False
    compareTimeout: int = 3000
    expiredScanCycle: int = 1000
    maxQueueSize: int = 1024


ENDPOINTS = ("primaryIn", "secondaryIn", "outdev", "notifyDev")

LIMITS = ("compareTimeout", "expiredScanCycle", "maxQueueSize")
"""What can be set while it runs, too."""


def compareKeys() -> frozenset[str]:
    """The option keys a comparer understands."""
    return frozenset(keyOf(field.name) for field in fields(CompareSettings))


def checkLimit(value: Any) -> int:
    """@return: the value of one of L{LIMITS}. @raise ConfigError: it cannot be one."""
    limit = parseWhole(value)
    if not 0 < limit < 1 << 32:
        raise ConfigError(f"must be 1 to {(1 << 32) - 1}")
    return limit


def buildCompareSettings(values: Mapping[str, Any]) -> CompareSettings:
    """
    Check values by key, fill in the defaults.

    @param values: option keys (C{compare-timeout}) to values as written by the operator.
    @raise ConfigError: naming the key, what is wrong and what is right.
    """
    unknown = f"role {ROLE} has no option {{0!r}}; it has: {{1}}"
    settings = CompareSettings(**parseFields(CompareSettings, values, _parse, unknown))
    places: dict[str | HostPort, str] = {}
    for field in ENDPOINTS:
        endpoint = getattr(settings, field)
        if endpoint is None:
            if field != "notifyDev":
                raise ConfigError(f"{keyOf(field)}: must be given; {_FORM}")
        elif endpoint.place in places:
            raise ConfigError(f"{keyOf(field)}: {endpoint} is {places[endpoint.place]} already")
        else:
            places[endpoint.place] = keyOf(field)
    return settings


def _parse(field: str, value: Any) -> Any:
    if field in LIMITS:
        return checkLimit(value)
    if field == "vnetHdrSupport":
        if not isinstance(value, str | bool) or value not in _SWITCH:
            raise ConfigError(f"{value!r} is neither on nor off")
        return _SWITCH[value]
    if not isinstance(value, str):
        raise ConfigError(f"{value!r} must be a string")
    if field in ENDPOINTS:
        return Endpoint.parse(value)
    if field == "vm" and not _NAME.fullmatch(value):
        raise ConfigError("use letters, digits, '-', '_' and '.', at most 64")
    return value
