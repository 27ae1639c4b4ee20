"""Sections as context managers: S on entry, E on exit, and the sync that deferred drivers owe."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from .audience import Audience
    from .dispatch import Dispatch, Failed
    from .ranges import Range


class _Section:
    __slots__ = ("_dispatch", "rng", "told")

    told: Audience

    def __init__(self, dispatch: Dispatch, rng: Range) -> None:
        self._dispatch = dispatch
        self.rng = rng

    def __repr__(self) -> str:
        name = f"{type(self).__name__} at {self._dispatch.name} over {self.rng!r}"
        failed = ", ".join(sub.name for sub in self.failed)
        return f"<{name}{': failed ' if failed else ''}{failed}>"

    @property
    def failed(self) -> Failed:
        """Who is quarantined by now, also when the exit raised. Leak the pages then."""
        return self.told.failed if hasattr(self, "told") else ()


class Section(_Section):
    """What `async with notifiers.invalidating(rng)` gives."""

    __slots__ = ("_sync",)

    def __init__(self, dispatch: Dispatch, rng: Range, sync: bool) -> None:
        super().__init__(dispatch, rng)
        self._sync = sync

    async def __aenter__(self) -> Section:
        self.told = await self._dispatch.invalidate_range_start(self.rng)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._dispatch.invalidate_range_end(self.rng, self.told)
        finally:
            if self._sync and self.told.sync_calls:
                await self.sync()

    async def sync(self) -> None:
        """Let the deferred drivers finish: no lock held, pages not yet released."""
        await self._dispatch.invalidate_range_sync(self.rng, self.told)


class AtomicSection(_Section):
    """What `with notifiers.invalidating_atomic(rng)` gives."""

    __slots__ = ()

    def __enter__(self) -> AtomicSection:
        self.told = self._dispatch.invalidate_range_start_atomic(self.rng)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._dispatch.invalidate_range_end_atomic(self.rng, self.told)

    async def sync(self) -> None:
        """Let the deferred drivers finish: locks dropped, pages not yet released."""
        await self._dispatch.invalidate_range_sync(self.rng, self.told)


class NonblockSection(_Section):
    """What `with notifiers.invalidating_nonblock(rng)` gives."""

    __slots__ = ()

    def __enter__(self) -> NonblockSection:
        self.told = self._dispatch.invalidate_range_start_nonblock(self.rng)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._dispatch.invalidate_range_end_nonblock(self.rng, self.told)
