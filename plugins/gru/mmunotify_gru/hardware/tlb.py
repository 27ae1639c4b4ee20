"""The TLB of a chiplet: tagged by ASID, of two page sizes, finite, replaced first in first out.

An entry is a `mmunotify.Translation` whose `writable` is what was dropped in for, which may be less
than the primary allows. Any context of the chiplet that runs under the ASID uses it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, TypeAlias

from mmunotify import PAGE_SHIFT, PAGE_SIZE, PMD_SHIFT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from mmunotify import Translation

    Table: TypeAlias = dict[int, Translation]


class Tlb:
    """`entries` translations at most, of all ASIDs and page sizes together."""

    __slots__ = ("_huge", "_order", "_small", "entries", "used")

    def __init__(self, entries: int) -> None:
        self.entries: Final = entries
        self.used = 0
        """Valid entries."""
        self._small: Final[dict[int, Table]] = {}
        """Tag to page number to entry."""
        self._huge: Final[dict[int, Table]] = {}
        """Tag to address >> PMD_SHIFT to entry."""
        self._order: Final[deque[tuple[dict[int, Table], int, Table, int, Translation]]] = deque()
        """Oldest first, with where each is; entries that have gone otherwise are passed over."""

    def lookup(self, tag: int, address: int, write: bool) -> Translation | None:
        """The entry that lets `address` be used, or None: a miss."""
        table = self._small.get(tag)
        if table is not None:
            entry = table.get(address >> PAGE_SHIFT)
            if entry is not None and (entry.writable or not write):
                return entry
        if self._huge:
            entry = self._huge.get(tag, {}).get(address >> PMD_SHIFT)
            if entry is not None and (entry.writable or not write):
                return entry
        return None

    def insert(self, tag: int, entry: Translation) -> None:
        """Write an entry, in the place of what maps the same, or else of the oldest."""
        if entry.size == PAGE_SIZE:
            tables, key = self._small, entry.address >> PAGE_SHIFT
        else:
            tables, key = self._huge, entry.address >> PMD_SHIFT
        table = tables.get(tag)
        if table is None:
            table = tables[tag] = {}
        if key not in table:
            if self.used >= self.entries:
                self._evict()
                table = tables.setdefault(tag, table)
            self.used += 1
        table[key] = entry
        order = self._order
        order.append((tables, tag, table, key, entry))
        if len(order) > 4 * self.entries:
            live = [item for item in order if item[2].get(item[3]) is item[4]]
            order.clear()
            order.extend(live)

    def _evict(self) -> None:
        while True:
            tables, tag, table, key, entry = self._order.popleft()
            if table.get(key) is entry:
                del table[key]
                if not table:
                    del tables[tag]
                self.used -= 1
                return

    def invalidate(self, tag: int, first: int, count: int, shift: int) -> Collection[int]:
        """Drop the entries of one page size in [first, first + count), in pages of `1 << shift`.

        Returns which, in those pages. Entries of another size stay, whatever they overlap.
        """
        table = (self._small if shift == PAGE_SHIFT else self._huge).get(tag)
        if not table:
            return ()
        if count == 1:
            if table.pop(first, None) is None:
                return ()
            self.used -= 1
            return (first,)
        if count <= len(table):
            found = [page for page in range(first, first + count) if page in table]
        else:
            last = first + count
            found = [page for page in table if first <= page < last]
        for page in found:
            del table[page]
        self.used -= len(found)
        return found

    def invalidate_tag(self, tag: int) -> tuple[Collection[int], Collection[int]]:
        """Drop everything of a tag; returns the small pages and the huge ones that it had."""
        small = self._small.pop(tag, None)
        huge = self._huge.pop(tag, None)
        pages = tuple(small) if small else ()
        large = tuple(huge) if huge else ()
        if small:
            small.clear()
        if huge:
            huge.clear()
        self.used -= len(pages) + len(large)
        return pages, large

    def invalidate_all(self) -> None:
        """Drop everything of everybody."""
        for tables in (self._small, self._huge):
            for table in tables.values():
                table.clear()
            tables.clear()
        self._order.clear()
        self.used = 0

    def of_tag(self, tag: int) -> Iterator[Translation]:
        """The entries of one tag."""
        for tables in (self._small, self._huge):
            yield from tables.get(tag, {}).values()

    def __iter__(self) -> Iterator[tuple[int, Translation]]:
        """Every entry, with its tag."""
        for tables in (self._small, self._huge):
            for tag, table in tables.items():
                for entry in table.values():
                    yield tag, entry
