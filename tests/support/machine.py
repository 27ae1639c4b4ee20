"""What the machine that runs the tests offers, and the reason to skip where it does not."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from functools import cache

import pytest

from mmunotify.errors import RecorderError
from mmunotify.traces.record.means import kernel_route


@cache
def lacks(announcements: bool = True) -> str | None:
    """Why a program cannot be recorded with the kernel's help here, or None."""
    said: list[str] = []
    try:
        with ExitStack() as stack:
            kernel_route(stack, said.append)
    except RecorderError as error:
        return str(error)
    return said[0] if said and announcements else None


needs_kernel = pytest.mark.skipif(lacks(announcements=False) is not None, reason=str(lacks(False)))
needs_announcements = pytest.mark.skipif(lacks() is not None, reason=str(lacks()))


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip where one of these programs is not installed."""
    absent = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)} is not installed")


def is_root() -> bool:
    """Whether the tests may do everything."""
    return os.geteuid() == 0
