"""Schedules as short strings, to print, to keep in a test, and to replay.

A digit is the number of the option that was taken, in base 36 (or `(41)` for larger ones);
`0{12}` is twelve zeros. Trailing zeros are left out, since option 0 is what is taken anyway:
`0` alone is the schedule in which nothing out of the ordinary happens.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Final

from mmunotify.errors import ScheduleMismatch

if TYPE_CHECKING:
    from collections.abc import Iterable

_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_RUN: Final = re.compile(r"([0-9a-z]|\((\d+)\))(?:\{(\d+)\})?")
_WORTH_COUNTING: Final = 5


def encode(choices: Iterable[int]) -> str:
    """The schedule as a string; `decode` gives the choices without the zeros at their end."""
    parts = []
    for choice, group in groupby(choices):
        digit = _DIGITS[choice] if choice < len(_DIGITS) else f"({choice})"
        times = sum(1 for _ in group)
        parts.append((choice, f"{digit}{{{times}}}" if times >= _WORTH_COUNTING else digit * times))
    if parts and parts[-1][0] == 0:
        parts.pop()
    return "".join(text for _, text in parts) or "0"


def decode(schedule: str) -> list[int]:
    """The choices of a schedule; raises `ScheduleMismatch` when that is not what the string is."""
    choices: list[int] = []
    position = 0
    while position < len(schedule):
        run = _RUN.match(schedule, position)
        if run is None:
            raise ScheduleMismatch(
                f"{schedule!r} is no schedule: expected a digit, a letter or (NUMBER), each "
                f"perhaps with {{TIMES}} behind it, at {schedule[position:]!r}"
            )
        digit, number, times = run.groups()
        choice = int(number) if number else _DIGITS.index(digit)
        choices += [choice] * int(times or 1)
        position = run.end()
    return choices
