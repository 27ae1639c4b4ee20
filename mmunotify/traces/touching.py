"""How devices touch the memory of a replayed program, so that invalidations find something.

    same        every page that the program faults on, right after it
    hot:N       one access per fault and per system call, in a working set of N pages that the
                program faulted on; a few of them take most of the accesses (Zipf), and every
                fourth page that is faulted on takes the place of one of them
    random:P    a page that the program faults on, with probability P

A device only touches what the program has mapped: a page that is gone from the primary is left
alone, and a write is a read where the primary would have to copy first. So the program's memory
goes on as it was recorded.
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Final

import attrs

from mmunotify.errors import BadAddress
from mmunotify.model.check.guest_driver import GuestDriver
from mmunotify.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmunotify import Device, Primary

_SEED: Final = 2008
_DRAWS: Final = 1 << 12
_NEWCOMERS: Final = 0.25
"""How many of the pages that the program faults on join a working set that is full."""
_STAYS: Final = -1


@attrs.frozen
class Touching:
    """What `--device` asks for."""

    mode: str
    pages: int = 0
    """Of `hot`: the size of the working set."""
    probability: float = 1.0
    """Of `random` (and 1 for `same`)."""

    @classmethod
    def parse(cls, text: str) -> Touching:
        """Read same, hot:N or random:P; raises ValueError that says so."""
        mode, _, value = text.partition(":")
        try:
            if mode == "same" and not value:
                return cls("same")
            if mode == "hot" and int(value) > 0:
                return cls("hot", pages=int(value))
            if mode == "random" and 0 <= float(value) <= 1:
                return cls("random", probability=float(value))
        except ValueError:
            pass
        raise ValueError(f"{text!r}: expected same, hot:N (pages > 0) or random:P (0 <= P <= 1)")

    def __str__(self) -> str:
        """As `parse` reads it."""
        return {
            "same": "same",
            "hot": f"hot:{self.pages}",
            "random": f"random:{self.probability:g}",
        }[self.mode]


class Draws:
    """The dice of one replay, which fall alike in all, so that designs have the same load."""

    def __init__(self, touching: Touching) -> None:
        dice = random.Random(_SEED)
        self.touching: Final = touching
        self.yes: Final[Iterator[bool]] = itertools.cycle(
            [dice.random() < touching.probability for _ in range(_DRAWS)]
        )
        """Whether `random` touches."""
        slots = range(touching.pages or 1)
        weights = [1 / (rank + 1) for rank in slots]
        self.slots: Final[Iterator[int]] = itertools.cycle(dice.choices(slots, weights, k=_DRAWS))
        """Which page of the working set is accessed."""
        self.newcomers: Final[Iterator[int]] = itertools.cycle(
            [
                slot if dice.random() < _NEWCOMERS else _STAYS
                for slot in dice.choices(slots, k=_DRAWS)
            ]
        )
        """Whose place a page that was faulted on takes, if anybody's."""


class Toucher:
    """The devices of one address space, and the pages that they use."""

    __slots__ = ("_devices", "_draws", "_guests", "_hot", "_primary", "_set")

    def __init__(self, draws: Draws, primary: Primary, devices: list[Device]) -> None:
        self._draws = draws
        self._primary = primary
        self._devices = devices
        self._guests: list[Device] = [each for each in devices if isinstance(each, GuestDriver)]
        self._hot = draws.touching.mode == "hot"
        self._set: list[tuple[int, bool]] = []

    async def faulted(self, address: int, pages: int, write: bool) -> None:
        """The program faulted on `pages` pages in a row, of which the first has `address`."""
        draws, devices, members = self._draws, self._devices, self._set
        run = range(address, address + pages * PAGE_SIZE, PAGE_SIZE)
        if not self._hot:
            for touched, touches in zip(run, draws.yes):  # noqa: B905
                if touches:
                    missed = _first_miss(devices, touched, write)
                    if missed >= 0:
                        await self._serve(missed, touched, write)
            return
        most = draws.touching.pages
        for touched, place, slot in zip(run, draws.newcomers, draws.slots):  # noqa: B905
            if len(members) < most:
                members.append((touched, write))
            elif place != _STAYS:
                members[place] = (touched, write)
            if slot < len(members):
                at, writes = members[slot]
                missed = _first_miss(devices, at, writes)
                if missed >= 0 and not await self._serve(missed, at, writes):
                    self._leave(slot)

    async def guest_faulted(self, address: int, write: bool) -> None:
        """The program's own guest faulted on a page, as the devices do that have a guest."""
        for device in self._guests:
            if not device.access(address, write=write):
                await device.fault(address, write=write)

    async def called(self) -> None:
        """The program made a system call."""
        slot = next(self._draws.slots)
        if self._hot and slot < len(self._set):
            address, write = self._set[slot]
            missed = _first_miss(self._devices, address, write)
            if missed >= 0 and not await self._serve(missed, address, write):
                self._leave(slot)

    def _leave(self, slot: int) -> None:
        """A page of the working set is gone: the next one that is faulted on joins."""
        last = self._set.pop()
        if slot < len(self._set):
            self._set[slot] = last

    async def _serve(self, missed: int, address: int, write: bool) -> bool:
        """Serve the first device that missed, and have those after it access the page.

        False if the process has no page there. What the process may do with one that it has stays
        as it is: a device is given no more than that.
        """
        found = self._primary.translate(address)
        if found is None:
            return False
        writes = write and found.writable
        devices = self._devices
        for position in range(missed, len(devices)):
            device = devices[position]
            if position > missed and device.access(address, write=write):
                continue
            if writes or not write or not device.access(address):
                # Memory that the process has and the device may not use (a guard page, a mapping
                # of another device) is nothing to it.
                try:  # noqa: SIM105 - suppress costs more than a device's access
                    await device.fault(address, write=writes)
                except BadAddress:
                    pass
        return True


def _first_miss(devices: list[Device], address: int, write: bool) -> int:
    """Have the devices access a page until one misses; its position, or -1."""
    for position, device in enumerate(devices):
        if not device.access(address, write=write):
            return position
    return -1
