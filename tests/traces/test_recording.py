"""The reader of recordings: what it yields, how it reads on, and what it says of what is wrong."""

from __future__ import annotations

import json
import lzma
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mmunotify.errors import RecordingError
from mmunotify.traces.decode import Call, Mapping, decode
from mmunotify.traces.recording import Recording

if TYPE_CHECKING:
    from mmunotify.traces.decode import Block

DATA = Path(__file__).parent.parent / "data" / "traces"
HEADER = {
    "cmd": ["prog"], "vm": True, "wall_ms": 3, "root": 7, "lost": [0, 0], "events": 0,
}  # fmt: skip
EVERY_KIND = """\
430 > 7 execve{blank}
615 o 7 7ffe000 7fff000 rw-p 0 0 [stack]
2 v 7 S 7ffe000 7fff000 rw-p 00000000 0 [stack]
4 F 7 563c43add764 2
12 x 7 wl/with blank.sh
5 < 7 execve 0
3 f 7 ffffffffff600000 7f13bd905b70 14
0 u 7 7f13bd892000 7f13bd893000
1 a 7 7f13bd893000 7f13bd894000
1 t 7 7f13bd893000
1 m 7 60dc9deb 1 4096
2 m 7 60dc9deb 2 -4096
9 n 7 8 1200000
1 > 7 brk 563c55129000
1 < 7 brk fffffffffffffff4
3 g 7 1000000 6
3 s 7 1000 14b706e67
1 e 7
""".format(blank=" ")


def recording(tmp_path: Path, text: str, **header: object) -> Recording:
    """A recording of these lines, with a header that counts them unless told otherwise."""
    fields = {**HEADER, "events": text.count("\n"), **header}
    path = tmp_path / "prog.mmt"
    path.write_text(f"#{json.dumps(fields)}\n{text}")
    return Recording(path)


def only_block(found: Recording) -> Block:
    (block,) = found.blocks()
    return block


def test_every_kind_of_line_is_decoded(tmp_path: Path) -> None:
    block = only_block(recording(tmp_path, EVERY_KIND))
    assert bytes(block.kinds).decode() == ">ovFx<fuatmmn><gse"
    assert block.micros.tolist() == [430, 615, 2, 4, 12, 5, 3, 0, 1, 1, 1, 2, 9, 1, 1, 3, 3, 1]
    assert set(block.tids.tolist()) == {7}
    numbers = dict(
        zip(bytes(block.kinds).decode(), zip(block.a, block.b, strict=True), strict=True)
    )
    assert numbers["f"] == (0xFFFF_FFFF_FF60_0000, 0x14)
    assert numbers["F"] == (0x563C_43AD_D764, 2)
    assert numbers["u"] == (0x7F13_BD89_2000, 0x7F13_BD89_3000)
    assert numbers["t"] == (0x7F13_BD89_3000, 0)
    assert numbers["n"] == (8, 0x1200000)
    assert numbers["s"] == (0x1000, 0x14B706E67)
    assert numbers["v"] == (0x7FFE000, 0x7FFF000)
    assert numbers["<"] == (2**64 - 12, 0)
    texts = [block.texts[row] for row in sorted(block.texts)]
    assert texts == [
        Call("execve", ()),
        Mapping(0x7FFE000, 0x7FFF000, "rw-p", 0, 0, "[stack]"),
        Call("brk", (0x563C_5512_9000,)),
    ]


def test_header_says_what_was_run(tmp_path: Path) -> None:
    header = recording(tmp_path, EVERY_KIND, lost=[2, 3]).header
    assert (header.command, header.root, header.wall_ms) == (("prog",), 7, 3)
    assert (header.events, header.lost, header.vm) == (18, 5, True)


@pytest.mark.parametrize("name", ["sqlite", "redis"])
def test_shipped_recordings_are_whole(name: str) -> None:
    found = Recording(DATA / f"{name}.mmt.xz")
    blocks = list(found.blocks())
    assert sum(map(len, blocks)) == found.read == found.header.events
    assert not found.truncated
    assert [block.line for block in blocks[:2]] == [2, 2 + len(blocks[0])][: len(blocks)]
    assert found.name == name


def test_decoding_does_not_depend_on_where_blocks_end() -> None:
    text = lzma.decompress((DATA / "sqlite.mmt.xz").read_bytes()).partition(b"\n")[2]
    whole = decode(text, 2, "sqlite")
    middle = text.index(b"\n", len(text) // 2) + 1
    halves = [decode(text[:middle], 2, "sqlite"), decode(text[middle:], 2, "sqlite")]
    for column in ("micros", "kinds", "tids", "a", "b"):
        parts = np.concatenate([getattr(half, column) for half in halves])
        assert (getattr(whole, column) == parts).all()
    texts = [half.texts[row] for half in halves for row in sorted(half.texts)]
    assert [whole.texts[row] for row in sorted(whole.texts)] == texts


def test_columns_are_what_the_lines_say() -> None:
    text = lzma.decompress((DATA / "sqlite.mmt.xz").read_bytes()).partition(b"\n")[2]
    block = decode(text, 2, "sqlite")
    kinds, addresses = bytes(block.kinds).decode(), block.a.tolist()
    for index, line in enumerate(text.decode().splitlines()):
        micros, kind, tid, *fields = line.split(" ")
        assert (int(micros), kind, int(tid)) == (
            block.micros[index],
            kinds[index],
            block.tids[index],
        )
        if kind in "fFua":
            assert addresses[index] == int(fields[0], 16)
            assert block.b[index] == int(fields[-1], 16)


def test_truncated_xz_is_read_up_to_where_it_ends(tmp_path: Path) -> None:
    whole = (DATA / "redis.mmt.xz").read_bytes()
    path = tmp_path / "cut.mmt.xz"
    path.write_bytes(whole[: len(whole) // 2])
    found = Recording(path)
    events = sum(map(len, found.blocks()))
    assert found.truncated
    assert found.header.events / 4 < events == found.read < found.header.events


def test_half_a_line_at_the_end_is_not_an_event(tmp_path: Path) -> None:
    found = recording(tmp_path, EVERY_KIND + "5 f 7 12")
    assert len(only_block(found)) == 18
    assert found.truncated


def test_events_missing_after_a_whole_line_are_noticed(tmp_path: Path) -> None:
    found = recording(tmp_path, EVERY_KIND, events=19)
    assert len(only_block(found)) == 18
    assert found.truncated


def test_more_events_than_the_header_says_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"18 events: expected 17"):
        list(recording(tmp_path, EVERY_KIND, events=17).blocks())


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        ("x f 7 1000 99 6", 1, "expected microseconds, a decimal number, found 'x'"),
        ("1 q 7 1000 99 6", 3, "expected kind, a letter of .*, found 'q'"),
        ("1 ff 7 1000 99 6", 3, "expected kind, a letter of .*, found 'ff'"),
        ("1 f 7a 1000 99 6", 5, "expected task, a decimal number, found '7a'"),
        ("1 f 7 10g0 99 6", 7, "expected address, a hexadecimal .*, found '10g0'"),
        ("1 f 7 1000 99", 14, "expected code, a hexadecimal .*, found the end of the line"),
        ("1 f 7 1000 99 6 5", 17, "expected the end of the line .*, found '5'"),
        ("1 f 7 1000  6", 12, "expected ip, a hexadecimal .*, found ''"),
        ("1 u 7 1000 12345678901234567", 12, "expected end, a hexadecimal .* at most 16 digits"),
        ("1 u 7 1000 2000\r", 12, r"found '2000\\r'"),
        ("1 m 7 60dc9deb 1 -", 18, "expected size, a decimal number, or a negative one"),
        ("1 < 7 brk", 10, "expected result, a hexadecimal .*, found the end of the line"),
        ("1 > 7 brk 1 zz", 13, "expected argument, a hexadecimal .*, found 'zz'"),
        ("1 > 7 brk  1", 11, "expected argument, a hexadecimal .*, found ''"),
        ("1 > 7 brk 1  ", 13, "expected argument, a hexadecimal .*, found ''"),
        ("1 > 7 brk 0x1", 11, "expected argument, a hexadecimal .*, found '0x1'"),
        ("1 < 7 brk 1g", 11, "expected result, a hexadecimal .*, found '1g'"),
        ("1 f 7 :000 99 6", 7, "expected address, a hexadecimal .*, found ':000'"),
        ("1 f 7 A000 99 6", 7, "expected address, a hexadecimal .*, found 'A000'"),
        ("1 n 7 12345678:0 0", 7, "expected child, a decimal number, found '12345678:0'"),
        ("1 v 7 S 1000 2000 rw-p 0 z", 26, "expected inode, a decimal .*, found 'z'"),
        ("1 v 7 SS 1000 2000 rw-p 0 0", 7, "expected copy, a letter of S F E, found 'SS'"),
        ("1 > 7", 6, "expected system call, a word, found the end of the line"),
        ("1 o 7 1000 2000 rw-p 0 inode /lib", 24, "expected inode, a decimal .*, found 'inode'"),
        ("1 v 7 Q 1000 2000 rw-p 0 0", 7, "expected copy, a letter of S F E, found 'Q'"),
        ("1 f 7 \udcff 99 6", 7, "expected address"),
        ("", 1, "expected microseconds, a decimal number, found ''"),
    ],
)
def test_what_is_wrong_is_said_with_line_and_column(
    tmp_path: Path, line: str, column: int, message: str
) -> None:
    path = tmp_path / "prog.mmt"
    text = f"#{json.dumps({**HEADER, 'events': 3})}\n1 e 7\n{line}\n1 e 7\n"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RecordingError, match=message) as caught:
        list(Recording(path).blocks())
    assert str(caught.value).startswith(f"{path}:3:{column}: ")


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (
            "1 e 7",
            r"prog.mmt:1:1: expected a line #{...}, the header of a recording, found '1 e 7'",
        ),
        ("", r"prog.mmt:1:1: expected a line #{...}"),
        ("#{]", r"prog.mmt:1:3: expected JSON"),
        ('#{"format": 2}', r"prog.mmt:1:2: expected 'format', a version up to 1, found 2"),
        ('#{"cmd": "prog"}', r"prog.mmt:1:2: expected 'cmd', a list of words, found 'prog'"),
        ('#{"cmd": ["prog"]}', r"expected 'wall_ms', milliseconds, found no such key"),
        ('#{"cmd": [], "wall_ms": true}', r"expected 'wall_ms', milliseconds, found True"),
        ('#{"cmd": [], "wall_ms": -1}', r"expected 'wall_ms', milliseconds, found -1"),
    ],
)
def test_header_is_checked(tmp_path: Path, first: str, message: str) -> None:
    path = tmp_path / "prog.mmt"
    path.write_text(f"{first}\n1 e 7\n")
    with pytest.raises(RecordingError, match=message):
        Recording(path)


def test_damaged_xz_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    whole = bytearray((DATA / "redis.mmt.xz").read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path = tmp_path / "bad.mmt.xz"
    path.write_bytes(whole)
    with pytest.raises(RecordingError, match=r"bad.mmt.xz: expected xz data up to byte \d+"):
        list(Recording(path).blocks())


def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    def peak(lines: int) -> int:
        path = tmp_path / f"{lines}.mmt.xz"
        header = f"#{json.dumps({**HEADER, 'events': lines})}\n"
        path.write_bytes(lzma.compress(header.encode() + b"1 f 7 1000 99 6\n" * lines, preset=0))
        tracemalloc.start()
        for _ in Recording(path).blocks():
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(400_000) < 1.3 * peak(100_000)
