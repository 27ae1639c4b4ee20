"""Scheduling while atomic: lockdep told of each step, where it is on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmunotify.errors import ScheduleWhileAtomic
from mmunotify.locks import lockdep

from .blocked import await_frames
from .code import is_ours, place
from .traps import running

if TYPE_CHECKING:
    from collections.abc import Callable


def checks() -> tuple[Callable[[], object], ...]:
    """What to do after each step: nothing, when lockdep is off."""
    return (_check,) if lockdep.enabled else ()


def forget() -> None:
    """Let lockdep begin anew: an execution leaves off wherever it failed."""
    lockdep.reset()


def _check() -> None:
    lockdep.after_step()
    for held in lockdep.held():
        if held.suspended_at is not None:
            execution = running.execution
            where = [
                place(frame.f_code, frame.f_lineno)
                for frame in await_frames(execution.current.coro)
                if not is_ours(frame.f_code.co_filename)
            ]
            raise ScheduleWhileAtomic(
                f"{execution.name(execution.current)} was suspended at "
                f"{where[-1] if where else 'its end'} and holds {held}"
            )
