"""Pages of the kernel's trace ring buffer into columns, many pages at a time.

A page begins with the time of its first record and the number of bytes that follow. Each record has
a header of 5 bits of length (or what it is, if it is no event) and 27 bits of time since the record
before. Source: include/linux/ring_buffer.h, `enum ring_buffer_type`.

A page has to be walked record by record, so all pages take each step together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Words: TypeAlias = npt.NDArray[np.uint64]
    Indices: TypeAlias = npt.NDArray[np.int64]
    Bytes: TypeAlias = npt.NDArray[np.uint8]

_SIZE_BITS: Final = 0xFFFFF
"""The bits of a page's count that are one; those above say that records are missing before it."""
_LONG: Final = 0
_PADDING: Final = 29
_TIME_EXTEND: Final = 30
_TIME_STAMP: Final = 31
_DELTA_BITS: Final = 27
_TOP_BITS: Final = ~((1 << 59) - 1) & (1 << 64) - 1


@attrs.define
class Records:
    """The events of some pages of one ring, in the order in which they were recorded."""

    times: Words
    """Nanoseconds of the ring's clock."""
    data: npt.NDArray[np.uint32]
    """The pages, as 32-bit words."""
    places: Indices
    """Where in `data` each record begins."""

    def __len__(self) -> int:
        return len(self.places)

    def u32(self, offset: int, rows: Indices) -> Words:
        """A 32-bit field of some of the records; `offset` is in bytes."""
        return self.data[self.places[rows] + (offset >> 2)].astype(np.uint64)

    def u64(self, offset: int, rows: Indices) -> Words:
        """A 64-bit field of some of the records."""
        return self.u32(offset, rows) | self.u32(offset + 4, rows) << np.uint64(32)

    def text(self, offset: int, row: int) -> bytes:
        """A string of one record, whose place and length are in a field of type __data_loc."""
        place = int(self.places[row])
        location = int(self.data[place + (offset >> 2)])
        begin = place * 4 + (location & 0xFFFF)
        raw = self.data.view(np.uint8)[begin : begin + (location >> 16)].tobytes()
        return raw.partition(b"\0")[0]


def decode(raw: bytes, page_size: int, data_offset: int) -> Records:
    """Decode whole pages of one ring, which are in the order of time."""
    data = np.frombuffer(raw, np.uint32)
    pages = len(raw) // page_size
    heads = np.arange(pages, dtype=np.int64) * (page_size >> 2)
    times = _u64(data, heads)
    begins = heads + (data_offset >> 2)
    ends = begins + ((_u64(data, heads + 2) & np.uint64(_SIZE_BITS)).astype(np.int64) >> 2)
    found: list[tuple[Indices, Indices, Words]] = []
    rows = np.flatnonzero(begins < ends)
    at, now, end = begins[rows], times[rows], ends[rows]
    while len(rows):
        head = data[at]
        kind = (head & 31).astype(np.int64)
        delta = (head >> np.uint32(5)).astype(np.uint64)
        # A record of nothing but its header may be the last word of a page.
        array = data[np.minimum(at + 1, len(data) - 1)]
        extended = array.astype(np.uint64) << np.uint64(_DELTA_BITS) | delta
        stamped = extended | now & np.uint64(_TOP_BITS)
        now = np.where(
            kind == _TIME_STAMP, stamped, now + np.where(kind == _TIME_EXTEND, extended, delta)
        )
        event = kind < _PADDING
        found.append((rows[event], at[event] + 1 + (kind[event] == _LONG), now[event]))
        # The length of long records and of padding counts the word that it is in.
        long = (kind == _LONG) | (kind == _PADDING)
        size = np.where(long, array.astype(np.int64) + 3 >> 2, kind)
        at = at + 1 + np.where(kind >= _TIME_EXTEND, 1, size)
        rest = (at < end) & ~((kind == _PADDING) & (delta == 0))
        rows, at, now, end = rows[rest], at[rest], now[rest], end[rest]
    if not found:
        nothing = np.zeros(0, np.int64)
        return Records(nothing.astype(np.uint64), data, nothing)
    page, place, time = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(page, kind="stable")
    return Records(time[order], data, place[order])


def _u64(data: npt.NDArray[np.uint32], at: Indices) -> Words:
    return data[at].astype(np.uint64) | data[at + 1].astype(np.uint64) << np.uint64(32)
