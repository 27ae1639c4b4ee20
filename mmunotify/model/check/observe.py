"""What a process looks like from outside, in the terms of a recording.

A recording numbers pages from the start of its area. A page is seen as a code (how it is mapped)
and a frame; which one it is says nothing, only which pages share one and which still have theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs

from mmunotify.drivers import AtomicDriver
from mmunotify.ranges import PAGE_SHIFT, Range

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmunotify.model.mm import AddressSpace

BASE: Final = 0x1000_0000_0000
"""Where the area of every recording begins, in bytes."""
AREA_PAGES: Final = 1 << 21

Announcement: TypeAlias = tuple[str, int | str, int | str]
"""("u" or "a", first page, page after the last), or ("t", page, "")."""
FrameKey: TypeAlias = tuple[int, int]
"""A frame and its generation."""


@attrs.define
class VmaState:
    """One line of /proc/pid/maps, and what smaps says of it, in pages."""

    start: int
    end: int
    permissions: str
    file: Any
    """The recorded label or the model's file object; "" if there is none."""
    offset: int
    flags: str
    counts: dict[str, int]


@attrs.define
class ProcessState:
    """An address space after an operation."""

    vmas: list[VmaState] = attrs.Factory(list)
    codes: dict[int, str] = attrs.Factory(dict)
    frames: dict[int, Any] = attrs.Factory(dict)
    """By page: a label in a recording, a FrameKey in the model."""


@attrs.define
class Outcome:
    """What an operation did."""

    result: Any = 0
    announcements: dict[str, list[Announcement]] = attrs.Factory(dict)
    """By process; those without any may be left out."""
    faults: list[tuple[int, str, str]] = attrs.Factory(list)
    """Page, access, process."""
    guest_faults: list[list[Any]] = attrs.Factory(list)
    """As recorded: page, access."""
    guest_mappings: list[list[Any]] = attrs.Factory(list)
    """As recorded: page, access."""
    minor: int | None = 0
    """Faults counted for the process that did the operation; None if it does not exist any more."""
    major: int | None = 0
    states: dict[str, ProcessState] = attrs.Factory(dict)
    problem: str = ""
    """What went wrong in the model, if it could not do the operation at all."""


class Recorder(AtomicDriver):
    """Writes down what one address space is told; it keeps no translations of its own."""

    def __init__(self) -> None:
        self.heard: list[Announcement] = []

    def take(self) -> list[Announcement]:
        """What was heard since the last time."""
        heard, self.heard = self.heard, []
        return heard

    def invalidate_range_start(self, rng: Range) -> None:
        """Write it down."""
        self.heard.append(("u", page_label(rng.start), page_label(rng.end)))

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Write it down; nothing was accessed."""
        self.heard.append(("a", page_label(start), page_label(end)))
        return False

    def clear_young(self, start: int, end: int) -> bool:
        """Write it down; nothing was accessed."""
        self.heard.append(("a", page_label(start), page_label(end)))
        return False

    def test_young(self, address: int) -> bool:
        """Write it down; nothing was accessed."""
        self.heard.append(("t", page_label(address), ""))
        return False


def page_label(address: int) -> int | str:
    """An address as a recording writes it: a page of the area, or in hexadecimal if outside."""
    page = (address - BASE) >> PAGE_SHIFT
    return page if 0 <= page <= AREA_PAGES else hex(address)


def look(mm: AddressSpace[Any], page_limit: int) -> ProcessState:
    """The state of a model's address space inside the area."""
    state = ProcessState()
    first = BASE >> PAGE_SHIFT
    label = mm.machine.frames.label
    for vma in mm.vmas:
        start, end = (vma.start - BASE) >> PAGE_SHIFT, (vma.end - BASE) >> PAGE_SHIFT
        state.vmas.append(
            VmaState(
                start,
                end,
                vma.perms,
                vma.file or "",
                vma.pgoff if vma.file else 0,
                " ".join(vma.mnemonics),
                mm.smaps(vma),
            )
        )
        if start >= page_limit:
            continue
        limit = BASE + (min(end, page_limit) << PAGE_SHIFT)
        for page, code, frame in mm.pagemap(vma.start, limit):
            state.codes[page - first] = code
            if frame is not None:
                state.frames[page - first] = label(frame)
    return state


def group(values: dict[int, Any], *, counting: bool = False) -> Iterator[tuple[int, int, Any]]:
    """(first page, pages, value) of each run of pages, ascending.

    A run is of equal values; if `counting`, integers must ascend by one.
    """
    first = count = 0
    value: Any = None
    for page in sorted(values):
        due = value + count if counting and isinstance(value, int) else value
        if count and page == first + count and values[page] == due:
            count += 1
            continue
        if count:
            yield first, count, value
        first, count, value = page, 1, values[page]
    if count:
        yield first, count, value
