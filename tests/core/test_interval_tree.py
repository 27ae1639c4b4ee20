"""The tree of intervals against a list, over the sizes at which it is a scan and a tree."""

from __future__ import annotations

import random

import pytest

from mmunotify import ADDRESS_END
from mmunotify.interval_tree import SCANNED, IntervalTree, Node


def everything(tree: IntervalTree[int]) -> list[int]:
    return tree.overlapping(0, ADDRESS_END)


def depth(node: Node[int] | None) -> int:
    return 0 if node is None else 1 + max(depth(node.left), depth(node.right))


def test_an_interval_ends_before_its_end() -> None:
    tree: IntervalTree[str] = IntervalTree()
    tree.insert(10, 20, "a")
    assert tree.overlapping(0, 10) == []
    assert tree.overlapping(0, 11) == ["a"]
    assert tree.overlapping(19, 20) == ["a"]
    assert tree.overlapping(20, 30) == []


@pytest.mark.parametrize("others", [0, 2 * SCANNED], ids=["scan", "tree"])
def test_the_whole_address_space_and_its_last_byte(others: int) -> None:
    tree: IntervalTree[int] = IntervalTree()
    for number in range(others):
        tree.insert(4096 * number, 4096 * number + 1, number)
    tree.insert(0, ADDRESS_END, -1)
    tree.insert(ADDRESS_END - 1, ADDRESS_END, -2)
    assert tree.overlapping(ADDRESS_END - 1, ADDRESS_END) == [-1, -2]
    assert tree.overlapping(ADDRESS_END - 2, ADDRESS_END - 1) == [-1]
    assert len(everything(tree)) == others + 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("space", [30, 5000], ids=["crowded", "sparse"])
def test_finds_what_a_list_finds_while_intervals_come_and_go(seed: int, space: int) -> None:
    """Grows over the threshold and shrinks below it again, twice, with equal starts among them."""
    rng = random.Random(seed)
    tree: IntervalTree[int] = IntervalTree()
    there: dict[int, tuple[int, int, Node[int]]] = {}
    sizes: list[int] = []
    for item in range(1600):
        growing = item % 800 < 400
        if not there or rng.random() < (0.8 if growing else 0.1):
            start = rng.randrange(space)
            end = start + rng.choice([1, 3, 50, space])
            there[item] = (start, end, tree.insert(start, end, item))
        else:
            tree.remove(there.pop(rng.choice(list(there)))[2])
        low = rng.randrange(space)
        high = low + rng.choice([1, 2, 40])
        found = tree.overlapping(low, high)
        assert found == sorted(
            (item for item, (start, end, _) in there.items() if start < high and low < end),
            key=lambda item: (there[item][0], item),
        )
        assert len(tree) == len(there)
        sizes.append(len(tree))
    for grown, shrunk in ((sizes[:400], sizes[400:800]), (sizes[800:1200], sizes[1200:])):
        assert max(grown) > SCANNED
        assert min(shrunk) < SCANNED // 2


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "equal"])
def test_it_stays_shallow_in_whatever_order_they_come(order: str) -> None:
    """A few times the logarithm of 20 000, which is 14: insert, remove and query stay fast."""
    starts = list(range(20_000))
    if order == "descending":
        starts.reverse()
    elif order == "shuffled":
        random.Random(0).shuffle(starts)
    elif order == "equal":
        starts = [7] * len(starts)
    tree: IntervalTree[int] = IntervalTree()
    nodes = [tree.insert(start, start + 1, item) for item, start in enumerate(starts)]
    assert depth(tree._root) < 50
    for node in nodes[::2]:
        tree.remove(node)
    assert depth(tree._root) < 50
    assert len(everything(tree)) == 10_000


def test_a_query_visits_the_hits_and_little_else() -> None:
    """The largest ends that are kept must be exact, or the query would walk the whole tree."""

    class Counted:
        compared = 0

        def __init__(self, value: int) -> None:
            self.value = value

        def __gt__(self, other: int) -> bool:
            Counted.compared += 1
            return self.value > other

    rng = random.Random(1)
    tree: IntervalTree[int] = IntervalTree()
    nodes = [tree.insert(8 * item, 8 * item + 4, item) for item in range(10_000)]
    wide = [tree.insert(0, 80_000, -1) for _ in range(3)]
    rng.shuffle(nodes)
    for node in (*nodes[:5_000], *wide):
        tree.remove(node)
    for node in nodes[5_000:]:
        node.reach = Counted(node.reach)  # type: ignore[assignment]
    for node in nodes[5_000:5_100]:
        Counted.compared = 0
        assert tree.overlapping(node.start, node.end) == [node.item]
        assert Counted.compared < 100
