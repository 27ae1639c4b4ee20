"""`mmunotify explore MODULE:FUNCTION`: run a scenario under every schedule, or replay one."""

from __future__ import annotations

import os
import shlex
import sys
from importlib import import_module
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mmunotify.errors import BadExploration
from mmunotify.testing.explore import DFS, PCT, Hypothesis, Random, SleepSets
from mmunotify.testing.explore import explore as explore_scenario

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from mmunotify.testing.explore import Exploration, Strategy

_OUTCOMES = 20
"""How many are listed, the most frequent ones."""
_FAIRNESS = 32
_SHOW_EVERY = 50
"""How many schedules pass between two updates of the progress bar."""


def explore(
    scenario: str,
    /,
    *,
    strategy: Literal["dfs", "sleep-sets", "random", "pct", "hypothesis"] = "dfs",
    preemptions: int | None = None,
    seed: int = 0,
    depth: int = 3,
    schedules: int | None = None,
    seconds: float | None = None,
    replay: str | None = None,
    cancel: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    time: Literal["auto", "choice"] = "auto",
    fault: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    fairness: int = _FAIRNESS,
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
        dfs: every schedule, depth first. sleep-sets: the same without the orders of steps that
        declare themselves independent. random. pct: by random priorities. hypothesis: drawn by it.
    preemptions
        With dfs: only schedules with at most so many preemptions.
    seed
        Of random and pct.
    depth
        With pct: how many orders of steps a bug takes.
    schedules
        Stop after so many; random and pct after 10 000, hypothesis after 100, if nothing is said.
    seconds
        Stop after so long.
    replay
        The one schedule that a failure has printed; with the options that it was found with.
    cancel
        Tasks, by name or pattern, to cancel wherever they are suspended; may be given again.
    time
        Whether the clock moves only when nothing can run, or at any step.
    fault
        NAME or NAME=N: a fault point, by name or pattern, that may fail once, or N times in an
        execution; may be given again.
    fairness
        Steps in a row after which a task has to let others run.
    """
    function = _load(scenario)
    chosen: dict[str, Callable[[], Strategy]] = {
        "dfs": lambda: DFS(preemptions),
        "sleep-sets": SleepSets,
        "random": lambda: Random(seed),
        "pct": lambda: PCT(depth, seed),
        "hypothesis": Hypothesis,
    }
    if preemptions is not None and strategy != "dfs":
        raise BadExploration(f"--preemptions: expected --strategy dfs, found {strategy}")
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} schedules, {task.fields[outcomes]} outcomes"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        shown = bar.add_task(scenario, total=schedules, outcomes=0)

        latest: Exploration | None = None

        def show(found: Exploration) -> None:
            nonlocal latest
            latest = found
            if found.schedules % _SHOW_EVERY == 0:
                bar.update(shown, completed=found.schedules, outcomes=len(found.outcomes))

        try:
            found = explore_scenario(
                function,
                strategy=chosen[strategy](),
                schedules=schedules,
                seconds=seconds,
                replay=replay,
                cancel=cancel,
                time=time,
                faults=dict(map(_budget, fault)),
                fairness=fairness,
                progress=show,
            )
        except KeyboardInterrupt:
            print(f"interrupted: {latest}" if latest else "interrupted in the first schedule")
            raise
    print(found)
    by_number = sorted(found.outcomes.items(), key=lambda item: -item[1])
    for outcome, times in by_number[:_OUTCOMES]:
        print(f"{times:10} x {outcome!r}")
    if len(by_number) > _OUTCOMES:
        print(f"           and {len(by_number) - _OUTCOMES} other outcomes")
    if found.failure is None:
        return 0
    again = ["mmunotify", "explore", scenario, "--replay", found.failure.schedule]
    again += [word for task in cancel for word in ("--cancel", task)]
    again += [word for point in fault for word in ("--fault", point)]
    again += ["--time", time] if time != "auto" else []
    again += ["--fairness", str(fairness)] if fairness != _FAIRNESS else []
    print(f"\n{found.failure.report(shlex.join(again))}")
    return 1


def _budget(fault: str) -> tuple[str, int]:
    name, equals, times = fault.partition("=")
    if not name or (equals and not times.isdigit()):
        raise BadExploration(f"--fault {fault}: expected NAME or NAME=N")
    return name, int(times or 1)


def _load(scenario: str) -> Callable[[], Coroutine[Any, Any, Any]]:
    name, colon, function = scenario.partition(":")
    if not (name and colon and function):
        raise BadExploration(f"{scenario!r} names no scenario: expected MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        hint = ", without the .py" if name.endswith(".py") else ""
        raise BadExploration(
            f"there is no module {name!r}, here or installed: expected MODULE:FUNCTION{hint}"
        ) from None
    for part in function.split("."):
        if not hasattr(found, part):
            raise BadExploration(f"{name} has no {function!r}: expected MODULE:FUNCTION")
        found = getattr(found, part)
    if not iscoroutinefunction(found):
        raise BadExploration(f"{scenario} is no scenario: expected a function of `async def`")
    scenario_function: Callable[[], Coroutine[Any, Any, Any]] = found
    return scenario_function
