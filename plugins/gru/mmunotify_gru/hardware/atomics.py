"""What each atomic operation makes of the old value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .instructions import Exop

if TYPE_CHECKING:
    from collections.abc import Callable

LINE_BITS: Final = 32
_LOW: Final = (1 << LINE_BITS) - 1


def queue_head(head: int, limit: int) -> int:
    """The word at the head of a queue: the next free line, and the first that is not to be used."""
    return head | limit << LINE_BITS


def head_and_limit(word: int) -> tuple[int, int]:
    """The two halves of such a word, in cache lines after it."""
    return word & _LOW, word >> LINE_BITS


def advance(word: int, lines: int) -> int | None:
    """The word when `lines` more are taken, or None: there is no room before the limit."""
    head, limit = head_and_limit(word)
    return queue_head(head + lines, limit) if head + lines <= limit else None


RESULTS: Final[dict[Exop, Callable[[int, int, int], int | None]]] = {
    Exop.FETCH: lambda old, one, two: None,
    Exop.CLR: lambda old, one, two: 0,
    Exop.INC: lambda old, one, two: old + 1,
    Exop.DEC: lambda old, one, two: old - 1,
    Exop.DECZ: lambda old, one, two: old - 1 if old else None,
    Exop.QCHK1: lambda old, one, two: advance(old, 1),
    Exop.QCHK2: lambda old, one, two: advance(old, 2),
    Exop.SWAP: lambda old, one, two: one,
    Exop.OR: lambda old, one, two: old | one,
    Exop.AND: lambda old, one, two: old & one,
    Exop.XOR: lambda old, one, two: old ^ one,
    Exop.ADD: lambda old, one, two: old + one,
    Exop.CSWAP: lambda old, one, two: one if old == two else None,
    Exop.CADD: lambda old, one, two: old + one if old == two else None,
    Exop.EPOLL: lambda old, one, two: None,
    Exop.NPOLL: lambda old, one, two: None,
}
"""(old value, operand1, operand2) to the new value, before it is cut to size; None: no store."""
READ_ONLY: Final = frozenset((Exop.FETCH, Exop.EPOLL, Exop.NPOLL))
"""These need no permission to write."""
