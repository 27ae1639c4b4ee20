"""A primary MMU whose answers to `fault_in` are on the way for a step, as those of GUP are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyio.lowlevel import checkpoint

if TYPE_CHECKING:
    from mmunotify import Primary, Translation


class SlowPrimary:
    """Everything else is the primary's own."""

    def __init__(self, primary: Primary) -> None:
        self._primary = primary

    def __getattr__(self, name: str) -> Any:
        return getattr(self._primary, name)

    async def fault_in(self, address: int, *, write: bool = False) -> Translation:
        """What the primary says, when others have run since."""
        found = await self._primary.fault_in(address, write=write)
        await checkpoint()
        return found
