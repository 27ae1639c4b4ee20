"""A range as operations of a gate handle: nothing of it is left, and no more goes than must."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmunotify import ADDRESS_END, PAGE_SHIFT, PMD_SHIFT, ULONG_MAX
from mmunotify_gru.flush import purges
from mmunotify_gru.hardware.geometry import PURGE_ALL, REGION_SHIFT

REGION = 1 << REGION_SHIFT
BORDERS = [region * REGION for region in range(9)]
ADDRESSES = st.one_of(
    st.integers(0, ADDRESS_END),
    st.builds(
        lambda border, offset: min(max(border + offset, 0), ADDRESS_END),
        st.sampled_from([*BORDERS, 1 << 47, 1023 << 12, 1024 << 12]),
        st.integers(-5000, 5000),
    ),
)


def dropped(address: int, field: int, shift: int) -> tuple[int, int]:
    """What one operation drops: [start, end)."""
    assert 0 <= field < PURGE_ALL, "the field has ten bits"
    if field == PURGE_ALL - 1:
        return address // REGION * REGION, (address // REGION + 1) * REGION
    first = address >> shift
    return first << shift, (first + field + 1) << shift


@given(one=ADDRESSES, two=ADDRESSES, shift=st.sampled_from([PAGE_SHIFT, PMD_SHIFT]))
@example(one=0, two=ULONG_MAX, shift=PAGE_SHIFT)
@example(one=0, two=ADDRESS_END, shift=PAGE_SHIFT)
@example(one=ADDRESS_END - 1, two=ADDRESS_END, shift=PAGE_SHIFT)
@example(one=0, two=1023 << 12, shift=PAGE_SHIFT)
@example(one=0, two=1024 << 12, shift=PAGE_SHIFT)
def test_purges_cover_a_range_region_by_region(one: int, two: int, shift: int) -> None:
    """They are ascending, stay in one region each, and cover the range; short ones exactly."""
    start, end = min(one, two), max(one, two)
    if start == end:
        return
    at = start >> shift << shift
    for address, field in purges(start, end, shift):
        low, high = dropped(address, field, shift)
        assert low // REGION == (high - 1) // REGION == address // REGION
        assert low <= at < high
        if field < PURGE_ALL - 1:
            assert low == at
            assert high <= -(-end >> shift) << shift
        else:
            assert min(end, high) - max(start, low) > (PURGE_ALL - 2) << shift
        at = high
    assert at >= end


@pytest.mark.parametrize(("pages", "field"), [(1, 0), (2, 1), (1022, 1021), (1023, 1022)])
def test_up_to_1023_pages_are_dropped_exactly(pages: int, field: int) -> None:
    """The field holds one less than the count."""
    assert purges(0x7000, 0x7000 + (pages << 12)) == [(0x7000, field)]


@pytest.mark.parametrize("pages", [1024, 1025, 1 << 20])
def test_more_pages_are_everything(pages: int) -> None:
    """All ones in the field: whatever the ASID has in that region."""
    assert purges(0x7000, 0x7000 + (pages << 12)) == [(0x7000, 1023)]
