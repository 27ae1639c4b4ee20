"""A Notifiers belongs to one event loop; post is the one entry for other threads."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest

import mmunotify as mn
from mmunotify.errors import ForeignThread
from mmunotify.locks import lockdep
from recorders import Atomic, Deferred, Sleepable
from steps import run_now

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("both_forms", "lines")


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


async def elsewhere(function: Callable[[], object]) -> None:
    """Call it in a worker thread, without an event loop."""
    await anyio.to_thread.run_sync(function)


async def used() -> tuple[mn.Notifiers[mn.RwSems], Any]:
    notifiers = mn.Notifiers(name="mm[4]")
    sub = await notifiers.register(Atomic("a"))
    return notifiers, sub


CALLS: dict[str, Callable[[mn.Notifiers[mn.RwSems], Any], object]] = {
    "register": lambda notifiers, sub: run_now(notifiers.register(Atomic("b"))),
    "unregister": lambda notifiers, sub: run_now(notifiers.unregister(sub)),
    "get": lambda notifiers, sub: run_now(notifiers.get(Atomic, lambda: Atomic("b"))),
    "put": lambda notifiers, sub: notifiers.put(sub),
    "barrier": lambda notifiers, sub: run_now(notifiers.barrier()),
    "release": lambda notifiers, sub: run_now(notifiers.release()),
    "invalidate": lambda notifiers, sub: run_now(notifiers.invalidate(page())),
    "invalidate_atomic": lambda notifiers, sub: notifiers.invalidate_atomic(page()),
    "invalidate_page": lambda notifiers, sub: run_now(notifiers.invalidate_page(0x1000)),
    "invalidate_page_atomic": lambda notifiers, sub: notifiers.invalidate_page_atomic(0x1000),
    "nonblock": lambda notifiers, sub: notifiers.invalidating_nonblock(page()).__enter__(),
    "clear_flush_young": lambda notifiers, sub: notifiers.clear_flush_young(0x1000, 0x2000),
    "clear_young": lambda notifiers, sub: notifiers.clear_young(0x1000, 0x2000),
    "test_young": lambda notifiers, sub: notifiers.test_young(0x1000),
}
SECTIONS: dict[str, Callable[[mn.Notifiers[mn.RwSems], Any], object]] = {
    "section": lambda notifiers, sub: run_now(notifiers.invalidate_range_start(page())),
    "atomic section": lambda notifiers, sub: notifiers.invalidate_range_start_atomic(page()),
}


@pytest.mark.parametrize("call", CALLS)
async def test_another_thread_is_refused(call: str) -> None:
    notifiers, sub = await used()
    with pytest.raises(ForeignThread, match=r"mm\[4\] belongs to .*another thread.*post"):
        await elsewhere(lambda: CALLS[call](notifiers, sub))
    assert sub.driver.told == []
    assert notifiers.statistics() == mn.NotifiersStatistics(
        subscriptions=1, quarantined=0, open_sections=0, srcu_readers=0
    )


@pytest.mark.parametrize("call", SECTIONS)
async def test_another_threads_sections_are_refused_in_checking_mode(call: str) -> None:
    """They are the hot path: only the checking mode looks."""
    with lockdep.checking():
        notifiers, sub = await used()
    with pytest.raises(ForeignThread):
        await elsewhere(lambda: SECTIONS[call](notifiers, sub))
    assert sub.driver.told == []
    assert notifiers.statistics().open_sections == 0


async def test_sections_of_sleepable_drivers_too() -> None:
    with lockdep.checking():
        notifiers = mn.Notifiers()
        driver = Sleepable("s")
        await notifiers.register(driver)
    with pytest.raises(ForeignThread):
        await elsewhere(lambda: run_now(notifiers.invalidate_range_start(page())))
    assert driver.told == []
    assert notifiers.statistics().open_sections == 0


async def test_the_first_thread_that_comes_is_the_one_that_it_belongs_to() -> None:
    """It may be made anywhere."""
    made: list[mn.Notifiers[mn.RwSems]] = []
    await elsewhere(lambda: made.append(mn.Notifiers()))
    (notifiers,) = made
    await notifiers.register(Atomic("a"))
    with pytest.raises(ForeignThread):
        await elsewhere(lambda: notifiers.test_young(0))


async def test_post_is_an_invalidate_on_the_loop_and_waits_for_it() -> None:
    notifiers = mn.Notifiers()
    threads: list[int] = []

    async def note() -> None:
        await anyio.lowlevel.checkpoint()
        threads.append(threading.get_ident())

    told: list[str] = []
    await notifiers.register(Sleepable("s", told, start=note))
    await notifiers.register(Deferred("d", told, sync=note))
    failed: list[object] = []
    await elsewhere(lambda: failed.append(notifiers.post(page())))
    assert told == ["d mark", "s start", "s end", "d sync"]
    assert threads == [threading.get_ident()] * 2
    assert failed == [()]


async def test_post_says_who_failed() -> None:
    def explode() -> None:
        raise OSError

    notifiers = mn.Notifiers()
    sub = await notifiers.register(Atomic("a", start=explode))
    failed: list[object] = []
    await elsewhere(lambda: failed.append(notifiers.post(page())))
    assert failed == [(sub,)]


async def test_post_on_the_loop_itself_would_wait_for_itself() -> None:
    notifiers, _ = await used()
    with pytest.raises(ForeignThread, match="expected a thread other than the event loop's"):
        notifiers.post(page())


async def test_post_before_the_loop_has_come_is_refused() -> None:
    notifiers = mn.Notifiers()
    with pytest.raises(ForeignThread, match="after the loop has used"):
        await elsewhere(lambda: notifiers.post(page()))


def test_post_finds_the_loop_also_when_plain_calls_came_before_it() -> None:
    """Plain calls need no loop, and the same thread may run one later."""
    notifiers = mn.Notifiers()
    assert not notifiers.test_young(0x1000)
    notifiers.invalidate_atomic(page())
    driver = Atomic("a")

    async def main() -> None:
        await notifiers.register(driver)
        await elsewhere(lambda: notifiers.post(page()))

    anyio.run(main)
    assert driver.told == ["a start", "a end"]
