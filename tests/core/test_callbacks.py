"""What a driver may call from inside its own callbacks: put, and nothing that would wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

import mmunotify as mn
from mmunotify.errors import CalledFromCallback
from recorders import Atomic, Concurrent, Deferred, Sleepable
from steps import run_now, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

pytestmark = pytest.mark.usefixtures("both_forms", "lines")

WAITING = ["register", "get", "unregister", "barrier", "release"]


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


class Scene:
    """An address space with a driver to unregister, and calls that would wait for callbacks."""

    def __init__(self, srcu: mn.SRCU | None = None) -> None:
        self.notifiers = mn.Notifiers(name="mm[5]", srcu=srcu)
        self.raised: list[BaseException] = []

    async def prepare(self) -> None:
        self.other = await self.notifiers.register(Atomic("other"))

    def call(self, what: str) -> Coroutine[Any, Any, object]:
        calls: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
            "register": lambda: self.notifiers.register(Atomic("new")),
            "get": lambda: self.notifiers.get(Atomic, lambda: Atomic("shared")),
            "unregister": lambda: self.notifiers.unregister(self.other),
            "barrier": self.notifiers.barrier,
            "release": self.notifiers.release,
        }
        return calls[what]()

    async def attempt(self, what: str) -> None:
        try:
            await self.call(what)
        except CalledFromCallback as exc:
            self.raised.append(exc)


@pytest.mark.parametrize("what", WAITING)
@pytest.mark.parametrize("callback", ["start", "end", "release"])
async def test_a_coroutine_callback_may_not_wait_for_itself(what: str, callback: str) -> None:
    scene = Scene()
    await scene.prepare()
    notifiers = scene.notifiers
    driver = Sleepable("s", None, **{callback: lambda: scene.attempt(what)})
    sub = await notifiers.register(driver)
    async with notifiers.invalidating(page()):
        pass
    await notifiers.invalidate(page())
    await notifiers.unregister(sub)
    name = "release" if callback == "release" else f"invalidate_range_{callback}"
    assert len(scene.raised) == (1 if callback == "release" else 2)
    for raised in scene.raised:
        assert str(raised).startswith(f"{what} at mm[5] inside Sleepable.{name}: ")
    run_now(notifiers.unregister(scene.other))


@pytest.mark.parametrize("what", WAITING)
async def test_nor_may_a_sync(what: str) -> None:
    scene = Scene()
    await scene.prepare()
    await scene.notifiers.register(Deferred("d", sync=lambda: scene.attempt(what)))
    await scene.notifiers.invalidate(page())
    (raised,) = scene.raised
    assert "inside Deferred.invalidate_range_sync" in str(raised)


@pytest.mark.parametrize("what", WAITING)
@pytest.mark.parametrize("form", ["section", "nonblock", "invalidate", "page", "age", "end"])
async def test_nor_may_a_plain_callback_that_drives_it_by_hand(what: str, form: str) -> None:
    """Uncontended they do not suspend, so a plain callback could run them; it must not either."""
    scene = Scene()
    await scene.prepare()
    notifiers = scene.notifiers

    class Hand(mn.AtomicDriver):
        def attempt(self) -> bool:
            run_now(scene.attempt(what))
            return True

        if form == "age":

            def clear_flush_young(self, start: int, end: int) -> bool:
                return self.attempt()
        elif form == "end":

            def invalidate_range_end(self, rng: mn.Range) -> None:
                self.attempt()
        else:

            def invalidate_range_start(self, rng: mn.Range) -> None:
                self.attempt()

    sub = await notifiers.register(Hand())
    match form:
        case "nonblock":
            with notifiers.invalidating_nonblock(page()):
                pass
        case "invalidate":
            await notifiers.invalidate(page())
        case "page":
            notifiers.invalidate_page_atomic(0x1000)
        case "age":
            notifiers.clear_flush_young(0x1000, 0x2000)
        case _:
            with notifiers.invalidating_atomic(page()):
                pass
    assert sub.failure is None
    (raised,) = scene.raised
    assert "inside test_nor_may_a_plain" in str(raised)
    assert ".Hand." in str(raised)


@pytest.mark.parametrize("callback", ["start", "end"])
async def test_nor_may_one_that_is_told_in_a_task_of_its_own(callback: str) -> None:
    """Concurrent drivers are awaited in tasks of a group: the section waits for them all."""
    scene = Scene()
    await scene.prepare()
    for name in ("a", "b"):
        acts = {callback: lambda: scene.attempt("unregister")}
        await scene.notifiers.register(Concurrent(name, None, **acts))
    async with scene.notifiers.invalidating(page()):
        pass
    assert len(scene.raised) == 2


async def test_a_callback_of_a_domain_that_is_shared_may_not_wait_for_it_either() -> None:
    srcu = mn.SRCU("global")
    scene = Scene(srcu)
    await scene.prepare()
    beside = mn.Notifiers(srcu=srcu)
    await beside.register(Sleepable("s", start=lambda: scene.attempt("unregister")))
    await beside.invalidate(page())
    assert len(scene.raised) == 1


async def test_a_callback_of_another_domain_may() -> None:
    scene = Scene()
    await scene.prepare()
    elsewhere = mn.Notifiers()
    await elsewhere.register(Sleepable("s", start=lambda: scene.attempt("unregister")))
    await elsewhere.invalidate(page())
    assert scene.raised == []
    assert scene.notifiers.statistics().subscriptions == 0


async def test_other_tasks_may_do_it_while_a_callback_runs() -> None:
    scene = Scene()
    await scene.prepare()
    gate = anyio.Event()
    await scene.notifiers.register(Sleepable("slow", start=gate.wait))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(scene.notifiers.invalidate, page())
        await settle()
        for what in ("get", "unregister", "barrier"):
            tasks.start_soon(scene.attempt, what)
        await settle()
        gate.set()
    assert scene.raised == []


async def test_the_body_of_a_section_may_unregister() -> None:
    scene = Scene()
    await scene.prepare()
    async with scene.notifiers.invalidating(page()):
        await scene.attempt("unregister")
    assert scene.raised == []


async def test_nothing_has_happened_when_it_is_refused() -> None:
    scene = Scene()
    await scene.prepare()
    await scene.notifiers.register(Sleepable("s", start=lambda: scene.attempt("unregister")))
    await scene.notifiers.invalidate(page())
    assert scene.notifiers.statistics().subscriptions == 2
    assert not scene.other.over
    assert scene.other.driver.told == ["other start", "other end"]


async def test_a_callback_may_open_sections_of_other_address_spaces() -> None:
    outer, inner = mn.Notifiers(name="mm[1]"), mn.Notifiers(name="mm[2]")
    told: list[str] = []

    async def pass_on() -> None:
        async with inner.invalidating(page()):
            pass

    await inner.register(Sleepable("inner", told))
    await outer.register(Sleepable("outer", told, start=pass_on))
    await outer.invalidate(page())
    assert told == ["outer start", "inner start", "inner end", "outer end"]
