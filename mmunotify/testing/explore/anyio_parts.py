"""All that is known here of anyio beyond what it promises.

anyio has two event loops and no door for a third; here is how one gets in all the same. Written
for anyio 4.16 and good from 4.9 on. A test holds each part against the anyio that is installed,
and names the one that has changed:

- `get_async_backend()` asks sniffio for the name of the library that runs, and looks that name up
  in `loaded_backends`. The modules that ask for every call, each by a global of that name, are
  answered at once: it is a tenth of the time that an execution takes.
- `Event`, `Lock`, `Semaphore`, `CapacityLimiter` and `CancelScope` make themselves, in `__new__`,
  by the `create_...` of that class; what they are then are subclasses with other methods.
- `TaskHandle` (since 4.14) is what a task group returns for each task. Our tasks are such handles
  themselves: what its methods read is kept in its private fields, or made when they ask for it.
"""

from __future__ import annotations

from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
from anyio._core import _eventloop, _synchronization, _tasks, _testing

from mmunotify.errors import NotExplorable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.abc import AsyncBackend

NAME: Final = "mmunotify.testing.explore"
"""What sniffio answers in an explored run."""


ASKING: Final = (anyio.lowlevel, _eventloop, _synchronization, _tasks, _testing)
"""The modules that ask which backend runs, for each of their calls."""


@contextmanager
def running(backend: type[AsyncBackend]) -> Iterator[None]:
    """In this thread anyio runs on `backend`. Raises `NotExplorable` when an event loop runs."""
    try:
        import sniffio
    except ImportError as error:
        raise NotExplorable(
            "anyio asks sniffio which event loop runs, and there the explorer has to answer: "
            "pip install 'mmunotify[testing]'"
        ) from error
    try:
        found = sniffio.current_async_library()
    except sniffio.AsyncLibraryNotFoundError:
        pass
    else:
        raise NotExplorable(f"explore() is a loop of its own and cannot run inside {found}")
    ask = _eventloop.get_async_backend
    thread = get_ident()

    def answer(name: str | None = None) -> type[AsyncBackend]:
        return backend if name is None and get_ident() == thread else ask(name)

    _eventloop.loaded_backends[NAME] = backend
    sniffio.thread_local.name = NAME
    for module in ASKING:
        vars(module)["get_async_backend"] = answer
    try:
        yield
    finally:
        for module in ASKING:
            vars(module)["get_async_backend"] = ask
        sniffio.thread_local.name = None
        del _eventloop.loaded_backends[NAME]


if hasattr(anyio, "TaskHandle"):
    _TaskHandle: Any = anyio.TaskHandle

    class Handle(_TaskHandle):  # type: ignore[misc]  # Final, and not meant to be derived from.
        """`anyio.TaskHandle` with names of ours for its fields; what costs is made on demand."""

        __slots__ = ("label",)

        label: object
        coro = _TaskHandle._coro
        result = _TaskHandle._return_value
        error = _TaskHandle._exception
        told = _TaskHandle._start_value
        """What `task_status.started` was given."""

        root: Any
        ended: Any

        @property
        def name(self) -> str:
            """The name that it was given, or the function's, without those it is local to."""
            return _name_of(self.label)

        _name = name

        @property
        def _cancel_scope(self) -> Any:
            return self.root

        @property
        def _finished_event(self) -> Any:
            return self.ended

else:

    class Handle:  # type: ignore[no-redef]
        """What a task keeps where anyio has no handles yet (before 4.14)."""

        __slots__ = ("coro", "error", "label", "result", "told")

        label: object

        @property
        def name(self) -> str:
            """The name that it was given, or the function's, without those it is local to."""
            return _name_of(self.label)


def _name_of(label: object) -> str:
    if isinstance(label, str):
        return label
    name: str = getattr(label, "__qualname__", None) or repr(label)
    return name.rpartition("<locals>.")[2]
