"""What a strategy is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmunotify.testing.explore.execution import Execution
    from mmunotify.testing.explore.explore import Search
    from mmunotify.testing.explore.settings import Path


class Strategy:
    """Says what the next execution repeats of the latest, and chooses beyond that."""

    choose: Callable[[int], int] | None = None
    """`choose(width)`: which option a scheduling point takes; None: always the first."""
    decide: Callable[[int], int] | None = None
    """The same for choices that a step makes itself, as `choose()` and `fault_point` do."""
    every_step = False
    """Whether to be asked before each step, also when there is one option."""
    endless = False
    """Whether it has to be told when to stop."""
    drive: Callable[[Search], None] | None = None
    """Runs the exploration itself, by `search.attempt(path)`, in place of `begin`."""
    interrupt: BaseException | None = None
    """What its `choose` has raised that is nobody's failure."""
    ended: Callable[[Execution], None] | None = None
    """Is told of an execution that is over, however it went."""
    shrinks = True
    """Whether a failing schedule may be made simpler."""

    @property
    def bounds(self) -> tuple[str, ...]:
        """What kept it from trying every schedule, for reports."""
        return ()

    def start(self) -> None:
        """Forget what an exploration before has left: a new one begins."""

    def begin(self, path: Path) -> bool:
        """Prepare `path`, which has the choices of the latest execution; False ends it all."""
        raise NotImplementedError
