"""What both type checkers must refuse: mypy's error code, then basedpyright's rule."""

from __future__ import annotations

import mmunotify as mn


class Atomic(mn.AtomicDriver):
    def invalidate_range_start(self, rng: mn.Range) -> None: ...


class Sleepable(mn.SleepableDriver):
    async def invalidate_range_start(self, rng: mn.Range) -> None: ...


class AtomicThatWaits(mn.AtomicDriver):
    async def invalidate_range_end(  # E: override / reportIncompatibleMethodOverride
        self, rng: mn.Range
    ) -> None: ...


class SleepableThatDoesNot(mn.SleepableDriver):
    def invalidate_range_end(  # E: override / reportIncompatibleMethodOverride
        self, rng: mn.Range
    ) -> None: ...


class DeferredThatSyncsAtOnce(mn.DeferredDriver):
    def invalidate_range_sync(  # E: override / reportIncompatibleMethodOverride
        self, rng: mn.Range
    ) -> None: ...


async def sleepable_under_spinlocks(notifiers: mn.Notifiers[mn.SpinLocks]) -> None:
    await notifiers.register(Sleepable())  # E: type-var / reportArgumentType
    async with notifiers.attached(Sleepable()):  # E: type-var / reportArgumentType
        pass


async def forgotten_await(notifiers: mn.Notifiers[mn.RwSems]) -> None:
    notifiers.register(Atomic())  # E: unused-coroutine / reportUnusedCoroutine


async def shared_sleepable_under_spinlocks(notifiers: mn.Notifiers[mn.SpinLocks]) -> None:
    await notifiers.get(Sleepable)  # E: type-var / reportArgumentType


async def whatever_is_installed_under_spinlocks(notifiers: mn.Notifiers[mn.SpinLocks]) -> None:
    driver = mn.Registry().create("theirs")
    await notifiers.register(driver)  # E: type-var / reportArgumentType


async def plain_section_awaited(notifiers: mn.Notifiers[mn.RwSems]) -> None:
    section = notifiers.invalidating_atomic(mn.Range(0, 1))
    async with section:  # E: attr-defined / reportGeneralTypeIssues
        pass


class IntervalThatWaits(mn.AtomicInterval):
    async def invalidate(  # E: override / reportIncompatibleMethodOverride
        self, rng: mn.Range, seq: int
    ) -> bool:
        return True


class IntervalThatDoesNot(mn.SleepableInterval):
    def invalidate(  # E: override / reportIncompatibleMethodOverride
        self, rng: mn.Range, seq: int
    ) -> bool:
        return True


class Remote(mn.SleepableInterval):
    async def invalidate(self, rng: mn.Range, seq: int) -> bool:
        self.set_seq(seq)
        return True


async def sleepable_interval_under_spinlocks(notifiers: mn.Notifiers[mn.SpinLocks]) -> None:
    await Remote().insert(notifiers, 0, 1)  # E: arg-type / reportArgumentType


async def forgotten_interval(notifiers: mn.Notifiers[mn.RwSems], interval: Remote) -> None:
    interval.insert(notifiers, 0, 1)  # E: unused-coroutine / reportUnusedCoroutine


class IntervalWithoutACallback(mn.AtomicInterval): ...


def nothing_to_call() -> mn.AtomicInterval:
    return IntervalWithoutACallback()  # E: abstract / reportAbstractUsage
