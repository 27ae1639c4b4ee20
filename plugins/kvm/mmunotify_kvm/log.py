"""What a virtual machine writes to the log: names and keys of its events."""

from __future__ import annotations

from typing import Final

from mmunotify import define_event

from .counters import NAMES

MEMSLOT_CHANGED: Final = define_event(
    "kvm_memslot_changed",
    "info",
    "driver slot change base pages hva flags",
    "A memslot was created, deleted, moved, or has other flags; `base` is its first guest page.",
)
SLOTS_WAITED: Final = define_event(
    "kvm_slots_waited",
    "info",
    "driver slot sections",
    "A memslot update has to wait for this many open sections, whether they meet the slot or not.",
)
UNBALANCED: Final = define_event(
    "kvm_sections_open",
    "warning",
    "driver sections",
    "The machine was unregistered inside of this many sections, whose end it is not told.",
)
RELEASED: Final = define_event(
    "kvm_released",
    "info",
    " ".join(("driver", *NAMES)),
    "The address space has gone: all entries are dropped, and this is what was counted.",
)
