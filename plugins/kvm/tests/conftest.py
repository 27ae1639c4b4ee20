"""A machine with one process, whose memory is a guest's: what most tests begin with."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import pytest

from mmunotify import PAGE_SIZE
from mmunotify.model import Machine
from mmunotify_kvm.options import KvmOptions
from mmunotify_kvm.vm import VirtualMachine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager


@attrs.frozen
class Guest:
    """A virtual machine whose first memslot, number 0 at gfn 0, is memory of `mm`."""

    machine: Machine[Any]
    mm: Any
    vm: VirtualMachine
    base: int
    """Where its memory begins in the host, in bytes."""
    pages: int

    def host(self, gfn: int) -> int:
        """The host's address of a page of the guest."""
        return self.base + gfn * PAGE_SIZE


class Boot(Protocol):
    """Starts a guest: `async with boot(pages=64, vcpus=2) as guest:`."""

    def __call__(
        self,
        pages: int = ...,
        *,
        kind: type[VirtualMachine] = ...,
        machine: dict[str, Any] | None = ...,
        flags: int = ...,
        align: int = ...,
        advice: str = ...,
        vm: dict[str, Any] | None = ...,
        **options: Any,
    ) -> AbstractAsyncContextManager[Guest]: ...


@asynccontextmanager
async def _boot(
    pages: int = 64,
    *,
    kind: type[VirtualMachine] = VirtualMachine,
    machine: dict[str, Any] | None = None,
    flags: int = 0,
    align: int = PAGE_SIZE,
    advice: str = "",
    vm: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Guest]:
    settings = {"frames": 1 << 12, "swap": 1 << 12, "contents": True, **(machine or {})}
    async with Machine(**settings) as host:
        mm = host.new_mm("qemu")
        size = pages * PAGE_SIZE
        base = -(-await mm.mmap(size + align) // align) * align
        if advice:
            await mm.madvise(base, size, advice)
        guest = kind(KvmOptions(**options), **(vm or {}))
        async with mm.attached(guest):
            await guest.set_user_memory_region(0, 0, size, base, flags)
            yield Guest(host, mm, guest, base, pages)


@pytest.fixture
def boot() -> Boot:
    return _boot
