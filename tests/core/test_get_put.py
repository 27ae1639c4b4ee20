"""get and put: one shared instance, counted, and freed once behind everybody who may see it."""

from __future__ import annotations

import anyio
import pytest

import mmunotify as mn
from mmunotify.errors import AddressSpaceExited, NotRegistered
from recorders import Atomic, Sleepable
from steps import run_now, settle

pytestmark = pytest.mark.usefixtures("both_forms", "lines")


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


class Shared(Atomic):
    def __init__(self, told: list[str] | None = None) -> None:
        super().__init__("shared", told)


async def test_the_first_get_makes_the_instance_and_the_last_put_frees_it() -> None:
    notifiers = mn.Notifiers()
    sub = await notifiers.get(Shared)
    assert await notifiers.get(Shared) is sub
    assert notifiers.statistics().subscriptions == 1
    told = sub.driver.told
    notifiers.put(sub)
    await notifiers.invalidate(page())
    assert told == ["shared start", "shared end"]
    notifiers.put(sub)
    assert told[2:] == ["shared free"]
    await notifiers.invalidate(page())
    assert told[3:] == []
    assert not notifiers.armed


async def test_put_does_not_release() -> None:
    """The driver must have torn itself down: that is the bargain of get and put."""
    notifiers = mn.Notifiers()
    sub = await notifiers.get(Shared)
    notifiers.put(sub)
    await notifiers.release()
    assert sub.driver.told == ["shared free"]


async def test_after_the_last_put_get_makes_a_new_instance() -> None:
    notifiers = mn.Notifiers()
    first = await notifiers.get(Shared)
    notifiers.put(first)
    second = await notifiers.get(Shared)
    assert second.driver is not first.driver
    assert first.driver.told == ["shared free"]


async def test_each_type_and_each_address_space_has_an_instance_of_its_own() -> None:
    one, two = mn.Notifiers(), mn.Notifiers()

    class Other(Shared):
        pass

    drivers = {
        (await one.get(Shared)).driver,
        (await one.get(Other)).driver,
        (await two.get(Shared)).driver,
    }
    assert len(drivers) == 3


async def test_the_factory_makes_the_instance_once() -> None:
    notifiers = mn.Notifiers()
    made: list[Atomic] = []

    def factory() -> Atomic:
        made.append(Atomic("a"))
        return made[-1]

    first = await notifiers.get(Atomic, factory)
    assert await notifiers.get(Atomic, factory) is first
    assert [first.driver] == made


async def test_the_factory_may_make_a_subclass() -> None:
    """The instance is shared by the type that was asked for, and goes under it too."""
    notifiers = mn.Notifiers()
    sub = await notifiers.get(Atomic, Shared)
    assert await notifiers.get(Atomic) is sub
    notifiers.put(sub)
    notifiers.put(sub)
    assert sub.driver.told == ["shared free"]
    assert run_now(notifiers.get(Atomic, Shared)) is not sub


async def test_what_the_factory_or_attach_raises_get_raises_and_nothing_stays() -> None:
    class Picky(mn.AtomicDriver):
        willing = False

        def attach(self, primary: mn.Primary | None) -> None:
            if not self.willing:
                raise OSError("no such device")

    notifiers = mn.Notifiers()
    with pytest.raises(OSError, match="no such device"):
        await notifiers.get(Picky)
    with pytest.raises(ZeroDivisionError):
        await notifiers.get(Picky, lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    Picky.willing = True
    assert notifiers.statistics().subscriptions == 0
    await notifiers.get(Picky)


async def test_two_that_get_at_once_share_and_both_wait_for_the_sections_before() -> None:
    notifiers = mn.Notifiers()
    subs: list[object] = []

    async def get() -> None:
        subs.append(await notifiers.get(Shared))

    async with anyio.create_task_group() as tasks, notifiers.invalidating(page()):
        tasks.start_soon(get)
        tasks.start_soon(get)
        await settle()
        assert notifiers.statistics().subscriptions == 1
        assert subs == []
    assert len(subs) == 2
    assert subs[0] is subs[1]


async def test_a_cancelled_get_gives_its_reference_back_and_the_other_keeps_its_own() -> None:
    notifiers = mn.Notifiers()
    subs: list[mn.Subscription[Shared]] = []

    async def get() -> None:
        subs.append(await notifiers.get(Shared))

    async with anyio.create_task_group() as tasks, notifiers.invalidating(page()):
        tasks.start_soon(get)
        await settle()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as others:
                others.start_soon(notifiers.get, Shared)
                await settle()
                scope.cancel()
    (sub,) = subs
    assert sub.driver.told == []
    assert sub.users == 1
    notifiers.put(sub)
    assert sub.driver.told == ["shared free"]


async def test_put_wants_a_reference_that_is_left() -> None:
    one, two = mn.Notifiers(name="mm[1]"), mn.Notifiers(name="mm[2]")
    sub = await one.get(Shared)
    with pytest.raises(NotRegistered, match=r"Shared at mm\[1\].*get of mm\[2\]"):
        two.put(sub)
    one.put(sub)
    with pytest.raises(NotRegistered, match="with a reference left"):
        one.put(sub)
    registered = await one.register(Atomic("a"))
    with pytest.raises(NotRegistered):
        one.put(registered)
    await one.unregister(registered)


async def test_unregister_is_not_for_what_get_gave() -> None:
    notifiers = mn.Notifiers()
    sub = await notifiers.get(Shared)
    with pytest.raises(NotRegistered, match="made by register"):
        await notifiers.unregister(sub)
    notifiers.put(sub)
    with pytest.raises(NotRegistered):
        await notifiers.unregister(sub)


async def test_nobody_gets_what_is_left_of_an_address_space_that_has_exited() -> None:
    notifiers = mn.Notifiers()
    sub = await notifiers.get(Shared)
    await notifiers.release()
    assert sub.driver.told == ["shared release"]
    with pytest.raises(AddressSpaceExited):
        await notifiers.get(Shared)
    notifiers.put(sub)
    assert sub.driver.told == ["shared release", "shared free"]


# ------------------------------------------------------------------ when it is freed


async def test_free_waits_for_the_sections_that_were_told() -> None:
    """The end must not reach what was put, nor free come while the section may still see it."""
    notifiers = mn.Notifiers()
    sub = await notifiers.get(Shared)
    told = sub.driver.told
    outer, inner = notifiers.invalidating(page(1)), notifiers.invalidating(page(2))
    await outer.__aenter__()
    await inner.__aenter__()
    told.clear()
    notifiers.put(sub)
    await inner.__aexit__(None, None, None)
    assert told == []
    await notifiers.invalidate(page(3))  # begun after the put: nobody waits for it
    assert told == []
    await outer.__aexit__(None, None, None)
    assert told == ["shared free"]


async def test_free_waits_for_a_section_of_before_another_driver_came() -> None:
    notifiers = mn.Notifiers()
    sub = await notifiers.get(Shared)
    told = sub.driver.told
    async with anyio.create_task_group() as tasks:
        section = notifiers.invalidating(page(1))
        await section.__aenter__()
        tasks.start_soon(notifiers.register, Atomic("new"))
        await settle()
        told.clear()
        notifiers.put(sub)
        assert told == []
        await section.__aexit__(None, None, None)
        assert told == ["shared free"]


async def test_free_does_not_wait_for_sections_that_began_after_the_put() -> None:
    notifiers = mn.Notifiers()
    sub = await notifiers.get(Shared)
    await notifiers.register(Atomic("other"))
    async with notifiers.invalidating(page(1)):
        notifiers.put(sub)
        later = notifiers.invalidating(page(2))
        await later.__aenter__()
        sub.driver.told.clear()
    assert sub.driver.told == ["shared free"]
    await later.__aexit__(None, None, None)


async def test_free_waits_for_callbacks_of_others_that_may_be_walking_to_it() -> None:
    """Put while an older walk is suspended in another driver's start: it may yet be called."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    sub = await notifiers.get(Sleepable, lambda: Sleepable("shared", told))
    await notifiers.register(Sleepable("slow", told, start=gate.wait))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate, page())
        await settle()
        notifiers.put(sub)
        await settle()
        early = "shared free" in told
        gate.set()
    assert not early
    assert told[-1] == "shared free"
    assert told.count("shared free") == 1


@pytest.mark.parametrize("callback", ["start", "end"])
async def test_a_plain_callback_may_put_itself(callback: str) -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []

    def put() -> None:
        notifiers.put(sub)

    await notifiers.register(Atomic("old", told))
    sub = await notifiers.get(Atomic, lambda: Atomic("shared", told, **{callback: put}))
    await notifiers.register(Atomic("new", told))
    async with notifiers.invalidating(page()):
        told.append("body")
    expected = ["new start", "shared start", "old start", "body", "new end"]
    if callback == "end":
        expected.append("shared end")
    assert told == [*expected, "old end", "shared free"]
    assert notifiers.statistics() == mn.NotifiersStatistics(
        subscriptions=2, quarantined=0, open_sections=0, srcu_readers=0
    )


@pytest.mark.parametrize("callback", ["start", "end"])
async def test_a_coroutine_callback_may_put_itself(callback: str) -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []

    async def put() -> None:
        notifiers.put(sub)
        await settle()
        assert "shared free" not in told

    await notifiers.register(Sleepable("old", told))
    sub = await notifiers.get(Sleepable, lambda: Sleepable("shared", told, **{callback: put}))
    await notifiers.register(Sleepable("new", told))
    async with notifiers.invalidating(page()):
        told.append("body")
    assert sub.failure is None
    assert told[-2:] == ["old end", "shared free"]
    assert told.count("shared end") == (callback == "end")


@pytest.mark.parametrize("other", ["older", "newer"])
async def test_a_callback_may_put_another_driver(other: str) -> None:
    """Whether or not the walk still reaches the other, free comes behind the section."""
    notifiers = mn.Notifiers()
    told: list[str] = []

    def put() -> None:
        notifiers.put(sub)

    if other == "older":
        sub = await notifiers.get(Shared, lambda: Shared(told))
    putter = await notifiers.register(Atomic("putter", told, start=put))
    if other == "newer":
        sub = await notifiers.get(Shared, lambda: Shared(told))
    async with notifiers.invalidating(page()):
        assert "shared free" not in told
    assert told[-2:] == ["putter end", "shared free"]
    assert "shared end" not in told
    assert putter.failure is None


async def test_an_ageing_callback_may_put_itself() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []

    class Ages(Shared):
        def clear_flush_young(self, start: int, end: int) -> bool:
            notifiers.put(sub)
            assert "shared free" not in told
            return True

    sub = await notifiers.get(Ages, lambda: Ages(told))
    assert notifiers.clear_flush_young(0x1000, 0x2000)
    assert sub.failure is None
    assert told == ["shared free"]


async def test_release_may_put_its_own_driver() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []

    async def put() -> None:
        notifiers.put(sub)
        await settle()

    sub = await notifiers.get(Sleepable, lambda: Sleepable("shared", told, release=put))
    await notifiers.release()
    assert told == ["shared release", "shared free"]


async def test_what_was_put_before_its_turn_at_the_exit_is_not_released_after_free() -> None:
    """Linux: put takes it off the list that the exit walks."""
    notifiers = mn.Notifiers()
    told: list[str] = []

    async def put() -> None:
        notifiers.put(sub)

    sub = await notifiers.get(Shared, lambda: Shared(told))
    await notifiers.register(Sleepable("newer", told, release=put))
    await notifiers.release()
    assert told == ["newer release", "shared free"]


async def test_free_that_raises_is_logged_and_stands_on_the_subscription() -> None:
    notifiers = mn.Notifiers()

    def explode() -> None:
        raise OSError("no")

    sub = await notifiers.get(Atomic, lambda: Atomic("a", free=explode))
    notifiers.put(sub)
    assert isinstance(sub.failure, OSError)
    assert run_now(notifiers.get(Atomic, lambda: Atomic("b"))).failure is None


async def test_z35_the_barrier_waits_for_what_was_put() -> None:
    """put queues the free; whoever unloads the driver's code has to wait for queued callbacks."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    await notifiers.register(Sleepable("slow", start=gate.wait))
    sub = await notifiers.get(Sleepable, lambda: Sleepable("shared", told))

    async def unload() -> None:
        await notifiers.barrier()
        told.append("unloaded")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate, page())
        await settle()
        told.clear()
        notifiers.put(sub)
        tasks.start_soon(unload)
        await settle()
        early = list(told)
        gate.set()
    assert early == []
    assert told == ["shared free", "unloaded"]
    run_now(notifiers.barrier())
