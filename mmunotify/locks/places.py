"""Places: lines of the program, of who is calling now and of who is suspended somewhere."""

from __future__ import annotations

import gc
import inspect
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class Place(NamedTuple):
    """One line of the program."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


Places = tuple[Place, ...]
"""A line and its callers, innermost first."""

_DEPTH: Final = 3
_SKIPPED: Final = (
    "contextlib",
    *("mmunotify.locks", "mmunotify.audience", "mmunotify.dispatch", "mmunotify.intervals"),
    *("mmunotify.notifiers", "mmunotify.sections", "mmunotify.watchers"),
)
"""Between the line that a message should show and the lock."""
_EVENT_LOOPS: Final = ("asyncio", "trio", "anyio", "mmunotify.testing.explore")
_kinds: Final[dict[str, str]] = {}
"""What kind of code a file holds, by file name: looked up once for each."""


def _kind(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    kind = _kinds.get(file)
    if kind is None:
        dotted = f"{frame.f_globals.get('__name__')}."
        kind = "user"
        if dotted.startswith(tuple(f"{name}." for name in _SKIPPED)):
            kind = "skipped"
        elif dotted.startswith(tuple(f"{name}." for name in _EVENT_LOOPS)):
            kind = "event loop"
        _kinds[file] = kind
    return kind


def _place(frame: FrameType) -> Place:
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)


def callers() -> Places:
    """Who called into the locks: the line that did, and its callers up to the event loop."""
    places: list[Place] = []
    frame = inspect.currentframe()
    while frame is not None and len(places) < _DEPTH:
        kind = _kind(frame)
        if kind == "user":
            places.append(_place(frame))
        elif kind == "event loop":
            break
        frame = frame.f_back
    return tuple(places)


def at(places: Places) -> str:
    """Places as they stand in a message."""
    if not places:
        return "an unknown line"
    first, *others = map(str, places)
    return first + "".join(f"\n        called from {place}" for place in others)


def await_frames(awaited: Any) -> Iterator[FrameType]:
    """The frames of a suspended coroutine and of what it awaits, outermost first.

    Of one that is running only its own: what it awaits is being resumed by throw() or close(), and
    to ask that for what it awaits crashes CPython 3.11 and 3.12, which look for it on its stack.
    """
    while awaited is not None:
        if hasattr(awaited, "cr_await"):
            frame = awaited.cr_frame
            awaited = None if awaited.cr_running else awaited.cr_await
        elif hasattr(awaited, "ag_await"):
            frame, awaited = awaited.ag_frame, awaited.ag_await
        elif hasattr(awaited, "gi_yieldfrom"):
            frame = awaited.gi_frame
            awaited = None if awaited.gi_running else awaited.gi_yieldfrom
        elif type(awaited).__name__ in ("async_generator_asend", "async_generator_athrow"):
            # The generator behind these two is not exposed, but the garbage collector knows it.
            referents = gc.get_referents(awaited)
            awaited = next((one for one in referents if hasattr(one, "ag_await")), None)
            continue
        else:
            return
        if frame is not None:
            yield frame


def suspended_at(coroutine: Any) -> Places:
    """Where a coroutine is suspended: the innermost line that is not an event loop's."""
    places: Places = ()
    for frame in await_frames(coroutine):
        if _kind(frame) == "user":
            places = (_place(frame), *places)[:_DEPTH]
    return places
