"""Async generators that are dropped before their end are closed at once, as on trio."""

from __future__ import annotations

import sys
from asyncio import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

_LAST_WORDS: Final = 100
"""How often one may await in its finally blocks, each time to be cancelled."""


@contextmanager
def closed_when_dropped() -> Iterator[None]:
    """Generators that are first iterated inside are."""
    before = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(firstiter=None, finalizer=_close)
    try:
        yield
    finally:
        sys.set_asyncgen_hooks(*before)


def _close(generator: AsyncGenerator[Any, Any]) -> None:
    if getattr(generator, "ag_running", False):
        return  # dropped together with the task that was inside, of an execution that was given up
    closing = generator.aclose()
    try:
        closing.send(None)
        for _ in range(_LAST_WORDS):
            closing.throw(CancelledError())
    except (StopIteration, CancelledError):
        pass
