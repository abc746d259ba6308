"""
How fast is the link? One direction in MB/s and a 4-byte round trip, through a real session's COLO channel between
two processes on loopback, against plain Twisted TCP, stock Twisted TLS and blocking C{ssl} sockets.

The CPU time is the sending process's; it is steadier than the clock on a busy machine. The kinds take turns within
each run, so that a busy machine slows all of them. Figures of different machines, or of different days, say nothing
about each other; the ratios do. Usage::

    python benchmarks/link.py [--json] [--megabytes 128] [--runs 7]
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import argparse
import json
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any
from uuid import uuid4

from OpenSSL.crypto import X509, PKey
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import Certificate, CertificateOptions, TLSVersion, trustRootFromCertificates
from twisted.internet.task import react
from twisted.internet.threads import deferToThread
from twisted.protocols.tls import TLSMemoryBIOFactory
from zope.interface import implementer

from colotx.certificates import LOCAL_NAMES, Credentials, initAuthority, issue
from colotx.errors import HelloRefused
from colotx.hello import Hello
from colotx.link import LinkDialer, LinkListener, LinkSettings
from colotx.session import Heartbeat, Session

reactor: Any = _reactor
PIECE = bytes(64 * 1024)
"""What is written at once: one read of a QEMU's socket."""

PINGS = 300
KINDS = "link", "tcp", "twisted_tls", "ssl"
TIMEOUT = 120.0
Result = tuple[float, float, float]
"""MB/s, CPU seconds for a GB, and the median round trip in ms."""

PATIENT = LinkSettings(heartbeat=Heartbeat(1.0, 30.0))


class Answerer(Protocol):
    """Takes C{total} bytes and says so; after that, whatever comes goes back."""

    def __init__(self, total: int) -> None:
        self.left = total

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        if self.left > 0:
            self.left -= len(data)
            if self.left <= 0:
                self.transport.write(b"done")
        else:
            self.transport.write(data)


@implementer(IPushProducer)
class Asker(Protocol):
    """Sends C{total} bytes as fast as the transport takes them, then pings."""

    def __init__(self, total: int) -> None:
        self.left = total
        self._running = True
        self._answer: Deferred[None] | None = None

    async def measure(self) -> Result:
        transport: Any = self.transport
        size = self.left
        start, startCPU = perf_counter(), process_time()
        transport.registerProducer(self, True)
        self.resumeProducing()
        await self._answered()
        speed, cpu = size / (perf_counter() - start) / 1e6, (process_time() - startCPU) / size * 1e9
        trips = []
        for _ in range(PINGS):
            start = perf_counter()
            transport.write(b"ping")
            await self._answered()
            trips.append((perf_counter() - start) * 1000)
        return speed, cpu, median(trips)

    def _answered(self) -> Deferred[None]:
        self._answer = Deferred()
        return self._answer.addTimeout(TIMEOUT, reactor)

    def dataReceived(self, data: bytes) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.callback(None)

    def resumeProducing(self) -> None:
        transport: Any = self.transport
        self._running = True
        while self._running and self.left > 0:
            self.left -= len(PIECE)
            transport.write(PIECE)
        if self.left <= 0 and self._running:
            self._running = False
            transport.unregisterProducer()

    def pauseProducing(self) -> None:
        self._running = False

    def stopProducing(self) -> None:
        self._running = False


class Owner:
    """The daemon around the link, reduced to nothing."""

    def __init__(self, role: Any, build: Callable[[], Protocol]) -> None:
        self._hello = Hello("benchmark", role, str(uuid4()), 0)
        self.buildColo = self.buildFrames = build
        self.established: Deferred[Session] = Deferred()

    def hello(self) -> Hello:
        return self._hello

    def judge(self, peer: Hello) -> str | None:
        return None

    def sessionEstablished(self, session: Session) -> None:
        if not self.established.called:
            self.established.callback(session)

    def linkRefused(self, error: HelloRefused) -> None:
        raise error


def stockOptions(credentials: Credentials) -> CertificateOptions:
    return CertificateOptions(
        privateKey=PKey.from_cryptography_key(credentials.key),
        certificate=X509.from_cryptography(credentials.certificate),
        trustRoot=trustRootFromCertificates([Certificate(X509.from_cryptography(credentials.authority))]),
        raiseMinimumTo=TLSVersion.TLSv1_3,
    )


def blockingContext(directory: Path, purpose: ssl.Purpose) -> ssl.SSLContext:
    context = ssl.create_default_context(purpose, cafile=directory / "ca.pem")
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


# -- the process that answers


def answerBlocking(listening: socket.socket, context: ssl.SSLContext, total: int) -> None:
    while True:
        raw, _ = listening.accept()
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(raw, server_side=True) as connection:
            left = total
            buffer = bytearray(256 * 1024)
            while left > 0:
                left -= connection.recv_into(buffer) or left
            connection.sendall(b"done")
            while data := connection.recv(65536):
                connection.sendall(data)


def serve(directory: Path, total: int) -> None:
    """Listen in every way, print the ports, and end when standard input does."""
    credentials = Credentials.load(directory / "ca.pem", directory / "cert.pem", directory / "key.pem")
    factory = Factory.forProtocol(lambda: Answerer(total))
    owner = Owner("secondary", lambda: Answerer(total))
    listener = LinkListener(reactor, owner, credentials, "localhost", 0, "127.0.0.1", PATIENT)
    listener.start()
    tls = TLSMemoryBIOFactory(stockOptions(credentials), False, factory)
    listening = socket.create_server(("127.0.0.1", 0))
    context = blockingContext(directory, ssl.Purpose.CLIENT_AUTH)
    threading.Thread(target=answerBlocking, args=(listening, context, total), daemon=True).start()
    ports = {
        "link": listener.address.port,  # type: ignore[attr-defined]
        "tcp": reactor.listenTCP(0, factory, interface="127.0.0.1").getHost().port,
        "twisted_tls": reactor.listenTCP(0, tls, interface="127.0.0.1").getHost().port,
        "ssl": listening.getsockname()[1],
    }
    print(json.dumps(ports), flush=True)

    def wait() -> None:
        sys.stdin.read()
        reactor.callFromThread(reactor.stop)

    threading.Thread(target=wait, daemon=True).start()
    reactor.run()


# -- the process that asks


async def askLink(credentials: Credentials, port: int, total: int) -> Result:
    owner = Owner("primary", lambda: Asker(total))
    dialer = LinkDialer(reactor, owner, credentials, "127.0.0.1", port, "localhost", PATIENT)
    dialer.start()
    try:
        session = await owner.established.addTimeout(TIMEOUT, reactor)
        assert isinstance(session.colo, Asker)
        return await session.colo.measure()
    finally:
        await dialer.stop()


async def askTwisted(options: CertificateOptions | None, port: int, total: int) -> Result:
    factory = Factory.forProtocol(lambda: Asker(total))
    tls = factory if options is None else TLSMemoryBIOFactory(options, True, factory)
    connected: Any = await TCP4ClientEndpoint(reactor, "127.0.0.1", port).connect(tls)
    asker: Asker = connected if options is None else connected.wrappedProtocol
    transport: Any = asker.transport
    transport.setTcpNoDelay(True)
    try:
        return await asker.measure()
    finally:
        transport.loseConnection()


def askBlocking(directory: Path, port: int, total: int) -> Result:
    context = blockingContext(directory, ssl.Purpose.SERVER_AUTH)
    raw = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with context.wrap_socket(raw, server_hostname="localhost") as connection:
        start, startCPU = perf_counter(), process_time()
        for _ in range(total // len(PIECE)):
            connection.sendall(PIECE)
        connection.recv(4)
        speed, cpu = total / (perf_counter() - start) / 1e6, (process_time() - startCPU) / total * 1e9
        trips = []
        for _ in range(PINGS):
            start = perf_counter()
            connection.sendall(b"ping")
            connection.recv(4)
            trips.append((perf_counter() - start) * 1000)
        return speed, cpu, median(trips)


async def run(directory: Path, total: int, runs: int) -> dict[str, Any]:
    credentials = Credentials.load(directory / "ca.pem", directory / "cert.pem", directory / "key.pem")
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(directory), "--megabytes", str(total >> 20)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    results: dict[str, list[Result]] = {kind: [] for kind in KINDS}
    try:
        ports = json.loads(await deferToThread(server.stdout.readline))
        for _ in range(runs):
            for kind in KINDS:
                if kind == "link":
                    result = await askLink(credentials, ports[kind], total)
                elif kind == "ssl":
                    result = await deferToThread(askBlocking, directory, ports[kind], total)
                else:
                    options = None if kind == "tcp" else stockOptions(credentials)
                    result = await askTwisted(options, ports[kind], total)
                results[kind].append(result)
    finally:
        server.communicate(timeout=10)
    return {
        "benchmark": "link",
        "megabytes": total >> 20,
        "runs": runs,
        **{
            name: {kind: spread([result[n] for result in results[kind]]) for kind in KINDS}
            for n, name in enumerate(("mb_per_s", "cpu_s_per_gb", "round_trip_ms"))
        },
        "link_vs": {kind: ratio(results, kind, 0) for kind in KINDS[1:]},
        "link_cpu_vs": {kind: ratio(results, kind, 1) for kind in KINDS[1:]},
    }


def ratio(results: dict[str, list[Result]], kind: str, n: int) -> float:
    """The median of run by run: what the link had, divided by what C{kind} had."""
    return round(median(a[n] / b[n] for a, b in zip(results["link"], results[kind], strict=True)), 2)


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def report(result: dict[str, Any]) -> None:
    print(f"{'':12} {'MB/s':>7} {'(min-max)':>12} {'CPU s/GB':>9} {'round trip ms':>14}")
    for kind in KINDS:
        speed, cpu, trip = (result[name][kind] for name in ("mb_per_s", "cpu_s_per_gb", "round_trip_ms"))
        extremes = f"({speed['min']:.0f}-{speed['max']:.0f})"
        print(f"{kind:12} {speed['median']:7.0f} {extremes:>12} {cpu['median']:9.2f} {trip['median']:14.3f}")
    for name, what in ("link_vs", "speed"), ("link_cpu_vs", "CPU time"):
        print(f"link's {what} against " + ", ".join(f"{kind} {x:.2f}x" for kind, x in result[name].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the link against TCP and TLS in other shapes.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--megabytes", type=int, default=128, help="MiB in a run (default 128)")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    total = options.megabytes << 20
    if options.serve:
        serve(options.serve, total)
        return

    async def benchmark(_: object) -> None:
        with tempfile.TemporaryDirectory() as name:
            initAuthority(Path(name) / "ca")
            issue(Path(name) / "ca", LOCAL_NAMES, Path(name))
            result = await run(Path(name), total, options.runs)
        if options.json:
            print(json.dumps(result))
        else:
            report(result)

    react(lambda r: Deferred.fromCoroutine(benchmark(r)))


if __name__ == "__main__":
    main()
