"""`mmunotify compare`: one recorded program in several designs, a row each."""

from __future__ import annotations

import itertools
import json as jsonlib
from pathlib import Path  # noqa: TC003 - cyclopts reads the annotation
from typing import Annotated, Any, Final, Literal

from cyclopts import Parameter, validators
from rich.console import Console
from rich.table import Table

from mmunotify.traces.figures import figures
from mmunotify.traces.recording import Recording
from mmunotify.traces.replay import Batching, Design, Replay

from .choices import choose
from .replay import HOT, LOCKS, DeviceOption, run

Locks = Literal["spin", "rwsem"]

ANSWERS: Final = (("spin", "atomic"), ("rwsem", "sleepable"), ("spin", "deferred"))
"""What the thread of 2008 was about: nobody sleeps; everybody may; mark now and finish later."""
BATCHINGS: Final[tuple[Batching, ...]] = ("page", "pte512", "gather", "range")


def compare(
    file: Path,
    /,
    *,
    driver: Annotated[list[str] | None, Parameter(name="--driver", negative="")] = None,
    locks: Annotated[list[Locks] | None, Parameter(negative="")] = None,
    batching: Annotated[list[Batching] | None, Parameter(negative="")] = None,
    thread: Annotated[bool, Parameter(negative="")] = False,
    device: DeviceOption = HOT,
    repeat: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 1,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Replay one recorded program under every combination of locks, batching and driver.

    Each row is a replay of its own with one driver attached, and all have the same load. A
    combination that cannot be is n/a.

    Parameters
    ----------
    file
        A recording (.mmt), plain or compressed with xz.
    driver
        As for `mmunotify replay`; may be repeated. By default atomic and sleepable.
    locks
        By default both.
    batching
        By default all four.
    thread
        The comparison that the thread of 2008 could not make: atomic drivers under spinlocks,
        sleepable ones with everything an rwsem, and marks that are finished later, by page, by 512
        entries, by gather and by range. Leaves no choice of driver, locks and batching.
    device
        As for `mmunotify replay`.
    repeat
        Replay each combination this often, and show the fastest.
    json
        Print one JSON object per combination instead of a table.
    """
    if thread:
        answers = [(*answer, how) for answer in ANSWERS for how in BATCHINGS]
    else:
        answers = [
            (lock, name, how)
            for name, lock, how in itertools.product(
                driver or ["atomic", "sleepable"], locks or LOCKS, batching or BATCHINGS
            )
        ]
    rows: list[dict[str, Any]] = []
    for lock, name, how in answers:
        design = Design((choose(name),), LOCKS[lock], how, touching=device)
        row: dict[str, Any] = {"driver": name, "locks": lock, "batching": how}
        reason = design.impossible()
        if reason is not None:
            row["impossible"] = reason
        else:
            row |= _fastest(file, design, repeat, quiet=json)
            if row["stopped"]:
                break
        rows.append(row)
        if json:
            print(jsonlib.dumps(row), flush=True)
    if not json:
        Console().print(_table(rows))
    return 0


def _fastest(file: Path, design: Design, repeat: int, *, quiet: bool) -> dict[str, Any]:
    best: dict[str, Any] = {}
    for _ in range(repeat):
        replay = Replay(Recording(file), design)
        run(replay, quiet=quiet)
        found = figures(replay)
        (told,) = found["drivers"]
        row = {
            "callbacks": sum(told["callbacks"].values()),
            "mapped": told["mapped"],
            "refaults": told["refaults"],
            "counters": told["counters"],
            "callback_seconds": told["callback_seconds"],
            "replay_seconds": found["replay_seconds"],
            "stopped": found["stopped"],
        }
        if not best or row["callback_seconds"] < best["callback_seconds"]:
            best = row
        if row["stopped"]:
            return row
    return best


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("driver", "locks", "batching", box=None, padding=(0, 1, 0, 0))
    for column in ("callbacks", "flushed", "refaults", "driver time", "ratio", "total time"):
        table.add_column(column, justify="right")
    possible = [row["callback_seconds"] for row in rows if "impossible" not in row]
    best = min(possible, default=0.0)
    for row in rows:
        words = (row["driver"], row["locks"], row["batching"])
        if "impossible" in row:
            table.add_row(*words, *["n/a"] * 6)
            continue
        table.add_row(
            *words,
            f"{row['callbacks']:,}",
            *("-" if row[name] is None else f"{row[name]:,}" for name in ("mapped", "refaults")),
            f"{row['callback_seconds']:.3f} s",
            f"{row['callback_seconds'] / best:.2f}",
            f"{row['replay_seconds']:.3f} s",
        )
    return table
