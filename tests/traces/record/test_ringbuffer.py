"""Pages of the kernel's ring buffer, put together record by record, and what is read of them."""

from __future__ import annotations

import struct

import numpy as np

from mmunotify.traces.record.ringbuffer import decode

SIZE, DATA = 256, 16


def page(time: int, *records: bytes, flags: int = 0) -> bytes:
    body = b"".join(records)
    return struct.pack("<QQ", time, len(body) | flags).ljust(DATA, b"\0") + body.ljust(
        SIZE - DATA, b"\xff"
    )


def event(delta: int, payload: bytes) -> bytes:
    return struct.pack("<I", delta << 5 | len(payload) // 4) + payload


def long_event(delta: int, payload: bytes) -> bytes:
    return struct.pack("<II", delta << 5, len(payload) + 4) + payload


def extend(delta: int) -> bytes:
    return struct.pack("<II", (delta & (1 << 27) - 1) << 5 | 30, delta >> 27)


def stamp(time: int) -> bytes:
    return struct.pack("<II", (time & (1 << 27) - 1) << 5 | 31, time >> 27 & 0xFFFFFFFF)


def discarded(delta: int, size: int) -> bytes:
    return struct.pack("<II", delta << 5 | 29, size) + bytes(size - 4)


def payload(number: int, tid: int, *values: int) -> bytes:
    return struct.pack(f"<HHi{len(values)}Q", number, 0, tid, *values)


def test_records_of_every_form_are_found_with_their_times() -> None:
    raw = page(
        1000,
        event(0, payload(7, 42, 0x1234_5678_9ABC)),
        event(5, payload(8, 43, 1)),
        extend(1 << 30),
        event(1, payload(7, 42, 2**64 - 1)),
        discarded(10, 24),
        long_event(2, payload(9, 44, *range(15))),
        stamp(5 << 32),
        event(3, payload(7, 45, 5)),
    )
    found = decode(raw, SIZE, DATA)
    late = 1005 + (1 << 30) + 1
    assert found.times.tolist() == [1000, 1005, late, late + 12, (5 << 32) + 3]
    every = np.arange(5)
    assert (found.u32(0, every) & np.uint64(0xFFFF)).tolist() == [7, 8, 7, 9, 7]
    assert found.u32(4, every).tolist() == [42, 43, 42, 44, 45]
    assert found.u64(8, every[[0, 2]]).tolist() == [0x1234_5678_9ABC, 2**64 - 1]
    assert found.u64(8 + 8 * 14, every[3:4]).tolist() == [14]


def test_an_absolute_time_has_the_top_bits_of_its_page() -> None:
    raw = page(1 << 60 | 7, stamp(9), event(0, payload(7, 1, 0)))
    assert decode(raw, SIZE, DATA).times.tolist() == [1 << 60 | 9]


def test_pages_are_read_in_order_each_to_its_end() -> None:
    padding = struct.pack("<I", 29)
    raw = (
        page(10, event(0, payload(7, 1, 0)), event(1, payload(7, 2, 0)), padding)
        + page(20)
        + page(30, event(0, payload(7, 3, 0)), flags=1 << 31)
        + page(40, event(0, payload(7, 4, 0)), event(9, payload(7, 5, 0)))
    )
    found = decode(raw, SIZE, DATA)
    assert found.times.tolist() == [10, 11, 30, 40, 49]
    assert found.u32(4, np.arange(5)).tolist() == [1, 2, 3, 4, 5]


def test_a_string_is_where_its_field_says() -> None:
    text = b"/bin/a b\0"
    record = payload(7, 1) + struct.pack("<I", len(text) << 16 | 12) + text.ljust(12, b"?")
    found = decode(page(1, event(0, payload(7, 1, 0)), event(0, record)), SIZE, DATA)
    assert found.text(8, 1) == b"/bin/a b"


def test_nothing_recorded_is_nothing() -> None:
    assert len(decode(b"", SIZE, DATA)) == 0
    assert len(decode(page(5), SIZE, DATA)) == 0
