"""Pages that go to a file and come back."""

from __future__ import annotations

import io
import struct

from mmunotify.traces.record.spool import read_pages, spool_page
from mmunotify.traces.record.tracefs import PageFormat

FORM = PageFormat(size=256, data=16)


def page(length: int, flags: int = 0) -> bytes:
    return (struct.pack("=QQ", 1, length | flags) + b"x" * length).ljust(FORM.size, b"\0")


def test_pages_come_back_in_order_and_take_no_more_than_they_hold() -> None:
    pages = [page(8), page(0), page(240), page(16, 1 << 31)]
    file = io.BytesIO()
    taken = sum(spool_page(file, memoryview(bytearray(raw)), FORM) for raw in pages)
    assert taken == file.tell() < 4 * (16 + 4) + 8 + 240 + 16 + 1
    file.seek(0)
    assert read_pages(file, FORM, 3) == b"".join(pages[:3])
    assert read_pages(file, FORM, 3) == pages[3]
    assert read_pages(file, FORM, 3) == b""


def test_no_page_is_longer_than_a_page() -> None:
    file = io.BytesIO()
    spool_page(file, memoryview(bytearray(page(240, 0)[:8] + b"\xff" * 248)), FORM)
    file.seek(0)
    assert len(read_pages(file, FORM, 1)) == FORM.size
