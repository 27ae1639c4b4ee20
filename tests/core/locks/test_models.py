"""The locking models, and the interface that their locks share."""

from __future__ import annotations

import pytest

from mmunotify.errors import SpinlockHeld
from mmunotify.locks import LockModel, RWSemaphore, RwSems, SpinLocks, SpinRWLock

MODELS: list[type[LockModel]] = [SpinLocks, RwSems]


def test_names_and_colours() -> None:
    assert (SpinLocks.name, SpinLocks.sleepable) == ("SpinLocks", False)
    assert (RwSems.name, RwSems.sleepable) == ("RwSems", True)


@pytest.mark.parametrize("model", MODELS)
def test_the_lock_is_of_the_models_colour(model: type[LockModel]) -> None:
    lock = model.rmap_lock("anon_vma[3]")
    assert lock.sleepable == model.sleepable
    assert isinstance(lock, RWSemaphore if model.sleepable else SpinRWLock)
    assert (lock.name, lock.lock_class) == ("anon_vma[3]", "anon_vma")
    assert model.rmap_lock("anon_vma[3]", "root").lock_class == "root"


@pytest.mark.parametrize("model", MODELS)
async def test_code_under_a_reverse_map_lock_is_written_once(model: type[LockModel]) -> None:
    lock = model.rmap_lock("i_mmap")
    async with lock.writing():
        assert not lock.down_read_trylock()
    async with lock.reading():
        assert not lock.down_write_trylock()
    await lock.down_write()
    lock.downgrade_write()
    lock.up_read()
    assert lock.down_read_trylock()
    assert not lock.down_write_trylock()
    lock.up_read()
    assert not lock.is_contended
    assert lock.statistics().name == "i_mmap"


async def test_only_readers_of_an_rwsem_share_it() -> None:
    shared, exclusive = RwSems.rmap_lock("a"), SpinLocks.rmap_lock("b")
    assert shared.down_read_trylock()
    assert shared.down_read_trylock()
    assert exclusive.down_read_trylock()
    with pytest.raises(SpinlockHeld):
        await exclusive.down_read()


def test_a_model_is_not_instantiated() -> None:
    with pytest.raises(TypeError):
        LockModel()  # type: ignore[abstract]
