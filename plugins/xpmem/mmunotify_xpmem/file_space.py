"""A file, or plain memory, as an address space that can be exported.

The smallest `mmunotify.Primary` there is: every page is present and mapped by one translation, so
that any part of it is read in one piece. `update` tells the drivers; who
changes the file behind its back must say so with `changed`.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Final

import attrs

from mmunotify import (
    PAGE_SHIFT,
    AddressSpaceExited,
    BadAddress,
    Event,
    Notifiers,
    Range,
    Region,
    RwSems,
    StaleTranslation,
    Translation,
    Translations,
)

from .errors import XpmemError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mmunotify import Pin

_BASE: Final = 0x1000_0000


@attrs.define(slots=True, eq=False)
class _Pinned:
    translations: Translations


class FileSpace:
    """The bytes of `path`, or `size` bytes of zeros, at address `base`; `notifiers` are its own.

    `writable` lets importers write to it, and writes go to the file. The last page is padded with
    zeros. Closed by `aclose`, or by `async with`.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        size: int = 0,
        writable: bool = False,
        base: int = _BASE,
        name: str = "",
    ) -> None:
        self.base: Final = base
        self.writable: Final = writable or path is None
        if path is None:
            if size <= 0:
                raise XpmemError(errno.EINVAL, f"FileSpace(size={size}): expected a path or a size")
            self._map = mmap.mmap(-1, size)
        else:
            with open(path, "r+b" if writable else "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if not size:
                    raise XpmemError(errno.EINVAL, f"{path}: is empty, there is nothing to export")
                access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
                self._map = mmap.mmap(file.fileno(), 0, access=access)
        self.length: Final = size
        """In bytes."""
        self.size: Final = -(-size >> PAGE_SHIFT) << PAGE_SHIFT
        """In bytes, whole pages."""
        self.pinned = 0
        """Pages, as often as they are."""
        self.notifiers: Final[Notifiers[RwSems]] = Notifiers(
            RwSems, name=name or str(path or "memory"), primary=self
        )
        self._users = 1
        self._all = Translation(base, base >> PAGE_SHIFT, self.writable, self.size, 0)

    async def __aenter__(self) -> FileSpace:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Its drivers let go, then the file is unmapped. Once is enough, twice does no harm."""
        if self._users:
            await self.put()

    # ------------------------------------------------------------------ changing it

    async def update(self, offset: int, data: bytes) -> None:
        """Write at a byte of the file, when no driver has the pages any more."""
        if offset < 0 or offset + len(data) > self.length or not self.writable:
            raise XpmemError(
                errno.EINVAL if self.writable else errno.EACCES,
                f"update of [{offset}, +{len(data)}) to {self.length} bytes",
            )
        async with self.notifiers.invalidating(self._range(offset, offset + len(data))):
            self._map[offset : offset + len(data)] = data

    async def changed(self, start: int = 0, end: int | None = None) -> None:
        """Bytes [start, end) of the file were changed by somebody else."""
        await self.notifiers.invalidate(self._range(start, self.length if end is None else end))

    def _range(self, start: int, end: int) -> Range:
        first, last = start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
        return Range(
            self.base + (first << PAGE_SHIFT), self.base + (last << PAGE_SHIFT), Event.CLEAR
        )

    # ------------------------------------------------------------------ mmunotify.Primary

    def translate(self, address: int) -> Translation | None:
        """All of it is one leaf."""
        return self._all if self.base <= address < self.base + self.size and self._users else None

    def translate_range(self, start: int, end: int) -> Translations:
        """Every page of [start, end) that there is."""
        first = max(start, self.base) >> PAGE_SHIFT
        last = -(-min(end, self.base + self.size) >> PAGE_SHIFT)
        pages = range(first, max(first, last))
        count = len(pages)
        return Translations(pages, pages, [int(self.writable)] * count, [0] * count)

    async def fault_in(self, address: int, *, write: bool = False) -> Translation:
        """Raises BadAddress outside of it, and for a write where it is not writable."""
        found = self.translate(address)
        if found is None:
            raise BadAddress(f"{address:#x}: beyond the end", signal="BUS", code=2, address=address)
        if write and not self.writable:
            raise BadAddress(f"{address:#x}: is read-only", code=2, address=address)
        return found

    async def fault_in_range(self, start: int, end: int, *, write: bool = False) -> Translations:
        """All or error."""
        for address in (start, end - 1):
            await self.fault_in(address, write=write)
        return self.translate_range(start, end)

    async def pin(self, start: int, end: int, *, write: bool = True) -> Pin:
        """Nothing ever moves; pins are counted."""
        found = await self.fault_in_range(start, end, write=write)
        self.pinned += len(found)
        return _Pinned(found)

    def unpin(self, pin: Pin) -> None:
        """Count the pages off."""
        self.pinned -= len(pin.translations)

    def read(self, translation: Translation, offset: int, size: int) -> bytes:
        """Bytes; zeros beyond the end of the file."""
        self._check(translation, offset, size)
        at = translation.address - self.base + offset
        data = self._map[at : at + size]
        return data if len(data) == size else data.ljust(size, b"\0")

    def write(self, translation: Translation, offset: int, data: bytes) -> None:
        """Store through a translation, up to the end of the file."""
        self._check(translation, offset, len(data))
        if not translation.writable:
            raise PermissionError(f"{translation!r} is not writable")
        at = translation.address - self.base + offset
        part = data[: max(0, self.length - at)]
        self._map[at : at + len(part)] = part

    def _check(self, translation: Translation, offset: int, size: int) -> None:
        if not self._users:
            raise StaleTranslation(f"{translation!r}: the file is closed")
        if offset < 0 or offset + size > translation.size:
            raise XpmemError(errno.EINVAL, f"[{offset}, +{size}) is outside of {translation!r}")

    def set_dirty(self, start: int, end: int, mask: Sequence[int] | None = None) -> None:
        """The kernel knows."""

    def mark_young(self, start: int, end: int) -> None:
        """The kernel knows."""

    def regions(self, start: int, end: int) -> Iterator[Region]:
        """One."""
        if start < self.base + self.size and self.base < end:
            yield Region(self.base, self.base + self.size, True, self.writable)

    def tryget(self) -> bool:
        """Keep it open, unless it is being closed."""
        if not self._users:
            return False
        self._users += 1
        return True

    async def put(self) -> None:
        """Give a `tryget` back; the last one closes it."""
        self._users -= 1
        if not self._users:
            try:
                await self.notifiers.release()
            except AddressSpaceExited:
                return
            finally:
                self._map.close()
