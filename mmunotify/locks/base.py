"""What all locks have in common: a name, a class, a checked form, and a wait that is none."""

from __future__ import annotations

import itertools
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, cast

from . import lockdep

if TYPE_CHECKING:
    from collections.abc import Callable


class Lock:
    """A named lock, of a lock class, that is checked if lockdep was on when it was made.

    `name` is for messages. `lock_class` is what lockdep orders by: the first word of the name when
    not given (that of `mmap_lock[7]` is `mmap_lock`). `order` lets several locks of one class be
    held in ascending order, as mmap_locks are by address.
    """

    __slots__ = ("lock_class", "name", "order")

    _checked: ClassVar[type[Lock] | None] = None

    def __init_subclass__(cls, *, checks: type[Lock] | None = None) -> None:
        cls._checked = None
        if checks is not None:
            checks._checked = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the checked form if lockdep is on."""
        if lockdep.enabled and cls._checked is not None:
            return cast("Self", object.__new__(cls._checked))
        return object.__new__(cls)

    def __init__(
        self, name: str, *, lock_class: str | None = None, order: int | None = None
    ) -> None:
        self.name = name
        self.lock_class = lock_class or lockdep.class_of(name)
        self.order = order


next_address: Final = itertools.count(1).__next__
"""Stands for the address of a lock in memory: unique, and the same in every run of a program."""


class Ready(Coroutine[Any, Any, None]):
    """A coroutine that has nothing left to do: what an uncontended lock is awaited with.

    `async with lock:` awaits what `__aenter__` returns. Making a coroutine for it costs more than
    the lock does; this one is shared, and its iterator is that of an empty tuple, so that the
    interpreter runs no Python code for the await and allocates nothing.
    """

    __slots__ = ()

    __await__: Callable[..., Generator[Any, Any, None]] = cast("Any", staticmethod(().__iter__))

    def send(self, value: Any) -> None:  # noqa: D102
        raise StopIteration

    def throw(self, typ: Any, val: Any = None, tb: Any = None) -> None:  # noqa: D102
        raise typ

    def close(self) -> None:  # noqa: D102
        pass


READY: Final = Ready()

Awaited = Any
"""What a guard's `__aenter__` returns: type checkers disagree on the type that `async def` has."""
