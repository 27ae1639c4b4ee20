"""Which of many intervals overlap a range: a scan while they are few, a tree above that.

The tree is a treap ordered by start, in which every node knows the largest end below it (Linux:
lib/interval_tree.c, a red-black tree with the same augmentation). Insert, remove and query take
logarithmic time, whatever the intervals are. Priorities are hashes of the order of insertion, so
that one program builds one tree in every run.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

SCANNED: Final = 100
"""How many intervals are scanned at most, unless a tree is told otherwise."""


class Node(Generic[T]):
    """One interval [start, end) of a tree, with the item that it is the interval of."""

    __slots__ = ("end", "item", "left", "order", "priority", "reach", "right", "start")

    def __init__(self, start: int, end: int, item: T, number: int) -> None:
        self.start = start
        self.end = end
        self.item = item
        self.order = (start, number)
        """By start; equal ones by their order of insertion."""
        self.priority = hash((number,))
        """No node has a smaller one than those below it."""
        self.reach = end
        """The largest end of this node and all below it."""
        self.left: Node[T] | None = None
        self.right: Node[T] | None = None

    def update(self) -> None:
        """Find `reach` anew after the children have changed."""
        reach = self.end
        if self.left is not None and self.left.reach > reach:
            reach = self.left.reach
        if self.right is not None and self.right.reach > reach:
            reach = self.right.reach
        self.reach = reach


class IntervalTree(Generic[T]):
    """A set of half-open intervals that can be asked for those that overlap a range.

    Up to `scanned` of them are scanned, and again when half of that are left.
    """

    __slots__ = ("_inserted", "_length", "_nodes", "_root", "_scanned")

    def __init__(self, scanned: int = SCANNED) -> None:
        self._scanned = scanned
        self._inserted = 0
        self._length = 0
        self._nodes: list[Node[T]] = []
        """All nodes in order, as long as there is no tree."""
        self._root: Node[T] | None = None

    def __len__(self) -> int:
        return self._length

    def insert(self, start: int, end: int, item: T) -> Node[T]:
        """Add [start, end); `remove` wants the node that is returned."""
        self._inserted += 1
        self._length += 1
        node = Node(start, end, item, self._inserted)
        if self._root is not None:
            self._root = _insert(self._root, node)
        else:
            insort(self._nodes, node, key=_order)
            if self._length > self._scanned:
                for each in self._nodes:
                    self._root = _insert(self._root, each)
                self._nodes.clear()
        return node

    def remove(self, node: Node[T]) -> None:
        """Take out a node that is in the tree."""
        self._length -= 1
        if self._root is None:
            del self._nodes[bisect_left(self._nodes, node.order, key=_order)]
            return
        self._root = _remove(self._root, node)
        if self._length <= self._scanned // 2:
            self._nodes.extend(_ascending(self._root))
            self._root = None

    def overlapping(self, start: int, end: int) -> list[T]:
        """The items whose intervals have an address of [start, end), by ascending start."""
        if self._root is None:
            return [node.item for node in self._nodes if node.start < end and start < node.end]
        found: list[T] = []
        above: list[Node[T]] = []
        node: Node[T] | None = self._root
        while True:
            while node is not None and node.reach > start:
                above.append(node)
                node = node.left
            if not above:
                return found
            node = above.pop()
            if node.start >= end:
                return found
            if node.end > start:
                found.append(node.item)
            node = node.right


def _order(node: Node[T]) -> tuple[int, int]:
    return node.order


def _insert(root: Node[T] | None, node: Node[T]) -> Node[T]:
    if root is None:
        node.left = node.right = None
        node.reach = node.end
        return node
    if node.priority > root.priority:
        node.left, node.right = _split(root, node)
        node.update()
        return node
    if node.order < root.order:
        root.left = _insert(root.left, node)
    else:
        root.right = _insert(root.right, node)
    if node.end > root.reach:
        root.reach = node.end
    return root


def _remove(root: Node[T] | None, node: Node[T]) -> Node[T] | None:
    if root is None or root is node:
        return _merge(node.left, node.right)
    if node.order < root.order:
        root.left = _remove(root.left, node)
    else:
        root.right = _remove(root.right, node)
    root.update()
    return root


def _split(root: Node[T] | None, at: Node[T]) -> tuple[Node[T] | None, Node[T] | None]:
    """What comes before `at`, and what comes after it."""
    if root is None:
        return None, None
    if root.order < at.order:
        root.right, after = _split(root.right, at)
        root.update()
        return root, after
    before, root.left = _split(root.left, at)
    root.update()
    return before, root


def _merge(before: Node[T] | None, after: Node[T] | None) -> Node[T] | None:
    """One tree of two, of which one is all before the other."""
    if before is None or after is None:
        return before or after
    if before.priority > after.priority:
        before.right = _merge(before.right, after)
        before.update()
        return before
    after.left = _merge(before, after.left)
    after.update()
    return after


def _ascending(root: Node[T] | None) -> Iterator[Node[T]]:
    if root is not None:
        yield from _ascending(root.left)
        yield root
        yield from _ascending(root.right)
