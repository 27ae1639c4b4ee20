"""What the driver logs."""

from __future__ import annotations

from typing import Final

from mmunotify import define_event

CONTEXT_LOADED: Final = define_event(
    "gru_context_loaded",
    "debug",
    "driver mm context chiplet asid",
    "A context got a place on a chiplet; its control blocks run on.",
)
CONTEXT_UNLOADED: Final = define_event(
    "gru_context_unloaded",
    "debug",
    "driver mm context chiplet asid",
    "A context lost its place; what it had is kept in memory.",
)
CONTEXT_STOLEN: Final = define_event(
    "gru_context_stolen",
    "info",
    "driver mm context chiplet victim",
    "Nothing was free for long: a context of address space `victim` was unloaded for another.",
)
ASID_WRAP: Final = define_event(
    "gru_asid_wrap",
    "info",
    "driver chiplet generation",
    "A chiplet has given out its last ASID and begins again with a flushed TLB.",
)
RELEASED: Final = define_event(
    "gru_released",
    "info",
    "driver mm statistics",
    "The address space has let go of its GRUs; the counters that are not 0, by name.",
)
