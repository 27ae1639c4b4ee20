"""What a block asks to be done, in order: events of which many became one, and some none.

A replay is as slow as its number of Python steps, so whatever can be decided for a whole block at
once is decided here, in numpy:

- faults of one task on the next page each, alike, are one row, and so are ageing and
  announcements of the next page each;
- a fault whose announcement follows, and whose task then goes on, has it in its row;
- so has reclaim that is asked for the age of a page, unmaps it, and counts it for its owner.

What does not have this shape stays as it is: a row for each event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from .decode import Block

    Bools: TypeAlias = npt.NDArray[np.bool_]
    Ints: TypeAlias = npt.NDArray[np.int64]
    Words: TypeAlias = npt.NDArray[np.uint64]
    Letters: TypeAlias = npt.NDArray[np.uint8]

OPEN: Final = -1
"""`told`: what belongs to the event is known only when its task goes on, or it is no fault."""
SILENT: Final = 0
"""`told`: nothing was announced in these faults."""
COPIED: Final = 1
"""`told`: each of these faults announced its page, and nothing else."""
RECLAIM: Final = "r"
"""The kind of a row for a page that reclaim took: `b` is the counters that changed, or 0."""

_PAGE_BITS: Final = np.uint64(PAGE_SHIFT)
_PAGE: Final = np.uint64(PAGE_SIZE)
_ONE: Final = np.uint64(1)
_F, _KERNEL_FAULT, _U, _A, _M, _S, _V = b"fFuamsv"


def rows(
    block: Block, times: Ints, *, ageing: bool
) -> Iterator[tuple[int, int, int, str, int, int, int, int]]:
    """(event, time, pages, kind, task, a, b, told) of each row; `times` are those of the events.

    Without `ageing` nobody wants to know of it, but for reclaim that is left as it is.
    """
    # What KVM installed changes nothing.
    kept = np.flatnonzero(block.kinds != _S)
    kinds, tids, a, b = block.kinds[kept], block.tids[kept], block.a[kept], block.b[kept]
    told, gone, reclaims, owners = _by_task(kinds, tids, a, b, ageing=ageing)
    b = np.where(reclaims, owners, b)
    kinds = np.where(reclaims, np.uint8(ord(RECLAIM)), kinds)
    left = np.flatnonzero(~gone)
    kept, kinds, tids, a, b, told = (
        kept[left], kinds[left], tids[left], a[left], b[left], told[left]
    )  # fmt: skip
    begins, ends = _runs(kinds, tids, a, b, told)
    return zip(
        kept[begins].tolist(),
        times[kept[ends]].tolist(),
        ((a[ends] >> _PAGE_BITS) - (a[begins] >> _PAGE_BITS) + _ONE).tolist(),
        bytes(kinds[begins]).decode(),
        tids[begins].tolist(),
        a[begins].tolist(),
        b[begins].tolist(),
        told[begins].tolist(),
        strict=True,
    )


def _by_task(
    kinds: Letters,
    tids: Ints,
    a: Words,
    b: Words,
    *,
    ageing: bool,
) -> tuple[Ints, Bools, Bools, Words]:
    """By event: `told`; whether another's row has it; whether it is reclaim, and of which owner.

    Each task's events are looked at in a row, one, two and three of them.
    """
    count = len(kinds)
    order = np.argsort(tids, kind="stable")
    kind, tid, first, second = kinds[order], tids[order], a[order], b[order]
    # Three of no task behind the last one, so that everything has successors.
    kind = np.concatenate((kind, np.zeros(3, np.uint8)))
    tid = np.concatenate((tid, np.full(3, -1)))
    first = np.concatenate((first, np.zeros(3, np.uint64)))
    second = np.concatenate((second, np.zeros(3, np.uint64)))
    here = slice(0, count)
    next_, third = slice(1, count + 1), slice(2, count + 2)
    has_next = tid[next_] == tid[here]
    has_third = tid[third] == tid[here]
    page = first >> _PAGE_BITS

    fault = (kind[here] == _F) | (kind[here] == _KERNEL_FAULT)
    copied = (
        fault & has_next & (kind[next_] == _U) & (page[next_] == page[here])
        & (second[next_] - first[next_] == _PAGE)
    )  # fmt: skip
    goes_on = np.where(copied, has_third & _ends_fault(kind[third]),
                       has_next & _ends_fault(kind[next_]))  # fmt: skip
    told = np.full(count, OPEN)
    told[fault & goes_on] = SILENT
    told[copied & goes_on] = COPIED
    gone = np.zeros(count + 3, np.bool_)
    gone[next_] |= told == COPIED

    # Of the announcement: the one before it asked for the age of the very page.
    aged = has_next & (kind[here] == _A) & (kind[next_] == _U)
    aged &= (first[next_] == first[here]) & (second[next_] == second[here])
    aged &= (second[here] - first[here] == _PAGE) & has_third
    counted = aged & (kind[third] == _M)
    reclaims = np.zeros(count + 3, np.bool_)
    reclaims[next_] = aged
    owners = np.zeros(count + 3, np.uint64)
    owners[next_] = np.where(counted, first[third], np.uint64(0))
    gone[third] |= counted
    # Of a copy of /proc/self/maps, that it was made is all that matters.
    gone[next_] |= has_next & (kind[here] == _V) & (kind[next_] == _V)
    if not ageing:
        # Who is asked before somebody else is asked, or before reclaim that is known by now.
        unused = has_next & ((kind[next_] != _U) | aged)
        gone[here] |= (kind[here] == _A) & unused

    back = np.empty(count, np.int64)
    back[order] = np.arange(count)
    return told[back], gone[back], reclaims[back], owners[back]


def _ends_fault(kind: Letters) -> Bools:
    """Whether an event of this kind means that its task's fault is over."""
    found: Bools = (kind != _U) & (kind != _A) & (kind != _M)
    return found


def _runs(
    kinds: Letters,
    tids: Ints,
    a: Words,
    b: Words,
    told: Ints,
) -> tuple[Ints, Ints]:
    """Where runs begin, and where they end: their first and last events."""
    pages = a >> _PAGE_BITS
    # What has an end is a page each, whose ends follow each other as the pages do.
    single = ((kinds == _A) | (kinds == _U)) & (b - a == _PAGE)
    joins = (
        (kinds[1:] == kinds[:-1])
        & (tids[1:] == tids[:-1])
        & (pages[1:] == pages[:-1] + _ONE)
        & (told[1:] == told[:-1])
        & (
            ((kinds[1:] == _F) & (told[1:] != OPEN) & (b[1:] == b[:-1]))
            | (single[1:] & single[:-1])
        )
    )
    begins = np.ones(len(kinds), np.bool_)
    begins[1:] = ~joins
    ends = np.ones(len(kinds), np.bool_)
    ends[:-1] = begins[1:]
    return np.flatnonzero(begins), np.flatnonzero(ends)
