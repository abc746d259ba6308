"""
Tests of L{colotx.vmstate}: bytes of a real QEMU and of its grammar, and what readers make of sound streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from uuid import UUID

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from colotx.errors import StreamError
from colotx.test.streams import (
    BLOCKS,
    MACHINE,
    QEMU_CONFIGURATION,
    RAM,
    ROM,
    VMDESC,
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
    InitialComplete,
    InitialReader,
    Pages,
    RamBlock,
    RamEnd,
    RamReader,
    RamWriter,
    Xbzrle,
    Zeros,
    applyXbzrle,
    restoreStream,
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

    def test_vmdescOfQemu10(self) -> None:
        """It begins with the configuration's description."""
        writer = RamWriter()
        vmdesc = b'{"configuration": {}, ' + VMDESC[1:]
        stream = opening(writer) + b"".join(writer.end([])) + deviceState() + writer.vmdesc(vmdesc)
        for size in (1, 7, 10**6):
            reader = InitialReader(RamReader())
            for piece in pieces(stream, [size] * len(stream)):
                reader.feed(piece)
            assert reader.complete is not None
            self.assertEqual(reader.complete.vmdesc, vmdesc)

    def test_decoys(self) -> None:
        """Device data that looks like a vmdesc is not taken for it, wherever the bytes are cut."""
        decoys = [
            b'\0\6\0\0\0\x20{"page_size": 1, "devices": []} ',
            b'\0\6\0\0\xff\xff{"page_size": 1',
            b'\0\6\xff\xff\xff\xff{"page_size"',
            b'\0\6\0\0\0\x42{"page_size": 1, "devices": [{"name": "other", "instance_id": 0}]}',
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

    def test_switchoverOfQemu10(self) -> None:
        """QEMU 10.0 announces the switch-over before the RAM of every checkpoint; other commands have no place."""
        writer = RamWriter()
        ram = ramAfter(opening(writer))
        stream = bytes.fromhex("08000b0000") + checkpoint(writer, [pages(RAM.name, [1, 2])])
        for cut in range(7):
            reader = CheckpointReader(ram)
            reader.feed(stream[:cut])
            events, consumed = reader.feed(stream[cut:] + b"rest")
            self.assertTrue(reader.complete)
            self.assertEqual(consumed, len(stream) - cut)
            self.assertIsInstance(events[-1], RamEnd)
        self.assertRaises(StreamError, CheckpointReader(ram).feed, bytes.fromhex("0800010000") + stream)

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

    def test_fillWithinRun(self) -> None:
        """A run of pages of zeros ends where another fill begins."""
        filled = [
            zeros(RAM.name, range(20)),
            zeros(RAM.name, range(20, 40), 7),
            zeros(RAM.name, range(40, 60)),
        ]
        writer = RamWriter()
        events, _ = CheckpointReader(ramAfter(opening(writer))).feed(checkpoint(writer, filled))
        self.assertEqual(applied(events), applied(filled))

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
