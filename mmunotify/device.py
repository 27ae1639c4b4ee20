"""What a driver offers to whoever has a workload to run on its device.

A driver that only listens needs none of this. One that has a device with translations of its own
(a shadow page table, a TLB, a registration cache) lets a replay or a test use memory through it:

    if not device.access(address, write=True):
        await device.fault(address, write=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping


@runtime_checkable
class Device(Protocol):
    """The device of one driver instance, attached to one address space. Addresses are bytes."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What the device has counted so far, by name; reports show it.

        Names that mean the same everywhere: `installed` (translations made, in pages), `mapped`
        (of the pages that invalidations announced, those that had a translation), `flushes`
        (invalidations that found any), `refaults` (translations made again after they had been
        dropped) and `retries` (lookups that an invalidation overtook).
        """
        ...

    def access(self, address: int, *, write: bool = False) -> bool:
        """Use memory through the device's own translation; False, a miss, if it has none that fits.

        Plain and cheap: what the hardware does without its driver.
        """
        ...

    async def fault(self, address: int, *, write: bool = False) -> None:
        """Serve a miss: look the page up in the primary MMU and install a translation.

        May suspend, and may make the primary announce (a write breaks copy-on-write). Not to be
        called inside a section of the address space. Raises BadAddress where the process itself
        would get a signal.
        """
        ...
