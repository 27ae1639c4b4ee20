"""What a block asks to be done: which events become one row, and which none."""

from __future__ import annotations

from typing import TypeAlias

import pytest

from mmunotify.traces.decode import decode
from mmunotify.traces.rows import COPIED, OPEN, SILENT, rows

Row: TypeAlias = tuple[int, str, int, int, int, int]
"""(first event, kind, task, pages, b, told)"""


def rows_of(text: str, *, ageing: bool = True) -> list[Row]:
    lines = [line.strip() for line in text.split(";")]
    block = decode("".join(f"1 {line}\n" for line in lines).encode(), 2, "test")
    found = rows(block, block.micros.cumsum(), ageing=ageing)
    return [(event, kind, tid, pages, b, told) for event, _, pages, kind, tid, _, b, told in found]


def test_next_page_faults_of_one_task_are_one_row() -> None:
    text = "f 7 1000 99 6; f 7 2fff 98 6; f 7 3000 99 6; f 7 4000 99 7; f 7 6000 99 7; e 7"
    assert rows_of(text) == [
        (0, "f", 7, 3, 6, SILENT),
        (3, "f", 7, 1, 7, SILENT),
        (4, "f", 7, 1, 7, SILENT),
        (5, "e", 7, 1, 0, OPEN),
    ]


def test_faults_of_two_tasks_are_not_one_row() -> None:
    assert [
        row[:4] for row in rows_of("f 7 1000 99 6; f 8 2000 99 6; f 7 2000 99 6; e 7; e 8")
    ] == [
        (0, "f", 7, 1),
        (1, "f", 8, 1),
        (2, "f", 7, 1),
        (3, "e", 7, 1),
        (4, "e", 8, 1),
    ]


def test_copy_has_its_announcement_in_its_row_whatever_others_do_meanwhile() -> None:
    text = "f 7 1234 99 7; f 8 1000 99 7; u 7 1000 2000; u 8 1000 2000; f 7 2000 99 7; "
    assert rows_of(text + "u 7 2000 3000; e 7; e 8") == [
        (0, "f", 7, 1, 7, COPIED),
        (1, "f", 8, 1, 7, COPIED),
        (4, "f", 7, 1, 7, COPIED),
        (6, "e", 7, 1, 0, OPEN),
        (7, "e", 8, 1, 0, OPEN),
    ]


def test_copies_in_a_row_are_one_row() -> None:
    text = "F 8 1000 3; u 8 1000 2000; f 7 1000 99 7; u 7 1000 2000; f 7 2000 99 7; u 7 2000 3000"
    assert rows_of(text + "; > 7 brk 0; > 8 brk 0")[:2] == [
        (0, "F", 8, 1, 3, COPIED),
        (2, "f", 7, 2, 7, COPIED),
    ]


@pytest.mark.parametrize(
    "after",
    [
        "u 7 5000 6000; e 7",
        "u 7 0 200000; e 7",
        "u 7 1000 2000; u 7 5000 6000; e 7",
        "u 7 1000 2000; a 7 5000 6000; e 7",
        "a 7 5000 6000; e 7",
        "m 7 aa 1 4096; e 7",
        "u 7 1000 2000",
        "u 8 1000 2000",
    ],
)
def test_fault_of_which_not_all_is_known_stays_open(after: str) -> None:
    assert rows_of(f"f 7 1000 99 7; {after}")[0] == (0, "f", 7, 1, 7, OPEN)


def test_announcements_of_the_next_page_each_are_one_row() -> None:
    text = (
        "u 7 1000 2000; u 7 2000 3000; u 7 3000 4000; u 8 4000 5000; u 8 5000 7000; u 8 6000 7000"
    )
    assert [row[:4] for row in rows_of(text)] == [
        (0, "u", 7, 3),
        (3, "u", 8, 1),
        (4, "u", 8, 1),
        (5, "u", 8, 1),
    ]


def test_reclaim_is_one_row_with_its_owner() -> None:
    text = "a 9 1000 2000; a 9 2000 3000; a 9 1000 2000; u 9 1000 2000; m 9 aa 1 4096; "
    text += "a 9 2000 3000; u 9 2000 3000; e 9"
    assert rows_of(text) == [
        (0, "a", 9, 2, 0x2000, OPEN),
        (2, "a", 9, 1, 0x2000, OPEN),
        (3, "r", 9, 1, 0xAA, OPEN),
        (5, "a", 9, 1, 0x3000, OPEN),
        (6, "r", 9, 1, 0, OPEN),
        (7, "e", 9, 1, 0, OPEN),
    ]


def test_nobody_is_asked_for_the_age_of_a_page_if_nobody_wants_to_know() -> None:
    text = "a 9 1000 2000; u 9 1000 2000; m 9 aa 1 4096; a 9 3000 4000; u 9 5000 6000; a 9 1 2; e 9"
    kinds = [kind for _, kind, *_ in rows_of(text, ageing=False)]
    assert kinds == ["r", "a", "u", "e"]


def test_a_copy_of_the_mappings_is_one_row_and_what_kvm_installed_none() -> None:
    text = (
        "v 7 S 1000 2000 rw-p 0 0 ; s 7 1 2; v 7 S 3000 4000 rw-p 0 0 x y; v 8 F 0 1 rw-p 0 0; e 7"
    )
    assert [row[:3] for row in rows_of(text)] == [(0, "v", 7), (3, "v", 8), (4, "e", 7)]
