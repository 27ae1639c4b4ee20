"""The GRU: an accelerator with a TLB and no page table, as a driver of mmunotify.

`DRIVER` is the entry point: `mmunotify replay FILE --driver gru,contexts=4,tlb=512`. Whoever wants
to use the device opens a context on it:

    gru = Gru()
    async with gru.open(mm.notifiers) as context:
        await context.bcopy(source, destination, 4096)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmunotify import Capability, DriverSpec

from .options import GruOptions as GruOptions

if TYPE_CHECKING:
    from .context import Context as Context
    from .driver import GruDriver as GruDriver
    from .gru import Gru as Gru
    from .hardware.instructions import Exop as Exop
    from .hardware.instructions import Xtype as Xtype
    from .invariants import GruChecker as GruChecker
    from .message_queue import MessageQueue as MessageQueue
    from .message_queue import Sender as Sender

DRIVER = DriverSpec(
    name="gru",
    api=(1, 0),
    summary="SGI's global reference unit: a TLB, instructions on it, and no page table",
    capabilities=frozenset({Capability.ATOMIC}),
    factory="mmunotify_gru.driver:GruDriver",
    config=GruOptions,
)

_LATER = {
    "Context": "context",
    "Gru": "gru",
    "GruChecker": "invariants",
    "GruDriver": "driver",
    "MessageQueue": "message_queue",
    "Sender": "message_queue",
    "Exop": "hardware.instructions",
    "Xtype": "hardware.instructions",
}


def __getattr__(name: str) -> object:
    # Listing the drivers imports this module, which must not cost the whole of the device.
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LATER[name]}", __name__), name)
