"""Thread states: a user's context, loaded on a chiplet or kept in memory (gru_thread_state).

Counted references keep one alive: its user's, one while it is loaded, and one of whoever works on
it meanwhile. With the last it is freed, and whoever uses it then is told so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

import attrs

from mmunotify import RWSemaphore

from .errors import UseAfterFree
from .hardware.cbr import SavedCbr
from .hardware.geometry import CBR_AU, DSR_AU

if TYPE_CHECKING:
    from collections.abc import Callable

    from .driver import GruDriver
    from .hardware.cbr import Cbr
    from .hardware.cch import Cch, MissMode
    from .state import GruState


@attrs.define(slots=True)
class UserStatistics:
    """What is counted for the user of one context (gru_gseg_statistics)."""

    tlb_dropin: int = 0
    user_polling_mode: int = 0
    context_stolen: int = 0


class Gts:
    """One context of one address space."""

    __slots__ = (
        *("blade", "cbr_units", "cbrs", "cch", "chiplet", "closing", "dsr_units", "force_reload"),
        *("freed", "gms", "huge", "loads", "lock", "miss_mode", "name", "preload", "references"),
        *("saved_cbrs", "saved_dseg", "state", "user"),
    )

    def __init__(
        self,
        gms: GruDriver,
        name: str,
        *,
        cbrs: int,
        dseg: int,
        miss_mode: MissMode,
        preload: int = 0,
        blade: int | None = None,
        chiplet: int | None = None,
        freed: Callable[[], None] | None = None,
    ) -> None:
        self.gms: Final = gms
        self.name: Final = name
        self.freed: Final = freed
        """Called when it is freed: nobody needs its address space for it any more."""
        self.cbr_units: Final = -(-cbrs // CBR_AU)
        self.dsr_units: Final = -(-dseg // DSR_AU)
        self.miss_mode = miss_mode
        self.preload = preload
        """Further pages that a miss of a BCOPY drops in."""
        self.blade = blade
        """Where it has to be loaded; None: where its task runs."""
        self.chiplet = chiplet
        """Which of the blade's chiplets; None: any."""
        self.huge = False
        """Whether its TLB may hold huge pages."""
        self.force_reload = False
        """`huge` has changed and the chiplet does not know yet (ts_force_cch_reload)."""
        self.lock: Final = RWSemaphore("ts_ctxlock")
        """Held for writing by whoever loads or unloads it, for reading by who serves its misses."""
        self.references = 1
        self.closing = False
        """Its user has gone: whoever has the lock unloads it."""
        self.state: GruState | None = None
        """Where it is loaded."""
        self.cch: Cch | None = None
        self.cbrs: list[Cbr] = []
        """By its own numbers; empty while it is not loaded."""
        self.saved_cbrs = [SavedCbr() for _ in range(self.cbr_units * CBR_AU)]
        self.saved_dseg = bytes(self.dsr_units * DSR_AU)
        self.loads = 0
        self.user: Final = UserStatistics()
        gms.statistics.gts_alloc += 1
        gms.contexts.append(self)

    def __repr__(self) -> str:
        where = "not loaded" if self.state is None else f"on {self.state.chiplet}"
        return f"<Gts {self.name}, {where}>"

    def get(self) -> None:
        """Take a reference."""
        self.references += 1

    def drop(self) -> None:
        """Give one back; the last one frees it."""
        self.references -= 1
        if self.references == 0:
            self.gms.context_freed(self)
            freed = self.freed
            self.__class__ = _FreedGts
            if freed is not None:
                freed()


class _FreedGts(Gts):
    """What a thread state becomes when it is freed: nothing of it can be used."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> NoReturn:
        raise UseAfterFree(f"{name} of a context that was freed")

    def __repr__(self) -> str:
        return "<Gts, freed>"
