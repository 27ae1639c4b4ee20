"""Files: the page cache, who maps it, and what shrinks, punches or cleans it.

Two kinds: "memfd" (shmem: pages live in memory and swap, nothing is ever written back) and "ext4"
(pages come from a disk and go back to it, so the first write to a clean one is noticed). Offsets
and sizes are bytes at the edge and pages inside.

Source: mm/filemap.c, mm/truncate.c, mm/shmem.c, mm/memory.c (unmap_mapping_range), fs/ext4/inode.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmunotify.errors import MmError
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE, Event, Range

from . import flags as f
from . import frames as fr
from .lru import INACTIVE_FILE
from .rmap import IntervalTree, page_of

if TYPE_CHECKING:
    from .machine import Machine
    from .vma import Vma

Kind = Literal["memfd", "ext4"]
_PAGE_BITS = PAGE_SIZE - 1
_MAPPING = f.PFN_MASK | f.PTE_PRESENT | f.PTE_SPECIAL
_READAHEAD = 1024
_FEW = 8
"""Up to so many pages are read one by one, which is cheaper than vector steps then."""


class File:
    """One inode and its page cache (struct address_space).

    `refs` counts the descriptor and every VMA; the pages of a memfd go with the last of them.
    """

    def __init__(self, machine: Machine[Any], name: str, size: int, kind: Kind) -> None:
        self.machine = machine
        self.name = name
        self.size = size
        """Bytes."""
        self.kind: Kind = kind
        self.pages: dict[int, int] = {}
        """Page index to frame."""
        self.swapped: dict[int, int] = {}
        """Page index to swap slot (memfd only)."""
        self.disk: dict[int, bytearray] = {}
        """Page index to what is on the disk, zeros left out (ext4 only)."""
        self.folios: dict[int, range] = {}
        """Page index to the folio of several pages that it is part of; what is not here is one."""
        self.i_mmap = IntervalTree()
        self.i_mmap_lock = machine.locks.rmap_lock("i_mmap")
        self.number = machine.owners.add(self)
        self.refs = 1
        self.vm_flags = 0
        """VM_ flags that its mappings get."""

    def __repr__(self) -> str:
        return f"<File {self.name} {self.kind} {self.size:#x}>"

    @property
    def writenotify(self) -> bool:
        """Whether the first write to a clean page must be noticed (page_mkwrite)."""
        return self.kind == "ext4"

    @property
    def page_end(self) -> int:
        """One past the index of its last page."""
        return (self.size + _PAGE_BITS) >> PAGE_SHIFT

    def get(self) -> None:
        """Take a reference."""
        self.refs += 1

    def put(self) -> None:
        """Drop a reference; the last one drops a memfd's pages, which nobody maps any more."""
        self.refs -= 1
        if not self.refs:
            if self.kind == "ext4":
                for index in [i for i, frame in self.pages.items() if self._dirty(frame)]:
                    self._write_page(index)
            self.drop_pages(0, None)
            self.machine.owners.remove(self.number)

    def _dirty(self, frame: int) -> bool:
        return bool(self.machine.frames.word[frame] & fr.PG_DIRTY)

    # ------------------------------------------------------------------ the page cache

    def add(self, index: int, frame: int) -> None:
        """Put a fresh frame into the page cache, which holds a reference."""
        frames = self.machine.frames
        flags = fr.PG_PAGECACHE | (fr.PG_SWAPBACKED if self.kind == "memfd" else 0)
        frames.word[frame] = frames.word[frame] + fr.REF_ONE | flags
        frames.set_owner(frame, self.number, index)
        self.pages[index] = frame
        self.machine.lru.add(frame, file=self.kind == "ext4")

    def remove(self, index: int) -> None:
        """Take a page out of the cache and drop its reference."""
        frame = self.pages.pop(index)
        self.folios.pop(index, None)
        frames = self.machine.frames
        frames.word[frame] &= ~(fr.PG_PAGECACHE | fr.PG_DIRTY)
        frames.put(frame)

    def drop_pages(self, first: int, last: int | None) -> None:
        """Remove [first, last) from cache and swap (truncate_inode_pages_range)."""
        end = last if last is not None else 1 << 52
        cached = [i for i in self.pages if first <= i < end]
        for index in cached:
            self.remove(index)
        if cached:
            self.machine.lru.drain()
        for index in [i for i in self.swapped if first <= i < end]:
            self.machine.swap.drop_unmapped(self.swapped.pop(index))

    async def _truncate_pages(self, first: int, last: int | None) -> None:
        """`drop_pages`, having split the folios that are only partly in the range."""
        for edge, inside in ((first, first - 1), (last, last)):
            if edge is None or inside is None or inside not in self.folios:
                continue
            folio = self.folios[inside]
            if edge != folio.start:
                await self.split_folio(inside, max(first, folio.start))
                if last is not None and last in self.folios and last != self.folios[last].start:
                    await self.split_folio(last, last)
        # A fault on another page may have mapped one of these again meanwhile.
        word = self.machine.frames.word
        mapped = [0]
        while mapped:
            end = last if last is not None else 1 << 52
            mapped = [
                index
                for index, frame in self.pages.items()
                if first <= index < end and word[frame] & fr.MAP_MASK
            ]
            for index in mapped:
                await self.unmap_mapping_range(index, index + 1, even_cows=False)
        self.drop_pages(first, last)

    def reaches_end(self, index: int) -> bool:
        """Whether the folio of a cached page of a disk file holds the last page of the file."""
        return self.kind != "memfd" and self.folio(index).stop >= self.page_end

    def folio(self, index: int) -> range:
        """The pages of the folio of a cached page."""
        return self.folios.get(index) or range(index, index + 1)

    async def split_folio(self, index: int, at: int) -> None:
        """Make small pages of a folio around its page `at`, and halves, quarters, … of the rest.

        It is unmapped first: one announcement per VMA that may map it, until nobody does. Source:
        __folio_split, unmap_folio.
        """
        folio = self.folios[index]
        await self._unmap_folio(folio)
        word = self.machine.frames.word
        while len(folio) > 1:
            for page in folio:
                del self.folios[page]
            middle = folio.start + len(folio) // 2
            low, high = range(folio.start, middle), range(middle, folio.stop)
            folio, rest = (low, high) if at < middle else (high, low)
            for part in (folio, rest):
                for page in part:
                    if len(part) > 1:
                        self.folios[page] = part
                    else:
                        word[self.pages[page]] &= ~fr.PG_LARGE

    async def _unmap_folio(self, folio: range) -> None:
        words = self.machine.frames.word
        frames = [self.pages[index] for index in folio]
        async with self.i_mmap_lock.reading():
            for vma in self.i_mmap.overlapping(folio.start, folio.stop):
                mm = vma.mm
                first = max(page_of(vma, folio.start), vma.first)
                last = min(page_of(vma, folio.stop), vma.last)
                async with mm.section(first, last, Event.CLEAR, locked=True):
                    for page in range(first, last):
                        frame = self.pages[page - vma.first + vma.pgoff]
                        if not mm.maps(page, frame):
                            continue
                        if mm.pt.get(page) & f.PTE_DIRTY:
                            words[frame] |= fr.PG_DIRTY
                        mm.set_pte(page, 0)
                        self.machine.remove_rmap(frame)
                        self.machine.frames.put(frame)
                    mm.flush_tlb(first, last)
                if not any(words[frame] & fr.MAP_MASK for frame in frames):
                    break
        await self.machine.settle()

    async def page(self, index: int, around: tuple[int, int] | None = None) -> tuple[int, bool]:
        """The frame of a page, brought in if need be, and whether that took I/O.

        `around` are the pages to read with it. -1 if the file has become too short meanwhile. Takes
        no reference: what it returns is good until the caller suspends.
        """
        frame = self.pages.get(index)
        if frame is not None:
            return frame, False
        if self.kind == "memfd":
            frame = await self.machine.alloc_frame()
            if index in self.pages or index >= self.page_end:
                self.machine.frames.give_back(frame)
                return self.pages.get(index, -1), False
            slot = self.swapped.pop(index, None)
            if slot is not None and slot in self.machine.swap.cache:
                self.machine.frames.give_back(frame)
                return self._from_swap_cache(index, slot), False
            if slot is not None:
                self.machine.swap.read(slot, frame)
                self.machine.swap.drop(slot)
                self.machine.frames.word[frame] |= fr.PG_DIRTY
            self.add(index, frame)
            return frame, slot is not None
        first = max(0, index - _READAHEAD // 2)
        first, last = around or (first, first + _READAHEAD)
        await self.readahead(first, min(last, self.page_end))
        if index not in self.pages:
            await self.readahead(index, index + 1)
        return self.pages.get(index, -1), True

    def closed(self, vma: Vma) -> None:
        """A mapping of it goes."""

    def _from_swap_cache(self, index: int, slot: int) -> int:
        """Make a page that was read into the swap cache one of the file's; its frame."""
        swap, frames = self.machine.swap, self.machine.frames
        frame = swap.cache[slot]
        frames.get(frame)
        swap.drop(slot)
        swap.delete_from_cache(frame)
        self.add(index, frame)
        frames.word[frame] |= fr.PG_DIRTY
        frames.put(frame)
        return frame

    async def readahead(self, first: int, last: int) -> None:
        """Read pages [first, last) that are not cached from the disk, or into the swap cache."""
        if self.kind == "ext4" and last - first > _FEW and self._read_many(first, last):
            return
        for index in range(first, last):
            if index in self.pages:
                continue
            if self.kind == "memfd":
                slot = self.swapped.get(index)
                if slot is not None and slot not in self.machine.swap.cache:
                    await self.machine.read_swap_cache(slot, readahead=False)
                continue
            frame = await self.machine.alloc_frame()
            if index in self.pages or index >= self.page_end:
                self.machine.frames.give_back(frame)
                continue
            data = self.machine.frames.data
            if data is not None and index in self.disk:
                data[frame] = bytearray(self.disk[index])
            self.add(index, frame)

    def _read_many(self, first: int, last: int) -> bool:
        """`readahead` from the disk in one step; False if memory has to be reclaimed for it."""
        cached, machine = self.pages, self.machine
        frames = machine.frames
        absent = [index for index in range(first, min(last, self.page_end)) if index not in cached]
        count = len(absent)
        if frames.free - count < machine.low:
            return False
        new = frames.alloc_many(count).astype(np.int64)
        frames.words[new] |= np.uint64(fr.REF_ONE | fr.PG_PAGECACHE | fr.PG_LRU)
        owner = np.uint64(self.number << fr.OWNER_SHIFT)
        frames.rmaps[new] = owner | np.array(absent, np.uint64)
        machine.lru.append_many(new, INACTIVE_FILE)
        pairs = list(zip(absent, new.tolist(), strict=True))
        cached.update(pairs)
        if frames.data is not None:
            frames.data.update(
                (frame, bytearray(self.disk[index])) for index, frame in pairs if index in self.disk
            )
        return True

    def _write_page(self, index: int) -> None:
        frame = self.pages[index]
        frames = self.machine.frames
        frames.word[frame] &= ~(fr.PG_DIRTY | fr.PG_READAHEAD)
        if frames.data is not None:
            contents = frames.data.get(frame)
            if contents is None:
                self.disk.pop(index, None)
            else:
                self.disk[index] = bytearray(contents)

    # ------------------------------------------------------------------ operations

    async def unmap_mapping_range(self, first: int, last: int | None, *, even_cows: bool) -> None:
        """Unmap pages [first, last) wherever they are mapped; one announcement per VMA.

        With `even_cows` the private copies go too. Runs under i_mmap for reading.
        """
        end = last if last is not None else 1 << 52
        if not len(self.i_mmap) or first >= end:
            return
        async with self.i_mmap_lock.reading():
            for vma in self.i_mmap.overlapping(first, end):
                low = page_of(vma, max(first, vma.pgoff))
                high = min(page_of(vma, min(end, vma.pgoff + vma.pages)), vma.last)
                await vma.mm.zap_page_range(vma, low, high, even_cows=even_cows, locked=True)
        await self.machine.settle()

    async def truncate(self, size: int) -> None:
        """Set the size in bytes (ftruncate)."""
        if size < 0:
            raise MmError(errno.EINVAL, f"truncate {self.name} to {size}: expected a size >= 0")
        was, self.size = self.size, size
        hole = (size + _PAGE_BITS) >> PAGE_SHIFT
        if self.kind == "memfd" and was <= hole << PAGE_SHIFT:
            self._zero_tail(size)
            return
        await self.unmap_mapping_range(hole, None, even_cows=True)
        await self._truncate_pages(hole, None)
        for index in [i for i in self.disk if i >= hole]:
            del self.disk[index]
        self._zero_tail(size)
        await self.unmap_mapping_range(hole, None, even_cows=True)

    def _zero_tail(self, size: int) -> None:
        data = self.machine.frames.data
        frame = self.pages.get(size >> PAGE_SHIFT)
        if data is not None and frame in data and size & _PAGE_BITS:
            keep = size & _PAGE_BITS
            data[frame][keep:] = bytes(PAGE_SIZE - keep)

    async def fallocate(self, mode: str, offset: int, length: int) -> None:
        """Make a hole ("punch"), zero ("zero") or take out ("collapse") a range of bytes."""
        if offset < 0 or length <= 0:
            raise MmError(errno.EINVAL, f"fallocate {self.name}: range [{offset}, +{length})")
        if mode not in ("punch", "zero", "collapse"):
            raise MmError(errno.EINVAL, f"fallocate {self.name}: unknown mode {mode!r}")
        if self.kind == "memfd" and mode != "punch":
            raise MmError(errno.EOPNOTSUPP, f"fallocate {mode} of {self.name}, a memfd")
        first = (offset + _PAGE_BITS) >> PAGE_SHIFT
        last = (offset + length) >> PAGE_SHIFT
        if mode == "collapse":
            await self._collapse(offset, length)
            return
        if self.kind == "ext4":
            if mode == "punch" and offset >= self.size:
                return
            if mode == "punch" and offset + length >= self.size:
                last = self.page_end
        await self.unmap_mapping_range(first, last, even_cows=False)
        await self._truncate_pages(first, last)
        for index in [i for i in self.disk if first <= i < last]:
            del self.disk[index]
        if mode == "zero":
            self.size = max(self.size, offset + length)

    async def _collapse(self, offset: int, length: int) -> None:
        if (offset | length) & _PAGE_BITS or offset + length >= self.size:
            raise MmError(
                errno.EINVAL,
                f"collapse [{offset:#x}, +{length:#x}) of {self.name}: expected whole pages that "
                f"end before {self.size:#x}",
            )
        first, count = offset >> PAGE_SHIFT, length >> PAGE_SHIFT
        await self.writeback(first, None)
        await self.unmap_mapping_range(first, None, even_cows=True)
        await self._truncate_pages(first, None)
        await self.unmap_mapping_range(first, None, even_cows=True)
        self.disk = {
            index if index < first else index - count: data
            for index, data in self.disk.items()
            if not first <= index < first + count
        }
        self.size -= length

    async def writeback(self, first: int = 0, last: int | None = None) -> None:
        """Write the dirty pages out; each is write-protected where it is shared (page_mkclean)."""
        if self.kind == "memfd":
            return
        end = last if last is not None else 1 << 52
        words, pages = self.machine.frames.word, self.pages
        dirty = [
            index
            for index, frame in pages.items()
            if words[frame] & fr.PG_DIRTY and first <= index < end
        ]
        dirty.sort()
        at = 0
        while at < len(dirty):
            done = self._clean_alike(dirty, at)
            at += done
            if done:
                continue
            index = dirty[at]
            at += 1
            folio = self.folio(index)
            if index in pages and words[pages[index]] & fr.PG_DIRTY:
                await self._mkclean(folio)
            for page in folio:
                if page in pages:
                    self._write_page(page)
        if dirty:
            self.machine.lru.drain()

    def _clean_alike(self, dirty: list[int], at: int) -> int:
        """`_mkclean` and write as many pages from dirty[at] on as can be done in one step.

        How many that were. For what writeback mostly meets: pages that are no part of a folio, of a
        file with one mapping, whose drivers, if any, can be told in one step. The reverse-map lock
        is taken once for all of them.
        """
        machine, vmas = self.machine, self.i_mmap.vmas
        if len(vmas) != 1 or machine.era == "v16":
            return 0
        vma = vmas[0]
        if not vma.flags & f.VM_SHARED or not self.i_mmap_lock.down_read_trylock():
            return 0
        mm = vma.mm
        notifiers, leaves = mm.notifiers, mm.pt.leaves
        one_step = notifiers.plain or notifiers.nowait
        words, pages, folios = machine.frames.word, self.pages, self.folios
        shift = vma.first - vma.pgoff
        first = at
        try:
            while at < len(dirty):
                index = dirty[at]
                frame = pages.get(index, -1)
                if index in folios or frame < 0 or not one_step:
                    break
                page = index + shift
                word = words[frame]
                if word & fr.PG_DIRTY and word & fr.MAP_MASK and vma.first <= page < vma.last:
                    rng = told = None
                    if notifiers.armed:
                        start = page << PAGE_SHIFT
                        rng = Range(start, start + PAGE_SIZE, Event.PROTECTION_PAGE)
                        told = notifiers.invalidate_range_start_nowait(rng)
                        if told is None:
                            break
                        mm.announced.append(rng)
                    leaf = leaves.get(page >> 9)
                    if leaf is not None:
                        entry = leaf.pte[page & 511]
                        mapped = entry & _MAPPING == frame << PAGE_SHIFT | f.PTE_PRESENT
                        if mapped and entry & (f.PTE_DIRTY | f.PTE_RW):
                            leaf.pte[page & 511] = entry & ~(f.PTE_DIRTY | f.PTE_RW)
                            if mm.tlb is not None:
                                mm.tlb.flush(page, page + 1)
                    if rng is not None and told is not None:
                        notifiers.invalidate_range_end_atomic(rng, told)
                self._write_page(index)
                at += 1
        finally:
            self.i_mmap_lock.up_read()
        return at - first

    async def _mkclean(self, folio: range) -> None:
        """Write-protect a mapped folio in every shared mapping of the file; one announcement each.

        Also in those that do not map it: Linux looks only after it has announced.
        """
        words = self.machine.frames.word
        if not any(words[self.pages[index]] & fr.MAP_MASK for index in folio):
            return
        async with self.i_mmap_lock.reading():
            for vma in self.i_mmap.overlapping(folio.start, folio.stop):
                if not vma.flags & f.VM_SHARED:
                    continue
                first = max(page_of(vma, folio.start), vma.first)
                last = min(page_of(vma, folio.stop), vma.last)
                mm = vma.mm
                async with mm.section(first, last, Event.PROTECTION_PAGE, locked=True):
                    for page in range(first, last):
                        entry = mm.pt.get(page)
                        frame = self.pages[page - vma.first + vma.pgoff]
                        mapped = frame << PAGE_SHIFT | f.PTE_PRESENT
                        if entry & (f.PTE_DIRTY | f.PTE_RW) and entry & _MAPPING == mapped:
                            mm.set_pte(page, entry & ~(f.PTE_DIRTY | f.PTE_RW))
                            mm.flush_tlb(page, page + 1)
        await self.machine.settle()

    async def pread(self, offset: int, size: int) -> bytes:
        """Bytes of the file, less than asked for at its end."""
        data = self.machine.frames.data
        end = min(offset + size, self.size)
        out = bytearray()
        while offset < end:
            index = offset >> PAGE_SHIFT
            if self.kind == "memfd" and index not in self.pages and index not in self.swapped:
                # A hole is read as zeros, and stays one.
                high = min(PAGE_SIZE - (offset & _PAGE_BITS), end - offset)
                out += bytes(high)
                offset += high
                continue
            frame, _ = await self.page(index, self._read_ahead(index, -(-end >> PAGE_SHIFT)))
            if frame < 0:
                break
            low = offset & _PAGE_BITS
            high = min(PAGE_SIZE, low + end - offset)
            contents = data.get(frame) if data is not None else None
            out += contents[low:high] if contents is not None else bytes(high - low)
            self.machine.mark_accessed(frame)
            offset += high - low
        return bytes(out)

    def _read_ahead(self, index: int, last: int) -> tuple[int, int]:
        """The pages to read for a miss at `index` in a read up to `last` (page_cache_sync_ra).

        From the start of the file on, or behind what has been read so far, more than was asked for.
        """
        count = last - index
        before = index
        while before and before - 1 in self.pages and index - before <= count:
            before -= 1
        if not index:
            size = 1 << (count - 1).bit_length()
            count = size * 4 if size <= _READAHEAD // 32 else min(size * 2, _READAHEAD)
        elif index - before > count:
            count = index - before + count
        return index, index + count

    async def pwrite(self, offset: int, data: bytes) -> None:
        """Write bytes through the page cache; grows the file."""
        frames = self.machine.frames
        large = self._large_folios(offset, len(data)) if self.kind == "ext4" else {}
        at = 0
        while at < len(data):
            index, low = (offset + at) >> PAGE_SHIFT, (offset + at) & _PAGE_BITS
            high = min(PAGE_SIZE, low + len(data) - at)
            self.size = max(self.size, offset + at + high - low)
            if self.kind == "ext4":
                await self.readahead(index, index + 1)
            frame, _ = await self.page(index)
            if frame < 0:
                # Truncated while the page was awaited: the write makes it longer again.
                continue
            if frames.data is not None:
                contents = frames.data.setdefault(frame, bytearray(PAGE_SIZE))
                contents[low:high] = data[at : at + high - low]
            frames.word[frame] |= fr.PG_DIRTY
            if index in large:
                self.folios[index] = large[index]
                frames.word[frame] |= fr.PG_LARGE
            self.machine.mark_accessed(frame)
            at += high - low

    def rewrite(self, index: int) -> bool:
        """A cached page is written to as it is: it is dirty, and was used. False if it is none."""
        frame = self.pages.get(index)
        if frame is None:
            return False
        self.machine.frames.word[frame] |= fr.PG_DIRTY
        self.machine.mark_accessed(frame)
        return True

    def _large_folios(self, offset: int, length: int) -> dict[int, range]:
        """The absent pages that a write of whole pages brings in as folios of several."""
        large: dict[int, range] = {}
        index, last = -(-offset >> PAGE_SHIFT), (offset + length) >> PAGE_SHIFT
        while index < last:
            order = (last - index).bit_length() - 1
            while index & ((1 << order) - 1) or any(
                page in self.pages for page in range(index, index + (1 << order))
            ):
                if not order:
                    break
                order -= 1
            folio = range(index, index + (1 << order))
            if order:
                large.update(dict.fromkeys(folio, folio))
            index = folio.stop
        return large

    def drop_cache(self) -> None:
        """Forget clean pages that nobody maps (POSIX_FADV_DONTNEED after a sync)."""
        word = self.machine.frames.word
        self.machine.lru.drain()
        if self.kind == "memfd":
            return
        for index, frame in list(self.pages.items()):
            if self._dirty(frame):
                continue
            if word[frame] & fr.COUNTS_MASK == fr.REF_ONE:
                if self.machine.frames.on_drop is not None:
                    self.machine.frames.on_drop(frame)
                self.remove(index)
