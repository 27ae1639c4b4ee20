"""Who waits for what, where, and held by whom: what a deadlock is reported with."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any, Final

from .code import is_ours, place
from .traps import PARKED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from .execution import Execution
    from .task import Task

_DEPTH: Final = 4
"""How many places of a task are shown, innermost first."""


def describe(execution: Execution, headline: str) -> str:
    """`headline`, and what each task that has not ended waits for."""
    lines = [headline]
    for task in execution.unfinished():
        lines += _task(execution, task)
    return "\n".join(lines)


def _task(execution: Execution, task: Task) -> Iterator[str]:
    name = execution.name(task)
    if task.state >= PARKED:
        yield f"  {name} waits for {task.waits_for}"
    else:
        yield f"  {name} can run"
    frames = [frame for frame in await_frames(task.coro) if not is_ours(frame.f_code.co_filename)]
    for frame in reversed(frames[-_DEPTH:]):
        of = _of(frame.f_locals.get("self"))
        yield f"      at {place(frame.f_code, frame.f_lineno)}{of}"
    for held in _held(execution, task):
        yield f"      holds {held}"


def _of(owner: object) -> str:
    """What the method at hand belongs to, if that has something to say."""
    if owner is None or all("__repr__" not in vars(base) for base in type(owner).__mro__[:-1]):
        return ""
    try:
        return f" of {owner!r}"
    except Exception:  # It may be half made.
        return ""


def _held(execution: Execution, task: Task) -> list[str]:
    """The locks that lockdep knows the task to hold."""
    lockdep = sys.modules.get("mmunotify.locks.lockdep")
    if lockdep is None or not lockdep.enabled:
        return []
    current, execution.current = execution.current, task
    try:
        return [
            f"{held.lock.name} ({held.mode}), taken at {held.places[0] if held.places else '?'}"
            for held in lockdep.held()
        ]
    finally:
        execution.current = current


def await_frames(awaited: Any) -> Iterator[FrameType]:
    """The frames of a suspended coroutine and of what it awaits, outermost first."""
    while awaited is not None:
        if hasattr(awaited, "cr_await"):
            frame, awaited = awaited.cr_frame, awaited.cr_await
        elif hasattr(awaited, "gi_yieldfrom"):
            frame, awaited = awaited.gi_frame, awaited.gi_yieldfrom
        elif hasattr(awaited, "ag_await"):
            frame, awaited = awaited.ag_frame, awaited.ag_await
        else:
            # `asend()` and its kin do not show their generator, but the collector knows it.
            referents = gc.get_referents(awaited)
            awaited = next((one for one in referents if hasattr(one, "ag_await")), None)
            continue
        if frame is not None:
            yield frame
