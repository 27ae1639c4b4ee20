"""Schedules that Hypothesis draws, and shrinks."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from mmunotify.testing.explore.settings import Path

from .base import Strategy

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject

    from mmunotify.testing.explore.explore import Search


class Drawn(Strategy):
    """One schedule, whose choices are drawn from the `data` of a Hypothesis test.

    What else the test draws (operations, sizes) and the schedule then shrink together:

        @given(st.data())
        def test(data):
            explore(scenario, strategy=Drawn(data)).check()
    """

    shrinks = False

    def __init__(self, data: DataObject) -> None:
        from hypothesis import strategies as st

        self._draw = data.draw
        self._options = st.integers
        self._begun = False
        self.decide = self.choose

    def __repr__(self) -> str:
        return "Drawn()"

    def begin(self, path: Path) -> bool:
        """Once."""
        begun, self._begun = self._begun, True
        path.repeat(0)
        return not begun

    def choose(self, width: int) -> int:
        """What Hypothesis draws; what it raises to end an example is not a failure."""
        try:
            return self._draw(self._options(0, width - 1))
        except BaseException as error:
            self.interrupt = error
            raise


class Hypothesis(Strategy):
    """Schedules that Hypothesis draws, `examples` of them; a failing one it shrinks.

    It leaves choices that did not matter, tries again what nearly failed, and ends before its time
    when it has drawn all that there is.
    """

    shrinks = False

    def __init__(self, examples: int = 100) -> None:
        self.examples = examples
        self.decide = self.choose
        self._drawn: Drawn | None = None

    def __repr__(self) -> str:
        return f"Hypothesis(examples={self.examples})"

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

        found = search.found
        enough = False

        @hypothesis.settings(
            max_examples=self.examples,
            database=None,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(st.data())
        def attempt(data: DataObject) -> None:
            nonlocal enough
            if enough:
                return
            self._drawn = Drawn(data)
            found.failure = None  # Each one that fails is simpler than the one before.
            failures = found.failures
            goes_on = search.attempt(Path())
            if found.failures > failures:
                raise _Falsified
            enough = not goes_on

        with suppress(_Falsified):
            attempt()
        found.exhausted = not found.failures and found.schedules < self.examples


class _Falsified(Exception):
    """What Hypothesis looks for."""
