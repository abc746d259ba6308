"""
Bringing a checkpoint back to life in a fresh QEMU.

Two ways. QEMU maps the RAM cache's own image as its main RAM and gets everything else as a stream
(C{x-ignore-shared}): milliseconds, whatever the size of the guest. Or it gets all of it as a stream, which works for
every machine and costs a copy of the RAM. This module knows both and who can have which; it starts no process.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.error import ConnectError
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from colotx.errors import GuestError, PeerError
from colotx.guests.qemu_arguments import MappedRam, ownsMemory
from colotx.guests.qemu_process import QemuProcess
from colotx.interfaces import CheckpointImage
from colotx.protocol import ColoConnection
from colotx.ramcache import RamCache
from colotx.vmstate import restoreStream

_DESCRIPTION = b'{"page_size": 4096, "devices": []}'
"""QEMU reads the description only to throw it away, but complains when there is none."""

_log = Logger(namespace="colotx.guests.qemu")

_LAST_WORDS = 1.0
"""Seconds to wait for a QEMU to end that closed its socket."""


def mappedRam(cache: RamCache, arguments: Sequence[str]) -> MappedRam | None:
    """
    What of the image QEMU can map as the guest's main RAM.

    @param arguments: the user's QEMU arguments.
    @return: None if it cannot: the user's arguments say themselves where guest RAM comes from.
    """
    main = max(cache.blocks, key=lambda block: block.length)
    if ownsMemory(arguments) or "/" in main.name:
        _log.info("the arguments say where guest RAM comes from, so it will be restored by a copy")
        return None
    return MappedRam(main.name, cache.imagePath(main.name), main.length)


def cacheOf(image: CheckpointImage) -> RamCache:
    """The RAM of a checkpoint. L{CheckpointImage} leaves open what holds it; of our standbys it is a cache."""
    assert isinstance(image.ram, RamCache)
    return image.ram


async def feed(
    reactor: Any,
    process: QemuProcess,
    path: str,
    image: CheckpointImage,
    shared: Collection[str],
    timeout: float,
) -> None:
    """
    Give a QEMU that waits for its state (C{-incoming defer}) the checkpoint's.

    @param path: the unix socket it is to listen on for it.
    @param shared: the blocks it maps.
    @param timeout: seconds QEMU may take nothing at all.
    @raise GuestError: it did not take it.
    """
    if shared:
        await _setIgnoreShared(process, True)
    await process.execute("migrate-incoming", {"uri": f"unix:{path}"})
    connection = ColoConnection(reactor, timeout)
    endpoint: Any = UNIXClientEndpoint(reactor, path, timeout)  # type: ignore[no-untyped-call]
    ram = cacheOf(image)
    stream = restoreStream(
        image.configuration, ram.blocks, ram.image, image.deviceState, _DESCRIPTION, shared
    )
    try:
        await endpoint.connect(Factory.forProtocol(lambda: connection))
        for piece in stream:
            await connection.write(piece)
    except (ConnectError, PeerError) as error:
        connection.abort(GuestError("QEMU did not take the checkpoint"))
        # Its own words are better than ours, and come with its end.
        await process.whenEnded(_LAST_WORDS)
        raise process.lost or GuestError(f"QEMU did not take the checkpoint: {error}") from error


async def forgetSharing(process: QemuProcess) -> None:
    """The guest runs: from now on its RAM is to be sent like any other, or it could not be protected again."""
    await _setIgnoreShared(process, False)


async def _setIgnoreShared(process: QemuProcess, state: bool) -> None:
    capability = {"capability": "x-ignore-shared", "state": state}
    await process.execute("migrate-set-capabilities", {"capabilities": [capability]})


__all__ = ["cacheOf", "feed", "forgetSharing", "mappedRam"]
