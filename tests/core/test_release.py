"""The end of a subscription and of an address space (I-REL): Z1, Z2, Z3, and who waits for whom."""

from __future__ import annotations

import math
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

import mmunotify as mn
from mmunotify import log
from mmunotify.errors import CallbackHung
from recorders import Atomic, Concurrent, Deferred, Sleepable
from steps import run_now, settle

pytestmark = pytest.mark.usefixtures("both_forms", "lines")

IDLE = mn.NotifiersStatistics(subscriptions=0, quarantined=0, open_sections=0, srcu_readers=0)


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


# ------------------------------------------------------------------ unregister


async def test_unregister_releases_then_frees_and_tells_nothing_more() -> None:
    notifiers = mn.Notifiers()
    driver = Sleepable("s")
    sub = await notifiers.register(driver)
    await notifiers.unregister(sub)
    await notifiers.invalidate(page())
    assert driver.told == ["s release", "s free"]
    assert notifiers.statistics() == IDLE


async def test_invalidations_are_delivered_while_release_runs() -> None:
    """Z1 and Z3: unhashed before its release, a driver missed what reclaim freed meanwhile."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    sub = await notifiers.register(Atomic("a", told, release=gate.wait))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.unregister, sub)
        await settle()
        await notifiers.invalidate(page())
        gate.set()
    assert told == ["a release", "a start", "a end", "a free"]


@pytest.mark.parametrize("callback", ["start", "end"])
async def test_unregister_waits_for_a_callback_that_runs_in_another_task(callback: str) -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()

    async def wait() -> None:
        await gate.wait()
        told.append("the callback returns")

    sub = await notifiers.register(Sleepable("s", told, **{callback: wait}))

    async def unregister() -> None:
        await notifiers.unregister(sub)
        told.append("unregistered")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate, page())
        await settle()
        tasks.start_soon(unregister)
        await settle()
        gate.set()
    order = ["s release", "the callback returns", "s free", "unregistered"]
    assert [one for one in told if one in order] == order


async def test_unregister_waits_for_a_sync_that_runs_in_another_task() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    sub = await notifiers.register(Deferred("d", told, sync=gate.wait))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate, page())
        await settle()
        tasks.start_soon(notifiers.unregister, sub)
        await settle()
        early = list(told)
        gate.set()
    assert early == ["d mark", "d sync", "d release"]
    assert told == [*early, "d free"]


async def test_unregister_does_not_wait_for_sections_in_which_nothing_runs() -> None:
    """Its end is not delivered afterwards: the driver has left between start and end (I-PAIR)."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    sub = await notifiers.register(Sleepable("s", told))
    await notifiers.register(Atomic("a", told))
    async with notifiers.invalidating(page()):
        run_now(notifiers.unregister(sub))
        told.clear()
    assert told == ["a end"]


async def test_unregister_in_the_body_of_an_atomic_section() -> None:
    notifiers = mn.Notifiers(mn.SpinLocks)
    told: list[str] = []
    sub = await notifiers.register(Atomic("a", told))
    await notifiers.register(Atomic("b", told))
    with notifiers.invalidating_atomic(page()):
        run_now(notifiers.unregister(sub))
        told.clear()
    assert told == ["b end"]


async def test_unregister_does_not_wait_for_callbacks_that_began_later() -> None:
    """A steady stream of sections does not keep a driver from leaving."""
    notifiers = mn.Notifiers()
    first, second = anyio.Event(), anyio.Event()
    gates = [first, second]
    other = Sleepable("slow", start=lambda: gates.pop(0).wait())
    await notifiers.register(other)
    sub = await notifiers.register(Atomic("a"))
    gone = anyio.Event()

    async def unregister() -> None:
        await notifiers.unregister(sub)
        gone.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate, page())
        await settle()
        tasks.start_soon(unregister)
        await settle()
        tasks.start_soon(notifiers.invalidate, page())
        await settle()
        first.set()
        await settle()
        left = gone.is_set()
        second.set()
    assert left


async def test_a_section_survives_that_everybody_leaves_in_the_middle() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    subs: list[mn.Subscription[mn.AnyDriver]] = [
        await notifiers.register(Atomic("a", told)),
        await notifiers.register(Sleepable("s", told)),
        await notifiers.register(Deferred("d", told)),
        await notifiers.register(Concurrent("c", told)),
    ]
    section = notifiers.invalidating(page())
    async with section:
        for sub in subs:
            await notifiers.unregister(sub)
        told.clear()
    assert told == []
    assert section.failed == ()
    assert notifiers.statistics() == IDLE


# ------------------------------------------------------------------ the exit


async def test_the_exit_releases_everybody_once_newest_first() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Atomic("a", told))
    await notifiers.register(Sleepable("s", told))
    await notifiers.register(Deferred("d", told))
    await notifiers.release()
    assert told == ["d release", "s release", "a release"]
    await notifiers.invalidate(page())
    await notifiers.release()
    assert told[3:] == []
    assert notifiers.statistics() == IDLE


async def test_reclaim_tells_everybody_until_all_have_been_released() -> None:
    """Z1: the exit must not take anybody off the list while translations may be left."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    await notifiers.register(Atomic("old", told))
    await notifiers.register(Atomic("new", told, release=gate.wait))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.release)
        await settle()
        await notifiers.invalidate(page())
        gate.set()
    assert told == [
        *("new release", "new start", "old start", "new end", "old end"),
        "old release",
    ]


async def test_the_exit_waits_for_callbacks_that_run() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    await notifiers.register(Sleepable("s", told, start=gate.wait))

    async def exits() -> None:
        await notifiers.release()
        told.append("exited")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate, page())
        await settle()
        tasks.start_soon(exits)
        await settle()
        early = list(told)
        gate.set()
    assert early == ["s start", "s release"]
    assert told[-1] == "exited"


async def test_after_the_exit_a_subscription_can_still_be_unregistered() -> None:
    notifiers = mn.Notifiers()
    driver = Atomic("a")
    async with notifiers.attached(driver):
        await notifiers.release()
        assert driver.told == ["a release"]
    assert driver.told == ["a release", "a free"]


# ------------------------------------------------------------------ both at once


@pytest.mark.parametrize("first", ["exit", "unregister"])
async def test_z2_exit_and_unregister_release_once_and_both_wait_for_it(first: str) -> None:
    """Linux has accepted that release may run twice at once; here it does not."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    sub = await notifiers.register(Sleepable("s", told, release=gate.wait))

    async def exits() -> None:
        await notifiers.release()
        told.append("exited")

    async def unregister() -> None:
        await notifiers.unregister(sub)
        told.append("unregistered")

    async with anyio.create_task_group() as tasks:
        order = [exits, unregister] if first == "exit" else [unregister, exits]
        for task in order:
            tasks.start_soon(task)
            await settle()
        await notifiers.invalidate(page())  # Z3: still on the list
        early = list(told)
        gate.set()
    assert early == ["s release", "s start", "s end"]
    assert sorted(told[3:]) == ["exited", "s free", "unregistered"]
    assert told.index("s free") < told.index("unregistered")


async def test_unregister_of_who_is_next_in_line_at_the_exit() -> None:
    """The exit finds it released already, and does not call it again."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    sub = await notifiers.register(Sleepable("old", told))
    await notifiers.register(Sleepable("new", told, release=gate.wait))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.release)
        await settle()
        tasks.start_soon(notifiers.unregister, sub)
        await settle()
        gate.set()
    assert told == ["new release", "old release", "old free"]


async def test_the_exit_releases_who_is_still_registering() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    subs: list[mn.Subscription[Atomic]] = []

    async def register() -> None:
        subs.append(await notifiers.register(Atomic("a", told)))

    async with anyio.create_task_group() as tasks, notifiers.invalidating(page()):
        tasks.start_soon(register)
        await settle()
        await notifiers.release()
        assert told == ["a release"]
    (sub,) = subs
    await notifiers.unregister(sub)
    assert told == ["a release", "a free"]


async def test_a_domain_that_is_shared_makes_unregister_wait_for_the_others() -> None:
    """Linux has one for all: selectable here, and the default is one for each address space."""
    srcu = mn.SRCU("global")
    gate = anyio.Event()
    shared = [mn.Notifiers(srcu=srcu) for _ in range(2)]
    own = mn.Notifiers()
    await shared[0].register(Sleepable("slow", start=gate.wait))
    gone: list[str] = []

    async def leave(notifiers: mn.Notifiers[mn.RwSems], name: str) -> None:
        async with notifiers.attached(Atomic(name)):
            pass
        gone.append(name)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shared[0].invalidate, page())
        await settle()
        tasks.start_soon(leave, shared[1], "beside")
        tasks.start_soon(leave, own, "elsewhere")
        await settle()
        early = list(gone)
        gate.set()
    assert early == ["elsewhere"]
    assert gone == ["elsewhere", "beside"]


# ------------------------------------------------------------------ callbacks that hang


@pytest.mark.parametrize("callback", ["start", "end"])
async def test_all_are_named_who_are_waited_for_at_the_same_time(callback: str) -> None:
    notifiers = mn.Notifiers()
    gate = anyio.Event()
    for name in ("a", "b"):
        await notifiers.register(Concurrent(name, None, **{callback: gate.wait}))
    sub = await notifiers.register(Atomic("a"))

    async def section() -> None:
        async with notifiers.invalidating(page()):
            pass

    with capture_logs() as lines:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(section)
            await settle()
            tasks.start_soon(notifiers.unregister, sub)
            await settle()
            gate.set()
    (line,) = [line for line in lines if line["event"] == log.WAITING_FOR_CALLBACKS]
    names = [driver.partition(" ")[0] for driver in line["drivers"]]
    assert names == [f"Concurrent.invalidate_range_{callback}"] * 2


@pytest.mark.parametrize("callback", ["start", "end", "sync"])
async def test_who_is_waited_for_is_said_in_the_log(callback: str) -> None:
    """Leaving waits without a deadline, and a person has to be able to find out for whom."""
    notifiers = mn.Notifiers(name="mm[3]")
    gate = anyio.Event()

    class Slow(Sleepable):
        """Named by its own name, although it inherits the callback."""

    if callback == "sync":
        await notifiers.register(Deferred("slow", sync=gate.wait))
    else:
        await notifiers.register(Slow("slow", None, **{callback: gate.wait}))
    sub = await notifiers.register(Atomic("a"))
    with capture_logs() as lines:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(notifiers.invalidate, page(), name="reclaim")
            await settle()
            tasks.start_soon(notifiers.unregister, sub)
            await settle()
            gate.set()
    (line,) = [line for line in lines if line["event"] == log.WAITING_FOR_CALLBACKS]
    name = "Deferred" if callback == "sync" else Slow.__qualname__
    assert (line["mm"], line["reason"]) == ("mm[3]", "unregister Atomic")
    (driver,) = line["drivers"]
    assert driver.startswith(f"{name}.invalidate_range_{callback} in task")
    assert "reclaim" in driver


@pytest.mark.parametrize("traced", [False, True])
async def test_who_leaves_itself_and_hangs_is_said_too(traced: bool) -> None:
    notifiers = mn.Notifiers()
    if traced:
        notifiers.trace = mn.Ring().append
    gate = anyio.Event()
    sub = await notifiers.register(Deferred("d", sync=gate.wait))
    with capture_logs() as lines:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(notifiers.invalidate, page())
            await settle()
            tasks.start_soon(notifiers.unregister, sub)
            await settle()
            gate.set()
    (line,) = [line for line in lines if line["event"] == log.WAITING_FOR_CALLBACKS]
    (driver,) = line["drivers"]
    assert driver.startswith("Deferred.invalidate_range_sync in task")


async def test_nobody_is_waited_for_and_nothing_is_said() -> None:
    notifiers = mn.Notifiers()
    with capture_logs() as lines:
        async with notifiers.attached(Sleepable("s")), notifiers.invalidating(page()):
            pass
    assert log.WAITING_FOR_CALLBACKS not in [line["event"] for line in lines]


@pytest.mark.parametrize("hangs", ["start", "release"])
async def test_grace_is_how_long_a_callback_may_take(hangs: str) -> None:
    notifiers = mn.Notifiers(name="mm[3]")
    told: list[str] = []
    gate = anyio.Event()
    sub = await notifiers.register(Sleepable("s", told, **{hangs: gate.wait}))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate, page(), name="reclaim")
        await settle()
        hung = r"Sleepable.invalidate_range_start in task .*reclaim" if hangs == "start" else ""
        with pytest.raises(CallbackHung, match=rf"Sleepable from mm\[3\].*within 0.0 s.*{hung}"):
            await notifiers.unregister(sub, grace=0.0)
        assert notifiers.statistics().subscriptions == 0
        gate.set()
    assert told.count("s release") == 1
    assert "s free" not in told
    assert notifiers.statistics() == IDLE


async def test_a_release_that_fails_when_its_grace_is_over_is_quarantined_like_any(
    lines: list[Any],
) -> None:
    """What it raises instead of the cancellation is its own failure, not unregister's."""
    notifiers = mn.Notifiers()

    async def clean_up() -> None:
        try:
            await anyio.Event().wait()
        except BaseException:
            raise OSError("device is gone") from None

    driver = Sleepable("s", release=clean_up)
    sub = await notifiers.register(driver)
    await notifiers.unregister(sub, grace=0.0)
    assert isinstance(sub.failure, OSError)
    assert driver.told == ["s release", "s free"]


async def test_grace_is_not_used_up_when_nobody_hangs() -> None:
    notifiers = mn.Notifiers()
    driver = Sleepable("s")
    async with notifiers.attached(driver, grace=0.0):
        await notifiers.invalidate(page())
    assert driver.told[-2:] == ["s release", "s free"]
    async with notifiers.attached(Sleepable("t"), grace=math.inf):
        pass


async def test_attached_raises_after_the_grace_that_was_given() -> None:
    notifiers = mn.Notifiers()
    gate = anyio.Event()
    driver = Sleepable("s", start=gate.wait)

    async def attach() -> None:
        async with notifiers.attached(driver, grace=0.0):
            tasks.start_soon(notifiers.invalidate, page())
            await settle()

    async with anyio.create_task_group() as tasks:
        with pytest.raises(CallbackHung):
            await attach()
        gate.set()


async def test_a_hung_release_of_the_exit_does_not_hold_up_a_grace() -> None:
    notifiers = mn.Notifiers()
    gate = anyio.Event()
    sub = await notifiers.register(Sleepable("s", release=gate.wait))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.release)
        await settle()
        with pytest.raises(CallbackHung):
            await notifiers.unregister(sub, grace=0.0)
        gate.set()
    assert notifiers.statistics() == IDLE
