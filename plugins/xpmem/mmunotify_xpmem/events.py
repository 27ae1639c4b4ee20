"""The log events of the plugin, in the catalogue of `mmunotify.log`."""

from __future__ import annotations

from typing import Final

from mmunotify import define_event

COUNTED: Final = define_event(
    "xpmem_counted",
    "info",
    "mapped flushes installed refaults retries served stores recalls pinned unpinned",
    "At release: what a thread group has exported, and what became of it.",
)
SEGMENT_MADE: Final = define_event(
    "xpmem_segment_made", "info", "segid start end mode fence", "A range is exported."
)
SEGMENT_REMOVED: Final = define_event(
    "xpmem_segment_removed", "info", "segid", "It is not any more: nobody has a page of it."
)
FENCED: Final = define_event(
    "xpmem_fenced",
    "warning",
    "partition segid reason",
    "An importer is taken for dead: its permit is void, nothing waits for it any longer.",
)
REATTACHED: Final = define_event(
    "xpmem_reattached",
    "warning",
    "partition segid",
    "This partition was fenced by `partition`; it has dropped everything and has a new permit.",
)
WAITING: Final = define_event(
    "xpmem_waiting",
    "warning",
    "partitions seconds",
    "An invalidation waits for these partitions, which do not acknowledge.",
)
KILLED: Final = define_event(
    "xpmem_killed", "warning", "partition pid", "A silent importer was killed, as its segment says."
)
FRAME_REFUSED: Final = define_event(
    "xpmem_frame_refused",
    "warning",
    "peer reason",
    "What came over a link is malformed, oversized or not from who it says: the link is closed.",
)
LINK: Final = define_event(
    "xpmem_link", "info", "peer state", "A connection to another partition is up, or lost."
)
