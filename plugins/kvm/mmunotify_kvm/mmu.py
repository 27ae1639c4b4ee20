"""The guest's MMU: what excludes page faults from invalidations, and the flushing of TLBs.

A fault looks a page up without any lock, and an invalidation may come meanwhile. So a fault takes
note of `invalidate_seq` before it looks up (I-SEQ), and under mmu_lock, before it maps what it has
found, asks `retry`: whether an invalidation that covers the page is going on, or one has ended
since. Both are written under mmu_lock alone.

Source: include/linux/kvm_host.h (mmu_invalidate_retry_gfn), virt/kvm/kvm_main.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from .mmu_lock import MmuLock

if TYPE_CHECKING:
    from .vcpu import VCpu

_FEW: Final = 8
"""Pages that are taken out of a TLB one by one; for more, all of it goes."""


class Mmu:
    """One per virtual machine."""

    __slots__ = (
        "_over",
        "counters",
        "invalidate_in_progress",
        "invalidate_seq",
        "lock",
        "range_end",
        "range_start",
        "vcpus",
    )

    def __init__(self, counters: dict[str, int]) -> None:
        self.counters: Final = counters
        self.lock: Final = MmuLock(counters)
        self.vcpus: Final[list[VCpu]] = []
        self.invalidate_seq = 0
        """Grows at every end."""
        self.invalidate_in_progress = 0
        """Sections that are open and meet a memslot."""
        self.range_start = self.range_end = 0
        """gfns around all that has been invalidated since `invalidate_in_progress` was 0."""
        self._over: anyio.Event | None = None

    def begin(self) -> None:
        """A section begins to be told; mmu_lock is held."""
        self.invalidate_in_progress += 1
        if self.invalidate_in_progress == 1:
            self.range_start = self.range_end = 0

    def range_add(self, start: int, end: int) -> None:
        """The section covers gfns [start, end); mmu_lock is held.

        The range grows over what no section covers rather than shrinking too early: a fault that
        retries in vain is legal, one that does not is not.
        """
        if self.range_start == self.range_end:
            self.range_start, self.range_end = start, end
        else:
            self.range_start = min(self.range_start, start)
            self.range_end = max(self.range_end, end)

    def end(self) -> None:
        """A section is over; mmu_lock is held. The sequence grows before the count falls."""
        self.invalidate_seq += 1
        self.invalidate_in_progress -= 1
        assert self.invalidate_in_progress >= 0, "a section ended that had not begun"
        if self._over is not None:
            self.wake()

    def reset(self) -> None:
        """Forget sections whose end will not come: the machine listens no more."""
        self.invalidate_seq += 1
        self.invalidate_in_progress = 0
        self.wake()

    def retry(self, seq: int, gfn: int) -> bool:
        """Whether what was looked up since `seq` must not be mapped; mmu_lock is held."""
        if self.invalidate_in_progress and self.range_start <= gfn < self.range_end:
            return True
        return self.invalidate_seq != seq

    def covered(self, gfn: int) -> bool:
        """Whether a section is open that may cover a page; a hint without mmu_lock."""
        return self.invalidate_in_progress > 0 and self.range_start <= gfn < self.range_end

    async def section_over(self) -> None:
        """Wait until a section ends."""
        if self._over is None:
            self._over = anyio.Event()
        await self._over.wait()

    def wake(self) -> None:
        """Let go on who waits in `section_over`."""
        if self._over is not None:
            self._over.set()
            self._over = None

    def flush(self, first: int, last: int) -> None:
        """Take gfns [first, last) out of the TLB of every vCPU (kvm_flush_remote_tlbs_range).

        mmu_lock is held: nobody may look at a page again before it is out of all TLBs.
        """
        for vcpu in self.vcpus:
            tlb = vcpu.tlb
            if not tlb:
                continue
            if last - first <= _FEW:
                for gfn in range(first, last):
                    tlb.pop(gfn, None)
            else:
                tlb.clear()
