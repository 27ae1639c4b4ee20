"""What both type checkers must accept, and the types that they must see."""

from __future__ import annotations

from typing import Generic, TypeVar, assert_type

import mmunotify as mn


class Atomic(mn.AtomicDriver):
    def invalidate_range_start(self, rng: mn.Range) -> None: ...


class Sleepable(mn.SleepableDriver):
    async def invalidate_range_start(self, rng: mn.Range) -> None: ...


class Deferred(mn.DeferredDriver):
    def invalidate_range(self, rng: mn.Range) -> None: ...
    async def invalidate_range_sync(self, rng: mn.Range) -> None: ...


L = TypeVar("L", bound=mn.LockModel)
PlainDriver = TypeVar("PlainDriver", bound=mn.AtomicDriver | mn.DeferredDriver)


class Pool(Generic[L]):
    """An owner of memory who leaves the locking model to whoever makes it."""

    def __init__(self, locks: type[L]) -> None:
        self.notifiers = mn.Notifiers(locks)

    async def watch(self, driver: PlainDriver) -> mn.Subscription[PlainDriver]:
        return await self.notifiers.register(driver)

    async def forget(self, subscription: mn.Subscription[PlainDriver]) -> None:
        await self.notifiers.unregister(subscription)


async def invalidate(notifiers: mn.Notifiers[L], rng: mn.Range) -> bool:
    """A generic helper over both locking models."""
    async with notifiers.attached(Atomic()) as subscription:
        assert_type(subscription, mn.Subscription[Atomic])
        async with notifiers.invalidating(rng) as section:
            assert_type(section, mn.Section)
    with notifiers.invalidating_atomic(rng) as atomic:
        assert_type(atomic, mn.AtomicSection)
    await atomic.sync()
    return not await notifiers.invalidate(rng)


async def both_models() -> None:
    today, old = mn.Notifiers(), mn.Notifiers(mn.SpinLocks)
    assert_type(today, mn.Notifiers[mn.RwSems])
    assert_type(old, mn.Notifiers[mn.SpinLocks])
    assert_type(await today.register(Sleepable()), mn.Subscription[Sleepable])
    assert_type(await today.register(Deferred()), mn.Subscription[Deferred])
    assert_type(await old.register(Deferred()), mn.Subscription[Deferred])
    assert_type(await Pool(mn.SpinLocks).watch(Atomic()), mn.Subscription[Atomic])
    assert_type(await Pool(mn.RwSems).watch(Atomic()), mn.Subscription[Atomic])
    await invalidate(today, mn.Range(0, mn.PAGE_SIZE))
    await invalidate(old, mn.Range(0, mn.PAGE_SIZE))


async def drivers_of_others(notifiers: mn.Notifiers[mn.RwSems]) -> None:
    driver = mn.Registry().create("theirs")
    assert_type(driver, mn.AnyDriver)
    async with notifiers.attached(driver):
        pass
    if isinstance(driver, mn.AtomicDriver):
        await mn.Notifiers(mn.SpinLocks).register(driver)


class Mapped(mn.AtomicInterval):
    lock: mn.SpinLock

    def __init__(self) -> None:
        self.lock = mn.SpinLock("mapped")

    def invalidate(self, rng: mn.Range, seq: int) -> bool:
        with self.lock:
            self.set_seq(seq)
        return True


class Remote(mn.SleepableInterval):
    async def invalidate(self, rng: mn.Range, seq: int) -> bool:
        self.set_seq(seq)
        return True


async def intervals(today: mn.Notifiers[mn.RwSems], old: mn.Notifiers[mn.SpinLocks]) -> None:
    await Mapped().insert(today, 0, mn.PAGE_SIZE)
    await Mapped().insert(old, 0, mn.PAGE_SIZE)
    remote = Remote()
    await remote.insert(today, 0, mn.PAGE_SIZE)
    seq = await remote.read_begin()
    assert_type(remote.read_retry(seq), bool)
    await remote.remove()


async def map_anywhere(notifiers: mn.Notifiers[L], interval: mn.AtomicInterval) -> None:
    """A generic helper over both locking models."""
    await interval.insert(notifiers, 0, mn.PAGE_SIZE)
