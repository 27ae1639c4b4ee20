"""A registration cache, as an RDMA library keeps one: pinned memory, found again by its address.

Registering memory with a network card is slow, because its pages are faulted in and pinned. So a
library keeps registrations after their last use, and hopes for the same buffer. But a registration
stands for pages, and a buffer for addresses: after munmap and mmap an address is other memory, and
the card would still read and write what was there before. One interval notifier per registration
tells the cache in time.

Two rules of it were learned by libraries the hard way, and are tests of this file:

- Nobody may find a registration again once its addresses have changed. So the notifier takes it
  out of the cache at once, and what is looked up meanwhile is checked by its sequence number.
- A notifier must not change the address space that it watches, least of all with its lock held: it
  would wait for itself. So it frees nothing; the next ordinary call does, without the lock.

Run it to see what it does with a small address space.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import attrs

import mmunotify as mn
from mmunotify.ranges import page_down, page_up

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType


class Pins(Protocol):
    """What the cache needs of an `mn.Primary`."""

    async def pin(self, start: int, end: int, *, write: bool = True) -> mn.Pin: ...
    def unpin(self, pin: mn.Pin) -> None: ...


class Registration(mn.AtomicInterval):
    """Pinned memory [start, end) that the card may use, from `get` until `put`."""

    def __init__(self, cache: RegistrationCache) -> None:
        self.cache = cache
        self.lock = cache.lock
        self.pin: mn.Pin | None = None
        self.users = 0

    def invalidate(self, rng: mn.Range, seq: int) -> bool:
        with self.lock:
            self.set_seq(seq)
            self.cache.forget(self)
        return True


@attrs.define
class Counters:
    hits: int = 0
    misses: int = 0
    evicted: int = 0
    """Forgotten to make room."""
    invalidated: int = 0
    """Forgotten because their addresses have changed."""


class RegistrationCache:
    """Registrations of one address space, kept after their last use up to `capacity` bytes.

    `gone` is called for each registration when nobody knows it any more, to free what belongs to
    it. It may change the address space.
    """

    def __init__(
        self,
        notifiers: mn.Notifiers[Any],
        primary: Pins,
        *,
        capacity: int = 64 << 20,
        gone: Callable[[Registration], Awaitable[object]] | None = None,
    ) -> None:
        self.notifiers = notifiers
        self.primary = primary
        self.capacity = capacity
        self.counters = Counters()
        self.lock = mn.SpinLock("registration cache")
        self._gone = gone
        # What can be found, least recently used first; a dict, since it keeps an order.
        self._cached: dict[Registration, None] = {}
        # What cannot, but is still inserted: a callback must not remove it.
        self._forgotten: list[Registration] = []

    async def __aenter__(self) -> RegistrationCache:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self.lock:
            for registration in list(self._cached):
                self._forget(registration)
        with anyio.CancelScope(shield=True):
            await self.flush()

    async def get(self, address: int, length: int) -> Registration:
        """Registered memory that covers [address, address + length), for `put` to be given back.

        Raises BadAddress where there is no memory.
        """
        await self.flush()
        with self.lock:
            for registration in self._cached:
                if registration.start <= address and address + length <= registration.end:
                    self.counters.hits += 1
                    registration.users += 1
                    self._cached[registration] = self._cached.pop(registration)
                    return registration
            self.counters.misses += 1
        registration = Registration(self)
        start = page_down(address)
        await registration.insert(self.notifiers, start, page_up(address + length) - start)
        try:
            await self._pin(registration)
        except BaseException:
            await registration.remove()
            raise
        return registration

    async def _pin(self, registration: Registration) -> None:
        while True:
            seq = await registration.read_begin()
            pin = await self.primary.pin(registration.start, registration.end)
            with self.lock:
                if not registration.read_retry(seq):
                    registration.pin = pin
                    registration.users = 1
                    self._cached[registration] = None
                    self._make_room()
                    return
            # The addresses have changed meanwhile, and with them perhaps the pages.
            self.primary.unpin(pin)

    def put(self, registration: Registration) -> None:
        """The card does not use it any more. Its pages stay pinned if it can be found again."""
        with self.lock:
            registration.users -= 1
            self._unpin_unused(registration)

    async def flush(self) -> None:
        """Remove what was forgotten: the part of it that a callback must not do."""
        while self._forgotten:
            registration = self._forgotten.pop()
            await registration.remove()
            if self._gone is not None:
                await self._gone(registration)

    def forget(self, registration: Registration) -> None:
        """Its addresses have changed: nobody finds it any more. With the lock held."""
        if registration in self._cached:
            self.counters.invalidated += 1
            self._forget(registration)

    def _make_room(self) -> None:
        size = sum(registration.end - registration.start for registration in self._cached)
        for registration in list(self._cached):
            if size > self.capacity and not registration.users:
                size -= registration.end - registration.start
                self.counters.evicted += 1
                self._forget(registration)

    def _forget(self, registration: Registration) -> None:
        del self._cached[registration]
        self._forgotten.append(registration)
        self._unpin_unused(registration)

    def _unpin_unused(self, registration: Registration) -> None:
        """Unpin what nobody can find and nobody uses; who uses it still does so when he is done."""
        if registration.pin and not registration.users and registration not in self._cached:
            self.primary.unpin(registration.pin)
            registration.pin = None


# ------------------------------------------------------------------ a small address space


@attrs.frozen
class Frames:
    """Pinned frames, as `Process.pin` gives them."""

    translations: mn.Translations


class Process:
    """Memory that is mapped and unmapped, and tells of it. Its frames are only numbers."""

    def __init__(self) -> None:
        self.notifiers = mn.Notifiers(name="process")
        self.pinned = 0
        self._new_frame = itertools.count(1).__next__
        self._frames: dict[int, int] = {}

    def mmap(self, start: int, end: int) -> None:
        for page in range(start >> mn.PAGE_SHIFT, end >> mn.PAGE_SHIFT):
            self._frames[page] = self._new_frame()

    async def munmap(self, start: int, end: int) -> None:
        async with self.notifiers.invalidating(mn.Range(start, end, mn.Event.UNMAP)):
            for page in range(start >> mn.PAGE_SHIFT, end >> mn.PAGE_SHIFT):
                del self._frames[page]

    async def pin(self, start: int, end: int, *, write: bool = True) -> Frames:
        pages = range(start >> mn.PAGE_SHIFT, end >> mn.PAGE_SHIFT)
        if not all(page in self._frames for page in pages):
            raise mn.BadAddress(f"pin [{start:#x}, {end:#x}): expected mapped memory")
        self.pinned += len(pages)
        frames = [self._frames[page] for page in pages]
        return Frames(mn.Translations(pages, frames, [1] * len(pages), frames))

    def unpin(self, pin: mn.Pin) -> None:
        self.pinned -= len(pin.translations)


async def main() -> None:
    process = Process()
    cache = RegistrationCache(process.notifiers, process, capacity=8 * mn.PAGE_SIZE)

    def say(what: str, registration: Registration | None = None) -> None:
        pin = registration.pin if registration is not None else None
        frames = f"  frames {[*pin.translations.frames]}" if pin is not None else ""
        print(f"{what:54}{process.pinned:2} pages pinned{frames}")

    async with cache:
        process.mmap(0x10000, 0x14000)
        first = await cache.get(0x10000, 0x4000)
        say("register 4 pages: a miss, they are pinned", first)
        cache.put(first)
        say("done with them: they stay pinned")
        again = await cache.get(0x11000, 0x100)
        say("register a part of them: a hit", again)
        cache.put(again)

        await process.munmap(0x10000, 0x14000)
        say("munmap: forgotten at once, and unpinned")
        process.mmap(0x10000, 0x14000)
        other = await cache.get(0x10000, 0x4000)
        say("mmap at the same address: a miss, other frames", other)

        await process.munmap(0x10000, 0x14000)
        say("munmap while the card uses them: they stay pinned", other)
        cache.put(other)
        say("done with them: nobody can find them, so unpinned")

        for start in (0x20000, 0x30000, 0x40000):
            process.mmap(start, start + 0x4000)
            cache.put(await cache.get(start, 0x4000))
        say("3 times 4 pages into 8: the oldest was evicted")
    say("the cache is closed")
    print(cache.counters)


if __name__ == "__main__":
    anyio.run(main)
