"""
A client that measures a guest's services: round trips of small records, and bytes a second.

Usage, in the client's network namespace: C{python -m benchmarks.guest_traffic WHAT ADDRESS SECONDS}. One JSON object on
standard output. C{WHAT}:

  - C{echo}: a record goes to the echo service, comes back, and after a short rest the next one: milliseconds of each.
  - C{download}: what the guest sends as fast as it can: megabytes (10^6 bytes) a second.
  - C{upload}: what the guest takes in and sends back as fast as it can, counted when it is back: the same.

Every byte is checked. The guest's first bytes do not count.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import sys
import time

from colotx.lab.guestimage import ECHO_PORT, NUMBERS_PORT, numbers

RECORD = 64
"""Bytes."""
REST = 0.005
"""Seconds between a record's return and the next record."""
SETTLE = 1.0
"""Seconds of traffic that do not count."""
STALL = 20.0
"""Seconds without a byte, until the connection is given up."""
_PIECE = 1 << 16


def connect(address: str, port: int) -> socket.socket:
    """Open a connection; the guest may be busy for a while."""
    connection = socket.create_connection((address, port), STALL)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def echo(address: str, seconds: float) -> dict[str, object]:
    """Round trips, one after the other."""
    times: list[float] = []
    with connect(address, ECHO_PORT) as connection:
        begin = time.monotonic()
        number = 0
        while (now := time.monotonic()) < begin + SETTLE + seconds:
            number += 1
            record = b"%0*d\n" % (RECORD - 1, number)
            connection.sendall(record)
            if receive(connection, RECORD) != record:
                raise SystemExit("the guest's echo is not what it was sent")
            if now >= begin + SETTLE:
                times.append(round((time.monotonic() - now) * 1000, 4))
            time.sleep(REST)
    return {"ms": times}


def receive(connection: socket.socket, size: int) -> bytes:
    """@return: so many bytes."""
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise SystemExit("the guest closed the connection")
        data += piece
    return data


def download(address: str, seconds: float) -> dict[str, object]:
    """Bytes a second from the guest."""
    with connect(address, NUMBERS_PORT) as connection:
        return bulk(connection, numbers(), seconds, sends=False)


def upload(address: str, seconds: float) -> dict[str, object]:
    """Bytes a second to the guest and back."""
    with connect(address, ECHO_PORT) as connection:
        return bulk(connection, numbers(), seconds, sends=True)


def bulk(connection: socket.socket, content: bytes, seconds: float, sends: bool) -> dict[str, object]:
    """
    Receive C{content} again and again, and check it.

    @param sends: send the same as well.
    """
    expected = content + content[:_PIECE]
    begin = time.monotonic()
    counted = sent = seen = 0
    connection.setblocking(False)
    while (now := time.monotonic()) < begin + SETTLE + seconds:
        wanted = [connection] if sends else []
        readable, writable, _ = select.select([connection], wanted, [], STALL)
        if not readable and not writable:
            raise SystemExit(f"the guest sent nothing for {STALL:.0f} s")
        if writable:
            at = sent % len(content)
            sent += connection.send(expected[at : at + _PIECE])
        if readable:
            piece = connection.recv(_PIECE)
            at = seen % len(content)
            if not piece or piece != expected[at : at + len(piece)]:
                raise SystemExit("the guest's bytes are not what is due" if piece else "the guest hung up")
            seen += len(piece)
            counted += len(piece) if now >= begin + SETTLE else 0
    return {"mb_s": round(counted / seconds / 1e6, 3)}


MEASUREMENTS = {"echo": echo, "download": download, "upload": upload}


def main() -> int:
    """@return: the exit status."""
    parser = argparse.ArgumentParser(description="Measure a guest's services.")
    parser.add_argument("what", choices=list(MEASUREMENTS))
    parser.add_argument("address")
    parser.add_argument("seconds", type=float)
    options = parser.parse_args()
    print(json.dumps(MEASUREMENTS[options.what](options.address, options.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
