"""The entry point of the gru driver; what it does is in `mmunotify_gru.driver`."""

from __future__ import annotations

from mmunotify import Capability, DriverSpec

DRIVER = DriverSpec(
    name="gru",
    api=(1, 0),
    summary="counts what the TLB of an SGI GRU would be told",
    capabilities=frozenset({Capability.ATOMIC}),
    factory="mmunotify_gru.driver:GruDriver",
)
