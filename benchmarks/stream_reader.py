"""
How fast L{colotx.vmstate}'s reader is, against a plain copy of the same bytes in the same run.

Kinds of stream: B{uniform} (pages only, in runs), B{alternating} (page, zero, page, zero...), B{bursts} (one to six of
a kind in a row, as a guest's writes leave them). Of the mixed kinds the slower one counts as C{mixed}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

import numpy as np

from colotx.vmstate import CheckpointReader, InitialReader, Pages, RamBlock, RamReader, RamWriter, Zeros

MIB = 2**20
BLOCK = RamBlock("pc.ram", 2**40)


def bursts(pages: int, lengths: list[int]) -> Iterator[Pages | Zeros]:
    """Bursts of these lengths, pages and zeros in turn, of so many pages in all."""
    generator = np.random.default_rng(1)
    content = generator.integers(0, 256, (max(lengths), 4096), np.uint8)
    page = turn = 0
    while pages > 0:
        length = min(lengths[turn // 2 % len(lengths)], pages)
        addresses = np.arange(page, page + length, dtype=np.uint64) * np.uint64(4096)
        if turn % 2:
            yield Zeros(BLOCK.name, addresses, 0)
        else:
            yield Pages(BLOCK.name, addresses, content[:length])
            pages -= length
        page += length
        turn += 1


def uniform(pages: int) -> Iterator[Pages]:
    """Pages without zeros between."""
    content = np.random.default_rng(1).integers(0, 256, (1024, 4096), np.uint8)
    for first in range(0, pages, 1024):
        yield Pages(BLOCK.name, np.arange(first, first + 1024, dtype=np.uint64) * np.uint64(4096), content)


def checkpoint(items: Iterator[Pages | Zeros]) -> bytes:
    """The stream of a connection's first checkpoint."""
    writer = RamWriter()
    writer.start([BLOCK])
    return b"".join([*writer.end(items), writer.eof()])


def readAll(stream: bytes, chunk: int) -> int:
    """
    Read the stream as a socket would bring it.

    @return: pages seen, so that the work cannot be left out.
    """
    writer, ram = RamWriter(), RamReader()
    InitialReader(ram).feed(writer.header() + writer.configuration("none") + writer.start([BLOCK]))
    reader = CheckpointReader(ram)
    view, seen = memoryview(stream), 0
    for at in range(0, len(stream), chunk):
        for event in reader.feed(view[at : at + chunk])[0]:
            if isinstance(event, Pages):
                seen += len(event.addresses)
    if not reader.complete:
        raise SystemExit("the reader did not see the end of the stream")
    return seen


def copyAll(stream: bytes, chunk: int, target: bytearray) -> None:
    """What the machine's memory can do at best: copy the same chunks."""
    view, to = memoryview(stream), memoryview(target)
    for at in range(0, len(stream), chunk):
        to[at : at + chunk] = view[at : at + chunk]


def rate(work: Callable[[], object], size: int) -> float:
    """GB (10^9 bytes) a second of one call."""
    start = perf_counter()
    work()
    return size / (perf_counter() - start) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Reader of QEMU's migration stream: GB/s against memcpy.")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--mib", type=int, default=256, help="MiB of pages in each stream (default: 256)")
    parser.add_argument("--chunk", type=int, default=256, help="KiB fed at a time (default: 256)")
    parser.add_argument("--runs", type=int, default=9, help="runs, the kinds taking turns (default: 9)")
    options = parser.parse_args()
    pages, chunk = options.mib * MIB // 4096, options.chunk * 1024
    streams = {
        "uniform": checkpoint(uniform(pages)),
        "alternating": checkpoint(bursts(pages, [1])),
        "bursts": checkpoint(bursts(pages, [1, 3, 2, 6, 1, 4])),
    }
    target = bytearray(len(streams["uniform"]))
    copyAll(streams["uniform"], chunk, target)
    rates: dict[str, list[float]] = {"memcpy": [], **{kind: [] for kind in streams}}
    for run in range(options.runs):
        rates["memcpy"].append(rate(partial(copyAll, streams["uniform"], chunk, target), len(target)))
        for kind, stream in streams.items():
            rates[kind].append(rate(partial(readAll, stream, chunk), len(stream)))
        if not options.json:
            print(f"run {run + 1} of {options.runs}", file=sys.stderr)
    summary = {
        kind: {
            "median": round(statistics.median(values), 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
        }
        for kind, values in rates.items()
    }
    slower = min("alternating", "bursts", key=lambda kind: summary[kind]["median"])
    result = {
        "name": "stream_reader",
        "chunk_kib": options.chunk,
        "pages_mib": options.mib,
        "runs": options.runs,
        "uniform_gb_s": summary["uniform"]["median"],
        "mixed_gb_s": summary[slower]["median"],
        "memcpy_gb_s": summary["memcpy"]["median"],
        "uniform_to_memcpy": round(summary["uniform"]["median"] / summary["memcpy"]["median"], 3),
        "mixed_to_memcpy": round(summary[slower]["median"] / summary["memcpy"]["median"], 3),
        "gb_s": summary,
    }
    if options.json:
        print(json.dumps(result))
        return
    for kind, figures in summary.items():
        print(f"{kind:12} {figures['median']:7.2f} GB/s   ({figures['min']:.2f} to {figures['max']:.2f})")


if __name__ == "__main__":
    main()
