"""How a GRU and the contexts that replay uses are configured: `--driver gru,contexts=4,tlb=512`."""

from __future__ import annotations

from typing import Any, Final

import attrs

MODES: Final = ("interrupt", "poll")


def _at_least(low: int) -> Any:
    def check(options: object, field: Any, value: int) -> None:
        if value < low:
            raise ValueError(f"{field.name} is {value}: expected at least {low}")

    return check


def _a_mode(options: object, field: Any, value: str) -> None:
    if value not in MODES:
        raise ValueError(f"miss is {value!r}: expected interrupt or poll")


@attrs.frozen(kw_only=True)
class GruOptions:
    """The options of the driver `gru`. Raises ValueError for one that is out of bounds."""

    contexts: int = attrs.field(default=2, validator=_at_least(1))
    """How many contexts a replayed program has; its pages are dealt out among them."""
    tlb: int = attrs.field(default=512, validator=_at_least(1))
    """Entries in the TLB of a chiplet."""
    blades: int = attrs.field(default=1, validator=_at_least(1))
    """Of two chiplets each."""
    miss: str = attrs.field(default="interrupt", validator=_a_mode)
    """Who serves a miss: the interrupt handler (`interrupt`), or the user who polls (`poll`)."""
    preload: int = attrs.field(default=0, validator=_at_least(0))
    """How many further pages a miss of a BCOPY drops in."""
    assign_delay: int = attrs.field(default=20, validator=_at_least(0))
    """Milliseconds between two attempts to get a context of a full GRU."""
    steal_delay: int = attrs.field(default=200, validator=_at_least(0))
    """Milliseconds after which one is taken from somebody else."""
