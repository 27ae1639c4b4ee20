from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mmunotify.locks import lockdep

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def own_graph() -> Iterator[None]:
    """Each test has a lock order of its own."""
    lockdep.reset()
    yield
    lockdep.reset()


@pytest.fixture(params=["plain", "checked"])
def both_forms(request: pytest.FixtureRequest) -> Iterator[None]:
    """Locks made inside are plain ones, and in a second run checked ones."""
    with lockdep.checking(request.param == "checked"):
        yield
