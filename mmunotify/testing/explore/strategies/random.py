"""At random: every option equally likely."""

from __future__ import annotations

from random import Random as Generator
from typing import TYPE_CHECKING

from .base import Strategy

if TYPE_CHECKING:
    from mmunotify.testing.explore.settings import Path


class Random(Strategy):
    """Schedules at random, the same ones for the same `seed`; some may be tried twice."""

    endless = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.start()
        self.decide = self.choose

    def __repr__(self) -> str:
        return f"Random(seed={self.seed})"

    def choose(self, width: int) -> int:
        """Any option."""
        return int(self._draw() * width)

    def start(self) -> None:
        """At the first schedule again."""
        self._draw = Generator(self.seed).random

    def begin(self, path: Path) -> bool:
        """Repeat nothing."""
        path.repeat(0)
        return True
