"""The callback contract: colours and names are checked before a driver can be told anything."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import attrs
import pytest

import mmunotify as mn
from mmunotify.drivers import CALLBACKS, Driver, check_driver_class, one_page
from mmunotify.errors import DriverError, UnknownCallback, WrongColour
from recorders import Atomic, Notebook, Sleepable
from steps import run_now

pytestmark = pytest.mark.usefixtures("both_forms", "lines")

KINDS = [mn.AtomicDriver, mn.SleepableDriver, mn.DeferredDriver]
COROUTINES = {
    mn.AtomicDriver: {"release"},
    mn.SleepableDriver: {
        "release",
        "invalidate_range_start",
        "invalidate_range_end",
        "invalidate_page",
    },
    mn.DeferredDriver: {"release", "invalidate_range_sync"},
}
EVERYWHERE = {
    *("attach", "release", "free"),
    *("clear_flush_young", "clear_young", "test_young", "invalidate_page"),
}
RANGES = {"invalidate_range_start", "invalidate_range_end"}
NONBLOCK = {"invalidate_range_start_nonblock", "invalidate_range_end_nonblock"}
NAMES = {
    mn.AtomicDriver: EVERYWHERE | RANGES,
    mn.SleepableDriver: EVERYWHERE | RANGES | NONBLOCK,
    mn.DeferredDriver: EVERYWHERE | NONBLOCK | {"invalidate_range", "invalidate_range_sync"},
}


async def coroutine(self: object, *args: object) -> bool:
    return False


def plain(self: object, *args: object) -> bool:
    return False


def make(kind: type[Any], **members: object) -> type[Any]:
    return type("Mine", (kind,), members)


# ------------------------------------------------------------------ colours


@pytest.mark.parametrize("kind", KINDS)
def test_the_callbacks_of_each_kind_are_these(kind: type[Any]) -> None:
    assert CALLBACKS[kind] == NAMES[kind]


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in sorted(NAMES[kind])]
)
def test_each_callback_has_one_colour(kind: type[Any], name: str) -> None:
    """A coroutine where the lock is a spinlock, and the reverse, is refused by name."""
    right, wrong = (coroutine, plain) if name in COROUTINES[kind] else (plain, coroutine)
    check_driver_class(make(kind, **{name: right}))
    due = "async def" if right is coroutine else r"\(def\)"
    with pytest.raises(WrongColour, match=rf"Mine\.{name}: expected .*{due}.*{kind.__name__}"):
        check_driver_class(make(kind, **{name: wrong}))


async def test_register_refuses_the_wrong_colour_and_registers_nothing() -> None:
    notifiers = mn.Notifiers()
    driver = make(mn.AtomicDriver, invalidate_range_start=coroutine)()
    with pytest.raises(WrongColour, match=r"Mine\.invalidate_range_start"):
        await notifiers.register(driver)
    assert driver.serves is None
    assert notifiers.statistics().subscriptions == 0


def test_the_colour_is_inherited_with_the_base() -> None:
    class Grandchild(Sleepable):
        def invalidate_range_end(self, rng: mn.Range) -> None:  # type: ignore[override]
            pass

    with pytest.raises(WrongColour, match=r"Grandchild\.invalidate_range_end"):
        check_driver_class(Grandchild)


def test_an_async_generator_is_no_coroutine_function() -> None:
    async def generator(self: object, rng: mn.Range) -> Any:
        yield

    with pytest.raises(WrongColour):
        check_driver_class(make(mn.SleepableDriver, invalidate_range_start=generator))


def test_a_driver_derives_from_one_of_the_three_kinds() -> None:
    with pytest.raises(WrongColour, match=r"Mine derives from Driver: expected AtomicDriver, Slee"):
        make(Driver)
    with pytest.raises(WrongColour, match=r"from AtomicDriver and DeferredDriver: expected exactl"):
        check_driver_class(type("Both", (mn.AtomicDriver, mn.DeferredDriver), {}))


@pytest.mark.parametrize("thing", [object(), mn.AtomicDriver], ids=["object", "class"])
async def test_what_is_no_instance_of_a_driver_class_is_named(thing: Any) -> None:
    with pytest.raises(WrongColour, match=re.escape(f"{thing!r} is no driver: expected an inst")):
        await mn.Notifiers().register(thing)


def test_a_mixin_that_is_no_driver_is_welcome() -> None:
    check_driver_class(type("Mine", (Notebook, mn.AtomicDriver), {}))


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        (mn.AtomicDriver, "invalidate_range", "DeferredDriver"),
        (mn.AtomicDriver, "invalidate_range_sync", "DeferredDriver"),
        (mn.AtomicDriver, "invalidate_range_start_nonblock", "SleepableDriver"),
        (mn.SleepableDriver, "invalidate_range", "DeferredDriver"),
        (mn.DeferredDriver, "invalidate_range_start", "AtomicDriver"),
    ],
)
def test_a_callback_of_another_kind_would_never_be_called(
    kind: type[Any], name: str, other: str
) -> None:
    with pytest.raises(UnknownCallback, match=f"{name} is a callback of {other}.*nobody would"):
        check_driver_class(make(kind, **{name: plain}))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("invalidate_rang_start", "invalidate_range_start"),
        ("invalidate_range_stop_start", "invalidate_range_start"),
        ("invalidate_range_strat", "invalidate_range_start"),
        ("invalidat_page", "invalidate_page"),
        ("clear_flush_yung", "clear_flush_young"),
        ("relase", "release"),
    ],
)
def test_a_misspelled_callback_is_refused_with_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(UnknownCallback, match=rf"{name} is no callback.*did you mean {meant}\?"):
        check_driver_class(make(mn.AtomicDriver, **{name: plain}))


@pytest.mark.parametrize(
    "name", ["_invalidate_range_strat", "map_page", "released", "clear_young_bits", "flush"]
)
def test_other_methods_are_the_drivers_own_business(name: str) -> None:
    check_driver_class(make(mn.AtomicDriver, **{name: plain}))


def test_what_is_no_method_is_no_callback() -> None:
    check_driver_class(make(mn.AtomicDriver, invalidate_range=3, relase="no"))


def test_errors_of_the_contract_are_type_errors() -> None:
    assert issubclass(DriverError, TypeError)
    assert issubclass(WrongColour, DriverError)
    assert issubclass(UnknownCallback, DriverError)


# ------------------------------------------------------------------ defaults


@pytest.mark.parametrize("address", [0x5000, 0x5FFF, mn.ULONG_MAX])
async def test_a_page_is_by_default_the_range_of_the_page(address: int) -> None:
    seen: list[tuple[str, int, int, mn.Event]] = []

    def note(name: str, rng: mn.Range) -> None:
        seen.append((name, rng.start, rng.end, rng.event))

    class Plain(mn.AtomicDriver):
        def invalidate_range_start(self, rng: mn.Range) -> None:
            note("start", rng)

        def invalidate_range_end(self, rng: mn.Range) -> None:
            note("end", rng)

    class Suspends(mn.SleepableDriver):
        async def invalidate_range_start(self, rng: mn.Range) -> None:
            note("start", rng)

        async def invalidate_range_end(self, rng: mn.Range) -> None:
            note("end", rng)

    class Marks(mn.DeferredDriver):
        def invalidate_range(self, rng: mn.Range) -> None:
            note("mark", rng)

    Plain().invalidate_page(address)
    await Suspends().invalidate_page(address)
    Marks().invalidate_page(address)
    start = address & ~0xFFF
    where = (start, start + 0x1000, mn.Event.CLEAR)
    assert seen == [(name, *where) for name in ("start", "end", "start", "end", "mark")]
    assert one_page(address).pages == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_driver_without_callbacks_is_told_nothing_and_was_never_accessed(
    kind: type[Any],
) -> None:
    notifiers = mn.Notifiers()
    async with notifiers.attached(kind()):
        async with notifiers.invalidating(mn.Range(0, 0x1000)):
            pass
        with notifiers.invalidating_atomic(mn.Range(0, 0x1000)):
            pass
        with notifiers.invalidating_nonblock(mn.Range(0, 0x1000)):
            pass
        assert not notifiers.clear_flush_young(0, 0x1000)
        assert not notifiers.clear_young(0, 0x1000)
        assert not notifiers.test_young(0)


@pytest.mark.parametrize("kind", [mn.SleepableDriver, mn.DeferredDriver])
def test_who_may_have_to_wait_refuses_non_blockable_sections_by_default(kind: type[Any]) -> None:
    assert kind().invalidate_range_start_nonblock(mn.Range(0, 0x1000)) is False


# ------------------------------------------------------------------ how drivers are written


async def test_drivers_are_attrs_classes_or_dataclasses() -> None:
    """With slots, with an __eq__ and so without a hash: two that are equal are still two."""

    @attrs.define
    class Slotted(mn.AtomicDriver):
        starts: int = 0

        def invalidate_range_start(self, rng: mn.Range) -> None:
            self.starts += 1

    @dataclass
    class Data(mn.SleepableDriver):
        starts: list[int] = field(default_factory=list)

        async def invalidate_range_start(self, rng: mn.Range) -> None:
            self.starts.append(rng.start)

    notifiers = mn.Notifiers()
    slotted = [Slotted(), Slotted()]
    data = [Data(), Data()]
    for one in slotted:
        await notifiers.register(one)
    for other in data:
        await notifiers.register(other)
    await notifiers.invalidate(mn.Range(0x1000, 0x2000))
    assert slotted == [Slotted(1), Slotted(1)]
    assert data == [Data([0x1000]), Data([0x1000])]


async def test_a_callback_may_be_set_on_the_instance() -> None:
    """Each driver is called as often as it has the callback, also when two share a function."""
    notifiers = mn.Notifiers()
    seen: list[mn.Range] = []
    for driver in (mn.AtomicDriver(), mn.AtomicDriver()):
        setattr(driver, "invalidate_range_start", seen.append)  # noqa: B010
        await notifiers.register(driver)
    rng = mn.Range(0x1000, 0x2000)
    await notifiers.invalidate(rng)
    assert seen == [rng, rng]


@pytest.mark.parametrize("failing", ["new", "old"])
async def test_who_fails_in_a_shared_function_is_who_called_it(failing: str) -> None:
    """Newest first: the first call is the new driver's, and it or the other is quarantined."""
    calls: list[str] = ["new", "old"]

    class Shares(Atomic):
        @staticmethod
        def invalidate_range_start(rng: mn.Range) -> None:
            if calls.pop(0) == failing:
                raise OSError

    notifiers = mn.Notifiers()
    subs = [await notifiers.register(Shares(name)) for name in ("old", "new")]
    await notifiers.invalidate(mn.Range(0x1000, 0x2000))
    for sub in subs:
        failed = sub.driver.name == failing
        assert isinstance(sub.failure, OSError) is failed
        assert sub.driver.told == ([] if failed else [f"{sub.driver.name} end"])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_callback_on_the_instance_has_the_colour_of_its_class(kind: type[Any]) -> None:
    """Otherwise a coroutine would be made and thrown away, and nothing invalidated."""
    notifiers = mn.Notifiers()
    for name in sorted(NAMES[kind]):
        driver = kind()
        setattr(driver, name, plain if name in COROUTINES[kind] else coroutine)
        with pytest.raises(WrongColour, match=rf"{kind.__name__}\.{name}"):
            run_now(notifiers.register(driver))
    assert notifiers.statistics().subscriptions == 0
