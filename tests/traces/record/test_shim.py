"""What the shims tell the recorder, in a file that every recorded program can write to."""

from __future__ import annotations

from mmunotify.traces.record.shim import copies

MAPS = b"""\
55c0-55d0 r-xp 00001000 fe:00 26                         /usr/bin/a  b (deleted)
7ffe-7fff rw-p 00000000 00:00 0\x20
"""


def test_pieces_of_one_copy_are_put_together() -> None:
    other = b"@6 8 F 0\n55c0-55d0 r-xp 00001000 fe:00 26 /c\n"
    first, second = MAPS.splitlines(keepends=True)
    found = list(copies(b"@5 7 S 0\n" + first + other + b"@5 7 S 0\n" + second))
    assert found == [
        (5, 7, "S", 0, ["55c0-55d0 r-xp 00001000 fe:00 26 /usr/bin/a  b (deleted)",
                        "7ffe-7fff rw-p 00000000 00:00 0"]),
        (6, 8, "F", 0, ["55c0-55d0 r-xp 00001000 fe:00 26 /c"]),
    ]  # fmt: skip


def test_a_failure_is_an_errno() -> None:
    assert list(copies(b"@5 7 S 13\n")) == [(5, 7, "S", 13, [])]


def test_what_is_no_copy_is_passed_over() -> None:
    text = b"hello\n@x 7 S 0\n" + MAPS + b"@5 7 Q 0\n@5 7 S 0\nnonsense\n@5\n" + MAPS
    assert list(copies(text)) == [(5, 7, "S", 0, [])]
