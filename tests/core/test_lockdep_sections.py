"""Lockdep knows open sections as a lock: held by who has one open, waited for by who registers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import mmunotify as mn
from mmunotify.errors import LockOrderViolation, LockRecursion, ScheduleWhileAtomic
from mmunotify.locks import lockdep
from recorders import Atomic, Concurrent, Sleepable
from steps import run_now, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    with lockdep.checking():
        yield


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


def line_of(function: Callable[..., object], text: str) -> str:
    """Where the first line of `function` is that contains `text`, as lockdep writes it."""
    lines, first = inspect.getsourcelines(function)
    number = next(n for n, line in enumerate(lines, first) if text in line)
    return f"{__file__}:{number} in "


class Plain(mn.AtomicInterval):
    def invalidate(self, rng: mn.Range, seq: int) -> bool:
        self.set_seq(seq)
        return True


WAITS: dict[str, Callable[[mn.Notifiers[mn.RwSems]], Any]] = {
    "register": lambda notifiers: notifiers.register(Atomic("late")),
    "register_locked": lambda notifiers: notifiers.register_locked(Atomic("late")),
    "get": lambda notifiers: notifiers.get(Atomic, lambda: Atomic("late")),
    "get_locked": lambda notifiers: notifiers.get_locked(Atomic, lambda: Atomic("late")),
    "barrier": lambda notifiers: notifiers.barrier(),
    "insert": lambda notifiers: Plain().insert(notifiers, 0, 4096),
}
waits = pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
kinds = pytest.mark.parametrize("kinds", [(), (Atomic,), (Sleepable,), (Concurrent, Concurrent)])


@waits
@kinds
async def test_whoever_waits_for_sections_in_ones_own_is_told_so(
    wait: Callable[[mn.Notifiers[mn.RwSems]], Any], kinds: tuple[type[Any], ...]
) -> None:
    """It would wait for itself; instead nothing has happened."""
    notifiers = mn.Notifiers(name="mm[7]")
    for kind in kinds:
        await notifiers.register(kind("a"))
    async with notifiers.invalidating(page()):
        with pytest.raises(LockRecursion, match=r"already holds a section of mm\[7\]"):
            run_now(wait(notifiers))
    assert notifiers.statistics().subscriptions == len(kinds)
    await wait(notifiers)


async def test_the_message_names_both_lines() -> None:
    notifiers = mn.Notifiers(name="mm[7]")

    async def munmap() -> None:
        async with notifiers.invalidating(page()):
            await notifiers.register(Atomic("late"))

    with pytest.raises(LockRecursion) as caught:
        await munmap()
    message = str(caught.value)
    assert message.startswith("register at mm[7] by task ")
    assert line_of(munmap, "invalidating") in message
    assert line_of(munmap, "register") in message


@pytest.mark.parametrize("form", ["atomic", "nonblock", "bare"])
async def test_every_form_of_a_section_counts(form: str) -> None:
    notifiers = mn.Notifiers()
    await notifiers.register(Atomic("a"))
    match form:
        case "atomic":
            with notifiers.invalidating_atomic(page()), pytest.raises(LockRecursion):
                run_now(notifiers.register(Atomic("late")))
        case "nonblock":
            with notifiers.invalidating_nonblock(page()), pytest.raises(LockRecursion):
                run_now(notifiers.register(Atomic("late")))
        case _:
            rng = page()
            told = await notifiers.invalidate_range_start(rng)
            with pytest.raises(LockRecursion):
                run_now(notifiers.register(Atomic("late")))
            await notifiers.invalidate_range_end(rng, told)
    await notifiers.register(Atomic("late"))


async def test_sections_nest_and_the_last_one_lets_go() -> None:
    notifiers = mn.Notifiers()
    async with notifiers.invalidating(page(1)):
        async with notifiers.invalidating(page(2)):
            await notifiers.invalidate(page(3))
        with pytest.raises(LockRecursion):
            run_now(notifiers.register(Atomic("late")))
    await notifiers.register(Atomic("late"))
    assert not lockdep.held()


async def test_sections_of_other_address_spaces_are_not_waited_for() -> None:
    parent, child = mn.Notifiers(name="mm[1]"), mn.Notifiers(name="mm[2]")
    async with parent.invalidating(page()):
        await child.register(Atomic("a"))


async def test_sections_of_other_tasks_are() -> None:
    notifiers = mn.Notifiers()
    async with anyio.create_task_group() as tasks, notifiers.invalidating(page()):
        tasks.start_soon(notifiers.register, Atomic("a"))
        await settle()
        assert notifiers.statistics().subscriptions == 1


async def test_another_task_may_end_a_section() -> None:
    notifiers = mn.Notifiers()
    rng = page()
    told = await notifiers.invalidate_range_start(rng)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate_range_end, rng, told)
    assert not lockdep.held()
    await notifiers.register(Atomic("a"))


async def test_a_section_that_never_was_is_not_held() -> None:
    """Refused, interrupted, or of the wrong kind."""
    notifiers = mn.Notifiers()
    await notifiers.register(Atomic("interrupts", start=interrupt))
    with pytest.raises(KeyboardInterrupt):
        await notifiers.invalidate_range_start(page())
    assert not lockdep.held()
    await notifiers.register(Sleepable("sleeps"))
    with pytest.raises(mn.WouldBlock):
        notifiers.invalidate_range_start_nonblock(page())
    with pytest.raises(ScheduleWhileAtomic):
        notifiers.invalidate_range_start_atomic(page())
    with pytest.raises(KeyboardInterrupt):
        await notifiers.invalidate_range_start(page())
    assert not lockdep.held()


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("first", ["section", "register"])
async def test_a_lock_taken_in_sections_must_not_be_held_around_register(first: str) -> None:
    """One task has a section open and wants the lock, the other the reverse."""
    notifiers = mn.Notifiers(name="mm[7]")
    device = mn.RWSemaphore("device_lock")

    async def munmap() -> None:
        async with notifiers.invalidating(page()), device.writing():
            pass

    async def mmap() -> None:
        async with device.writing():
            await notifiers.register(Atomic("late"))

    one, other = (munmap, mmap) if first == "section" else (mmap, munmap)
    await one()
    with pytest.raises(LockOrderViolation) as caught:
        await other()
    message = str(caught.value)
    for function, line in (
        (munmap, "invalidating"),
        (mmap, "device.writing"),
        (mmap, "register"),
    ):
        assert line_of(function, line) in message
    assert "sections of mm" in message


async def test_so_it_is_with_a_lock_that_a_callback_takes() -> None:
    """Found although the two are of different address spaces: their sections are of one class."""
    device = mn.RWSemaphore("device_lock")

    async def drop() -> None:
        async with device.writing():
            pass

    first, second = mn.Notifiers(name="mm[1]"), mn.Notifiers(name="mm[2]")
    await first.register(Sleepable("s", start=drop))
    await first.invalidate(page())
    async with device.writing():
        with pytest.raises(LockOrderViolation):
            await second.register(Atomic("late"))


async def test_the_locks_that_sections_run_under_may_be_held_around_register() -> None:
    """That is what `quiesce` does."""
    mmap_lock = mn.RWSemaphore("mmap_lock")
    notifiers = mn.Notifiers(quiesce=mmap_lock.writing)
    for _ in range(2):
        async with mmap_lock.reading(), notifiers.invalidating(page()):
            pass
        await notifiers.register(Atomic("a"))
        async with mmap_lock.writing():
            await notifiers.register_locked(Atomic("b"))


@waits
async def test_nobody_waits_for_sections_under_a_spinlock(
    wait: Callable[[mn.Notifiers[mn.RwSems]], Any],
) -> None:
    """Also while no section is open: the next time there may be one."""
    notifiers = mn.Notifiers()
    with mn.SpinLock("table"), pytest.raises(ScheduleWhileAtomic, match="table"):
        run_now(wait(notifiers))
    assert notifiers.statistics().subscriptions == 0


async def test_off_it_is_not_there() -> None:
    with lockdep.checking(False):
        notifiers = mn.Notifiers()
        assert notifiers._audience.start_calls == notifiers._audience.end_calls == ()
        async with notifiers.invalidating(page()):
            assert not lockdep.held()
