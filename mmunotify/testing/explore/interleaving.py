"""A failing schedule as a picture: what the tasks did, line by line, a column for each."""

from __future__ import annotations

import linecache
import os
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import attrs

from .code import is_ours, place
from .traps import running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from .events import Event
    from .task import Task

_WIDTH: Final = 100
"""Of the picture, in characters; columns that get too narrow overlap instead."""
_NARROWEST: Final = 32
_OVERLAP: Final = 8
_LINES_PER_STEP: Final = 12
_LAST_LINES: Final = 2
_STEPS: Final = 80
"""Of a longer execution the last ones are shown."""
_LINES_KEPT: Final = 1_000
"""Of a step, while it runs; of more the first half and the latest."""

_SILENT: Final = (StopIteration, StopAsyncIteration, GeneratorExit)


class _Line(NamedTuple):
    depth: int
    """How many calls deep it is."""
    file: str
    """Empty for what is no line of the program."""
    text: str


@attrs.define
class _Step:
    task: str
    before: list[str]
    """What was chosen before it, other than whom to run."""
    lines: list[_Line] = attrs.Factory(list)
    times: int = 1

    def add(self, depth: int, text: str, file: str = "") -> None:
        line = _Line(depth, file, text)
        if not self.lines or self.lines[-1] != line:
            self.lines.append(line)
            if len(self.lines) > _LINES_KEPT:
                del self.lines[_LINES_KEPT // 2 : -_LAST_LINES]


class Recorder:
    """Watches an execution and traces the lines of its steps.

    A tracer that is set already (a debugger's, of a coverage tool) is put aside for each step.
    """

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque()
        """The latest; those in which a task did again just the same are one."""
        self._left_out = 0
        self._chosen: list[str] = []
        self._raised: BaseException | None = None
        self._in_step = False
        self._tracer: Any = None

    def chosen(self, what: str, index: int, width: int) -> None:
        """Note a choice, if it is another than whom to run."""
        if self._in_step:
            self._steps[-1].add(0, f"* {what}")
        elif not what.startswith("run "):
            self._chosen.append(f"* {what}")

    def made(self, event: Event) -> None:
        """Note where an event was made."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None:
            event.made_at = place(frame.f_code, frame.f_lineno)

    def step_begins(self, task: Task) -> None:
        """Trace what the task does now."""
        self._tidy()
        self._steps.append(_Step(running.execution.name(task), self._chosen))
        self._chosen = []
        self._tracer = sys.gettrace()
        self._in_step = True
        sys.settrace(self._trace)

    def step_ends(self, task: Task) -> None:
        """Trace no more."""
        sys.settrace(self._tracer)
        self._in_step = False

    def broken_off(self) -> None:
        """Trace no more, also if a step has not come to its end."""
        if self._in_step:
            sys.settrace(self._tracer)
            self._in_step = False

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if is_ours(code.co_filename):
            return None
        if event == "line":
            number = frame.f_lineno
            source = linecache.getline(code.co_filename, number).strip()
            file = os.path.basename(code.co_filename)
            self._steps[-1].add(_depth(frame), f"{number}: {source}", file)
        elif event == "exception" and arg[1] is not self._raised:
            self._raised = arg[1]
            if not isinstance(arg[1], _SILENT):
                message = f"! {arg[0].__name__}: {arg[1]}".partition("\n")[0]
                self._steps[-1].add(0, message.rstrip(": "))
        return self._trace

    def _tidy(self) -> None:
        """Drop the latest step if it did nothing, or count it if it did what the one before did."""
        steps = self._steps
        if steps and not steps[-1].lines and not steps[-1].before:
            steps.pop()
        elif len(steps) > 1 and not steps[-1].before:
            last, latest = steps[-2], steps[-1]
            if (last.task, last.lines) == (latest.task, latest.lines):
                last.times += latest.times
                steps.pop()
        if len(steps) > _STEPS:
            self._left_out += steps.popleft().times

    def picture(self) -> str:
        """The steps from top to bottom, each task in its column."""
        self._tidy()
        names = list(dict.fromkeys(step.task for step in self._steps))
        column = max(_NARROWEST, (_WIDTH - 6) // max(1, len(names)))
        stride = column if column * len(names) <= _WIDTH else _OVERLAP
        at = {name: number * stride for number, name in enumerate(names)}
        if stride == column:
            head = "".join(name[: column - 2].ljust(column) for name in names)
        else:
            head = "a column each for " + ", ".join(names)
        rows = [f"step  {head}".rstrip()]
        files = {line.file for step in self._steps for line in step.lines if line.file}
        if len(files) == 1:
            rows.insert(0, f"lines of {next(iter(files))}")
        number = 1 + self._left_out
        if self._left_out:
            rows.append(f"      ... {self._left_out} steps before")
        for step in self._steps:
            rows += [f"      {note}" for note in step.before]
            again = [f"... {step.times} such steps in a row"] if step.times > 1 else []
            for line_number, line in enumerate([*_cut(step.lines, len(files) > 1), *again]):
                label = f"{number:4}  " if line_number == 0 else " " * 6
                who = f"{step.task}: " if stride != column and line_number == 0 else ""
                rows.append(f"{label}{' ' * at[step.task]}{(who + line)[: _WIDTH - at[step.task]]}")
            number += step.times
        return "\n".join(rows)


def _cut(lines: list[_Line], named: bool) -> Iterator[str]:
    """The outermost lines, as many as there is room for, and the last ones, where it suspended."""
    kept = set(range(max(0, len(lines) - _LAST_LINES), len(lines)))
    for depth in sorted({line.depth for line in lines}):
        level = {number for number, line in enumerate(lines) if line.depth == depth}
        if len(kept | level) > _LINES_PER_STEP:
            break
        kept |= level
    left_out = False
    for number, line in enumerate(lines):
        if number in kept:
            if left_out:
                yield "..."
            yield f"{line.file}:{line.text}" if named and line.file else line.text
        left_out = number not in kept


def _depth(frame: FrameType) -> int:
    depth = 0
    back = frame.f_back
    while back is not None:
        depth += not is_ours(back.f_code.co_filename)
        back = back.f_back
    return depth
