"""Page arithmetic, at the edges of the address space too."""

from __future__ import annotations

import pytest

from mmunotify.errors import MmuNotifyError, RangeError
from mmunotify.ranges import (
    ADDRESS_END,
    PAGE_SIZE,
    PMD_SIZE,
    ULONG_MAX,
    Event,
    Range,
    page_count,
    page_down,
    page_up,
)

LAST_PAGE = ADDRESS_END - PAGE_SIZE


def test_sizes_are_those_of_x86() -> None:
    assert (PAGE_SIZE, PMD_SIZE) == (4096, 2 << 20)
    assert ULONG_MAX + 1 == ADDRESS_END == 2**64


def test_events_have_the_numbers_of_the_kernel() -> None:
    names = "UNMAP CLEAR PROTECTION_VMA PROTECTION_PAGE SOFT_DIRTY RELEASE MIGRATE EXCLUSIVE"
    assert [event.name for event in sorted(Event)] == names.split()
    assert sorted(Event) == list(range(8))


def test_a_range_is_a_blockable_unmap_of_nobodys_by_default() -> None:
    rng = Range(0x1000, 0x3000)
    assert (rng.event, rng.blockable, rng.owner, rng.span) == (Event.UNMAP, True, None, 0)
    owner = object()
    rng = Range(0x1000, 0x3000, Event.MIGRATE, owner=owner)
    assert (rng.start, rng.end, rng.event, rng.owner) == (0x1000, 0x3000, Event.MIGRATE, owner)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, ADDRESS_END),
        (0, ULONG_MAX),
        (LAST_PAGE, ADDRESS_END),
        (ULONG_MAX, ADDRESS_END),
        (0, 1),
    ],
)
def test_any_range_up_to_the_end_of_the_address_space_is_legal(start: int, end: int) -> None:
    rng = Range(start, end)
    assert (rng.start, rng.end) == (start, end)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 0),
        (0x2000, 0x1000),
        (-PAGE_SIZE, PAGE_SIZE),
        (0, ADDRESS_END + 1),
        (ADDRESS_END, ADDRESS_END),
        (ADDRESS_END, ADDRESS_END + PAGE_SIZE),
    ],
)
def test_an_impossible_range_is_refused_by_its_numbers(start: int, end: int) -> None:
    with pytest.raises(RangeError, match=f"{start:#x}, {end:#x}.*expected 0 <= start < end"):
        Range(start, end)


def test_a_range_error_is_a_value_error_of_this_package() -> None:
    assert issubclass(RangeError, ValueError)
    assert issubclass(RangeError, MmuNotifyError)


def test_ranges_have_no_attributes_but_their_own() -> None:
    with pytest.raises(AttributeError):
        Range(0, 1).stop = 2  # type: ignore[attr-defined]


def test_repr_shows_the_addresses_the_event_and_nonblock() -> None:
    rng = Range(0x1000, 0x3000, Event.CLEAR)
    assert repr(rng) == "<Range [0x1000, 0x3000) CLEAR>"
    rng.blockable = False
    assert repr(rng) == "<Range [0x1000, 0x3000) CLEAR nonblock>"


@pytest.mark.parametrize(
    ("start", "end", "pages"),
    [
        (0, 1, 1),
        (0, PAGE_SIZE, 1),
        (0, PAGE_SIZE + 1, 2),
        (PAGE_SIZE - 1, PAGE_SIZE + 1, 2),
        (LAST_PAGE, ADDRESS_END, 1),
        (0, ULONG_MAX, 1 << 52),
        (0, ADDRESS_END, 1 << 52),
    ],
)
def test_pages_counts_partly_covered_ones(start: int, end: int, pages: int) -> None:
    assert Range(start, end).pages == page_count(start, end) == pages


def test_rounding_up_never_wraps_to_zero() -> None:
    """Z36: the GRU rounded -1UL up to 0 and purged by accident what it purged."""
    assert page_up(ULONG_MAX) == ADDRESS_END
    assert page_up(ADDRESS_END) == ADDRESS_END
    assert page_up(LAST_PAGE) == LAST_PAGE
    assert (page_up(0), page_up(1), page_up(PAGE_SIZE)) == (0, PAGE_SIZE, PAGE_SIZE)


def test_rounding_down() -> None:
    assert page_down(ULONG_MAX) == LAST_PAGE
    assert (page_down(PAGE_SIZE - 1), page_down(PAGE_SIZE)) == (0, PAGE_SIZE)


@pytest.mark.parametrize(
    ("start", "end", "common"),
    [
        (0, 0x1000, None),
        (0x3000, 0x4000, None),
        (0, 0x1001, (0x1000, 0x1001)),
        (0x2FFF, 0x4000, (0x2FFF, 0x3000)),
        (0x1800, 0x2000, (0x1800, 0x2000)),
        (0, ADDRESS_END, (0x1000, 0x3000)),
        (0x1000, 0x3000, (0x1000, 0x3000)),
        (0x2000, 0x2000, None),
    ],
)
def test_clamp_is_the_common_part_and_overlaps_whether_there_is_one(
    start: int, end: int, common: tuple[int, int] | None
) -> None:
    """An empty range has no address in common with anything, wherever it lies."""
    rng = Range(0x1000, 0x3000)
    assert rng.clamp(start, end) == common
    assert rng.overlaps(start, end) is (common is not None)


def test_clamp_of_everything() -> None:
    everything = Range(0, ULONG_MAX, Event.SOFT_DIRTY)
    assert everything.clamp(LAST_PAGE, ADDRESS_END) == (LAST_PAGE, ULONG_MAX)
    assert everything.overlaps(LAST_PAGE, ADDRESS_END)
    assert not everything.overlaps(ULONG_MAX, ADDRESS_END)
