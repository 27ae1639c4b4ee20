"""What this machine offers to record with, and what it costs that something is missing."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Final

import attrs

from mmunotify.errors import RecorderError

from . import residue, shim
from .lender import Lender
from .sideband import SideBand
from .tracefs import TraceFs

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack
    from pathlib import Path

_FIRST_PID_NAMESPACE: Final = "pid:[4026531836]"
_MACHINE: Final = "x86_64"
_KVM_EVENT: Final = "kvm/kvm_unmap_hva_range"
_FAULT_EVENT: Final = "exceptions/page_fault_user"
_NO_ANNOUNCEMENTS: Final = (
    "what the kernel announces is not recorded, and a replay has nothing to be compared with"
)
_NO_SIDE_BAND: Final = (
    "mappings are recorded without their files, and what execve maps is not: a replay is poor"
)


@attrs.define
class Means:
    """What the kernel route uses here. Everything belongs to the stack it was opened on."""

    tracefs: TraceFs
    library: Path | None
    """The shim; None: no announcements."""
    lender: Lender | None
    side_band: SideBand | None


def kernel_route(stack: ExitStack, say: Callable[[str], None]) -> Means:
    """Open what there is; `say` is told a line for each thing that is not.

    Raises RecorderError, which says why, if this kernel cannot be asked at all.
    """
    if platform.machine() != _MACHINE:
        raise RecorderError(f"this machine is {platform.machine()}, and only {_MACHINE} is known")
    if os.geteuid():
        raise RecorderError("not root")
    if os.readlink("/proc/self/ns/pid") != _FIRST_PID_NAMESPACE:
        raise RecorderError("in a container, whose process numbers are not the kernel's")
    tracefs = stack.enter_context(TraceFs())
    if not tracefs.has_event(_FAULT_EVENT):
        raise RecorderError(f"this kernel does not trace {_FAULT_EVENT}")
    library, lender = None, None
    try:
        if not tracefs.has_event(_KVM_EVENT):
            raise RecorderError(f"this kernel does not trace {_KVM_EVENT}")
        library = shim.build()
        lender = stack.enter_context(Lender(residue.own_name()))
    except RecorderError as error:
        say(f"{error}: {_NO_ANNOUNCEMENTS}")
    except OSError as error:
        say(f"no /dev/kvm ({error.strerror}): {_NO_ANNOUNCEMENTS}")
    if lender is None:
        library = None
    side_band = None
    try:
        side_band = stack.enter_context(SideBand())
    except RecorderError as error:
        say(f"{error}: {_NO_SIDE_BAND}")
    return Means(tracefs, library, lender, side_band)
