"""The locks, uncontended, against peers; and the ways to take all of them, against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from mmunotify.locks import SRCU, Flagged, RWSemaphore, RwSems, SortedArray

from ._bench import (
    Row,
    async_minima,
    at_least,
    at_most,
    bare_calls,
    minima,
    peer,
    printed,
    unmeasured,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from mmunotify.locks import RmapLock, TakeAll


def _reading(
    hold: Callable[[], AbstractAsyncContextManager[Any]],
) -> Callable[[int], Awaitable[None]]:
    async def take(number: int) -> None:
        for _ in range(number):
            async with hold():
                pass

    return take


async def rwsem() -> list[Row]:
    ours = _reading(RWSemaphore("bench").reading)
    rows = []
    for name, limit, theirs in (
        ("aiorwlock(fast)", 2.0, _aiorwlock()),
        ("culsans RWLock", 5.0, _culsans()),
        ("anyio.Lock", 5.0, _reading(_always(anyio.Lock()))),
    ):
        title = f"uncontended read, {name} : ours"
        if isinstance(theirs, str):
            rows.append(unmeasured(title, f">= {limit:g}", name, theirs))
        else:
            mine, other = await async_minima(ours, theirs)
            rows.append(at_least(title, other / mine, limit, name))
    return rows


def _always(
    lock: AbstractAsyncContextManager[Any],
) -> Callable[[], AbstractAsyncContextManager[Any]]:
    return lambda: lock


def _aiorwlock() -> Callable[[int], Awaitable[None]] | str:
    aiorwlock = peer("aiorwlock")
    if isinstance(aiorwlock, str):
        return aiorwlock
    return _reading(_always(aiorwlock.RWLock(fast=True).reader))


def _culsans() -> Callable[[int], Awaitable[None]] | str:
    culsans = peer("culsans")
    if isinstance(culsans, str):
        return culsans
    return _reading(_always(culsans.RWLock().reading))


def srcu() -> list[Row]:
    domain = SRCU("bench")

    class Bare:
        def lock(self) -> int:
            return 0

        def unlock(self, index: int) -> None:
            pass

    bare = Bare()

    def ours(number: int) -> None:
        lock, unlock = domain.read_lock, domain.read_unlock
        for _ in range(number):
            unlock(lock())

    def calls(number: int) -> None:
        lock, unlock = bare.lock, bare.unlock
        for _ in range(number):
            unlock(lock())

    mine, theirs = minima(ours, calls, number=2000)
    return [at_most("SRCU lock and unlock", mine / theirs, 2.5, "two bare method calls")]


async def take_all() -> list[Row]:
    rows = []
    for vmas in (127, 1024, 65_536):
        locks = reachable(vmas)
        rounds = max(5, 20_000 // vmas)
        mine, theirs, thousand_calls = await async_minima(
            _taking(Flagged(), locks),
            _taking(SortedArray(), locks),
            _calls,
            number=1,
            rounds=rounds,
        )
        rows.append(
            at_least(f"take_all, {vmas} VMAs, sorted : flagged", theirs / mine, 1.0, "sorted")
        )
        rows += [
            printed(
                f"take_all, {vmas} VMAs, {name}, per VMA",
                1000 * taken / vmas / thousand_calls,
                "a call",
                "calls",
            )
            for name, taken in (("flagged", mine), ("sorted", theirs))
        ]
    return rows


def reachable(vmas: int) -> Sequence[RmapLock]:
    """The locks that so many VMAs reach: one in four maps a file, four VMAs share an anon_vma."""
    files = [RwSems.rmap_lock(f"i_mmap[{index}]") for index in range(vmas // 16 + 1)]
    anons = [RwSems.rmap_lock(f"anon_vma[{index}]") for index in range(vmas // 4 + 1)]
    return [
        *(files[index % len(files)] for index in range(0, vmas, 4)),
        *(anons[index * 7919 % len(anons)] for index in range(vmas)),
    ]


def _taking(how: TakeAll, locks: Sequence[RmapLock]) -> Callable[[int], Awaitable[None]]:
    async def take(number: int) -> None:
        for _ in range(number):
            async with how.taking(locks):
                pass

    return take


async def _calls(number: int) -> None:
    bare_calls(1000 * number)


async def _in_loop() -> list[Row]:
    return [*await rwsem(), *await take_all()]


def run() -> list[Row]:
    return [*srcu(), *anyio.run(_in_loop)]
