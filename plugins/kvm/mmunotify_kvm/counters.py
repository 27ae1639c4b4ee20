"""What a virtual machine counts; the first five are those of `mmunotify.Device`."""

from __future__ import annotations

from typing import Final

NAMES: Final = (
    *("installed", "mapped", "flushes", "refaults", "retries"),
    "false_retries",  # a retry that found what it had found before
    "faults",  # page faults that reached the hypervisor, retried ones each time
    "fast_faults",  # mended without a lookup
    "spurious",  # faults on what was mapped already
    "prefetched",
    "zaps",  # invalidations that took mmu_lock
    "aged",  # pages asked about
    "young",  # and accessed since the last time
    "dirtied",  # pages that dirty logging has noted
    "mmio",
    "efault",  # faults that the host could not serve
    "huge",  # 2 MiB mappings made
    "splits",  # and split
    "lock_ns",  # held mmu_lock, in sum
    "lock_longest_ns",
    "slot_updates",
    "pfn_refreshes",  # of gfn-to-pfn caches
    "pfn_invalidations",
)


def new_counters() -> dict[str, int]:
    """All of them, at 0."""
    return dict.fromkeys(NAMES, 0)
