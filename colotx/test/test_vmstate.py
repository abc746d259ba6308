"""
Tests of L{colotx.vmstate}: bytes of a real QEMU and of its grammar, then properties (any chunking, any cut, any flipped
byte), then each refusal.
"""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from struct import pack
from uuid import UUID

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import StreamError, UnsupportedStream
from colotx.vmstate import (
    PAGE_SIZE,
    Blocks,
    CheckpointReader,
    InitialComplete,
    InitialReader,
    Limits,
    Pages,
    RamBlock,
    RamEnd,
    RamEvent,
    RamReader,
    RamWriter,
    Xbzrle,
    Zeros,
    applyXbzrle,
    restoreStream,
)

RAM = RamBlock("pc.ram", 300 * PAGE_SIZE)
ROM = RamBlock("pc.rom", 40 * PAGE_SIZE)
BLOCKS = (RAM, ROM)
VMDESC = json.dumps({"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0}]}).encode()
MACHINE = "pc-i440fx-7.2"
QEMU_CONFIGURATION = bytes.fromhex(
    "070000000d70632d6934343066782d372e32051a636f6e66696775726174696f6e2f6361706162696c697469657300000001"
    "000000010f782d69676e6f72652d736861726564"
)
"""The configuration section of a QEMU 7.2.22 with x-ignore-shared."""

Item = Pages | Zeros | Xbzrle
Image = dict[tuple[str, int], object]


def addressesOf(numbers: Iterable[int]) -> NDArray[np.uint64]:
    return np.array(list(numbers), np.uint64) * np.uint64(PAGE_SIZE)


def pages(block: str, numbers: Sequence[int], seed: int = 0) -> Pages:
    """Pages that tell block, number and seed."""
    data = np.empty((len(numbers), PAGE_SIZE), np.uint8)
    for row, number in zip(data, numbers, strict=True):
        row[:] = np.frombuffer(pack(">IIQ", seed, len(block), number) * (PAGE_SIZE // 16), np.uint8)
    return Pages(block, addressesOf(numbers), data)


def zeros(block: str, numbers: Iterable[int], fill: int = 0) -> Zeros:
    return Zeros(block, addressesOf(numbers), fill)


def applied(events: Iterable[RamEvent], image: Image | None = None) -> Image:
    """What is in each page after the events; a delta remembers what it was applied to."""
    image = {} if image is None else image
    for event in events:
        if isinstance(event, Pages):
            for address, row in zip(event.addresses, event.data, strict=True):
                image[event.block, int(address)] = row.tobytes()
        elif isinstance(event, Zeros):
            image.update({(event.block, int(address)): event.fill for address in event.addresses})
        elif isinstance(event, Xbzrle):
            image[event.block, event.address] = (image.get((event.block, event.address)), event.data)
    return image


def checkpoint(writer: RamWriter, items: Iterable[Item]) -> bytes:
    return b"".join([*writer.end(items), writer.eof()])


def opening(writer: RamWriter, blocks: Sequence[RamBlock] = BLOCKS) -> bytes:
    """An initial stream up to its first PART or END."""
    return writer.header() + writer.configuration(MACHINE) + writer.enableColo() + writer.start(blocks)


def deviceState(payload: bytes = b"now") -> bytes:
    return RamWriter().deviceSection(7, "timer", 0, 2, payload) + b"\0"


def initial(items: Sequence[Item] = (), devices: bytes | None = None, vmdesc: bytes = VMDESC) -> bytes:
    """An initial stream: half of the items in PART, the others in END."""
    writer, half = RamWriter(), len(items) // 2
    return b"".join(
        [
            opening(writer),
            *writer.part(items[:half]),
            *writer.end(items[half:]),
            deviceState() if devices is None else devices,
            writer.vmdesc(vmdesc),
        ]
    )


def pieces(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """The data in pieces of these sizes, the rest at once."""
    at = 0
    for size in sizes:
        yield data[at : at + size]
        at += size
    yield data[at:]


def readInitial(data: bytes, sizes: Iterable[int] = ()) -> tuple[Image, InitialComplete | None]:
    reader, image = InitialReader(RamReader()), Image()
    for piece in pieces(data, sizes):
        applied(reader.feed(piece), image)
    return image, reader.complete


def ramAfter(data: bytes) -> RamReader:
    """The state of RAM sections after this beginning of an initial stream."""
    ram = RamReader()
    InitialReader(ram).feed(data)
    return ram


numbers = st.integers(0, 38)
blockNames = st.sampled_from([RAM.name, ROM.name])
items = st.lists(
    st.one_of(
        st.builds(pages, blockNames, st.lists(numbers, min_size=1, max_size=3), st.integers(0, 9)),
        st.builds(
            lambda first, count: pages(RAM.name, range(first, first + count)), numbers, st.integers(8, 20)
        ),
        st.builds(
            zeros, blockNames, st.lists(numbers, min_size=1, max_size=3), st.sampled_from([0, 0, 0, 7])
        ),
        st.builds(
            lambda first, count: zeros(RAM.name, range(first, first + count)), numbers, st.integers(8, 90)
        ),
        st.builds(
            Xbzrle,
            blockNames,
            numbers.map(lambda number: number * PAGE_SIZE),
            st.binary(min_size=3, max_size=30),
        ),
    ),
    max_size=14,
)
chunkings = st.one_of(
    st.just([1] * 3000),
    st.integers(1, 9000).map(lambda size: [size] * 90),
    st.lists(st.integers(0, 20000), max_size=20),
)


class WriterTests(SynchronousTestCase):
    """The writer gives QEMU's bytes."""

    def test_initial(self) -> None:
        """Each element as C{savevm.c} and C{ram.c} in QEMU have it, CONTINUE where the block is the same."""
        writer = RamWriter(sectionId=3)
        page = pages("a", [1, 2])
        stream = b"".join(
            [
                writer.header(),
                writer.configuration("pc"),
                writer.enableColo(),
                writer.start([RamBlock("a", 8 * 4096)]),
                *writer.part([zeros("a", [0]), page]),
                *writer.end([Xbzrle("a", 3 * 4096, b"xyz")]),
                writer.deviceSection(9, "dev", 1, 2, b"state"),
                writer.eof(),
                writer.vmdesc(b"{}"),
            ]
        )
        footer = bytes.fromhex("00000000000000107e00000003")
        expected = [
            bytes.fromhex("5145564d00000003"),
            bytes.fromhex("0700000002") + b"pc",
            bytes.fromhex("0800080000"),
            bytes.fromhex("0100000003") + b"\3ram" + bytes.fromhex("0000000000000004"),
            bytes.fromhex("0000000000008004") + b"\1a" + bytes.fromhex("0000000000008000") + footer,
            bytes.fromhex("0200000003"),
            bytes.fromhex("0000000000000002") + b"\1a\0",
            bytes.fromhex("0000000000001028") + page.data[0].tobytes(),
            bytes.fromhex("0000000000002028") + page.data[1].tobytes() + footer,
            bytes.fromhex("0300000003"),
            bytes.fromhex("0000000000003060") + b"\1\0\3xyz" + footer,
            bytes.fromhex("0400000009") + b"\3dev" + bytes.fromhex("0000000100000002"),
            b"state" + bytes.fromhex("7e00000009") + b"\0",
            bytes.fromhex("0600000002") + b"{}",
        ]
        self.assertEqual(stream, b"".join(expected))

    def test_configuration(self) -> None:
        """Capabilities are written as a real QEMU writes them."""
        self.assertEqual(RamWriter().configuration(MACHINE, ["x-ignore-shared"]), QEMU_CONFIGURATION)

    def test_bulk(self) -> None:
        """Many pages are written in few pieces."""
        written = list(RamWriter().end([pages(RAM.name, range(256))]))
        self.assertLess(len(written), 12)


class InitialTests(SynchronousTestCase):
    """L{InitialReader} on sound streams."""

    def test_complete(self) -> None:
        """Block list, pages, end and everything beside RAM."""
        reader = InitialReader(RamReader())
        events = reader.feed(initial([pages(RAM.name, [1]), zeros(ROM.name, [2])]))
        self.assertEqual(events[0], Blocks(BLOCKS))
        self.assertEqual(events[-1], RamEnd())
        self.assertEqual(
            reader.complete,
            InitialComplete(MACHINE, RamWriter().configuration(MACHINE), deviceState(), VMDESC, colo=True),
        )

    def test_subsections(self) -> None:
        """All of the configuration is kept; x-ignore-shared in it gives blocks their gpa."""
        writer = RamWriter()
        configuration = (
            QEMU_CONFIGURATION
            + writer.configuration("", uuid=UUID(int=1))[5:]
            + b"\5\x1econfiguration/target-page-bits\0\0\0\1\0\0\0\x0c"
        )
        blocks = (RamBlock("a", 4096, 0), RamBlock("b", 4096, 0xFFFC0000))
        stream = [writer.header(), configuration, writer.start(blocks), *writer.end([]), b"\0"]
        stream.append(writer.vmdesc(b'{"page_size": 4096, "devices": []}'))
        for size in (1, 7, 10**6):
            ram = RamReader()
            reader = InitialReader(ram)
            for piece in pieces(b"".join(stream), [size] * 500):
                reader.feed(piece)
            assert reader.complete is not None
            self.assertEqual(reader.complete.configuration, configuration)
            self.assertFalse(reader.complete.colo)
            self.assertEqual(ram.blocks, blocks)

    def test_switchover(self) -> None:
        """Newer sources announce the switch-over before END(ram)."""
        writer = RamWriter()
        stream = opening(writer) + bytes.fromhex("08000b0000") + b"".join(writer.end([]))
        _, complete = readInitial(stream + deviceState() + writer.vmdesc(VMDESC))
        self.assertIsNotNone(complete)

    def test_decoys(self) -> None:
        """Device data that looks like a vmdesc is not taken for it, wherever the bytes are cut."""
        decoys = [
            b'\0\6\0\0\0\x20{"page_size": 1, "devices": []} ',
            b'\0\6\0\0\xff\xff{"page_size": 1',
            b'\0\6\xff\xff\xff\xff{"page_size"',
            b'\0\6\0\0\0\x41{"page_size": 1, "devices": [{"name": "other", "instance_id": 0}]}',
            b'\0\6\0\0\0\x13{"page_size": 1234}}',
            b'{"page_size": 1}',
        ]
        devices = deviceState(b"".join(decoys) + b"end")
        for size in (11, 13, 10**6):
            _, complete = readInitial(initial(devices=devices), [size] * 1000)
            assert complete is not None
            self.assertEqual(complete.deviceState, devices)
            self.assertEqual(complete.vmdesc, VMDESC)

    def test_withoutVmdesc(self) -> None:
        """With suppress-vmdesc=on, only silence tells the end, and only after EOF."""
        writer = RamWriter()
        stream = opening(writer) + b"".join(writer.end([])) + deviceState()
        reader = InitialReader(RamReader(), vmdesc=False)
        reader.feed(stream[:-1])
        reader.endOfQuiet()
        self.assertIsNone(reader.complete)
        reader.feed(stream[-1:])
        reader.endOfQuiet()
        assert reader.complete is not None
        self.assertEqual((reader.complete.deviceState, reader.complete.vmdesc), (deviceState(), b""))

    def test_quietIsNoEnd(self) -> None:
        """Where a vmdesc is due, silence completes nothing."""
        reader = InitialReader(RamReader())
        reader.feed(initial()[: -len(VMDESC) - 5])
        reader.endOfQuiet()
        self.assertIsNone(reader.complete)


class CheckpointTests(SynchronousTestCase):
    """L{CheckpointReader} on sound streams."""

    def test_next(self) -> None:
        """The block of the last record is known in the next checkpoint, and what follows EOF is left alone."""
        writer = RamWriter()
        ram = ramAfter(opening(writer) + b"".join(writer.end([pages(ROM.name, [3])])))
        for number in (4, 5):
            stream = checkpoint(writer, [zeros(ROM.name, [number])])
            reader = CheckpointReader(ram)
            events, consumed = reader.feed(stream + b"\0\0\0\4")
            self.assertEqual(consumed, len(stream))
            self.assertTrue(reader.complete)
            self.assertEqual(applied(events), {(ROM.name, number * PAGE_SIZE): 0})
            self.assertEqual(reader.feed(b"\0\0\0\4"), ([], 0))

    def test_parts(self) -> None:
        """PART sections may come before END."""
        writer = RamWriter()
        ram = ramAfter(opening(writer))
        stream = b"".join([*writer.part([pages(RAM.name, [1])]), *writer.part([])]) + checkpoint(writer, [])
        reader = CheckpointReader(ram)
        events, consumed = reader.feed(stream)
        self.assertEqual((consumed, reader.complete, events[-1]), (len(stream), True, RamEnd()))

    def test_runIsView(self) -> None:
        """A run of pages is one event whose data lies in the caller's buffer."""
        writer = RamWriter()
        ram = ramAfter(opening(writer) + b"".join(writer.part([zeros(RAM.name, [0])])))
        stream = checkpoint(writer, [pages(RAM.name, range(1, 300))])
        events, _ = CheckpointReader(ram).feed(stream)
        run = events[0]
        assert isinstance(run, Pages)
        self.assertEqual([len(events), len(run.addresses)], [2, 299])
        self.assertTrue(np.shares_memory(run.data, np.frombuffer(stream, np.uint8)))

    def test_mixedIsFewEvents(self) -> None:
        """Records of alternating kinds make one event a kind, not one each."""
        writer = RamWriter()
        ram = ramAfter(opening(writer) + b"".join(writer.part([zeros(RAM.name, [0])])))
        mixed = [
            item
            for at in range(0, 200, 3)
            for item in (pages(RAM.name, [at, at + 1]), zeros(RAM.name, [at + 2]))
        ]
        events, _ = CheckpointReader(ram).feed(checkpoint(writer, mixed))
        self.assertEqual(len(events), 3)
        self.assertEqual(applied(events), applied(mixed))

    def test_lastOfAnAddress(self) -> None:
        """A page that comes several times in one feed has its last content, and comes once an event."""
        again = [3, 1, 2, 3, 1] * 6
        cases: list[list[Item]] = [
            [pages(RAM.name, [1], 1), zeros(RAM.name, [1, 2]), pages(RAM.name, [2], 2), pages(RAM.name, [4])],
            [pages(RAM.name, [1, 2, 3], 1), zeros(RAM.name, [3, 2]), pages(RAM.name, [3], 3)],
            [pages(RAM.name, again)],
            [zeros(RAM.name, again), pages(RAM.name, [1])],
        ]
        for twice in cases:
            writer = RamWriter()
            ram = ramAfter(opening(writer) + b"".join(writer.part([zeros(RAM.name, [0])])))
            events, _ = CheckpointReader(ram).feed(checkpoint(writer, twice))
            self.assertEqual(applied(events), applied(twice))
            for event in events:
                if isinstance(event, Pages | Zeros):
                    self.assertEqual(len(np.unique(event.addresses)), len(event.addresses))


class PropertyTests(SynchronousTestCase):
    """What holds for every stream."""

    @settings(max_examples=80, deadline=None)
    @given(items, chunkings)
    def test_identity(self, some: list[Item], sizes: list[int]) -> None:
        """Reader after writer is the identity, in any chunking."""
        image, complete = readInitial(initial(some), sizes)
        self.assertEqual(image, applied(some))
        assert complete is not None
        self.assertEqual(complete.deviceState, deviceState())

    @settings(max_examples=60, deadline=None)
    @given(items, chunkings)
    def test_checkpointIdentity(self, some: list[Item], sizes: list[int]) -> None:
        """The same for a checkpoint, which takes exactly its own bytes."""
        writer = RamWriter()
        reader = CheckpointReader(ramAfter(opening(writer)))
        stream = checkpoint(writer, some)
        image, taken = Image(), 0
        for piece in pieces(stream + b"behind", sizes):
            events, consumed = reader.feed(piece)
            applied(events, image)
            taken += consumed
        self.assertEqual((reader.complete, taken, image), (True, len(stream), applied(some)))

    @settings(max_examples=120, deadline=None)
    @given(items, st.data())
    def test_cut(self, some: list[Item], data: st.DataObject) -> None:
        """A stream that is cut anywhere is not complete, and no error either."""
        stream = initial(some)
        cut = data.draw(st.integers(0, len(stream) - 1))
        _, complete = readInitial(stream[:cut], data.draw(chunkings))
        self.assertIsNone(complete)

    def test_everyFlip(self) -> None:
        """
        Each byte that is not content of a page, changed in three ways, alone: a L{StreamError}, a wait, or a stream
        that is complete with pages within the blocks. (No check sum: another good address cannot be seen.)
        """
        run, single = pages(RAM.name, [1, 2]), pages(ROM.name, [5])
        others: list[Item] = [
            zeros(RAM.name, range(3, 30)),
            Xbzrle(ROM.name, 4096, b"\0\1x"),
            zeros(ROM.name, [6], 1),
        ]
        stream = initial([run, *others, single])
        content: set[int] = set()
        for row in (*run.data, *single.data):
            at = stream.index(row.tobytes())
            content.update(range(at, at + PAGE_SIZE))
        outcomes = {"error": 0, "wait": 0, "complete": 0}
        for at in sorted(set(range(len(stream))) - content):
            for mask in (0x01, 0x80, 0xFF):
                bad = bytearray(stream)
                bad[at] ^= mask
                for sizes in ((), (at, 1, 3)):
                    outcomes[self._flipped(bytes(bad), sizes)] += 1
        self.assertGreater(min(outcomes.values()), 100, outcomes)

    @settings(max_examples=60, deadline=None)
    @given(items, st.data())
    def test_flips(self, some: list[Item], data: st.DataObject) -> None:
        """Several bytes of any stream changed."""
        bad = bytearray(initial(some))
        for _ in range(data.draw(st.integers(1, 3))):
            bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
        self._flipped(bytes(bad), data.draw(chunkings))

    @settings(max_examples=100, deadline=None)
    @given(st.binary(max_size=300))
    def test_noise(self, noise: bytes) -> None:
        """Noise at every place of the grammar."""
        writer = RamWriter()
        begin = opening(writer)
        for start in (
            b"",
            writer.header(),
            writer.header() + writer.configuration(MACHINE),
            begin,
            begin + b"\2\0\0\0\2",
        ):
            self._flipped(start + noise, ())

    def _flipped(self, data: bytes, sizes: Iterable[int]) -> str:
        ram = RamReader()
        reader = InitialReader(ram)
        lengths: dict[str, int] = {}
        try:
            for piece in pieces(data, sizes):
                for event in reader.feed(piece):
                    if isinstance(event, Blocks):
                        lengths = {block.name: block.length for block in event.blocks}
                    elif isinstance(event, Pages | Zeros):
                        self.assertLess(int(event.addresses.max()), lengths[event.block])
                    elif isinstance(event, Xbzrle):
                        self.assertLess(event.address, lengths[event.block])
        except StreamError as error:
            self.assertTrue(str(error))
            return "error"
        return "wait" if reader.complete is None else "complete"

    def test_bounded(self) -> None:
        """However long a stream is, and however it is cut, the reader keeps less than two pages of it."""
        writer = RamWriter()
        ram = ramAfter(opening(writer))
        stream = b"".join(writer.part([pages(RAM.name, range(256))]))
        reader = CheckpointReader(ram)
        reader.feed(stream)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for _ in range(4):
            for piece in pieces(stream, [5000] * 250):
                reader.feed(piece)
        self.assertLess(tracemalloc.get_traced_memory()[0], 32 * 1024)


class RefusalTests(SynchronousTestCase):
    """Each thing that is refused, with what the message must say."""

    def refused(self, data: bytes, *words: str, kind: type[StreamError] = StreamError) -> None:
        for sizes in ((), [1] * len(data)):
            error = self.assertRaises(kind, readInitial, data, sizes)
            for word in words:
                self.assertIn(word, str(error))

    def records(self, records: bytes, *words: str, kind: type[StreamError] = StreamError) -> None:
        """Refused within a PART section."""
        self.refused(opening(RamWriter()) + bytes.fromhex("0200000002") + records, *words, kind=kind)

    def test_magic(self) -> None:
        self.refused(b"HTTP/1.1 200 OK", "no migration stream")
        self.refused(bytes.fromhex("5145564d00000002"), "version 3")

    def test_configuration(self) -> None:
        header = RamWriter().header()
        self.refused(header + b"\1", "0x01", "configuration")
        self.refused(header + b"\7\0\1\0\0", "65536", "255")
        self.refused(header + b"\7\0\0\0\1a\5\5other\0\0\0\1", "other", "not known")
        section = QEMU_CONFIGURATION[:-20] + b"\0\0\1\0"
        self.refused(header + section, "256 capabilities", "64")

    def test_unsupported(self) -> None:
        """Grammars of other kinds of migration are refused by name."""
        for flags, word in ((0x80, "RDMA"), (0x120, "compress"), (0x200, "multifd")):
            self.records(pack(">QB", flags, 0), word, kind=UnsupportedStream)
        start = RamWriter().header() + RamWriter().configuration(MACHINE)
        for command, word in ((1, "return-path"), (3, "postcopy-ram"), (4, "POSTCOPY"), (7, "postcopy")):
            self.refused(start + pack(">BHH", 8, command, 0), word, kind=UnsupportedStream)
        self.refused(start + b"\1\0\0\0\1\5block\0\0\0\0\0\0\0\1", "block", kind=UnsupportedStream)
        self.refused(start + deviceState(), "before the RAM", kind=UnsupportedStream)

    def test_commands(self) -> None:
        start = RamWriter().header() + RamWriter().configuration(MACHINE)
        self.refused(start + pack(">BHH", 8, 99, 0), "command 99")
        self.refused(start + pack(">BHH", 8, 8, 5), "command 8", "5 bytes")

    def test_records(self) -> None:
        self.records(pack(">QB", 0x1022, 0), "0x1000", "none")
        self.records(pack(">Q", 0x1008) + b"\4nope\0", "nope", "block list")
        self.records(pack(">Q", RAM.length | 2) + b"\6pc.ram\0", hex(RAM.length), "pc.ram")
        self.records(pack(">Q", 0x1004) + b"\0", "block list")
        self.records(pack(">Q", 0x1010) + b"\0", "EOS", "0x1000")
        self.records(pack(">QB", 0x400, 0), "0x400")
        self.records(pack(">Q", 0x40) + b"\6pc.ram\2\0\5", "mark 2")
        self.records(pack(">Q", 0x40) + b"\6pc.ram\1\x10\1", "4097")

    def test_recordsInBulk(self) -> None:
        """A run that leaves its block is seen as a single page is."""
        for item in (pages(ROM.name, range(20, 50)), zeros(ROM.name, range(20, 50))):
            self.refused(initial([item, item]), "pc.rom", hex(ROM.length))
        mixed = [
            item for at in range(30, 50, 2) for item in (pages(ROM.name, [at]), zeros(ROM.name, [at + 1]))
        ]
        self.refused(initial(mixed), "pc.rom")

    def test_sections(self) -> None:
        begin = opening(RamWriter())
        known = RamWriter().header() + RamWriter().configuration(MACHINE)
        end = b"".join(RamWriter().end([]))
        self.refused(known + b"\2\0\0\0\2", "never came")
        self.refused(begin + b"\3\0\0\0\7", "section 7", "section 2")
        self.refused(begin + RamWriter().start(BLOCKS), "second START")
        self.refused(begin + end[:-5] + b"\x7e\0\0\0\3", "section 3")
        self.refused(begin + end[:-5] + b"\0\0\0\0\0", "0x00", "0x7e")
        self.refused(begin + b"\x55", "0x55")
        self.refused(begin + end + b"\x08", "0x08")
        self.refused(known + b"\1\0\0\0\2\3ram\0\0\0\0\0\0\0\3", "version 3")

    def test_blockList(self) -> None:
        writer = RamWriter()
        known = writer.header() + writer.configuration(MACHINE)
        self.refused(known + writer.start([RamBlock("a", 4096), RamBlock("a", 4096)]), "'a'", "twice")
        self.refused(known + writer.start([RamBlock("", 4096)]), "no name")
        self.refused(known + writer.start([]), "empty")
        good = writer.start([RamBlock("a", 4096)])
        self.refused(known + good.replace(pack(">Q", 4096), pack(">Q", 8192)), "8192", "4096")
        self.refused(known + good.replace(b"\1a", b"\1\xff"), "UTF-8")
        self.refused(
            known + writer.start([RamBlock("a", 4096), RamBlock("b", 100), RamBlock("c", 3996)]), "100"
        )

    def test_behindTheEnd(self) -> None:
        """The source has nothing to say after its vmdesc."""
        self.refused(initial() + b"x", "behind")
        reader = InitialReader(RamReader())
        reader.feed(initial()[:-500])
        self.assertRaises(StreamError, reader.feed, initial()[-500:] + bytes(100_000))

    def test_limits(self) -> None:
        limits = Limits(blocks=1, deviceState=100, vmdesc=200)
        writer = RamWriter()
        self.assertRaises(StreamError, InitialReader(RamReader(limits), limits).feed, opening(writer))
        begin = opening(writer) + b"".join(writer.end([])) + deviceState()
        for described, least in ((True, 300), (False, 100)):
            reader = InitialReader(RamReader(), limits, described)
            reader.feed(begin)
            error = self.assertRaises(StreamError, reader.feed, bytes(least))
            self.assertIn(str(least), str(error))
        reader = InitialReader(RamReader())
        self.assertRaises(StreamError, reader.feed, begin + b'\0\6\0\0\xff\xff{"page_size"' * 65)

    def test_checkpoint(self) -> None:
        """What may not come in a checkpoint."""
        for bad in (
            b"\1\0\0\0\2\3ram",
            b"\0",
            b"\4",
            b"\x08\0\3\0\0",
            checkpoint(RamWriter(), [])[:-1] + b"\2",
        ):
            ram = ramAfter(opening(RamWriter()))
            self.assertRaises(StreamError, CheckpointReader(ram).feed, bad)
        self.assertRaises(StreamError, CheckpointReader(RamReader()).feed, checkpoint(RamWriter(), []))


def encodeXbzrle(old: bytes, new: bytes) -> bytes:
    """The delta as QEMU makes it, the plain way."""
    delta, at = b"", 0

    def number(value: int) -> bytes:
        return bytes((value,)) if value < 128 else bytes((value & 0x7F | 0x80, value >> 7))

    while at < len(old):
        same = at
        while at < len(old) and old[at] == new[at]:
            at += 1
        if at == len(old):
            break
        changed = at
        while at < len(old) and old[at] != new[at]:
            at += 1
        delta += number(changed - same) + number(at - changed) + new[changed:at]
    return delta


class XbzrleTests(SynchronousTestCase):
    """L{applyXbzrle}."""

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, PAGE_SIZE - 1), st.binary(min_size=1, max_size=300)), max_size=8)
    )
    def test_identity(self, writes: list[tuple[int, bytes]]) -> None:
        old = pages("a", [1]).data.tobytes()
        changed = bytearray(old)
        for at, data in writes:
            changed[at : at + len(data)] = data[: PAGE_SIZE - at]
        self.assertEqual(applyXbzrle(old, encodeXbzrle(old, bytes(changed))), bytes(changed))

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=60))
    def test_noise(self, noise: bytes) -> None:
        with contextlib.suppress(StreamError):
            self.assertEqual(len(applyXbzrle(bytes(PAGE_SIZE), noise)), PAGE_SIZE)

    def test_malformed(self) -> None:
        for delta in (
            "00",
            "0000",
            "0001",
            "0002aa",
            "8080",
            "80",
            "0001aa00",
            "0001aa0001aa",
            "ff7f01aa",
            "ff1f02aabb",
        ):
            self.assertRaises(StreamError, applyXbzrle, bytes(PAGE_SIZE), bytes.fromhex(delta))

    def test_edges(self) -> None:
        """The last byte of a page can change; an empty delta changes nothing."""
        self.assertEqual(
            applyXbzrle(bytes(PAGE_SIZE), bytes.fromhex("ff1f01aa")), bytes(PAGE_SIZE - 1) + b"\xaa"
        )
        self.assertEqual(applyXbzrle(bytes(PAGE_SIZE), b""), bytes(PAGE_SIZE))


class RestoreTests(SynchronousTestCase):
    """L{restoreStream}."""

    def setUp(self) -> None:
        generator = np.random.default_rng(1)
        self.contents = {}
        for block in BLOCKS:
            content = np.zeros((block.length // PAGE_SIZE, PAGE_SIZE), np.uint8)
            content[::3] = generator.integers(0, 256, content[::3].shape)
            self.contents[block.name] = content

    def stream(self, configuration: bytes, vmdesc: bytes = VMDESC, shared: Sequence[str] = ()) -> bytes:
        return b"".join(
            restoreStream(
                configuration,
                BLOCKS,
                lambda name: self.contents[name].reshape(-1).data,
                deviceState(),
                vmdesc,
                shared,
            )
        )

    def test_whole(self) -> None:
        """All pages are there, except those of zeros in the largest block, which begin so."""
        configuration = RamWriter().configuration(MACHINE)
        image, complete = readInitial(self.stream(configuration))
        self.assertEqual(complete, InitialComplete(MACHINE, configuration, deviceState(), VMDESC, colo=False))
        for block in BLOCKS:
            for number, row in enumerate(self.contents[block.name]):
                expected: object = row.tobytes() if number % 3 == 0 else 0 if block is ROM else None
                self.assertEqual(image.get((block.name, number * PAGE_SIZE)), expected)

    def test_shared(self) -> None:
        """No page of a shared block, the capability in the configuration, and a gpa for every block."""
        ram = RamReader()
        reader = InitialReader(ram)
        image = applied(reader.feed(self.stream(RamWriter().configuration(MACHINE), shared=[RAM.name])))
        assert reader.complete is not None
        self.assertEqual(reader.complete.configuration, QEMU_CONFIGURATION)
        self.assertEqual([block.gpa for block in ram.blocks], [0, 0])
        self.assertEqual({name for name, _ in image}, {ROM.name})

    def test_withoutVmdesc(self) -> None:
        """A machine that suppresses the vmdesc gets none."""
        self.assertTrue(self.stream(RamWriter().configuration(MACHINE), b"").endswith(deviceState()))
