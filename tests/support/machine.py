"""What the machine that runs the tests offers, and the reason to skip where it does not."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest

from mmunotify.errors import RecorderError
from mmunotify.traces.record import residue
from mmunotify.traces.record.means import kernel_route
from mmunotify.traces.record.tracefs import TraceFs


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


_GLOBAL = "tracing_on set_event set_event_pid current_tracer trace_clock buffer_size_kb"


def tracing_state() -> dict[str, Any]:
    """Everything of the machine's tracing that a recorder could have changed."""
    with TraceFs() as tracefs:
        # Others may be recording: what counts is what nobody uses any more.
        state: dict[str, Any] = {"orphans": residue.orphans(tracefs)}
        for name in _GLOBAL.split():
            with open(f"{tracefs.path}/{name}") as file:
                state[name] = file.read()
        with open(f"{tracefs.path}/events/enable") as file:
            state["events"] = file.read()
    with open("/proc/self/mountinfo") as file:
        state["mounts"] = sum("tracefs" in line for line in file)
    return state
