"""The registration cache, against an address space whose frames are reused at once."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, cast

import anyio
import pytest

import mmunotify as mn
from dict_mm import DictMm, DictPin
from mmunotify import PAGE_SIZE
from mmunotify.errors import BadAddress, SpinlockHeld
from registration_cache import Registration, RegistrationCache
from steps import settle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

A, B, C = 0x10000, 0x20000, 0x30000


def seen_by_card(mm: DictMm, registration: Registration) -> bytes:
    """The first bytes of every page of a registration, read by frame as a card does."""
    assert registration.pin is not None
    columns = registration.pin.translations
    return b"".join(
        mm.read(mn.Translation(page * PAGE_SIZE, frame, True, PAGE_SIZE, generation), 0, 3)
        for page, frame, generation in zip(
            columns.pages, columns.frames, columns.generations, strict=True
        )
    )


async def with_memory(*starts: int) -> DictMm:
    mm = DictMm()
    for start in starts:
        await mm.map(start, start + PAGE_SIZE)
    return mm


class Interrupted:
    """Pins through an address space to which something happens once while it pins."""

    def __init__(self, mm: DictMm, meanwhile: Callable[[], Awaitable[object]]) -> None:
        self.mm = mm
        self.meanwhile: Callable[[], Awaitable[object]] | None = meanwhile
        self.pinned = 0

    async def pin(self, start: int, end: int, *, write: bool = True) -> DictPin:
        self.pinned += 1
        pin = await self.mm.pin(start, end, write=write)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            try:
                await meanwhile()
            except BaseException:
                self.mm.unpin(pin)
                raise
        return pin

    def unpin(self, pin: mn.Pin) -> None:
        self.mm.unpin(pin)


async def test_what_was_put_is_found_again_also_by_a_part_of_it() -> None:
    mm = DictMm()
    await mm.map(A, A + 4 * PAGE_SIZE)
    async with RegistrationCache(mm.notifiers, mm) as cache:
        first = await cache.get(A + 5, 3 * PAGE_SIZE)
        assert (first.start, first.end) == (A, A + 4 * PAGE_SIZE)
        cache.put(first)
        assert await cache.get(A + PAGE_SIZE, 10) is first
        assert await cache.get(A, PAGE_SIZE) is first
        assert (cache.counters.hits, cache.counters.misses) == (2, 1)
        cache.put(first)
        cache.put(first)


async def test_a_part_of_it_that_is_not_registered_is_a_miss() -> None:
    mm = DictMm()
    await mm.map(A, A + 2 * PAGE_SIZE)
    async with RegistrationCache(mm.notifiers, mm) as cache:
        cache.put(await cache.get(A, 1))
        cache.put(await cache.get(A + PAGE_SIZE - 1, 2))
        assert cache.counters.misses == 2


async def test_the_least_recently_used_makes_room_and_who_is_used_stays() -> None:
    mm = await with_memory(A, B, C)
    async with RegistrationCache(mm.notifiers, mm, capacity=2 * PAGE_SIZE) as cache:
        used = await cache.get(A, 1)
        idle = await cache.get(B, 1)
        cache.put(idle)
        assert await cache.get(C, 1) is not idle
        assert cache.counters.evicted == 1
        assert idle.pin is None
        assert await cache.get(A, 1) is used
        assert await cache.get(B, 1) is not idle
        assert used.pin


async def test_an_unmap_unpins_what_is_not_used() -> None:
    mm = await with_memory(A, B)
    async with RegistrationCache(mm.notifiers, mm) as cache:
        for start in (A, B):
            cache.put(await cache.get(start, 1))
        assert mm.frames.used == 2
        await mm.unmap(A, A + PAGE_SIZE)
        assert mm.frames.used == 1
        assert cache.counters.invalidated == 1


async def test_what_the_card_uses_stays_pinned_until_it_is_put() -> None:
    mm = await with_memory(A)
    await mm.store(A, b"old")
    async with RegistrationCache(mm.notifiers, mm) as cache:
        used = await cache.get(A, 1)
        await mm.unmap(A, A + PAGE_SIZE)
        await mm.map(A, A + PAGE_SIZE)
        await mm.store(A, b"new")
        assert seen_by_card(mm, used) == b"old"
        fresh = await cache.get(A, 1)
        assert seen_by_card(mm, fresh) == b"new"
        assert mm.frames.used == 2
        cache.put(used)
        assert mm.frames.used == 1
        cache.put(fresh)


async def test_closing_unpins_and_removes_everything() -> None:
    mm = await with_memory(A, B)
    async with RegistrationCache(mm.notifiers, mm) as cache:
        cache.put(await cache.get(A, 1))
        used = await cache.get(B, 1)
    assert not mm.notifiers.armed
    await mm.unmap(A, C)
    assert mm.frames.used == 1
    cache.put(used)
    assert mm.frames.used == 0


async def test_the_exit_of_the_address_space_empties_the_cache() -> None:
    mm = await with_memory(A)
    async with RegistrationCache(mm.notifiers, mm) as cache:
        cache.put(await cache.get(A, 1))
        await mm.put()
        assert mm.frames.used == 0
    assert not mm.notifiers.armed


async def test_where_no_memory_is_nothing_is_left() -> None:
    mm = DictMm()
    async with RegistrationCache(mm.notifiers, mm) as cache:
        with pytest.raises(BadAddress):
            await cache.get(A, 1)
        assert not mm.notifiers.armed


async def test_addresses_that_change_while_they_are_pinned_are_pinned_again() -> None:
    mm = await with_memory(A)
    await mm.store(A, b"old")

    async def remap() -> None:
        await mm.unmap(A, A + PAGE_SIZE)
        await mm.map(A, A + PAGE_SIZE)
        await mm.store(A, b"new")

    primary = Interrupted(mm, remap)
    async with RegistrationCache(mm.notifiers, primary) as cache:
        registration = await cache.get(A, 1)
        assert seen_by_card(mm, registration) == b"new"
        assert primary.pinned == 2
        assert mm.frames.used == 1
        cache.put(registration)


async def test_a_get_that_is_cancelled_leaves_nothing() -> None:
    mm = await with_memory(A)
    async with RegistrationCache(mm.notifiers, Interrupted(mm, anyio.sleep_forever)) as cache:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cache.get, A, 1)
            await settle()
            tasks.cancel_scope.cancel()
        assert not mm.notifiers.armed
        await mm.unmap(A, A + PAGE_SIZE)
        assert mm.frames.used == 0


# ------------------------------------------------------------------ what libraries learned


@pytest.mark.parametrize("told", [False, True], ids=["as it was", "told"])
async def test_memory_that_was_mapped_again_at_its_address_is_not_found(told: bool) -> None:
    """Register, deregister, munmap, mmap at the same address, register: libfabric's old hit."""
    mm = await with_memory(A)
    await mm.store(A, b"old")
    notifiers = mm.notifiers if told else mn.Notifiers()
    async with RegistrationCache(notifiers, mm) as cache:
        cache.put(await cache.get(A, 3))
        await mm.unmap(A, A + PAGE_SIZE)
        await mm.map(A, A + PAGE_SIZE)
        await mm.store(A, b"new")
        registration = await cache.get(A, 3)
        assert (cache.counters.hits, cache.counters.misses) == ((0, 2) if told else (1, 1))
        assert seen_by_card(mm, registration) == (b"new" if told else b"old")
        cache.put(registration)


async def test_freeing_memory_in_the_notifier_meets_its_own_lock() -> None:
    """As it was: what belongs to a registration was unmapped by its handler, lock in hand.

    The event comes to the handler itself. A kernel or a thread would hang here.
    """

    class FreesAtOnce(Registration):
        def invalidate(self, rng: mn.Range, seq: int) -> bool:
            with self.lock:
                self.set_seq(seq)
                self.cache.forget(self)
                self.cache.notifiers.invalidate_atomic(mn.Range(B, B + PAGE_SIZE))
            return True

    mm = await with_memory(A, B)
    async with RegistrationCache(mm.notifiers, mm) as cache:
        cached = await cache.get(B, 1)
        cache.put(cached)
        await FreesAtOnce(cache).insert(mm.notifiers, A, PAGE_SIZE)
        await mm.unmap(A, A + PAGE_SIZE)
        assert isinstance(cached.failure, SpinlockHeld)
        assert "registration cache" in str(cached.failure)


async def test_memory_that_belongs_to_a_registration_is_freed_outside_the_notifier() -> None:
    """The same memory, unmapped by the next call: the event finds the lock free."""

    async def free(registration: Registration) -> None:
        if registration.start == A:
            await mm.unmap(B, B + PAGE_SIZE)

    mm = await with_memory(A, B, C)
    async with RegistrationCache(mm.notifiers, mm, gone=free) as cache:
        owner, owned = await cache.get(A, 1), await cache.get(B, 1)
        cache.put(owner)
        cache.put(owned)
        await mm.unmap(A, A + PAGE_SIZE)
        cache.put(await cache.get(C, 1))
        assert owner.pin is owned.pin is None
        assert (owner.failure, owned.failure) == (None, None)
        assert cache.counters.invalidated == 2
        assert mm.frames.used == 1


# ------------------------------------------------------------------ everything at once


@pytest.mark.parametrize("seed", range(8))
async def test_a_hit_is_always_what_the_process_sees(seed: int) -> None:
    """Many users, while memory is mapped anew under them, is protected, forks and is evicted."""
    rng = random.Random(seed)
    mm = await with_memory(*range(A, A + 4 * PAGE_SIZE, PAGE_SIZE))
    seen = 0

    async def user(cache: RegistrationCache) -> None:
        nonlocal seen
        for _ in range(40):
            start = A + rng.randrange(4) * PAGE_SIZE
            try:
                registration = await cache.get(start, rng.randrange(1, 2 * PAGE_SIZE))
            except BadAddress:
                await anyio.lowlevel.checkpoint()
                continue
            # Nothing has run since: it is what the process maps, or it was forgotten meanwhile.
            if registration in cache._cached:
                assert registration.pin is not None
                columns = registration.pin.translations
                now = mm.translate_range(registration.start, registration.end)
                assert [*now.frames] == [*columns.frames]
                seen += 1
            for _ in range(rng.randrange(4)):
                await anyio.lowlevel.checkpoint()
            seen_by_card(mm, registration)  # pinned: never stale
            cache.put(registration)

    async def disturb() -> None:
        for _ in range(60):
            start = A + rng.randrange(4) * PAGE_SIZE
            match rng.randrange(3):
                case 0:
                    await mm.unmap(start, start + PAGE_SIZE)
                    await anyio.lowlevel.checkpoint()
                    await mm.map(start, start + PAGE_SIZE)
                case 1:
                    await mm.protect(start, start + PAGE_SIZE, writable=False)
                    await mm.protect(start, start + PAGE_SIZE, writable=True)
                case 2:
                    await mm.evict(start)
            for _ in range(rng.randrange(6)):
                await anyio.lowlevel.checkpoint()

    class Yielding(mn.SleepableDriver):
        """Makes sections long enough for others to run in them."""

        async def invalidate_range_start(self, rng: mn.Range) -> None:
            await anyio.lowlevel.checkpoint()

    await cast("mn.Notifiers[mn.RwSems]", mm.notifiers).register(Yielding())
    async with RegistrationCache(mm.notifiers, mm, capacity=3 * PAGE_SIZE) as cache:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(user, cache)
            tasks.start_soon(disturb)
        assert seen > 20
        assert cache.counters.hits
        assert cache.counters.invalidated
    await mm.unmap(A, A + 4 * PAGE_SIZE)
    assert mm.frames.used == 0
