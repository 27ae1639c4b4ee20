from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from typing import Any

import pytest

# Locks made while lockdep is on are checked ones, so it is on before the first import.
os.environ.setdefault("MMUNOTIFY_LOCKDEP", "1")


def backends() -> list[Any]:
    found = [pytest.param(("asyncio", {}), id="asyncio")]
    if sys.version_info >= (3, 12):

        def eager_loop() -> asyncio.AbstractEventLoop:
            loop = asyncio.new_event_loop()
            loop.set_task_factory(asyncio.eager_task_factory)
            return loop

        found.append(pytest.param(("asyncio", {"loop_factory": eager_loop}), id="asyncio+eager"))
    if importlib.util.find_spec("trio"):
        found.append(pytest.param(("trio", {}), id="trio"))
    return found


@pytest.fixture(params=backends())
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param
