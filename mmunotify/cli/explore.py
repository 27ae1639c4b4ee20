"""`mmunotify explore MODULE:FUNCTION`: run a scenario under every schedule, or replay one."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mmunotify.testing.explore import DFS, PCT, Random, SleepSets
from mmunotify.testing.explore import explore as explore_scenario

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from mmunotify.testing.explore import Exploration, Strategy

_SHOW_EVERY = 50
"""How many schedules pass between two updates of the progress bar."""


def explore(
    scenario: str,
    /,
    *,
    strategy: Literal["dfs", "sleep-sets", "random", "pct"] = "dfs",
    preemptions: int | None = None,
    seed: int = 0,
    depth: int = 3,
    schedules: int | None = None,
    seconds: float | None = None,
    replay: str | None = None,
    cancel: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    time: Literal["auto", "choice"] = "auto",
    fault: Annotated[dict[str, int] | None, Parameter(negative=())] = None,
    fairness: int = 32,
) -> int:
    """Run async code under every schedule that matters, or replay one.

    The scenario is a coroutine function without parameters: plain anyio code that makes all that it
    uses and asserts what must hold. Its module is looked for from the current directory. Exit
    status 1 is a schedule that fails, and its report says how to replay it.

    Parameters
    ----------
    scenario
        MODULE:FUNCTION.
    strategy
        Every schedule depth first, without the orders of steps that declare themselves independent,
        at random, or by random priorities.
    preemptions
        Depth first: only schedules with at most so many preemptions.
    seed
        Of the strategies that are random.
    depth
        Of bugs that pct looks for: how many orders it takes.
    schedules
        Stop after so many.
    seconds
        Stop after so long.
    replay
        The one schedule that a failure has printed; with the options that it was found with.
    cancel
        Tasks, by name or pattern, to cancel wherever they are suspended; may be given again.
    time
        Whether the clock moves only when nothing can run, or at any step.
    fault
        `--fault.NAME N`: how often the fault point NAME may fail in an execution.
    fairness
        Steps in a row after which a task has to let others run.
    """
    function = _load(scenario)
    chosen: dict[str, Callable[[], Strategy]] = {
        "dfs": lambda: DFS(preemptions),
        "sleep-sets": SleepSets,
        "random": lambda: Random(seed),
        "pct": lambda: PCT(depth, seed),
    }
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} schedules, {task.fields[outcomes]} outcomes"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with bar:
        shown = bar.add_task(scenario, total=schedules, outcomes=0)

        def show(found: Exploration) -> None:
            if found.schedules % _SHOW_EVERY == 0:
                bar.update(shown, completed=found.schedules, outcomes=len(found.outcomes))

        found = explore_scenario(
            function,
            strategy=chosen[strategy](),
            schedules=schedules,
            seconds=seconds,
            replay=replay,
            cancel=cancel,
            time=time,
            faults=fault,
            fairness=fairness,
            progress=show,
        )
    print(found)
    for outcome, times in sorted(found.outcomes.items(), key=lambda item: -item[1]):
        print(f"{times:10} times {outcome!r}")
    if found.failure is None:
        return 0
    print(f"\n{found.failure}")
    return 1


def _load(scenario: str) -> Callable[[], Coroutine[Any, Any, Any]]:
    module, colon, function = scenario.partition(":")
    if not (module and colon and function):
        raise ValueError(f"{scenario!r} names no scenario: expected MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = import_module(module)
    for name in function.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{module} has no {function!r}: expected MODULE:FUNCTION")
        found = getattr(found, name)
    if not iscoroutinefunction(found):
        raise ValueError(f"{scenario} is {found!r}: expected a function of `async def`")
    scenario_function: Callable[[], Coroutine[Any, Any, Any]] = found
    return scenario_function
