from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import structlog

from mmunotify.locks import lockdep

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """Each test has a lock order of its own, and leaves structlog unconfigured."""
    lockdep.reset()
    yield
    lockdep.reset()
    structlog.reset_defaults()


@pytest.fixture(params=["plain", "checked"])
def both_forms(request: pytest.FixtureRequest) -> Iterator[None]:
    """Notifiers made inside are plain ones, and in a second run watched and with checked locks."""
    with lockdep.checking(request.param == "checked"):
        yield
