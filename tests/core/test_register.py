"""Who may register, when register returns (I-REG), and who is told of what from when on."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

import mmunotify as mn
from dict_mm import DictMm
from mmunotify.errors import (
    AddressSpaceExited,
    AlreadyRegistered,
    LockdepViolation,
    NotRegistered,
    WrongColour,
)
from recorders import Atomic, Deferred, Sleepable
from steps import run_now, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.usefixtures("both_forms")


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


# ------------------------------------------------------------------ who is told, in which order


async def test_drivers_are_told_newest_first_whatever_their_colour() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Atomic("a", told))
    await notifiers.register(Sleepable("s", told))
    await notifiers.register(Deferred("d", told))
    await notifiers.register(Atomic("b", told))
    async with notifiers.invalidating(page()):
        told.append("the ptes change")
    assert told == [
        *("b start", "d mark", "s start", "a start"),
        "the ptes change",
        *("b end", "s end", "a end"),
        "d sync",
    ]


async def test_a_driver_that_precedes_is_told_before_those_that_do_not() -> None:
    class First(Atomic):
        precedes = True

    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(First("x", told))
    await notifiers.register(Atomic("a", told))
    await notifiers.register(First("y", told))
    await notifiers.register(Sleepable("s", told))
    await notifiers.invalidate(page())
    assert told[:4] == ["y start", "x start", "s start", "a start"]


async def test_attach_learns_the_primary_before_the_driver_is_visible() -> None:
    mm = DictMm()
    seen: list[object] = []

    class Learner(mn.AtomicDriver):
        def attach(self, primary: mn.Primary | None) -> None:
            seen.append((primary, notifiers.statistics().subscriptions, notifiers.armed))

    notifiers = mn.Notifiers(primary=mm)
    await notifiers.register(Learner())
    assert seen == [(mm, 0, False)]
    assert notifiers.statistics().subscriptions == 1
    assert notifiers.armed


async def test_what_attach_raises_register_raises_and_nothing_is_registered() -> None:
    class Picky(Atomic):
        willing = False

        def attach(self, primary: mn.Primary | None) -> None:
            if not self.willing:
                raise OSError("no such device")

    notifiers = mn.Notifiers()
    driver = Picky("a")
    with pytest.raises(OSError, match="no such device"):
        await notifiers.register(driver)
    assert notifiers.statistics().subscriptions == 0
    await notifiers.invalidate(page())
    assert driver.told == []
    driver.willing = True
    await notifiers.register(driver)
    assert notifiers.statistics().subscriptions == 1


# ------------------------------------------------------------------ who may register


async def test_one_instance_serves_one_address_space_once_and_for_ever() -> None:
    one, two = mn.Notifiers(name="mm[1]"), mn.Notifiers(name="mm[2]")
    driver = Atomic("a")
    sub = await one.register(driver)
    for notifiers in (one, two):
        with pytest.raises(AlreadyRegistered, match=r"serves mm\[1\].*never registered"):
            await notifiers.register(driver)
    await one.unregister(sub)
    with pytest.raises(AlreadyRegistered, match=r"serves mm\[1\]"):
        await two.register(driver)
    assert one.statistics().subscriptions == two.statistics().subscriptions == 0


async def test_a_sleepable_driver_is_refused_where_the_locks_spin() -> None:
    notifiers = mn.Notifiers(mn.SpinLocks)
    driver = Sleepable("s")
    with pytest.raises(WrongColour, match=r"AtomicDriver or a DeferredDriver.*SpinLocks"):
        await notifiers.register(driver)  # type: ignore[type-var]
    with pytest.raises(WrongColour):
        await notifiers.get(Sleepable, lambda: driver)  # type: ignore[type-var]
    await notifiers.register(Atomic("a"))
    await notifiers.register(Deferred("d"))
    await mn.Notifiers().register(driver)


async def test_nobody_registers_after_the_exit() -> None:
    notifiers = mn.Notifiers(name="mm[7]")
    await notifiers.release()
    driver = Atomic("a")
    with pytest.raises(AddressSpaceExited, match=r"mm\[7\] has exited.*Atomic"):
        await notifiers.register(driver)
    with pytest.raises(AddressSpaceExited):
        await notifiers.get(Atomic, lambda: driver)
    await mn.Notifiers().register(driver)


async def test_a_subscription_is_unregistered_once_and_where_it_belongs() -> None:
    one, two = mn.Notifiers(name="mm[1]"), mn.Notifiers(name="mm[2]")
    sub = await one.register(Atomic("a"))
    with pytest.raises(NotRegistered, match=r"Atomic at mm\[1\].*register of mm\[2\]"):
        await two.unregister(sub)
    await one.unregister(sub)
    with pytest.raises(NotRegistered, match="not yet unregistered"):
        await one.unregister(sub)


async def test_attached_registers_and_unregisters_also_when_the_body_raises() -> None:
    notifiers = mn.Notifiers()
    driver = Atomic("a")
    with pytest.raises(KeyError):  # noqa: PT012
        async with notifiers.attached(driver) as sub:
            assert sub.driver is driver
            assert notifiers.statistics().subscriptions == 1
            raise KeyError
    assert driver.told == ["a release", "a free"]
    assert notifiers.statistics().subscriptions == 0


# ------------------------------------------------------------------ I-REG


async def test_register_returns_when_the_sections_that_began_before_it_are_over() -> None:
    notifiers = mn.Notifiers()
    await notifiers.register(Atomic("old"))
    new = Atomic("new")
    async with anyio.create_task_group() as tasks:
        first = notifiers.invalidating(page(1))
        second = notifiers.invalidating(page(2))
        await first.__aenter__()
        await second.__aenter__()
        registered = anyio.Event()

        async def register() -> None:
            await notifiers.register(new)
            registered.set()

        tasks.start_soon(register)
        await settle()
        await first.__aexit__(None, None, None)
        await settle()
        assert not registered.is_set()
        await second.__aexit__(None, None, None)
        await settle()
        assert registered.is_set()
    assert new.told == []


@pytest.mark.parametrize("kind", [Atomic, Sleepable])
async def test_register_waits_also_when_nobody_was_registered(
    kind: type[Atomic] | type[Sleepable],
) -> None:
    """Without quiesce sections are counted even when nobody hears of them."""
    notifiers = mn.Notifiers()
    new = kind("new")
    async with anyio.create_task_group() as tasks, notifiers.invalidating(page()):
        tasks.start_soon(notifiers.register, new)
        await settle()
        assert notifiers.statistics().subscriptions == 1
    assert new.told == []


@pytest.mark.parametrize("kind", [Atomic, Sleepable])
async def test_a_section_that_begins_while_register_waits_is_told_to_the_new_driver(
    kind: type[Atomic] | type[Sleepable],
) -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Atomic("old", told))
    async with anyio.create_task_group() as tasks:
        async with notifiers.invalidating(page(1)):
            tasks.start_soon(notifiers.register, kind("new", told))
            await settle()
            told.clear()
            async with notifiers.invalidating(page(2)):
                assert told == ["new start", "old start"]
            assert told[2:] == ["new end", "old end"]
        assert told[4:] == ["old end"]


async def test_sections_that_begin_while_register_waits_do_not_hold_it_up() -> None:
    """Nested sections and a steady stream of new ones: neither deadlock nor starvation."""
    notifiers = mn.Notifiers()
    await notifiers.register(Sleepable("old"))
    registered = anyio.Event()

    async def register() -> None:
        await notifiers.register(Sleepable("new"))
        registered.set()

    async with anyio.create_task_group() as tasks:
        outer = notifiers.invalidating(page(1))
        await outer.__aenter__()
        tasks.start_soon(register)
        await settle()
        inner = notifiers.invalidating(page(2))
        await inner.__aenter__()
        await outer.__aexit__(None, None, None)
        await settle()
        assert registered.is_set()
        await inner.__aexit__(None, None, None)


async def test_two_that_register_at_once_both_wait_for_what_each_of_them_missed() -> None:
    notifiers = mn.Notifiers()
    done: list[str] = []

    async def register(name: str) -> None:
        await notifiers.register(Atomic(name))
        done.append(name)

    async with anyio.create_task_group() as tasks:
        first = notifiers.invalidating(page(1))
        await first.__aenter__()
        tasks.start_soon(register, "a")
        await settle()
        second = notifiers.invalidating(page(2))
        await second.__aenter__()
        tasks.start_soon(register, "b")
        await settle()
        await first.__aexit__(None, None, None)
        await settle()
        assert done == ["a"]  # b has missed the second section too
        await second.__aexit__(None, None, None)
    assert done == ["a", "b"]


async def test_a_refused_or_failed_section_does_not_hold_register_up() -> None:
    """Starts that were undone are no open sections."""
    notifiers = mn.Notifiers()
    await notifiers.register(Sleepable("s"))
    with pytest.raises(mn.WouldBlock):
        notifiers.invalidating_nonblock(page()).__enter__()
    with pytest.raises(mn.ScheduleWhileAtomic):
        notifiers.invalidating_atomic(page()).__enter__()
    with pytest.raises(mn.ScheduleWhileAtomic):
        notifiers.invalidate_page_atomic(0x1000)
    assert notifiers.statistics().open_sections == 0
    run_now(notifiers.register(Atomic("a")))


async def test_a_cancelled_register_leaves_nothing() -> None:
    """It has been told of sections meanwhile, so it is released and freed like any other."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    async with anyio.create_task_group() as tasks, notifiers.invalidating(page(1)):
        tasks.start_soon(notifiers.register, Sleepable("s", told))
        await settle()
        inner = notifiers.invalidating(page(2))
        await inner.__aenter__()
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await settle()
            assert notifiers.statistics().subscriptions == 0
            await inner.__aexit__(None, None, None)
    assert told == ["s start", "s release", "s free"]
    assert notifiers.statistics() == mn.NotifiersStatistics(
        subscriptions=0, quarantined=0, open_sections=0, srcu_readers=0
    )
    run_now(notifiers.register(Sleepable("t", told)))


async def test_a_cancelled_get_leaves_nothing() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    async with anyio.create_task_group() as tasks, notifiers.invalidating(page(1)):
        tasks.start_soon(notifiers.get, Atomic, lambda: Atomic("a", told))
        await settle()
        assert notifiers.statistics().subscriptions == 1
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await settle()
            assert notifiers.statistics().subscriptions == 0
    assert told == ["a free"]
    assert run_now(notifiers.get(Atomic, lambda: Atomic("b"))).driver.name == "b"


# ------------------------------------------------------------------ quiesce


class Owner:
    """An address space whose sections run under mmap_lock, held for reading."""

    def __init__(self) -> None:
        self.mmap_lock = mn.RWSemaphore("mmap_lock")
        self.notifiers = mn.Notifiers(quiesce=self.mmap_lock.writing)


async def test_register_is_inside_quiesce_from_attach_until_the_sections_are_over() -> None:
    seen: list[str] = []

    class Learner(Atomic):
        def attach(self, primary: mn.Primary | None) -> None:
            seen.append("attach")

    @asynccontextmanager
    async def quiesce() -> AsyncIterator[None]:
        seen.append("quiesce")
        yield
        seen.append("over")

    notifiers = mn.Notifiers(quiesce=quiesce)
    await notifiers.register(Learner("a"))
    await notifiers.get(Learner, lambda: Learner("b"))
    assert seen == ["quiesce", "attach", "over"] * 2
    await notifiers.register_locked(Learner("c"))
    await notifiers.get_locked(Learner)
    assert seen[6:] == ["attach"]


@pytest.mark.parametrize("how", ["register", "get"])
async def test_cancelled_on_the_way_out_of_quiesce_it_leaves_nothing_either(how: str) -> None:
    """And its release runs when the locks of the registration are dropped: it may need them."""
    told: list[str] = []

    @asynccontextmanager
    async def quiesce() -> AsyncIterator[None]:
        try:
            yield
            await settle()
        finally:
            told.append("over")

    notifiers = mn.Notifiers(quiesce=quiesce)
    async with anyio.create_task_group() as tasks:
        if how == "register":
            tasks.start_soon(notifiers.register, Sleepable("s", told))
        else:
            tasks.start_soon(notifiers.get, Sleepable, lambda: Sleepable("s", told))
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        present = notifiers.statistics().subscriptions
        tasks.cancel_scope.cancel()
    assert present == 1
    assert told == ["over", *(["s release"] if how == "register" else []), "s free"]
    assert notifiers.statistics().subscriptions == 0


async def test_cancelled_while_it_waits_it_releases_without_the_locks() -> None:
    owner = Owner()
    notifiers = owner.notifiers

    async def needs_the_lock() -> None:
        async with owner.mmap_lock.writing():
            pass

    driver = Sleepable("s", release=needs_the_lock)
    section = notifiers.invalidating(page())  # one that quiesce has missed
    await section.__aenter__()
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(notifiers.register, driver)
            await settle()
            scope.cancel()
    await section.__aexit__(None, None, None)
    assert driver.told == ["s release", "s free"]


async def test_what_register_refuses_it_refuses_after_leaving_quiesce() -> None:
    owner = Owner()
    driver = Atomic("a")
    await owner.notifiers.register(driver)
    with pytest.raises(AlreadyRegistered):
        await owner.notifiers.register(driver)
    assert not owner.mmap_lock.locked


async def test_register_that_is_cancelled_in_quiesce_has_not_attached() -> None:
    owner = Owner()
    driver = Atomic("a")
    async with owner.mmap_lock.reading():
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(owner.notifiers.register, driver)
                await settle()
                scope.cancel()
    assert driver.serves is None
    assert not owner.mmap_lock.locked
    run_now(owner.notifiers.register(driver))


async def test_z13_who_saw_nobody_registered_is_over_before_anybody_is() -> None:
    """A fault under a per-VMA lock skips its section; register must not land inside it."""
    owner = Owner()
    order: list[str] = []
    go_on = anyio.Event()

    async def fault() -> None:
        async with owner.mmap_lock.reading():
            assert not owner.notifiers.armed
            await go_on.wait()  # no section: nobody would hear of it
            order.append("the pte changes")

    async def register() -> None:
        await owner.notifiers.register(Atomic("a"))
        order.append("registered")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fault)
        tasks.start_soon(fault)
        await settle()
        tasks.start_soon(register)
        await settle()
        go_on.set()
    assert order == ["the pte changes", "the pte changes", "registered"]


async def test_z14_a_drivers_mmap_registers_with_the_lock_held() -> None:
    """The GRU of v15 took mmap_lock twice; the form for callers that hold it does not."""
    owner = Owner()
    async with owner.mmap_lock.writing():
        await owner.notifiers.register_locked(Atomic("a"))
        await owner.notifiers.get_locked(Atomic, lambda: Atomic("b"))
    assert owner.notifiers.statistics().subscriptions == 2


async def test_z14_lockdep_names_who_registers_twice_inside_the_lock() -> None:
    with mn.locks.lockdep.checking():
        owner = Owner()
        async with owner.mmap_lock.writing():
            with pytest.raises(LockdepViolation, match="mmap_lock"):
                await owner.notifiers.register(Atomic("a"))
    assert owner.notifiers.statistics().subscriptions == 0
