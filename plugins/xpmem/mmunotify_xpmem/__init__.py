"""The entry point of the xpmem driver; what it does is in `mmunotify_xpmem.driver`."""

from __future__ import annotations

from mmunotify import Capability, DriverSpec

DRIVER = DriverSpec(
    name="xpmem",
    api=(1, 0),
    summary="counts what the exporter of an XPMEM segment would be told",
    capabilities=frozenset({Capability.SLEEPABLE}),
    factory="mmunotify_xpmem.driver:XpmemDriver",
)
