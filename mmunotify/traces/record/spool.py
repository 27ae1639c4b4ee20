"""Pages of a ring in a file, without their empty ends: a ring that is slow gives many such."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    from .tracefs import PageFormat

_LENGTH: Final = struct.Struct("=I")
_USED: Final = struct.Struct("=8xQ")
"""The second word of a page: bytes of records in it, and above them flags."""
_SIZE_BITS: Final = 0xFFFFF


def spool_page(file: BinaryIO, page: memoryview, form: PageFormat) -> int:
    """Append a page; returns the bytes that it took."""
    used: int = _USED.unpack_from(page)[0] & _SIZE_BITS
    length = min(form.data + used, form.size)
    file.write(_LENGTH.pack(length))
    file.write(page[:length])
    return _LENGTH.size + length


def read_pages(file: BinaryIO, form: PageFormat, count: int) -> bytes:
    """The next pages, at most so many, each of full size; nothing at the end."""
    pages = bytearray(count * form.size)
    for index in range(count):
        head = file.read(_LENGTH.size)
        if not head:
            del pages[index * form.size :]
            break
        (length,) = _LENGTH.unpack(head)
        begin = index * form.size
        pages[begin : begin + length] = file.read(length)
    return bytes(pages)
