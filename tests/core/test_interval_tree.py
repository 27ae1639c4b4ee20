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


def check(node: Node[int] | None) -> int:
    """That each node knows the largest end below it, which is what queries go by; that end."""
    if node is None:
        return 0
    assert node.reach == max(node.end, check(node.left), check(node.right))
    assert all(node.priority >= child.priority for child in (node.left, node.right) if child)
    return node.reach


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("space", [30, 5000], ids=["crowded", "sparse"])
def test_finds_what_a_list_finds_while_intervals_come_and_go(seed: int, space: int) -> None:
    """Becomes a tree and a scan again, twice, with equal starts among the intervals."""
    rng = random.Random(seed)
    tree: IntervalTree[int] = IntervalTree()
    there: dict[int, tuple[int, int, Node[int]]] = {}
    items = iter(range(100_000))
    for size in (2 * SCANNED, SCANNED // 3, 2 * SCANNED, 0):
        while len(there) != size:
            if not there or rng.random() < (0.75 if len(there) < size else 0.25):
                item, start = next(items), rng.randrange(space)
                end = start + rng.choice([1, 3, 50, space])
                there[item] = (start, end, tree.insert(start, end, item))
            else:
                tree.remove(there.pop(rng.choice(list(there)))[2])
            low = rng.randrange(space)
            high = low + rng.choice([1, 2, 40])
            assert tree.overlapping(low, high) == sorted(
                (item for item, (start, end, _) in there.items() if start < high and low < end),
                key=lambda item: (there[item][0], item),
            )
            assert len(tree) == len(there)
            check(tree._root)
        assert (tree._root is not None) == (size > SCANNED)


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
    class Counted(int):
        compared = 0

        def __gt__(self, other: int) -> bool:
            Counted.compared += 1
            return int(self) > other

    tree: IntervalTree[int] = IntervalTree()
    nodes = [tree.insert(4 * item, 4 * item + 4, item) for item in range(10_000)]
    crowd = [tree.insert(0, 40_000, -1) for _ in range(1_000)]
    for node in (*nodes, *crowd):
        node.reach = Counted(node.reach)
    assert tree.overlapping(40_000, 50_000) == []
    assert Counted.compared < 10
    for node in crowd:
        tree.remove(node)
    for node in nodes:
        node.reach = Counted(node.reach)
    for node in random.Random(1).choices(nodes, k=200):
        Counted.compared = 0
        assert tree.overlapping(node.start, node.end) == [node.item]
        assert Counted.compared < 100
