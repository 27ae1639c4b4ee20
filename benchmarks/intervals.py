"""Interval notifiers: what it costs that there are many of them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio

import mmunotify as mn
from mmunotify.interval_tree import SCANNED, IntervalTree

from ._bench import Row, at_most, bare_calls, minima, printed

if TYPE_CHECKING:
    from collections.abc import Callable

FEW, MANY = 100, 100_000
LENGTH, STRIDE = 4 * mn.PAGE_SIZE, 8 * mn.PAGE_SIZE


class Interval(mn.AtomicInterval):
    def invalidate(self, rng: mn.Range, seq: int) -> bool:
        self.set_seq(seq)
        return True


def _ranges(count: int, hits: int) -> list[mn.Range]:
    """Ranges at random among `count` intervals; each overlaps `hits` of them."""
    rng = random.Random(0)
    starts = [rng.randrange(count - hits + 1) * STRIDE for _ in range(1000)]
    return [mn.Range(start, start + (hits - 1) * STRIDE + LENGTH) for start in starts]


def _tree(count: int, scanned: int = SCANNED) -> IntervalTree[int]:
    """As many intervals, inserted in random order."""
    tree: IntervalTree[int] = IntervalTree(scanned)
    numbers = list(range(count))
    random.Random(1).shuffle(numbers)
    for number in numbers:
        tree.insert(number * STRIDE, number * STRIDE + LENGTH, number)
    return tree


def _query(tree: IntervalTree[int], hits: int) -> Callable[[int], None]:
    ranges = [(rng.start, rng.end) for rng in _ranges(len(tree), hits)]

    def query(number: int) -> None:
        overlapping = tree.overlapping
        for start, end in ranges[:number]:
            overlapping(start, end)

    return query


def _insert_and_remove(tree: IntervalTree[int]) -> Callable[[int], None]:
    starts = [rng.start for rng in _ranges(len(tree), 1)]

    def change(number: int) -> None:
        for start in starts[:number]:
            tree.remove(tree.insert(start, start + LENGTH, -1))

    return change


def trees() -> list[Row]:
    few, many = _tree(FEW), _tree(MANY)
    itself = f"itself among {FEW}"
    rows = []
    for hits in (1, 10):
        short, long, call = minima(
            _query(few, hits), _query(many, hits), bare_calls, number=1000, rounds=30
        )
        what = f"overlap query, hits: {hits}"
        title = f"{what}, among {MANY} : among {FEW}"
        rows.append(
            at_most(title, long / short, 5, itself)
            if hits == 1
            else printed(title, long / short, itself)
        )
        rows.append(printed(f"{what}, among {FEW}", short / call, "a bare method call", "calls"))
    short, long = minima(_insert_and_remove(few), _insert_and_remove(many), number=1000, rounds=30)
    rows.append(printed(f"insert and remove, among {MANY} : among {FEW}", long / short, itself))
    for count in (10, FEW):
        scan, tree = minima(
            _query(_tree(count), 1), _query(_tree(count, scanned=0), 1), number=1000, rounds=30
        )
        rows.append(printed(f"scan : tree, among {count}", scan / tree, "the tree"))
    return rows


async def sections() -> list[Row]:
    """Start and end of a section that one atomic interval hears of."""
    taken: dict[int, Callable[[int], None]] = {}
    for count in (1, FEW, MANY):
        notifiers = mn.Notifiers()
        for number in range(count):
            await Interval().insert(notifiers, number * STRIDE, LENGTH)
        taken[count] = _section(notifiers, _ranges(count, 1))
    one, few, many, call = minima(*taken.values(), bare_calls, number=1000, rounds=30)
    return [
        printed(f"start and end, among {MANY} : among {FEW}", many / few, f"itself among {FEW}"),
        printed("start and end, 1 interval", one / call, "a bare method call", "calls"),
    ]


def _section(notifiers: mn.Notifiers[mn.RwSems], ranges: list[mn.Range]) -> Callable[[int], None]:
    def section(number: int) -> None:
        start, end = (
            notifiers.invalidate_range_start_atomic,
            notifiers.invalidate_range_end_atomic,
        )
        for rng in ranges[:number]:
            end(rng, start(rng))

    return section


def run() -> list[Row]:
    return [*trees(), *anyio.run(sections)]
