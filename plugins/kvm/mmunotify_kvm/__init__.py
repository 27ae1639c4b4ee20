"""The entry point of the kvm driver; what it does is in the modules beside it."""

from __future__ import annotations

from mmunotify import Capability, DriverSpec

from .options import KvmOptions

DRIVER = DriverSpec(
    name="kvm",
    api=(1, 0),
    summary="a virtual machine's shadow page tables, as KVM keeps them",
    capabilities=frozenset({Capability.ATOMIC, Capability.AGE}),
    factory="mmunotify_kvm.driver:KvmDriver",
    config=KvmOptions,
)
