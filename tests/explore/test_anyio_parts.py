"""What the explorer needs of anyio's private parts: when one of these fails, anyio has changed.

The message names the version that is installed and the part; `anyio_parts.py` is where to look.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version

import anyio
import pytest
from anyio._core import _eventloop
from anyio.abc import AsyncBackend, TaskGroup, TaskStatus

from mmunotify.errors import NotExplorable
from mmunotify.testing.explore import anyio_parts, explore
from mmunotify.testing.explore.backend import ExplorerBackend
from mmunotify.testing.explore.events import Event
from mmunotify.testing.explore.groups import TaskGroup as ExplorerTaskGroup
from mmunotify.testing.explore.primitives import CapacityLimiter, Lock, Semaphore
from mmunotify.testing.explore.scopes import CancelScope

INSTALLED = f"anyio {version('anyio')}"
HANDLES = hasattr(anyio, "TaskHandle")


def changed(part: str) -> str:
    return f"{INSTALLED} has changed {part}: see mmunotify/testing/explore/anyio_parts.py"


def test_backends_are_found_by_name() -> None:
    """`loaded_backends` maps names to classes, and `get_async_backend` asks it."""
    assert isinstance(_eventloop.loaded_backends, dict), changed("loaded_backends")
    source = inspect.getsource(_eventloop.get_async_backend)
    assert "loaded_backends[asynclib_name]" in source, changed("get_async_backend")


@pytest.mark.parametrize("module", anyio_parts.ASKING, ids=lambda module: module.__name__)
def test_modules_ask_by_their_own_global(module: object) -> None:
    """Each of these has `get_async_backend` as a global, the one of `_eventloop`."""
    asked = vars(module).get("get_async_backend")
    assert asked is _eventloop.get_async_backend, changed(f"{module!r}.get_async_backend")


def test_backend_has_an_answer_to_everything() -> None:
    """No abstract method of a backend is left, or anyio has a new one."""
    left = sorted(ExplorerBackend.__abstractmethods__)
    assert not left, changed(f"AsyncBackend: it has {', '.join(left)} now")
    theirs = {name for name in vars(AsyncBackend) if not name.startswith("_")}
    ours = {name for name in vars(ExplorerBackend) if not name.startswith("_")}
    assert ours <= theirs, changed(f"AsyncBackend: {sorted(ours - theirs)} are gone")


@pytest.mark.parametrize(
    ("base", "ours"),
    [
        (anyio.Event, Event),
        (anyio.Lock, Lock),
        (anyio.Semaphore, Semaphore),
        (anyio.CapacityLimiter, CapacityLimiter),
        (anyio.CancelScope, CancelScope),
        (TaskGroup, ExplorerTaskGroup),
    ],
)
def test_primitives_override_every_method(base: type, ours: type) -> None:
    """A public method that anyio has added would do nothing, or the wrong thing."""
    inherited = {
        name
        for name, value in vars(base).items()
        if not name.startswith("_") and vars(ours).get(name) is None and callable(value)
    }
    assert inherited <= {"cancel"}, changed(f"{base.__name__}: {sorted(inherited)} are new")
    made = {"Semaphore": (1,), "CapacityLimiter": (1,)}.get(base.__name__, ())
    if base is not TaskGroup:

        async def scenario() -> None:
            assert type(base(*made)) is ours, changed(f"{base.__name__}.__new__")

        explore(scenario).check()


@pytest.mark.skipif(not HANDLES, reason="tasks have handles since anyio 4.14")
def test_task_handles_have_the_known_fields() -> None:
    """What `TaskHandle` reads of itself is what `Handle` keeps or makes."""
    known = {
        "__weakref__",
        "_cancel_scope",
        "_coro",
        "_exception",
        "_finished_event",
        "_name",
        "_return_value",
        "_start_value",
    }
    fields = set(anyio.TaskHandle.__slots__)
    assert fields == known, changed(f"TaskHandle: {sorted(fields ^ known)}")


def test_task_status_has_one_method() -> None:
    """`task_status` is `started` and nothing else."""
    methods = {name for name in vars(TaskStatus) if not name.startswith("_")}
    assert methods == {"started"}, changed(f"TaskStatus: {sorted(methods)}")


def test_nothing_is_left_behind() -> None:
    """After an exploration anyio is what it was, whether it failed or not."""

    async def fails() -> None:
        raise ValueError

    before = dict(_eventloop.loaded_backends), _eventloop.get_async_backend
    explore(fails)
    assert (dict(_eventloop.loaded_backends), _eventloop.get_async_backend) == before
    assert all(vars(module)["get_async_backend"] is before[1] for module in anyio_parts.ASKING)
    assert anyio.run(anyio.sleep, 0) is None


def test_without_sniffio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """anyio has been able to do without it since 4.12."""

    async def scenario() -> None:
        pass

    monkeypatch.setitem(__import__("sys").modules, "sniffio", None)
    with pytest.raises(NotExplorable, match=r"mmunotify\[testing\]"):
        explore(scenario)
