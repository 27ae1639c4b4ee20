"""Drivers that write down what they are told, for tests to compare.

All drivers of a test share one list, so that it shows the order between them: "a start" is the
start of the driver that is named a. What a callback does beyond writing is given by keyword, under
the same short name: a plain function, or for a coroutine callback a coroutine function.

    told: list[str] = []
    Atomic("a", told, start=explode)
    Sleepable("s", told, end=gate.wait)
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import mmunotify as mn

if TYPE_CHECKING:
    from collections.abc import Callable


class Notebook:
    """What the recording drivers have in common."""

    def __init__(
        self, name: str, told: list[str] | None = None, **acts: Callable[[], object]
    ) -> None:
        self.name = name
        self.told: list[str] = [] if told is None else told
        self.acts = acts
        self.open = 0
        """Starts (or marks) that succeeded, less ends (or syncs) that came."""
        self.lone_ends = 0
        """Ends that came without a start."""

    def tell(self, callback: str) -> Any:
        self.told.append(f"{self.name} {callback}")
        act = self.acts.get(callback)
        return act() if act is not None else None

    async def tell_async(self, callback: str) -> None:
        answer = self.tell(callback)
        if inspect.isawaitable(answer):
            await answer

    def began(self) -> None:
        self.open += 1

    def ended(self) -> None:
        self.open -= 1
        self.lone_ends += self.open < 0


class Atomic(Notebook, mn.AtomicDriver):
    """An AtomicDriver: start, end, release, free."""

    def invalidate_range_start(self, rng: mn.Range) -> bool | None:
        self.tell("start")
        self.began()
        return None

    def invalidate_range_end(self, rng: mn.Range) -> None:
        self.ended()
        self.tell("end")

    async def release(self) -> None:
        await self.tell_async("release")

    def free(self) -> None:
        self.tell("free")


class Sleepable(Notebook, mn.SleepableDriver):
    """A SleepableDriver: start, end, release, free."""

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        await self.tell_async("start")
        self.began()

    async def invalidate_range_end(self, rng: mn.Range) -> None:
        self.ended()
        await self.tell_async("end")

    async def release(self) -> None:
        await self.tell_async("release")

    def free(self) -> None:
        self.tell("free")


class Concurrent(Sleepable):
    """A Sleepable that opts in to being told at the same time as others."""

    concurrent = True


class Deferred(Notebook, mn.DeferredDriver):
    """A DeferredDriver: mark, sync, release, free."""

    def invalidate_range(self, rng: mn.Range) -> None:
        self.tell("mark")
        self.began()

    async def invalidate_range_sync(self, rng: mn.Range) -> None:
        self.ended()
        await self.tell_async("sync")

    async def release(self) -> None:
        await self.tell_async("release")

    def free(self) -> None:
        self.tell("free")


class Stop(BaseException):
    """Like KeyboardInterrupt, which event loops treat in their own ways."""
