"""Interleavings that have gone wrong in Linux, on real pages: the frame tells who was missed.

The names are those of the bug zoo in the reference; each is also tested for itself, where the rule
that it broke is.
"""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import mmunotify as mn
from dict_mm import DictMm, Frames
from recorders import Atomic, Sleepable
from steps import settle

pytestmark = pytest.mark.usefixtures("both_forms", "lines")

PAGE = mn.PAGE_SIZE
A, B = 0x10000, 0x11000


class Guest:
    """The part of a secondary MMU that all three kinds have: translations, counted and stamped.

    As KVM does it: nothing is installed while a section is open over the address space, nor if one
    was since the translation was looked up (I-NOEST, I-INFLIGHT, I-SEQ).
    """

    def __init__(self) -> None:
        self.translations: dict[int, mn.Translation] = {}
        self.sections = 0
        self.seq = 0
        self.gone = False

    def attach(self, primary: mn.Primary | None) -> None:
        assert primary is not None
        self.mm = primary

    def drop(self, rng: mn.Range) -> None:
        for page in [page for page in self.translations if rng.overlaps(page, page + PAGE)]:
            del self.translations[page]

    def begin(self) -> None:
        self.sections += 1

    def end(self) -> None:
        self.sections -= 1
        self.seq += 1

    async def release(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.gone = True
        self.translations.clear()

    async def map(self, address: int, *, write: bool) -> None:
        while not self.gone:
            seq = self.seq
            found = await self.mm.fault_in(address, write=write)
            if not self.sections and self.seq == seq and not self.gone:
                self.translations[found.address] = found
                return
            await anyio.lowlevel.checkpoint()

    def use(self) -> None:
        for found in self.translations.values():
            self.mm.read(found, 0, 1)


class AtomicGuest(Guest, mn.AtomicDriver):
    def invalidate_range_start(self, rng: mn.Range) -> None:
        self.begin()
        self.drop(rng)

    def invalidate_range_end(self, rng: mn.Range) -> None:
        self.end()


class SleepableGuest(Guest, mn.SleepableDriver):
    async def invalidate_range_start(self, rng: mn.Range) -> None:
        self.begin()
        try:
            await anyio.lowlevel.checkpoint()
        except BaseException:
            self.end()  # cancelled: no end will be told
            raise
        self.drop(rng)

    async def invalidate_range_end(self, rng: mn.Range) -> None:
        await anyio.lowlevel.checkpoint()
        self.end()


class ConcurrentGuest(SleepableGuest):
    concurrent = True


class DeferredGuest(Guest, mn.DeferredDriver):
    def invalidate_range(self, rng: mn.Range) -> None:
        self.begin()

    async def invalidate_range_sync(self, rng: mn.Range) -> None:
        await anyio.lowlevel.checkpoint()
        self.drop(rng)
        self.end()


KINDS: list[Any] = [AtomicGuest, SleepableGuest, ConcurrentGuest, DeferredGuest]


async def gated(mm: DictMm, told: list[str]) -> anyio.Event:
    """A driver, newer than those before it, whose release waits for what is returned."""
    gate = anyio.Event()
    await mm.notifiers.register(Sleepable("gate", told, release=gate.wait))
    return gate


@pytest.mark.parametrize("kind", KINDS)
async def test_z1_reclaim_frees_a_page_while_the_exit_releases_somebody_else(kind: Any) -> None:
    """v15 to v17: off the list before its release, the driver missed it (also Z3)."""
    mm = DictMm()
    await mm.map(A, B)
    guest = kind()
    await mm.notifiers.register(guest)
    await guest.map(A, write=False)
    gate = await gated(mm, [])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mm.put)
        await settle()
        assert await mm.evict(A)
        reused = mm.frames.allocate(b"\1" * PAGE)
        missed = bool(guest.translations)
        guest.use()
        gate.set()
    assert not missed
    mm.frames.unmap(reused)


@pytest.mark.parametrize("kind", KINDS)
async def test_z3_reclaim_frees_a_page_while_the_driver_itself_is_released(kind: Any) -> None:
    class Slow(kind):  # type: ignore[misc]
        async def release(self) -> None:
            await gate.wait()
            self.use()
            await super().release()

    async with DictMm() as mm:
        await mm.map(A, B)
        gate = anyio.Event()
        guest = Slow()
        sub = await mm.notifiers.register(guest)
        await guest.map(A, write=False)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mm.notifiers.unregister, sub)
            await settle()
            assert await mm.evict(A)
            gate.set()
        assert sub.failure is None


@pytest.mark.parametrize("first", ["exit", "unregister"])
async def test_z2_a_driver_that_unregisters_while_the_address_space_exits(first: str) -> None:
    """2013: released twice, and freed under the exit's feet."""

    class Fragile(SleepableGuest):
        freed = False
        releases = 0

        async def release(self) -> None:
            self.releases += 1
            await settle()
            assert not self.freed
            await super().release()

        def free(self) -> None:
            self.freed = True

    mm = DictMm()
    await mm.map(A, B)
    guest = Fragile()
    sub = await mm.notifiers.register(guest)
    await guest.map(A, write=False)

    async def unregister() -> None:
        await mm.notifiers.unregister(sub)

    parts = [mm.put, unregister]
    async with anyio.create_task_group() as tasks:
        for part in parts if first == "exit" else parts[::-1]:
            tasks.start_soon(part)
            await anyio.lowlevel.checkpoint()
    assert (guest.releases, guest.freed, sub.failure) == (1, True, None)
    assert mm.frames.used == 0


async def test_z4_a_guest_can_fault_again_after_the_oom_reaper_was_refused() -> None:
    """2021: the section that was refused was never ended, and each fault retried for ever."""
    async with DictMm() as mm:
        await mm.map(A, B)
        await mm.notifiers.register(Sleepable("refuses"))
        guest = AtomicGuest()
        await mm.notifiers.register(guest)
        with pytest.raises(mn.WouldBlock):
            mm.notifiers.invalidating_nonblock(mn.Range(A, B)).__enter__()
        with anyio.fail_after(5):
            await guest.map(A, write=True)
        assert guest.sections == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_z13_a_fault_that_saw_nobody_is_over_before_somebody_translates(kind: Any) -> None:
    """2023: registered in the middle of a COW that skipped its section, the driver kept the old."""
    async with DictMm() as mm:
        await mm.map(A, B)
        await mm.store(A, b"old")
        guest = kind()
        go_on = anyio.Event()

        async def cow_under_a_vma_lock() -> None:
            async with mm.mmap_lock.reading():
                assert not mm.notifiers.armed  # so it skips the section
                pte = mm._ptes[A >> 12]
                await go_on.wait()
                mm._ptes[A >> 12] = type(pte)(mm.frames.allocate(b"n" * PAGE), writable=True)
                mm.frames.unmap(pte.frame)

        async def register_and_map() -> None:
            await mm.notifiers.register(guest)
            await guest.map(A, write=False)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cow_under_a_vma_lock)
            await settle()
            tasks.start_soon(register_and_map)
            await settle()
            go_on.set()
        guest.use()
        assert mm.read(guest.translations[A], 0, 1) == b"n"


async def test_z14_a_drivers_mmap_registers_with_mmap_lock_held() -> None:
    async with DictMm() as mm:
        await mm.map(A, B)
        guest = SleepableGuest()
        async with mm.mmap_lock.writing(), mm.anon_vma.writing():
            await mm.notifiers.register_locked(guest)
        await guest.map(A, write=True)
        await mm.unmap(A, B)
        assert guest.translations == {}


# ------------------------------------------------------------------ and all others


class Chaos:
    """Everything at once, by a seed: pages and drivers that come and go, and cancellations."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.mm = DictMm(Frames())
        self.guests: list[tuple[Any, Any]] = []
        self.end = A + 6 * PAGE

    def range(self) -> tuple[int, int]:
        first, last = sorted(self.random.choices(range(7), k=2))
        return A + first * PAGE, A + max(last, first + 1) * PAGE

    async def change(self) -> None:
        start, end = self.range()
        match self.random.choice(["unmap", "map", "protect", "store", "evict", "fork", "page"]):
            case "unmap":
                await self.mm.unmap(start, end)
            case "map":
                await self.mm.map(start, end)
            case "protect":
                await self.mm.protect(start, end, writable=self.random.random() < 0.5)
            case "store":
                await self.mm.store(start, b"x" * self.random.randrange(1, 2 * PAGE))
            case "evict":
                await self.mm.evict(start)
            case "page":
                await self.mm.notifiers.invalidate_page(start)
            case _:
                child = await self.mm.fork()
                with anyio.CancelScope(shield=True):
                    await child.put()

    async def translate(self) -> None:
        if self.guests:
            guest, _ = self.random.choice(self.guests)
            await guest.map(self.range()[0], write=self.random.random() < 0.5)

    async def come_or_go(self) -> None:
        if len(self.guests) < 4:
            guest = self.random.choice(KINDS)()
            self.guests.append((guest, await self.mm.notifiers.register(guest)))
        else:
            _, sub = self.guests.pop(self.random.randrange(4))
            await self.mm.notifiers.unregister(sub)

    async def worker(self) -> None:
        for _ in range(40):
            part = self.random.choice([self.change, self.change, self.translate, self.come_or_go])
            async with anyio.create_task_group() as tasks:
                if self.random.random() < 0.3:
                    tasks.start_soon(self.cancel, tasks.cancel_scope)
                with suppress(mn.BadAddress, ValueError):  # mapped, or not, by others meanwhile
                    await part()
                tasks.cancel_scope.cancel()
            for guest, _ in self.guests:
                guest.use()

    async def cancel(self, scope: anyio.CancelScope) -> None:
        for _ in range(self.random.randrange(8)):
            await anyio.lowlevel.checkpoint()
        scope.cancel()


@pytest.mark.parametrize("seed", range(10))
async def test_nobody_ever_uses_a_page_that_was_freed(seed: int) -> None:
    """I-FREE, I-PAIR and I-REL at random; the frames and the guests' own counts say so."""
    chaos = Chaos(seed)
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(chaos.worker)
    statistics = chaos.mm.notifiers.statistics()
    assert (statistics.open_sections, statistics.srcu_readers) == (0, 0)
    assert statistics.quarantined == 0
    for guest, sub in chaos.guests:
        assert (guest.sections, sub.failure) == (0, None)
        guest.use()
    await chaos.mm.put()
    assert chaos.mm.frames.used == 0
    for guest, _ in chaos.guests:
        assert guest.translations == {}


async def test_who_is_told_too_late_is_found_out_at_random() -> None:
    """The negative control: a guest that drops its translations at the end, not the start."""

    class Late(AtomicGuest):
        def invalidate_range_start(self, rng: mn.Range) -> None:
            self.begin()

        def invalidate_range_end(self, rng: mn.Range) -> None:
            self.end()

    caught = 0
    for seed in range(10):
        chaos = Chaos(seed)
        late = Late()
        chaos.guests.append((late, await chaos.mm.notifiers.register(late)))
        try:
            await chaos.worker()
        except BaseExceptionGroup as group:
            caught += group.subgroup(mn.StaleTranslation) is not None
        except mn.StaleTranslation:
            caught += 1
    assert caught


async def test_atomic_drivers_see_the_same_under_spinlocks() -> None:
    async with DictMm(locks=mn.SpinLocks) as mm:
        await mm.map(A, B)
        told: list[str] = []
        await mm.notifiers.register(Atomic("a", told))
        guest = AtomicGuest()
        await mm.notifiers.register(guest)
        await guest.map(A, write=True)
        assert await mm.evict(A)
        assert guest.translations == {}
        assert told == ["a start", "a end"]
