"""`explore()`: run a scenario under one schedule after the other."""

from __future__ import annotations

from inspect import iscoroutine, signature
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from mmunotify.errors import BadExploration, Nondeterminism, ScheduleMismatch

from . import atomic
from .anyio_parts import running as running_as
from .backend import ExplorerBackend
from .code import named
from .execution import Execution
from .exploration import Exploration, Failure
from .generators import closed_when_dropped
from .interleaving import Recorder
from .schedule import encode
from .settings import Path, Pruned, Settings, Watcher
from .shrink import shrink
from .strategies import DFS, PCT, Hypothesis, Random, Replay, SleepSets, Strategy
from .traps import running
from .twice import Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence

    Scenario = Callable[[], Coroutine[Any, Any, Any]]

STRATEGIES: Final[Mapping[str, Callable[[], Strategy]]] = {
    "dfs": DFS,
    "sleep-sets": SleepSets,
    "random": Random,
    "pct": PCT,
    "hypothesis": Hypothesis,
}
_ENDLESS: Final = 10_000
_STEPS_OF_SHRINKING: Final = 500_000
_OTHERS_BUSINESS: Final = (KeyboardInterrupt, SystemExit, ScheduleMismatch, BadExploration)


def explore(
    scenario: Scenario,
    *,
    strategy: Strategy | str = "dfs",
    schedules: int | None = None,
    seconds: float | None = None,
    replay: str | None = None,
    cancel: bool | str | Iterable[str] = (),
    time: Literal["auto", "choice"] = "auto",
    faults: Mapping[str, int] | None = None,
    invariant: Callable[[], object] | None = None,
    steps: int = 100_000,
    stall: int = 10_000,
    fairness: int = 32,
    verify: int = 256,
    stop: bool = True,
    progress: Callable[[Exploration], object] | None = None,
) -> Exploration:
    """Run the program `await scenario()` under every schedule, or those that `strategy` picks.

    The scenario makes all that it uses, starts its tasks in anyio task groups, asserts what must
    hold, and returns what is to be counted as its outcome (hashable). It is plain anyio code; time
    is virtual, and threads, sockets, processes and signals are refused.

    - `strategy`: `"dfs"` (every schedule), `"sleep-sets"`, `"random"`, `"pct"`, `"hypothesis"`, or
      a `Strategy`. With `replay`, one schedule that a failure has printed.
    - `schedules`, `seconds`: when to stop; an endless strategy stops after 10 000 schedules if
      neither is given.
    - `cancel`: tasks, by name or `fnmatch` pattern (True: all but the scenario's own), that may be
      cancelled wherever they are suspended, once in an execution.
    - `time`: `"auto"` moves the clock when nothing can run; with `"choice"` a deadline may come at
      any step.
    - `faults`: how often each `fault_point`, by name or pattern, may fail in an execution.
    - `invariant`: called after each step; to raise or to return False is a failure. `always` does
      the same from within the scenario.
    - `steps`, `stall`: an execution is a livelock after that many steps, or after that many in
      which no task was woken, started or finished. `fairness`: after about so many steps in a row a
      task lets all others that can run take one.
    - `verify`: of so many schedules one is run twice more, and must do the same; 0: none.
    - `stop=False` goes on after a failure, and counts them.
    - `progress(exploration)` is called after each schedule.

    Fails as `Exploration.failure` with the error that was raised, `Deadlock`, `Livelock`,
    `InvariantViolated`, `Nondeterminism`, `NotExplorable`, or, when lockdep is on, with
    `ScheduleWhileAtomic` for a task that suspends with a spinlock held; `.check()` raises it.
    Raises `ScheduleMismatch` when `replay` does not fit the scenario, `BadExploration` for what is
    no scenario or no value of an option, and `NotExplorable` inside an event loop.
    """
    _must_be_callable(scenario)
    numbers = {"schedules": schedules, "seconds": seconds, "steps": steps, "stall": stall}
    for option, value in {**numbers, "fairness": fairness}.items():
        if value is not None and value <= 0:
            raise BadExploration(f"{option}={value}, expected a number above 0")
    for option, value in {"verify": verify, **(faults or {})}.items():
        if value < 0:
            raise BadExploration(f"{option}={value}, expected a number from 0 on")
    if time not in ("auto", "choice"):
        raise BadExploration(f"time={time!r}, expected 'auto' or 'choice'")
    if replay is not None:
        strategy = Replay(replay)
    elif isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise BadExploration(f"strategy={strategy!r}, expected one of {', '.join(STRATEGIES)}")
        strategy = STRATEGIES[strategy]()
    if schedules is None and seconds is None and strategy.endless:
        schedules = _ENDLESS
    checks = () if invariant is None else (invariant,)
    lockdep = atomic.checks()
    settings = Settings(
        cancel=_patterns(cancel),
        time=time,
        faults=faults or {},
        unmatched={*_patterns(cancel), *(faults or {})},
        steps=steps,
        stall=stall,
        fairness=fairness,
        checks=checks + lockdep,
        choose=strategy.choose,
        decide=strategy.decide,
        every_step=strategy.every_step,
    )
    search = Search(
        scenario, strategy, settings, schedules, seconds, verify, stop, progress, bool(lockdep)
    )
    with running_as(ExplorerBackend), running.one_at_a_time(), closed_when_dropped():
        return search.run()


@attrs.define
class Search:
    """An exploration that is under way."""

    scenario: Scenario
    strategy: Strategy
    settings: Settings
    schedules: int | None
    seconds: float | None
    verify: int
    stop: bool
    progress: Callable[[Exploration], object] | None
    lockdep: bool
    """Whether it is on, and has to forget what an execution before has left locked."""
    found: Exploration = attrs.field(init=False)
    _begun: float = attrs.field(init=False, factory=perf_counter)

    @found.default
    def _nothing_yet(self) -> Exploration:
        return Exploration(repr(self.strategy))

    def run(self) -> Exploration:
        """Explore until there is nothing left, or enough."""
        found, strategy = self.found, self.strategy
        strategy.start()
        try:
            if strategy.drive is not None:
                strategy.drive(self)
            else:
                path = Path()
                while True:
                    if not strategy.begin(path):
                        found.exhausted = True
                        break
                    if not self.attempt(path):
                        break
        finally:
            if self.lockdep:
                atomic.forget()
            found.seconds = perf_counter() - self._begun
        found.bounds += strategy.bounds
        unmatched = self.settings.unmatched
        found.unmatched = (
            *(f"cancel={name!r}" for name in self.settings.cancel if name in unmatched),
            *(f"faults={name!r}" for name in self.settings.faults if name in unmatched),
        )
        return found

    def attempt(self, path: Path) -> bool:
        """Run one schedule, which `path` begins; whether to go on."""
        found, strategy = self.found, self.strategy
        repeated = len(path.taken)
        goes_on = True
        execution = Execution(self.settings, path)
        if self.lockdep:
            atomic.forget()
        try:
            outcome = execution.run(self.scenario)
        except Pruned:
            found.pruned += 1
            return True
        except BaseException as error:
            if isinstance(error, _OTHERS_BUSINESS) or error is strategy.interrupt:
                raise
            found.failures += 1
            if found.failure is None:
                found.failure = self._examine(_only(error), path.choices())
            goes_on = not self.stop
        else:
            try:
                found.outcomes[outcome] = found.outcomes.get(outcome, 0) + 1
            except TypeError:
                raise TypeError(
                    f"the scenario returned {outcome!r}; outcomes are counted, and so hashable"
                ) from None
        if strategy.ended is not None:
            strategy.ended(execution)
        found.schedules += 1
        found.states += len(path.taken) - repeated + 1
        found.steps += execution.steps
        if execution.unfair and self._unfair not in found.bounds:
            found.bounds += (self._unfair,)
        if goes_on and self.verify and found.schedules % self.verify == 1 % self.verify:
            goes_on = self._is_deterministic(path.choices())
        if self.progress is not None:
            self.progress(found)
        if found.schedules == self.schedules:
            goes_on = False
        if self.seconds is not None and perf_counter() - self._begun >= self.seconds:
            goes_on = False
        return goes_on

    @property
    def _unfair(self) -> str:
        return f"fairness = {self.settings.fairness}"

    def _again(
        self, choices: Sequence[int], watcher: Watcher | None = None
    ) -> tuple[Execution, BaseException | None]:
        """Run one schedule outside the count; and the error that it raised."""
        settings = attrs.evolve(
            self.settings, watcher=watcher, choose=None, decide=None, every_step=False
        )
        execution = Execution(settings, Path(choices))
        if self.lockdep:
            atomic.forget()
        try:
            execution.run(self.scenario)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            return execution, _only(error)
        return execution, None

    def _examine(self, error: BaseException, choices: list[int]) -> Failure:
        """Make the failure simpler, and look at it again, closely."""

        steps = 0

        def fails(candidate: list[int]) -> list[int] | None:
            nonlocal steps
            if steps > _STEPS_OF_SHRINKING:
                return None
            execution, seen = self._again(candidate)
            steps += execution.steps
            return execution.path.taken if type(seen) is type(error) else None

        if self.strategy.shrinks:
            choices = shrink(choices, fails)
        recorder = Recorder()
        _, seen = self._again(choices, recorder)
        schedule = encode(choices)
        if type(seen) is not type(error):
            seen = Nondeterminism(
                f"the schedule {schedule!r} raised {error!r}, and then, run again, {seen!r}"
            )
        return Failure(seen, schedule, recorder.picture(), self.found.schedules + 1)

    def _is_deterministic(self, choices: list[int]) -> bool:
        """Run a schedule twice; the failure is recorded if that makes a difference."""
        once, again = Trace(), Trace()
        self._again(choices, once)
        self._again(choices, again)
        difference = once.difference(again)
        if difference is None:
            return True
        found = self.found
        found.failures += 1
        error = Nondeterminism(f"the schedule {encode(choices)!r}, run twice, differs {difference}")
        found.failure = found.failure or Failure(error, encode(choices), "", found.schedules)
        return not self.stop


def _must_be_callable(scenario: object) -> None:
    """Raise `BadExploration` for what cannot be called without arguments."""
    name = named(scenario)
    if iscoroutine(scenario):
        scenario.close()
        raise BadExploration(f"{name}() can run once: expected the function itself, {name}")
    if not callable(scenario):
        raise BadExploration(f"{scenario!r} is no scenario: expected a function of `async def`")
    try:
        signature(scenario).bind()
    except TypeError as error:
        raise BadExploration(f"{name} is called without arguments: {error}") from None
    except ValueError:
        pass  # It has no signature.


def _patterns(cancel: bool | str | Iterable[str]) -> tuple[str, ...]:
    if cancel is True or cancel is False:
        return ("*",) if cancel else ()
    return (cancel,) if isinstance(cancel, str) else tuple(cancel)


def _only(error: BaseException) -> BaseException:
    """The error itself, when it is the only one in groups of exceptions."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
