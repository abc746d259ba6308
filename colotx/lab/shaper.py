"""
A slow link in user space: a TCP relay with a bandwidth, a one-way delay and controls to stall or cut each way.

TLS and everything else passes untouched. Bytes are serialised one after the other at the bandwidth and arrive
C{delay} later, on a schedule of absolute times, so that late timers do not add up. Each direction buffers what is
under way on such a link and one queue of a router, no more: beyond that the sender is held back.

Runs inside a reactor (L{Shaper}), or as a process of its own: C{python -m colotx.lab.shaper LISTEN-PORT HOST PORT}.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IPushProducer,
    IReactorTime,
    ITCPTransport,
)
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from colotx.lab.running import CommandInput, runToEnd

_SLICE_SECONDS = 0.001
_SMALLEST_SLICE = 1460
_KERNEL_BUFFER = 65_536
_CONNECT_LIMIT = 5.0


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """
    One direction of the link.

    @ivar bandwidth: bit/s; None: as fast as it goes.
    @ivar delay: seconds one way.
    @ivar queue: bytes that may wait for their turn, on top of those under way.
    """

    bandwidth: float | None = None
    delay: float = 0.0
    queue: int = 131_072

    @property
    def slice(self) -> int:
        """Bytes delivered as one: a millisecond's worth, so that the flow is smooth."""
        if self.bandwidth is None:
            return _KERNEL_BUFFER
        return max(_SMALLEST_SLICE, int(self.bandwidth / 8 * _SLICE_SECONDS))

    @property
    def limit(self) -> int:
        """Bytes buffered before the sender is held back."""
        return self.queue + int((self.bandwidth or 0) / 8 * self.delay)


class Wire:
    """
    One direction of the link, shared by all connections through it.

    @ivar stalled: nothing arrives, and no connection is told.
    """

    def __init__(self, clock: IReactorTime, settings: LinkSettings) -> None:
        self.clock = clock
        self.settings = settings
        self.stalled = False
        self._free = 0.0

    def schedule(self, size: int) -> float:
        """@return: when C{size} bytes sent now arrive, in seconds of the clock."""
        self._free = max(self._free, self.clock.seconds())
        if self.settings.bandwidth is not None:
            self._free += size * 8 / self.settings.bandwidth
        return self._free + self.settings.delay


@implementer(IPushProducer)
class Flow:
    """
    One direction of one relayed connection. It is the producer of the transport it writes to, and pauses the
    transport it reads from.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._source: Any = None
        self._target: Any = None
        # Pieces with the time they arrive; None is the end of the connection, which takes as long as a byte.
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._buffered = 0
        self._timer: IDelayedCall | None = None
        self._blocked = False

    def connect(self, source: Any, target: Any) -> None:
        """Both ends (TCP transports) are there: bytes may flow."""
        self._source, self._target = source, target
        target.registerProducer(self, True)
        self.deliver()

    def feed(self, data: bytes) -> None:
        """Bytes of the near end."""
        size = self._wire.settings.slice
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            self._queue.append((self._wire.schedule(len(piece)), piece))
        self._buffered += len(data)
        if self._source is not None and self._buffered > self._wire.settings.limit:
            self._source.pauseProducing()
        self.deliver()

    def end(self) -> None:
        """The near end is gone: the far one closes when what is under way arrived."""
        self._source = None
        self._queue.append((self._wire.schedule(0), None))
        self.deliver()

    def deliver(self) -> None:
        """Hand over what is due, and look again when the next is."""
        now = self._wire.clock.seconds()
        while self._queue and self._target is not None and not self._blocked and not self._wire.stalled:
            due, piece = self._queue[0]
            if due > now:
                if self._timer is None:
                    self._timer = self._wire.clock.callLater(due - now, self._wake)
                break
            self._queue.popleft()
            if piece is None:
                target, self._target = self._target, None
                target.unregisterProducer()
                target.loseConnection()
                break
            self._buffered -= len(piece)
            self._target.write(piece)
        if self._source is not None and self._buffered <= self._wire.settings.limit:
            self._source.resumeProducing()

    def _wake(self) -> None:
        self._timer = None
        self.deliver()

    def pauseProducing(self) -> None:
        """The far end takes no more."""
        self._blocked = True

    def resumeProducing(self) -> None:
        """The far end takes more."""
        self._blocked = False
        self.deliver()

    def stopProducing(self) -> None:
        """The far end is gone: nothing can arrive any more."""
        self._target = None
        self._queue.clear()
        self._buffered = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _End(Protocol):
    """One end of a relayed connection: what it reads goes into C{flow}."""

    transport: ITCPTransport

    def __init__(self, flow: Flow, ends: set[_End]) -> None:
        self.flow = flow
        self._ends = ends

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)
        # A link holds what its bandwidth and delay make, not what the kernel's large buffers would take.
        handle: socket.socket = self.transport.getHandle()  # type: ignore[attr-defined]
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KERNEL_BUFFER)
        self._ends.add(self)

    def dataReceived(self, data: bytes) -> None:
        self.flow.feed(data)

    def connectionLost(self, reason: Failure | None = None) -> None:
        self._ends.discard(self)
        self.flow.end()


class Shaper(Factory):
    """
    The relay: the factory of its connections.

    @ivar forward: the L{Wire} from those who connect to the target.
    @ivar backward: the L{Wire} of the other direction.
    """

    noisy = False

    def __init__(self, reactor: Any, forward: LinkSettings, backward: LinkSettings) -> None:
        self._reactor = reactor
        self.forward = Wire(reactor, forward)
        self.backward = Wire(reactor, backward)
        self._ends: set[_End] = set()
        self._port: Any = None

    def listen(self, interface: str, port: int, host: str, targetPort: int) -> int:
        """
        Relay connections to C{interface} and C{port} (0: any free one) to C{host} and C{targetPort}.

        @return: the port.
        """
        self._target = TCP4ClientEndpoint(self._reactor, host, targetPort, timeout=_CONNECT_LIMIT)
        self._port = self._reactor.listenTCP(port, self, interface=interface)
        return int(self._port.getHost().port)

    def buildProtocol(self, address: IAddress | None) -> _End:
        near = _End(Flow(self.forward), self._ends)
        far = _End(Flow(self.backward), self._ends)
        connecting: Deferred[_End] = connectProtocol(self._target, far)  # type: ignore[no-untyped-call]

        def connected(far: _End) -> None:
            near.flow.connect(near.transport, far.transport)
            far.flow.connect(far.transport, near.transport)

        connecting.addCallbacks(connected, lambda _: near.transport.abortConnection())
        return near

    def stall(self, *wires: Wire) -> None:
        """Let nothing arrive on these directions (none named: both), until C{resume}."""
        for wire in wires or (self.forward, self.backward):
            wire.stalled = True

    def resume(self) -> None:
        """Undo every stall: what is overdue arrives at once."""
        self.forward.stalled = self.backward.stalled = False
        for end in list(self._ends):
            end.flow.deliver()

    def cut(self) -> None:
        """Reset all connections, at both ends, now. New ones are relayed again."""
        for end in list(self._ends):
            end.transport.abortConnection()

    async def close(self) -> None:
        """Stop listening, and C{cut}."""
        if self._port is not None:
            await maybeDeferred(self._port.stopListening)
        self.cut()


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m colotx.lab.shaper",
        description="Relay TCP connections over a link of the given bandwidth and delay. "
        "Commands on standard input, one a line: stall [forward|backward], resume, cut. Ends with its input.",
    )
    parser.add_argument("listen", type=int, help="TCP port to listen on; 0: any, told on standard output")
    parser.add_argument("host", help="where to connect to")
    parser.add_argument("port", type=int, help="TCP port there")
    parser.add_argument(
        "--interface", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument("--bandwidth", type=float, help="Mbit/s each way (default: no limit)")
    parser.add_argument("--delay", type=float, default=0.0, help="ms each way (default: 0)")
    return parser.parse_args(argv)


async def _main(reactor: Any, options: argparse.Namespace) -> int:
    settings = LinkSettings(options.bandwidth and options.bandwidth * 1e6, options.delay / 1000)
    shaper = Shaper(reactor, settings, settings)
    wires = {"forward": shaper.forward, "backward": shaper.backward}

    def command(words: list[str]) -> None:
        match words:
            case ["stall", *names]:
                shaper.stall(*(wires[name] for name in names if name in wires))
            case ["resume"]:
                shaper.resume()
            case ["cut"]:
                shaper.cut()

    port = shaper.listen(options.interface, options.listen, options.host, options.port)
    print(json.dumps({"event": "listening", "port": port}), flush=True)
    await CommandInput(reactor, command).ended
    await shaper.close()
    return 0


def main(argv: Sequence[str]) -> int:
    """@return: the exit status."""
    from twisted.internet import reactor

    options = _arguments(argv)
    return runToEnd(reactor, lambda: _main(reactor, options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
