"""mremap: resize in place, move, move several VMAs at once.

A move is told as: unmap of the destination, unmap of the source's tail if it shrinks, then the
source twice, once for the moving of its entries and once for its unmapping. The destination hears
nothing: its pages appear. Source: mm/mremap.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from mmunotify.errors import MmError
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE, Event

from . import flags as f
from .mmap import MAX_MAP_COUNT, TASK_SIZE, do_munmap, hole, link_file
from .vma import Vma, find_vma, link, merge_new, vmas_in

if TYPE_CHECKING:
    from .mm import AddressSpace

_TASK_PAGES = TASK_SIZE >> PAGE_SHIFT
_LATENCY_PAGES = 64


async def mremap(
    mm: AddressSpace[Any],
    old: int,
    old_size: int,
    new_size: int,
    flags: int = 0,
    new_addr: int = 0,
) -> int:
    """Resize or move the mapping at `old`; returns its address. Sizes are bytes, rounded up.

    Without MREMAP_MAYMOVE it stays where it is, and ENOMEM says that it cannot grow there. EFAULT
    where the range is not one mapping (a move of unchanged size may cover several), EPERM if
    sealed, EINVAL for ranges that make no sense. Takes mmap_lock for writing; may suspend.
    """
    mm.require_alive()
    what = f"mremap({old:#x}, {old_size:#x}, {new_size:#x}, flags={flags}, {new_addr:#x})"
    fixed = bool(flags & f.MREMAP_FIXED)
    keep = bool(flags & f.MREMAP_DONTUNMAP)
    first = old >> PAGE_SHIFT
    count = (old_size + PAGE_SIZE - 1) >> PAGE_SHIFT
    wanted = (new_size + PAGE_SIZE - 1) >> PAGE_SHIFT
    target = new_addr >> PAGE_SHIFT
    invalid = (
        flags & ~7
        or (old | (new_addr if fixed else 0)) & (PAGE_SIZE - 1)
        or not wanted
        or ((fixed or keep) and not flags & f.MREMAP_MAYMOVE)
        or (keep and count != wanted)
        or (fixed and target + wanted > _TASK_PAGES)
        or (fixed and target < first + count and first < target + wanted)
    )
    if invalid:
        raise MmError(errno.EINVAL, f"{what}: unaligned, empty, overlapping or contradictory")
    await mm.machine.cond_resched()
    populate: tuple[int, int] | None = None
    async with mm.write_locked:
        source = find_vma(mm, first)
        if source is not None and source.flags & f.VM_HUGETLB:
            count, wanted = (count + 511) & ~511, (wanted + 511) & ~511
            if (first | (target if fixed else 0)) & 511 or wanted > count:
                raise MmError(errno.EINVAL, f"{what}: expected whole huge pages, and no more")
        if len(mm.vmas) + 2 >= MAX_MAP_COUNT - 3:
            raise MmError(errno.ENOMEM, f"{what}: too many mappings")
        if fixed and count == wanted:
            result = await _move_vmas(mm, first, count, target, keep, what)
        else:
            vma = _check(mm, first, count, wanted, flags, what)
            locked = bool(vma.flags & f.VM_LOCKED) and wanted > count
            if fixed or keep:
                result = await _mremap_to(
                    mm, vma, first, count, wanted, target if fixed else None, keep, what
                )
            else:
                result = await _mremap_at(mm, vma, first, count, wanted, flags, what)
            if locked:
                populate = (result + count, result + wanted)
    if populate is not None:
        await mm.populate(*populate, ignore_errors=True)
    await mm.machine.cond_resched(count)
    return result << PAGE_SHIFT


def _check(
    mm: AddressSpace[Any], first: int, count: int, wanted: int, flags: int, what: str
) -> Vma:
    """The VMA at the start, if it may become what is asked (check_prep_vma)."""
    vma = find_vma(mm, first)
    if vma is None:
        raise MmError(errno.EFAULT, f"{what}: nothing is mapped there in {mm.name}")
    if vma.flags & f.VM_SEALED:
        raise MmError(errno.EPERM, f"{what}: {vma!r} is sealed (mseal)")
    moves = flags & (f.MREMAP_FIXED | f.MREMAP_DONTUNMAP)
    if wanted <= count and not moves:
        return vma
    if not count and not vma.flags & f.VM_MAYSHARE:
        raise MmError(errno.EINVAL, f"{what}: only shared mappings can be duplicated")
    if flags & f.MREMAP_DONTUNMAP and vma.flags & f.VM_SPECIAL:
        raise MmError(errno.EINVAL, f"{what}: {vma!r} cannot be moved so")
    if min(count, wanted) > vma.last - first:
        raise MmError(errno.EFAULT, f"{what}: goes beyond {vma!r}")
    if count < wanted and count > vma.last - first:
        raise MmError(errno.EFAULT, f"{what}: goes beyond {vma!r}")
    if wanted > count and vma.flags & f.VM_SPECIAL:
        raise MmError(errno.EFAULT, f"{what}: {vma!r} cannot grow")
    return vma


async def _mremap_at(
    mm: AddressSpace[Any], vma: Vma, first: int, count: int, wanted: int, flags: int, what: str
) -> int:
    """Resize where it is, or move if that is allowed and needed."""
    if wanted == count:
        return first
    if wanted < count:
        await do_munmap(mm, first + wanted, first + count)
        return first
    free = not vmas_in(mm, vma.last, vma.last + wanted - count)
    if first + count == vma.last and free:
        # In place: a merge of the hole behind it, with its own flags.
        last = vma.last + wanted - count
        merged = await merge_new(
            mm, vma.last, last, vma.flags, vma.pgoff + vma.pages, vma.file,
            anon_vma=vma.anon_vma, uffd=vma.uffd,
        )  # fmt: skip
        if merged is None:
            raise MmError(errno.ENOMEM, f"{what}: {vma!r} cannot be extended")
        return first
    if not flags & f.MREMAP_MAYMOVE:
        raise MmError(errno.ENOMEM, f"{what}: no room behind {vma!r}")
    return await _move_vma(mm, vma, first, count, wanted, hole(mm, wanted), False)


async def _mremap_to(
    mm: AddressSpace[Any],
    vma: Vma,
    first: int,
    count: int,
    wanted: int,
    target: int | None,
    keep: bool,
    what: str,
) -> int:
    if target is not None:
        await do_munmap(mm, target, target + wanted)
        found = find_vma(mm, first)
        if found is None:
            raise MmError(errno.EFAULT, f"{what}: the source went with the destination")
        vma = found
    if wanted < count:
        await do_munmap(mm, first + wanted, first + count)
        count = wanted
        found = find_vma(mm, first)
        assert found is not None
        vma = found
    if target is None:
        target = hole(mm, wanted)
    return await _move_vma(mm, vma, first, count, wanted, target, keep)


async def _move_vmas(
    mm: AddressSpace[Any], first: int, count: int, target: int, keep: bool, what: str
) -> int:
    """A move without a resize may cover several VMAs; the gaps between them are kept."""
    last = first + count
    result = -1
    end = 0
    at = first
    while at < last or result < 0:
        vmas = vmas_in(mm, at, max(last, at + 1))
        if not vmas:
            break
        vma = vmas[0]
        if result < 0 and vma.first > first:
            break
        low, high = max(vma.first, first), min(vma.last, last)
        gap = vma.first - end if result >= 0 else 0
        end = vma.last
        at = vma.last
        flags = f.MREMAP_FIXED | (f.MREMAP_DONTUNMAP if keep else 0)
        if vma.uffd is not None and (result >= 0 or vma.last < last):
            raise MmError(errno.EFAULT, f"{what}: {vma!r} has to be moved alone")
        vma = _check(mm, low, high - low, high - low, flags, what)
        moved = await _mremap_to(mm, vma, low, high - low, high - low, target + gap, keep, what)
        if result < 0:
            result = moved
        target = moved + high - low
    if result < 0:
        raise MmError(errno.EFAULT, f"{what}: nothing is mapped at the start in {mm.name}")
    return result


async def _move_vma(
    mm: AddressSpace[Any], vma: Vma, first: int, count: int, wanted: int, target: int, keep: bool
) -> int:
    """Make the new VMA, move the entries, unmap the source (move_vma)."""
    if vma.flags & f.VM_MERGEABLE:
        await mm.machine.ksm.unmerge(mm, vma, first, first + count)
    mm.vma_start_write(vma)
    new, vma = await _copy_vma(mm, vma, first, wanted, target)
    await _move_page_tables(mm, vma, new, first, first + count, target)
    if keep:
        if vma.flags & f.VM_LOCKED:
            vma.flags &= ~f.VM_LOCKED_MASK
        if new is not vma and first == vma.first and first + count == vma.last:
            async with mm.locks_of(vma):
                mm.machine.anon_vmas.unlink(vma)
    elif count:
        await do_munmap(mm, first, first + count)
    return target


async def _copy_vma(
    mm: AddressSpace[Any], vma: Vma, first: int, wanted: int, target: int
) -> tuple[Vma, Vma]:
    """The VMA at the destination, and the source, which may have become the same (copy_vma)."""
    pgoff = vma.pgoff + first - vma.first
    if vma.anonymous and vma.anon_vma is None:
        pgoff = target
    merged = await merge_new(
        mm, target, target + wanted, vma.flags, pgoff, vma.file,
        anon_vma=vma.anon_vma, uffd=vma.uffd, copied=vma,
    )  # fmt: skip
    if merged is not None:
        return merged, merged if merged.first <= vma.first < merged.last else vma
    new = vma.dup()
    new.first, new.last, new.pgoff = target, target + wanted, pgoff
    async with mm.locks_of(vma):
        new.anon_vma = vma.anon_vma
        mm.machine.anon_vmas.clone(new, vma)
    mm.vma_start_write(new)
    await link_file(new)
    link(mm, new)
    return new, vma


async def _move_page_tables(
    mm: AddressSpace[Any], vma: Vma, new: Vma, first: int, last: int, target: int
) -> None:
    """Move the entries of [first, last) to `target`: whole leaves where both are aligned."""
    if first == last:
        return
    if mm.machine.era == "v16":
        await _move_in_chunks(mm, vma, new, first, last, target)
        return
    first, target = _realign(mm, vma, new, first, last, target)
    event = Event.CLEAR if vma.flags & f.VM_HUGETLB else Event.UNMAP
    async with mm.section(first, last, event), mm.locks_of(vma, new):
        at = first
        while at < last:
            index = at >> 9
            room = min(last - at, 512 - (at & 511))
            there = target + at - first
            if index in mm.pt.huge and not (room == 512 and not there & 511):
                await mm.split_huge_pmd(index << 9, vma)
            if index in mm.pt.leaves or index in mm.pt.huge:
                _move_leaf(mm, at, there, room)
                at += room
            else:
                at = _next_present(mm, at, room, last)
        mm.flush_tlb(first, last)


async def _move_in_chunks(
    mm: AddressSpace[Any], vma: Vma, new: Vma, first: int, last: int, target: int
) -> None:
    """2008: a section for each 64 pages (LATENCY_LIMIT) of a page table; flushed at the end."""
    at = first
    while at < last:
        room = min(last - at, _LATENCY_PAGES, 512 - (at & 511), 512 - ((target + at - first) & 511))
        if at >> 9 in mm.pt.leaves:
            async with mm.section(at, at + room, Event.UNMAP), mm.locks_of(vma, new):
                _move_leaf(mm, at, target + at - first, room)
        at += room
    mm.flush_tlb(first, last)


def _next_present(mm: AddressSpace[Any], at: int, room: int, last: int) -> int:
    """The next page that has a table behind it, so that holes cost nothing."""
    for index in mm.pt.indices(at + room, last):
        return max(at + room, index << 9)
    return last


def _move_leaf(mm: AddressSpace[Any], at: int, there: int, room: int) -> None:
    mm.pt.pmd_alloc(there >> 18)
    index, target = at >> 9, there >> 9
    if index in mm.pt.huge:
        entry = mm.pt.clear_huge(index)
        old = mm.pt.detach(target)
        if old is not None:
            mm.pt.pool.free(old)
        mm.pt.set_huge(target, entry)
        return
    if room == 512 and not there & 511 and target not in mm.pt.leaves:
        leaf = mm.pt.detach(index)
        assert leaf is not None
        mm.pt.attach(target, leaf)
        return
    source = mm.pt.leaves[index].entries[at & 511 : (at & 511) + room]
    done = 0
    while done < room:
        part = min(room - done, 512 - ((there + done) & 511))
        leaf = mm.pt.leaf_of(there + done)
        low = (there + done) & 511
        leaf.entries[low : low + part] = source[done : done + part]
        done += part
    source[:] = 0


def _realign(
    mm: AddressSpace[Any], vma: Vma, new: Vma, first: int, last: int, target: int
) -> tuple[int, int]:
    """Begin at the 2 MiB boundary below where that is harmless and lets whole leaves move."""
    offset = first & 511
    harmless = (
        offset
        and offset == target & 511
        and last - first >= 512 - offset
        and vma is not new
        and vma.first == first
        and new.first == target
        and not vmas_in(mm, first - offset, first)
        and not vmas_in(mm, target - offset, target)
    )
    return (first - offset, target - offset) if harmless else (first, target)
