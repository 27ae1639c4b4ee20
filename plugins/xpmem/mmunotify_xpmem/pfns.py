"""The PFN table of an exporter: who holds which page, which sections are open, what is pinned.

One table per address space, in page numbers. An importer is in it from before it can have a page
until it was told to drop it, so an invalidation asks the table alone, never the VMAs. Nothing here
suspends; what is in the way of a section waits in `parked`, and what a section has to wait for is a
`Wait`.
"""

from __future__ import annotations

from collections import Counter
from itertools import repeat
from typing import TYPE_CHECKING, Final, Protocol

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from mmunotify import Pin

_REMEMBERED: Final = 1 << 20
"""Dropped pages of which it is known that they come back."""
LAST_PAGE: Final = 1 << 52
"""One past the last page number that an address can have."""


class Holder(Protocol):
    """Whoever may have pages of the table: a permit of this process, or of another partition."""

    @property
    def remote(self) -> bool:
        """Whether it has to be waited for: it is a `Remote`."""
        ...

    @property
    def held(self) -> Iterable[int]:
        """The pages that the table has it for."""
        ...

    def drop(self, pages: Sequence[int]) -> None:
        """Let go of these pages, ascending; a `Remote` has then something to acknowledge."""
        ...


class Remote(Holder, Protocol):
    """A holder that has to be waited for."""

    @property
    def name(self) -> str:
        """Whom a report says is waited for."""
        ...

    def unacked(self, first: int, last: int) -> int:
        """What it has to acknowledge before it has nothing of [first, last) left; 0 if nothing."""
        ...

    def tell(self, number: int, wait: Wait) -> None:
        """Call `wait.acknowledged` once `number` is acknowledged, or the holder is fenced."""
        ...


@attrs.define(slots=True, eq=False)
class Wait:
    """Acknowledgements that an invalidation needs; `done` is called when there are none left."""

    pending: set[Remote] = attrs.field(factory=set)
    done: Callable[[], object] | None = None

    def acknowledged(self, holder: Remote) -> None:
        """One less to wait for."""
        self.pending.discard(holder)
        if not self.pending and self.done is not None:
            self.done()

    @property
    def waiting_for(self) -> list[str]:
        """The partitions that have not acknowledged."""
        return sorted({holder.name for holder in self.pending})


class PfnTable:
    """Pages of one address space, and who holds them."""

    def __init__(self, unpin: Callable[[Pin], None] | None = None) -> None:
        self.counters: Final[Counter[str]] = Counter()
        """See `mmunotify.Device`."""
        self.holders: Final[dict[int, tuple[Holder, ...]]] = {}
        self.pins: Final[dict[int, Pin]] = {}
        """One for each page that somebody holds, where pages are pinned."""
        self.remotes: Final[set[Remote]] = set()
        """Holders that have invalidations to acknowledge."""
        self.open: Final[list[tuple[int, int]]] = []
        """The sections and recalls that are going on: [first, last) pages."""
        self.shared = False
        """Whether a remote has ever been a holder of any page."""
        self.waits: Final[set[Wait]] = set()
        """What is waited for now."""
        self._unpin = unpin
        self._parked: list[tuple[int, int, Callable[[], object]]] = []
        self._low, self._high = LAST_PAGE, 0
        """All pages that have holders are in [low, high)."""
        self._dropped: list[Collection[int]] = []
        self._gone: set[int] = set()
        """Pages that come back if they are entered; those of `_dropped` are not in it yet."""

    # ------------------------------------------------------------------ sections

    def closed(self, first: int, last: int) -> bool:
        """Whether a section is open over any page of [first, last)."""
        return bool(self.open) and any(first < high and low < last for low, high in self.open)

    def park(self, first: int, last: int, resume: Callable[[], object]) -> None:
        """Call `resume` once no section is open over [first, last)."""
        self._parked.append((first, last, resume))

    def end(self, first: int, last: int) -> None:
        """A section is over: what it kept out goes on."""
        self.open.remove((first, last))
        if self._parked:
            parked, self._parked = self._parked, []
            for entry in parked:
                if self.closed(entry[0], entry[1]):
                    self._parked.append(entry)
                else:
                    entry[2]()

    def invalidate(self, first: int, last: int, *, announced: bool = True) -> Wait | None:
        """Have everybody drop [first, last); what has to be acknowledged before they have.

        It is counted if it was `announced`. A holder leaves the table when it is told. So that it
        may be served again at once, an invalidation that finds it gone still waits for what it has
        not acknowledged.
        """
        if self.holders:
            taken = self._take(first, last)
            if taken and announced:
                self.counters["flushes"] += 1
                self.counters["mapped"] += taken
        if self.pins:
            # A page is pinned before it has a holder.
            pinned = self.pins if len(self.pins) < last - first else range(first, last)
            self.let_go([page for page in pinned if first <= page < last])
        if self.remotes:
            return self._owed(first, last)
        return None

    def _take(self, first: int, last: int) -> int:
        """Take what there is of [first, last) out of the table, and tell its holders; how much."""
        holders = self.holders
        pages: Sequence[int] = range(first, last)
        taken: list[tuple[Holder, ...] | None]
        # Mostly they all have the same holders, and often it is all that there is.
        if first <= self._low and self._high <= last:
            pages, taken = sorted(holders), list(holders.values())
            if taken.count(taken[0]) < len(taken):
                taken = list(map(holders.get, pages))
            holders.clear()
            self._low, self._high = LAST_PAGE, 0
        else:
            if len(pages) > len(holders):
                pages = sorted([page for page in holders if first <= page < last])
            taken = list(map(holders.pop, pages, repeat(None)))
            if not taken:
                return 0
        common = taken[0]
        if taken.count(common) < len(taken):
            return self._take_each(pages, taken)
        if common is None:
            return 0
        self._dropped.append(pages)
        for holder in common:
            holder.drop(pages)
        return len(pages)

    def _take_each(self, pages: Iterable[int], taken: list[tuple[Holder, ...] | None]) -> int:
        victims: dict[Holder, list[int]] = {}
        dropped = []
        for page, known in zip(pages, taken, strict=True):
            if known is not None:
                dropped.append(page)
                for holder in known:
                    victims.setdefault(holder, []).append(page)
        self._dropped.append(dropped)
        for holder, mine in victims.items():
            holder.drop(mine)
        return len(dropped)

    def _owed(self, first: int, last: int) -> Wait | None:
        """What was told now, and what was told before and is still not acknowledged."""
        wait = None
        for remote in self.remotes:
            number = remote.unacked(first, last)
            if number:
                if wait is None:
                    wait = Wait()
                    self.waits.add(wait)
                wait.pending.add(remote)
                remote.tell(number, wait)
        return wait

    def local(self, first: int, last: int) -> bool:
        """Whether nothing of [first, last) has to be waited for."""
        if not self.shared:
            return True
        if any(remote.unacked(first, last) for remote in self.remotes):
            return False
        holders = self.holders
        pages = range(first, last) if last - first <= len(holders) else list(holders)
        return not any(
            holder.remote
            for page in pages
            if first <= page < last
            for holder in holders.get(page, ())
        )

    # ------------------------------------------------------------------ who holds what

    def enter(self, first: int, last: int, holder: Holder) -> None:
        """`holder` may have pages [first, last) from now on."""
        holders, pages = self.holders, range(first, last)
        self.shared = self.shared or holder.remote
        if first < self._low:
            self._low = first
        if last > self._high:
            self._high = last
        alone = (holder,)  # of all these pages: nobody changes it
        if last - first == 1 and first not in holders:
            holders[first] = alone
        elif holders.keys().isdisjoint(pages):
            holders.update(dict.fromkeys(pages, alone))
        else:
            for page in pages:
                known = holders.setdefault(page, alone)
                if holder not in known:
                    holders[page] = (*known, holder)
        self.counters["installed"] += last - first
        if self._dropped or self._gone:
            self._come_back(pages)

    def enter_page(self, page: int, holder: Holder) -> None:
        """`enter` of one page, by a holder of this process."""
        known = self.holders.get(page)
        if known is None:
            self.holders[page] = (holder,)
            if page < self._low:
                self._low = page
            if page >= self._high:
                self._high = page + 1
        elif holder not in known:
            self.holders[page] = (*known, holder)
        self.counters["installed"] += 1
        if self._dropped or page in self._gone:
            self._come_back((page,))

    def _come_back(self, pages: Iterable[int]) -> None:
        """Count those of `pages` that were here before."""
        if self._dropped:
            if len(self._gone) > _REMEMBERED:
                self._gone.clear()
            self._gone.update(*self._dropped)
            self._dropped.clear()
        again = self._gone.intersection(pages)
        if again:
            self._gone -= again
            self.counters["refaults"] += len(again)

    def leave(self, holder: Holder, pages: Collection[int]) -> None:
        """`holder` has nothing of `pages` any more, and need not be told."""
        holders = self.holders
        for page in pages:
            known = holders.get(page)
            if known is not None and holder in known:
                rest = tuple(other for other in known if other is not holder)
                if rest:
                    holders[page] = rest
                    continue
                del holders[page]
                if page in self.pins:
                    self.let_go((page,))

    def let_go_unheld(self, first: int, last: int) -> None:
        """Unpin those of [first, last) that nobody holds: they were looked up for nothing."""
        if self.pins:
            self.let_go([page for page in range(first, last) if page not in self.holders])

    def let_go(self, pages: Iterable[int]) -> None:
        """Unpin those of `pages` that are pinned."""
        assert self._unpin is not None
        for page in pages:
            pin = self.pins.pop(page, None)
            if pin is not None:
                self._unpin(pin)
                self.counters["unpinned"] += 1


def runs_of(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending pages as ranges [first, last)."""
    first = last = -1
    for page in pages:
        if page == last:
            last += 1
        else:
            if last > first:
                yield first, last
            first, last = page, page + 1
    if last > first:
        yield first, last


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in any order as ascending ones that neither meet nor touch."""
    found: list[tuple[int, int]] = []
    low = high = -1
    for first, last in sorted(ranges):
        if first <= high:
            high = max(high, last)
        else:
            if high >= 0:
                found.append((low, high))
            low, high = first, last
    if high >= 0:
        found.append((low, high))
    return found
