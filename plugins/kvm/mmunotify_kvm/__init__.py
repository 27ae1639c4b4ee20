"""The entry point of the kvm driver; what it does is in `mmunotify_kvm.driver`."""

from __future__ import annotations

from mmunotify import Capability, DriverSpec

DRIVER = DriverSpec(
    name="kvm",
    api=(1, 0),
    summary="counts what a KVM secondary MMU would be told",
    capabilities=frozenset({Capability.ATOMIC}),
    factory="mmunotify_kvm.driver:KvmDriver",
)
