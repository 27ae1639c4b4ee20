"""One execution: the tasks, who can run, what the clock says, and whose turn it is.

A *step* is what a task does between two suspensions. Before each step every task that can run is an
option, and the options that were taken determine the execution: that list of small numbers is the
schedule. Option 0 is always the least surprising one: the task that ran last goes on or, when it
cannot, the one that has waited longest.

`backend` dresses this as one of anyio's event loops. The loop is written for speed, since an
exploration is hundreds of thousands of executions: a task owns nothing before it needs it, and what
only replays and checks want is behind one flag, `attended`.
"""

from __future__ import annotations

from asyncio import CancelledError
from fnmatch import fnmatchcase
from functools import lru_cache
from heapq import heappop, heappush
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from mmunotify.errors import (
    BadExploration,
    Deadlock,
    InvariantViolated,
    Livelock,
    MmuNotifyError,
    Nondeterminism,
    NotExplorable,
)

from .code import named
from .scopes import is_cancelled
from .task import Task
from .traps import (
    DONE,
    DOOMED,
    PARKED,
    PAUSED,
    PINNED,
    SHIELDED,
    running,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from .scopes import CancelScope
    from .settings import Footprint, Path, Settings


_send: Final = CoroutineType.send
_throw: Final = CoroutineType.throw
_NOBODY: Final = -1
_OVER: Final = -2
_LAST_WORDS: Final = 100
"""How often a task that is closed may await in its finally blocks before it is let go."""


_matches: Final = lru_cache(fnmatchcase)


class _Main:
    """The owner of the scenario's own task."""

    host = cancel_scope = None

    def finished(self, task: Task, error: BaseException | None) -> None:
        execution = running.execution
        execution.error = error
        execution.result = task.result


_main: Final = _Main()


class Execution:
    """Runs a scenario once, by the choices of `path`, to which it adds what comes after them."""

    current: Task
    """The task whose step it is, or was last."""

    # What few executions change is an attribute of the class until they do: it is made too often.
    idlers: Sequence[Task] = ()
    """Tasks that wait until no other can run."""
    now = 0.0
    """The virtual clock (s)."""
    serial = 0
    """Numbers timers and events."""
    targets: Sequence[Task] = ()
    """Tasks that may be cancelled wherever they are suspended."""
    unfair = False
    """Whether a task ran so long that others had to run first."""
    progress = False
    """Whether `loud` was looked at and true."""
    quiet_since = 0
    footprint: Footprint | None = None
    """What the step says that it touches; None is everything."""
    faults: dict[str, int] | None = None
    """How many more calls of each fault point may fail."""
    result: Any = None
    """What the scenario has returned."""
    error: BaseException | None = None
    """What it has raised."""
    _broken: BaseException | None = None

    def __init__(self, settings: Settings, path: Path) -> None:
        self.settings = settings
        self.path = path
        self.steps = 0
        self.tasks: list[Task] = []
        self.runnable: list[Task] = []
        """In front the task that ran last, if it can go on; the others as they became able to."""
        self.timers: list[tuple[float, int, Task | CancelScope]] = []
        self.cancelling = False
        """Whether any scope has been cancelled."""
        self.tired: Sequence[Task] = ()
        """Tasks that ran so long that others have to run first."""
        self.loud = False
        """Whether anybody was woken, started or finished since this was looked at."""
        self.checks = settings.checks
        """Called after every step; to raise or to return False is a failure."""
        self.attended = settings.attended
        """Whether anybody looks at what each step did."""

    def run(self, scenario: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """What `scenario` returns.

        Raises what it raises; or `Deadlock`, `Livelock`, `InvariantViolated`, `ScheduleMismatch`,
        `NotExplorable`, and whatever `choose` raises.
        """
        running.execution = self
        coro = scenario()
        if type(coro) is not CoroutineType:
            raise BadExploration(
                f"{named(scenario)} returned {coro!r}: expected a function of `async def`"
            )
        Task(coro, "main", _main)
        try:
            self._loop()
        except BaseException:
            if self.settings.watcher is not None:
                self.settings.watcher.broken_off()
            self._abandon()
            raise
        if self.error is not None:
            raise self.error
        return self.result

    def _loop(self) -> None:
        runnable, plan = self.runnable, self.path.plan
        settings = self.settings
        special, choose = settings.special, settings.choose
        begin, switched = 0, 0
        goes_on = False  # Whether `task`, which ran last, is runnable[0].
        task = self.tasks[0]
        while True:
            for self.steps in range(begin, begin + settings.fairness):
                ready = len(runnable)
                if ready > 1 or special:
                    if special:
                        index = self._deliberate(goes_on)
                        if index == _OVER:
                            return
                        if index == _NOBODY:
                            continue
                        goes_on = goes_on and runnable[0] is task
                    elif plan:
                        index = plan.pop()
                    else:
                        index = self._choice(ready, ready if goes_on else 0, choose)
                    if index:
                        switched = self.steps
                        try:
                            task = self.current = runnable.pop(index)
                        except IndexError:
                            raise self._diverged(index, ready) from None
                        runnable.insert(0, task)
                    elif not goes_on:
                        task = self.current = runnable[0]
                elif not goes_on:
                    switched = self.steps
                    if not ready:
                        if self._nothing_can_run() == _OVER:
                            return
                        continue
                    task = self.current = runnable[0]
                try:
                    if self.cancelling and (
                        (state := task.state) == DOOMED
                        or (state == PAUSED and is_cancelled(task.scope))
                    ):
                        state = task.context.run(_throw, task.coro, CancelledError())
                    else:
                        state = task.context.run(_send, task.coro, None)
                except StopIteration as stop:
                    del runnable[0]
                    goes_on = False
                    task.state = DONE
                    self.loud = True
                    task.owner.finished(task, task.end(stop.value, None))
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:
                    del runnable[0]
                    goes_on = False
                    task.state = DONE
                    self.loud = True
                    task.owner.finished(task, task.end(None, error))
                else:
                    task.state = state
                    if state is PAUSED:
                        goes_on = True
                    elif state is PARKED or state is PINNED:
                        del runnable[0]
                        goes_on = False
                    elif state is SHIELDED or state is DOOMED:
                        goes_on = True
                    else:
                        raise NotExplorable(
                            f"{self.name(task)} awaited {state!r}, which is no anyio primitive: "
                            "the explorer runs anyio code, not what asks for asyncio or trio itself"
                        )
                if self.attended:
                    self._after_step(task)
            begin += settings.fairness
            hogged = goes_on and switched < begin - settings.fairness
            special = self._look_around(begin, task if hogged else None)

    def _choice(self, width: int, costly: int, ask: Callable[[int], int] | None) -> int:
        """Which of `width` options is taken: what the path says, or else what `ask` says."""
        path = self.path
        if path.plan:
            index = path.plan.pop()
            if index >= width:
                raise self._diverged(index, width)
        else:
            index = ask(width) if ask is not None else 0
            path.taken.append(index)
            path.widths.append(width)
            path.costly.append(costly)
        return index

    def _diverged(self, index: int, width: int) -> Nondeterminism:
        depth = len(self.path.taken) - len(self.path.plan) - 1
        return Nondeterminism(
            f"option {index} was taken at choice {depth} before, and now there are {width}: the "
            "scenario has an input that the explorer does not control, such as time, randomness, "
            "the order of a set, or what an earlier run has left behind"
        )

    def _look_around(self, steps: int, hog: Task | None) -> bool:
        """After every `fairness` steps: does anything happen, and does everybody have a turn?

        Returns whether there is more to choose from now on than one of all that can run.
        """
        settings = self.settings
        if steps >= settings.steps:
            raise Livelock(self._blocked(f"not over after {steps} steps"))
        if self.loud or self.progress:
            self.quiet_since = steps
            self.loud = self.progress = False
        elif steps - self.quiet_since >= settings.stall:
            what = f"nobody was woken, started or finished in {steps - self.quiet_since} steps"
            if self._next_timer() is not None:
                what += ", and the clock stands still as long as somebody can run"
            raise Livelock(self._blocked(what))
        if hog is not None and len(self.runnable) > 1:
            hog.debts = sum(1 << task.number for task in self.runnable if task is not hog)
            self.tired = [*self.tired, hog]
            self.attended = True
            self.unfair = True
        return settings.special or bool(self.tired)

    def _deliberate(self, goes_on: bool) -> int:
        """A choice with all that there can be: the place of who is to run, `_NOBODY` or `_OVER`.

        Besides whom to run there are whom to cancel, and to let the clock move. Who can run is
        cancelled and runs at once; who is parked is cancelled and then can run, so that a wake-up
        may come in between and find a waiter that will make no use of it.
        """
        runnable, watcher = self.runnable, self.settings.watcher
        ready = self._rested() if self.tired else len(runnable)
        offers: list[Task | None] = [task for task in self.targets if self._can_cancel(task)]
        if not ready:
            ready = 1  # Option 0 is to let happen what happens when nothing can run.
        elif self.settings.time == "choice" and self._next_timer() is not None:
            offers.append(None)
        width = ready + len(offers)
        index = 0
        if width > 1 or self.settings.every_step:
            goes_on = goes_on and runnable[0] is self.current
            index = self._choice(width, ready if goes_on else 0, self.settings.choose)
            if watcher is not None:
                watcher.chosen(self._describe(index, ready, offers), index, width)
        if index >= ready:
            offer = offers[index - ready]
            if offer is None:
                self.advance()
                return _NOBODY
            parked = offer.state == PARKED
            offer.root.cancel("chosen by the explorer")
            if parked:
                return _NOBODY
            index = runnable.index(offer)
        elif not runnable:
            return self._nothing_can_run()
        self.progress = self.progress or self.loud
        self.loud = False
        self.footprint = None
        if watcher is not None:
            watcher.step_begins(runnable[index])
        return index

    def _describe(self, index: int, ready: int, offers: Sequence[Task | None]) -> str:
        if index >= ready:
            task = offers[index - ready]
            return "let the clock move" if task is None else f"cancel {self.name(task)}"
        return f"run {self.name(self.runnable[index])}" if self.runnable else "cancel nobody"

    def _can_cancel(self, task: Task) -> bool:
        """Whether a cancellation would reach the task where it is suspended."""
        if task.state not in (PAUSED, SHIELDED, PARKED) or not task.coro.cr_suspended:
            return False
        root, scope = task.root, task.scope
        while scope is not root:
            if scope is None or scope.cancelled or scope.shielding:
                return False
            scope = scope.parent
        return not root.cancelled

    def _rested(self) -> int:
        """Put those last who have to let others run first; how many are left.

        A task that has run for long while others could is in debt of a step to each of them, and is
        no option until they have had it. Source: Musuvathi and Qadeer, Fair stateless model
        checking, 2008.
        """
        runnable = self.runnable
        can_run = sum(1 << task.number for task in runnable)
        self.tired = tired = [task for task in self.tired if task.debts & can_run]
        rested = [task for task in runnable if task not in tired]
        runnable[:] = rested + [task for task in runnable if task in tired]
        return len(rested)

    def _after_step(self, task: Task) -> None:
        if self.settings.watcher is not None:
            self.settings.watcher.step_ends(task)
        for other in self.tired:
            other.debts &= ~(1 << task.number)
        if self._broken is not None:
            raise self._broken
        for check in self.checks:
            try:
                holds = check()
            except MmuNotifyError:
                raise
            except Exception as error:
                raise InvariantViolated(f"{named(check)}: {error}") from error
            if holds is False:
                raise InvariantViolated(f"{named(check)} is False")

    def _nothing_can_run(self) -> int:
        """Let somebody be able to run and return `_NOBODY`, or `_OVER`."""
        if self.tasks[0].state == DONE:
            return _OVER
        if self.idlers:
            idlers, self.idlers = self.idlers, ()
            for task in idlers:
                self.wake(task)
        elif not self.advance():
            raise Deadlock(self._blocked("nothing can run, and no timer is pending"))
        return _NOBODY

    def _blocked(self, headline: str) -> str:
        from .blocked import describe

        return describe(self, headline)

    def _abandon(self) -> None:
        """Close what has not ended: a failure ends an execution wherever it is."""
        for task in self.tasks:
            if task.state == DONE:
                continue
            self.current = task
            for _ in range(_LAST_WORDS):
                try:
                    task.context.run(task.coro.close)
                except RuntimeError:
                    continue  # A finally block awaits something; close it there.
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException:
                    pass  # The execution has failed already.
                break
            task.state = DONE

    # What tasks and what they wait for call --------------------------------------------------

    def consider(self, task: Task) -> None:
        """Is the new task one that may be cancelled wherever it is suspended?

        The scenario itself is not what `*` means, since nobody is left when it is cancelled.
        """
        if task is self.tasks[0] and task.name not in self.settings.cancel:
            return
        for wanted in self.settings.cancel:
            if _matches(task.name, wanted) or ("#" in wanted and _matches(self.name(task), wanted)):
                self.settings.unmatched.discard(wanted)
                self.targets = [*self.targets, task]
                return

    def wake(self, task: Task) -> bool:
        """Let a parked task run; False when it was not parked (any more)."""
        if task.state != PARKED and task.state != PINNED:
            return False
        task.state = SHIELDED
        self.runnable.append(task)
        self.loud = True
        return True

    def park(self, on: object) -> int:
        """What a task yields to wait until it is woken; `on` is for reports.

        It gets a cancellation there, after others had their chance to run, if one has come.
        """
        self.current.waits_for = on
        return DOOMED if self.cancelling and is_cancelled(self.current.scope) else PARKED

    def pin(self, on: object) -> int:
        """What a task yields to wait until it is woken, in spite of cancellations."""
        self.current.waits_for = on
        return PINNED

    def deliver(self) -> None:
        """A scope was cancelled, or lost its shield: wake whom a cancellation reaches now."""
        self.cancelling = self.loud = True
        for task in self.tasks:
            if task.state == PARKED and is_cancelled(task.scope):
                task.state = DOOMED
                self.runnable.append(task)

    def at(self, when: float, whom: Task | CancelScope) -> None:
        """Wake a task, or cancel a scope, when the clock says `when`."""
        self.serial = whom.timer = self.serial + 1
        heappush(self.timers, (when, self.serial, whom))

    def _next_timer(self) -> float | None:
        """When the clock moves to next; timers that nobody needs any more are dropped."""
        timers = self.timers
        while timers:
            when, serial, whom = timers[0]
            if whom.timer == serial:
                return when
            heappop(timers)
        return None

    def advance(self) -> bool:
        """Move the clock to the next timer, and let all of that instant go off."""
        when = self._next_timer()
        if when is None:
            return False
        self.now = when
        while self._next_timer() == when:
            heappop(self.timers)[2].time_out()
        return True

    def decide(self, what: str, width: int, options: Sequence[object]) -> int:
        """A choice that the running step makes itself: a number below `width`."""
        try:
            index = self._choice(width, 0, self.settings.decide)
        except BaseException as error:
            self.break_off(error)
        self.loud = True
        if self.settings.watcher is not None:
            self.settings.watcher.chosen(f"{what}: {options[index]}", index, width)
        return index

    def break_off(self, error: BaseException) -> NoReturn:
        """End the execution with `error`, whatever the running task makes of it."""
        self._broken = error
        self.attended = True
        raise error

    def always(self, check: Callable[[], object]) -> None:
        """Have `check` called after every step from now on."""
        self.checks = [*self.checks, check]
        self.attended = True

    def unfinished(self) -> list[Task]:
        """The tasks that have not ended."""
        return [task for task in self.tasks if task.state != DONE]

    def name(self, task: Task) -> str:
        """The task's name, numbered if tasks before it have the same."""
        before = sum(other.name == task.name for other in self.tasks[: task.number])
        return f"{task.name}#{before + 1}" if before else task.name
