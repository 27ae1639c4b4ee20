from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import structlog
from structlog.testing import capture_logs

from mmunotify.locks import lockdep

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """Each test has a lock order of its own, and leaves structlog unconfigured."""
    lockdep.reset()
    yield
    lockdep.reset()
    structlog.reset_defaults()


@pytest.fixture
def lines() -> Iterator[list[MutableMapping[str, Any]]]:
    """What is logged in the test, instead of a page of console for each driver that fails."""
    with capture_logs() as captured:
        yield captured


@pytest.fixture(params=["plain", "checked"])
def both_forms(request: pytest.FixtureRequest) -> Iterator[None]:
    """Notifiers made inside are plain ones, and in a second run watched and with checked locks."""
    with lockdep.checking(request.param == "checked"):
        yield
