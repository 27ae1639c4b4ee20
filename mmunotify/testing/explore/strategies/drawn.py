"""Schedules that Hypothesis draws."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, Final

from mmunotify.errors import BadExploration
from mmunotify.testing.explore.settings import Path

from .base import Strategy

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject

    from mmunotify.testing.explore.explore import Search

_EXAMPLES: Final = 100
_MOST: Final = 2_000
"""Of the choices of a schedule; Hypothesis gives an example up that draws some thousand times."""


class Drawn(Strategy):
    """One schedule, whose choices are drawn from the `data` of a Hypothesis test.

    What else the test draws (operations, sizes) and the schedule then shrink together:

        @given(st.data())
        def test(data):
            explore(scenario, strategy=Drawn(data)).check()

    After 2 000 choices the first option is taken, and the bounds say so.
    """

    shrinks = False

    def __init__(self, data: DataObject) -> None:
        from hypothesis import strategies as st

        self._draw = data.draw
        self._options = st.integers
        self.start()
        self.decide = self.choose

    def __repr__(self) -> str:
        return "Drawn()"

    @property
    def bounds(self) -> tuple[str, ...]:
        """Choices, if there were more of them."""
        return (f"choices <= {_MOST}",) if self._drawn > _MOST else ()

    def start(self) -> None:
        """Draw another schedule."""
        self._begun = False
        self._drawn = 0

    def begin(self, path: Path) -> bool:
        """Once."""
        begun, self._begun = self._begun, True
        path.repeat(0)
        return not begun

    def choose(self, width: int) -> int:
        """What Hypothesis draws; what it raises to end an example is not a failure."""
        self._drawn += 1
        if self._drawn > _MOST:
            return 0
        try:
            return self._draw(self._options(0, width - 1))
        except BaseException as error:
            self.interrupt = error
            raise


class Hypothesis(Strategy):
    """Schedules that Hypothesis draws, `examples` of them, no two the same.

    None is as many as `explore(schedules=)` says, or 100. It is done before when there are not so
    many. A failing one is made simpler as with any other strategy; where the test draws more than
    the schedule, `Drawn` lets Hypothesis do it.
    """

    def __init__(self, examples: int | None = None) -> None:
        if examples is not None and examples < 1:
            raise BadExploration(f"examples={examples}, expected at least 1")
        self.examples = examples
        self.decide = self.choose
        self._drawn: Drawn | None = None
        self._bounds: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Hypothesis(examples={self.examples})" if self.examples else "Hypothesis()"

    @property
    def bounds(self) -> tuple[str, ...]:
        """Choices, if there were more than are drawn."""
        return self._bounds

    def choose(self, width: int) -> int:
        """What Hypothesis draws."""
        assert self._drawn is not None
        try:
            return self._drawn.choose(width)
        finally:
            self.interrupt = self._drawn.interrupt

    def drive(self, search: Search) -> None:
        """Let Hypothesis run the exploration."""
        import hypothesis
        from hypothesis import strategies as st

        self._bounds = ()
        seen: set[tuple[int, ...]] = set()
        unseen = Fraction(1)
        """Of all schedules, those at each choice counted as equally many."""

        @hypothesis.settings(
            max_examples=self.examples or search.schedules or _EXAMPLES,
            phases=(hypothesis.Phase.generate,),
            database=None,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(st.data())
        def attempt(data: DataObject) -> None:
            nonlocal unseen
            self._drawn = Drawn(data)
            path = Path()
            goes_on = search.attempt(path)
            self._bounds = self._drawn.bounds or self._bounds
            if (schedule := tuple(path.taken)) not in seen:
                seen.add(schedule)
                unseen -= Fraction(1, prod(path.widths))
            if not goes_on:
                raise _Enough

        with suppress(_Enough):
            attempt()
        search.found.exhausted = not unseen


class _Enough(BaseException):
    """No further example, whatever Hypothesis thinks."""
