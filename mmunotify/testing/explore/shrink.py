"""A failing schedule made simpler: fewer choices that are out of the ordinary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_ATTEMPTS: Final = 400


def shrink(choices: list[int], fails: Callable[[list[int]], list[int] | None]) -> list[int]:
    """Fewer and smaller choices that fail the same way.

    `fails(choices)` runs a schedule and returns all the choices of that run if it failed in the
    same way, and None if not. Whatever comes after the given choices is option 0.
    """
    attempts = _ATTEMPTS
    best = _trimmed(choices)

    def better(candidate: list[int]) -> bool:
        nonlocal attempts, best
        candidate = _trimmed(candidate)
        if attempts <= 0 or _cost(candidate) >= _cost(best):
            return False
        attempts -= 1
        found = fails(candidate)
        if found is None or _cost(found := _trimmed(found)) >= _cost(best):
            return False
        best = found
        return True

    improved = True
    while improved and attempts > 0:
        improved = False
        size = len(best)
        while size:  # Drop the end, then flatten ever smaller pieces.
            for start in range(len(best) - size, -1, -size):
                if any(best[start : start + size]):
                    flat = best[:start] + [0] * size + best[start + size :]
                    improved |= better(best[:start]) or better(flat)
            size //= 2
        for place in range(len(best) - 1, -1, -1):
            if place < len(best) and best[place]:
                improved |= better([0] * place + best[place : place + 1])
        for place in range(len(best) - 1, -1, -1):
            if place < len(best) and best[place]:
                less = [*best[:place], best[place] - 1, *best[place + 1 :]]
                without = best[:place] + best[place + 1 :]
                improved |= better(without) or better(less)
    return best


def _trimmed(choices: list[int]) -> list[int]:
    end = len(choices)
    while end and choices[end - 1] == 0:
        end -= 1
    return choices[:end]


def _cost(choices: list[int]) -> tuple[int, int, int]:
    return sum(map(bool, choices)), len(choices), sum(choices)
