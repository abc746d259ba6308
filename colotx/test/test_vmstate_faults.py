"""
Tests of L{colotx.vmstate} with streams in any chunking, cut, flipped, of noise, and with each thing that is refused.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from struct import pack

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import StreamError, UnsupportedStream
from colotx.test.streams import (
    BLOCKS,
    MACHINE,
    QEMU_CONFIGURATION,
    RAM,
    ROM,
    Image,
    Item,
    applied,
    checkpoint,
    deviceState,
    initial,
    opening,
    pages,
    pieces,
    ramAfter,
    readInitial,
    zeros,
)
from colotx.vmstate import (
    PAGE_SIZE,
    Blocks,
    CheckpointReader,
    InitialReader,
    Limits,
    Pages,
    RamBlock,
    RamReader,
    RamWriter,
    Xbzrle,
    Zeros,
)

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
