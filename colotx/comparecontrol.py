"""
What operators and scripts can ask of a comparer of its own, on its control socket.

C{qom-get} and C{qom-set} are QEMU's, so that scripts that set the limits of a C{colo-compare} object keep working; the
object's path does not matter, there is one. C{colotx-checkpoint-done} and the event C{COLOTX_CHECKPOINT_WANTED}
C{{reason}} are what C{notify_dev} has, for scripts that speak QMP anyway.
"""

from __future__ import annotations

from typing import Protocol

from colotx.comparesettings import LIMITS, checkLimit
from colotx.errors import ConfigError, QmpError
from colotx.evidence import Evidence
from colotx.qmp import Command, JsonObject
from colotx.settings import keyOf


class CompareProperties(Protocol):
    """What has a comparer's properties."""

    def properties(self) -> dict[str, object]:
        """C{qom-get}: all properties, by QEMU's names."""

    def setLimit(self, name: str, value: int) -> None:
        """C{qom-set} of one of L{LIMITS}."""


class CompareNode(CompareProperties, Protocol):
    """What the commands need of the daemon."""

    evidence: Evidence

    def checkpointDone(self) -> None:
        """C{colotx-checkpoint-done}."""

    def describeStatus(self) -> JsonObject:
        """C{query-colotx-status}."""

    def describeStatistics(self) -> JsonObject:
        """C{query-colotx-stats}."""

    def quit(self) -> None:
        """C{quit}."""


_SETTABLE = {keyOf(name).replace("-", "_"): name for name in LIMITS}


def propertyCommands(node: CompareProperties) -> dict[str, Command]:
    """C{qom-get} and C{qom-set}."""

    def get(path: str, property: str) -> object:
        return _known(node, property)

    def set(path: str, property: str, value: int) -> None:
        _known(node, property)
        name = _SETTABLE.get(property)
        if name is None:
            raise QmpError(
                "GenericError", f"Property 'colo-compare.{property}' is settled when the daemon starts"
            )
        try:
            node.setLimit(name, checkLimit(value))
        except ConfigError as error:
            raise QmpError("GenericError", f"Property 'colo-compare.{property}': {error}") from None

    return {
        "qom-get": Command(get, required={"path": str, "property": str}),
        "qom-set": Command(set, required={"path": str, "property": str, "value": int}),
    }


def commandTable(node: CompareNode) -> dict[str, Command]:
    """The commands, as L{colotx.qmp.QmpServerFactory} takes them."""
    return {
        **propertyCommands(node),
        "query-status": Command(lambda: {"running": True, "singlestep": False, "status": "running"}),
        "query-colotx-status": Command(node.describeStatus),
        "query-colotx-stats": Command(node.describeStatistics),
        "query-colotx-evidence": Command(lambda: node.evidence.describe()),
        "colotx-checkpoint-done": Command(node.checkpointDone),
        "quit": Command(node.quit),
    }


def _known(node: CompareProperties, property: str) -> object:
    properties = node.properties()
    if property not in properties:
        raise QmpError("GenericError", f"Property 'colo-compare.{property}' not found")
    return properties[property]
