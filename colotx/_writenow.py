"""
Writing to a socket at once.

Twisted hands data to a socket in the next turn of its reactor: one turn, two C{epoll_ctl} and 50 microseconds later.
For a frame that is on its way between a guest and its client that is most of the cost.
"""

from __future__ import annotations

from typing import Any


def writeNow(transport: Any, data: bytes) -> None:
    """
    C{transport.write}, but what the socket takes it gets at once, when nothing is in front of it.

    @param transport: a Twisted TCP or unix connection; any other transport is just written to.
    """
    try:
        idle = transport.connected and not (
            transport.disconnecting or transport.dataBuffer or transport._tempDataBuffer
        )
    except AttributeError:
        idle = False
    if idle:
        sent = transport.writeSomeData(data)
        if sent == len(data):
            return
        # A lost connection is told by the next turn's attempt.
        if isinstance(sent, int):
            data = data[sent:]
    transport.write(data)


__all__ = ["writeNow"]
