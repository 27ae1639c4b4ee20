"""Which events become lines: those of the program, and what others do to its memory."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mmunotify.traces.record.compose import Composer
from mmunotify.traces.record.timeline import COLUMNS, Events, merge, told
from mmunotify.traces.record.writer import RecordingWriter, scratch

if TYPE_CHECKING:
    from pathlib import Path

ROOT, KSWAPD, OTHER = 7, 66, 99
EXECVE, CLONE, MMAP = 59, 56, 9


def numbers(*rows: tuple[int, str, int, tuple[int, ...]]) -> Events:
    values = np.zeros((len(rows), COLUMNS), np.uint64)
    for index, row in enumerate(rows):
        values[index, : len(row[3])] = row[3]
    return Events(
        np.array([row[0] * 1000 for row in rows], np.uint64),
        np.frombuffer("".join(row[1] for row in rows).encode(), np.uint8),
        np.array([row[2] for row in rows], np.int64),
        values,
        {},
    )


def words(*rows: tuple[int, str, int, str]) -> Events:
    return told((time * 1000, kind, tid, text) for time, kind, tid, text in rows)


def composed(tmp_path: Path, *streams: Events) -> tuple[Composer, list[str]]:
    output = tmp_path / "out.mmt"
    with scratch(output) as body:
        writer = RecordingWriter(output, body)
        composer = Composer(writer, ROOT, 0, kernel_tasks={KSWAPD})
        composer.compose(merge(iter([stream]) for stream in streams), lambda: None)
        writer.finish({})
    return composer, output.read_text().splitlines()[1:]


BEGIN = numbers((10, ">", ROOT, (EXECVE,)), (12, "<", ROOT, (EXECVE, 0)))
MAPPED = words((11, "o", ROOT, "1000 9000 rw-p 0 0 //anon"))


def test_it_begins_with_the_execve_of_the_root(tmp_path: Path) -> None:
    before = numbers((1, "f", ROOT, (1, 2, 3)), (2, ">", 6, (EXECVE,)))
    _, lines = composed(tmp_path, before, BEGIN, MAPPED)
    assert lines == ["10 > 7 execve ", "1 o 7 1000 9000 rw-p 0 0 //anon", "1 < 7 execve 0"]


@pytest.mark.parametrize(
    ("events", "lines"),
    [
        # Writeback by a kernel thread is followed by no counter.
        ([(20, "u", KSWAPD, (0x1000, 0x2000))], ["8 u 66 1000 2000"]),
        # What another program does to its own memory neither.
        ([(20, "u", OTHER, (0x1000, 0x2000))], []),
        # Nobody's in the tree is there.
        ([(20, "u", KSWAPD, (0x9000, 0xA000)), (20, "a", KSWAPD, (0x9000, 0xA000))], []),
        ([(20, "a", KSWAPD, (0x1000, 0x2000)), (21, "t", KSWAPD, (0x1000,))],
         ["8 a 66 1000 2000", "1 t 66 1000"]),
        ([(20, "a", OTHER, (0x1000, 0x2000)), (21, "t", OTHER, (0x1000,))], []),
        # A counter of somebody else's says that it was about that.
        ([(20, "u", KSWAPD, (0x1000, 0x2000)), (21, "m", KSWAPD, (5, 1, 0))], []),
        # One that the tree has introduced says that it was ours, whoever did it.
        ([(13, ">", ROOT, (CLONE,)), (14, "m", ROOT, (5, 1, 4096)), (15, "<", ROOT, (CLONE, 8)),
          (20, "u", OTHER, (0x1000, 0x2000)), (21, "m", OTHER, (5, 1, 2**64 - 4096)),
          (22, "a", OTHER, (0x1000, 0x2000))],
         ["1 > 7 clone 0 0 0 0 0", "1 m 7 5 1 4096", "1 < 7 clone 8",
          "5 u 99 1000 2000", "1 m 99 5 1 -4096", "1 a 99 1000 2000"]),
    ],
)  # fmt: skip
def test_of_what_others_do_what_is_about_the_tree_is_kept(
    tmp_path: Path, events: list[tuple[int, str, int, tuple[int, ...]]], lines: list[str]
) -> None:
    assert composed(tmp_path, BEGIN, MAPPED, numbers(*events))[1][3:] == lines


def test_a_task_whose_making_was_lost_is_recorded_all_the_same(tmp_path: Path) -> None:
    events = numbers(
        (20, ">", 8, (MMAP, 0, 4096, 3, 0x22, 0xFFFFFFFF, 0)),
        (21, "<", 8, (MMAP, 0x5000)),
        (22, "n", 8, (9, 0x1200011)),
        (23, "f", 9, (0x5000, 1, 6)),
        (24, "e", 8, ()),
        (25, "e", 9, ()),
    )
    _, lines = composed(tmp_path, BEGIN, MAPPED, events)
    assert [line.split(" ", 1)[1] for line in lines[3:]] == [
        *("> 8 mmap 0 1000 3 22 ffffffff 0", "< 8 mmap 5000", "n 8 9 1200011"),
        *("f 9 5000 1 6", "e 8", "e 9"),
    ]


def test_a_thread_that_executes_goes_on_as_the_first(tmp_path: Path) -> None:
    events = numbers(
        (20, "n", ROOT, (8, 0x10100)),
        (21, ">", 8, (EXECVE,)),
        (22, "e", ROOT, ()),
        (25, "<", ROOT, (EXECVE, 0)),
        (30, "e", ROOT, ()),
    )
    mapped = words((23, "o", ROOT, "1000 2000 r-xp 0 5 /bin/b"), (24, "x", ROOT, "/bin/b"))
    _, lines = composed(tmp_path, BEGIN, MAPPED, mapped, events)
    assert [line.split(" ", 1)[1] for line in lines[3:]] == [
        *("n 7 8 10100", "> 8 execve ", "e 8", "> 7 execve "),
        *("o 7 1000 2000 r-xp 0 5 /bin/b", "x 7 /bin/b", "< 7 execve 0", "e 7"),
    ]


def test_programs_of_32_bits_have_no_system_calls_and_are_named(tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    narrow.write_bytes(struct.pack("<4sB", b"\x7fELF", 1).ljust(64, b"\0"))
    mapped = words(
        (11, "o", ROOT, f"1000 9000 r-xp 0 5 {narrow}"), (11, "x", ROOT, "whatever it was called")
    )
    events = numbers((20, ">", ROOT, (3, 1)), (21, "f", ROOT, (0x1000, 1, 4)), (22, "e", ROOT, ()))
    composer, lines = composed(tmp_path, BEGIN, mapped, events)
    assert [line.split()[1] for line in lines] == [">", "o", "x", "f", "e"]
    assert list(composer.tree.unobserved()) == [(str(narrow), "a program of 32 bits", 1)]


def test_a_program_is_observed_when_it_has_a_vm_and_named_when_it_can_have_none(
    tmp_path: Path,
) -> None:
    events = words(
        (11, "x", ROOT, "/bin/a"),
        (20, "o", ROOT, "a000 b000 r--s 0 5 anon_inode:kvm-vcpu:0"),
        (21, "v", ROOT, "S 1000 9000 rw-p 00000000 0 "),
        (32, "x", 8, "/bin/b"),
        (33, "!", 8, "Permission denied"),
    )
    made = numbers((30, "n", ROOT, (8, 0x1200011)), (40, "e", 8, ()), (41, "e", ROOT, ()))
    composer, lines = composed(tmp_path, BEGIN, events, made)
    assert list(composer.tree.unobserved()) == [
        ("/bin/a", "made by a clone that the C library did not see", 1),
        ("/bin/b", "no VM: Permission denied", 1),
    ]
    assert composer.tree.processes == 2
    assert [line.split()[1] for line in lines] == list(">x<ovnxee")
