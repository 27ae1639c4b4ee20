"""Spinlocks, and the reverse-map lock that is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mmunotify.errors import LockNotHeld, SpinlockHeld
from mmunotify.locks import SpinLock, SpinRWLock

if TYPE_CHECKING:
    from collections.abc import Coroutine

pytestmark = pytest.mark.usefixtures("both_forms")


def test_held_inside_with() -> None:
    lock = SpinLock("page_table_lock")
    assert not lock.statistics().locked
    with lock:
        assert lock.statistics().locked
        assert repr(lock) == "<SpinLock 'page_table_lock' locked>"
    assert not lock.locked
    assert lock.statistics().name == "page_table_lock"


def test_an_exception_inside_releases_it() -> None:
    lock = SpinLock("page_table_lock")
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    assert not lock.locked


def test_found_held_raises_and_names_it() -> None:
    lock = SpinLock("page_table_lock")
    with lock:
        with pytest.raises(SpinlockHeld, match="page_table_lock"), lock:
            pytest.fail("took it twice")
        assert lock.locked, "it is still the first one's"
    with lock:
        pass


def finish(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that must not suspend, without an event loop."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


@pytest.fixture
def rmap() -> SpinRWLock:
    return SpinRWLock("i_mmap_lock")


def test_rmap_lock_never_suspends(rmap: SpinRWLock) -> None:
    async def use() -> None:
        async with rmap.writing():
            assert rmap.locked
        async with rmap.reading():
            assert rmap.locked
        await rmap.down_write()
        rmap.downgrade_write()
        rmap.up_read()
        await rmap.down_read()
        rmap.up_read()

    finish(use())
    assert not rmap.locked
    assert rmap.writing() is rmap.writing()


def test_rmap_lock_has_one_mode(rmap: SpinRWLock) -> None:
    async def use() -> None:
        async with rmap.reading():
            for guard in (rmap.reading(), rmap.writing()):
                with pytest.raises(SpinlockHeld, match="i_mmap_lock"):
                    async with guard:
                        pytest.fail("two holders")
            with pytest.raises(SpinlockHeld, match="i_mmap_lock"):
                await rmap.down_read()
            with pytest.raises(SpinlockHeld, match="i_mmap_lock"):
                await rmap.down_write()
            assert rmap.locked

    finish(use())
    assert not rmap.locked


def test_rmap_trylock(rmap: SpinRWLock) -> None:
    assert rmap.down_read_trylock()
    assert not rmap.down_read_trylock()
    assert not rmap.down_write_trylock()
    rmap.up_read()
    assert rmap.down_write_trylock()
    assert rmap.statistics().locked
    assert repr(rmap) == "<SpinRWLock 'i_mmap_lock' locked>"
    assert not rmap.is_contended
    assert not rmap.needbreak
    rmap.up_write()
    assert not rmap.locked


def test_releasing_what_nobody_holds(rmap: SpinRWLock) -> None:
    for release in (rmap.up_read, rmap.up_write, rmap.downgrade_write):
        with pytest.raises(LockNotHeld, match="i_mmap_lock"):
            release()


def test_an_exception_releases_the_rmap_lock(rmap: SpinRWLock) -> None:
    async def use() -> None:
        with pytest.raises(ZeroDivisionError):
            async with rmap.writing():
                raise ZeroDivisionError

    finish(use())
    assert not rmap.locked
