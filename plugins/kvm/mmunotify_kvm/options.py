"""How a virtual machine is configured. Imported with the spec, so it imports little."""

from __future__ import annotations

import re
from typing import Final

import attrs

_SIZE: Final = re.compile(r"(\d+)([kmgt]?)", re.IGNORECASE)
_CHOICES: Final = {"mmu": ("tdp", "shadow"), "dirty": ("map", "zap")}
_SHIFTS: Final = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(text: str) -> int:
    """Bytes of a size such as 4096, 64M or 2g; raises ValueError that says so."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"size {text!r}: expected a number of bytes, or one with K, M, G or T")
    return int(match[1]) << _SHIFTS[match[2].lower()]


def _is_size(options: object, field: object, value: str) -> None:
    if value and not parse_size(value):
        raise ValueError(f"memory is {value!r}: expected a size above 0, or nothing for no limit")


def _is_count(options: object, field: object, value: int) -> None:
    if not 1 <= value <= 4096:
        raise ValueError(f"vcpus is {value}: expected 1 to 4096")


def _is_choice(options: object, field: attrs.Attribute[str], value: str) -> None:
    if value not in _CHOICES[field.name]:
        choices = " or ".join(_CHOICES[field.name])
        raise ValueError(f"{field.name} is {value!r}: expected {choices}")


@attrs.frozen
class KvmOptions:
    """The options of `--driver kvm`; raises ValueError for a value that is not as described."""

    memory: str = attrs.field(default="", validator=_is_size)
    """How much of the host's memory the guest may be given, such as 64M; empty: whatever it uses.

    Where a device uses host memory that has no memslot, the mapping around it becomes one, until
    this much has been given; what is used beyond that are MMIO exits.
    """
    vcpus: int = attrs.field(default=1, validator=_is_count)
    """Virtual CPUs, each with a TLB of its own that every zap has to flush."""
    mmu: str = attrs.field(default="tdp", validator=_is_choice)
    """`tdp` mends write protection lock-free; `shadow` maps up to 8 aligned neighbours with a page.

    Two-dimensional paging is what hardware has today, shadow paging what it falls back to, nested
    machines among them.

    Source: direct_pte_prefetch and fast_page_fault, arch/x86/kvm/mmu/mmu.c.
    """
    huge: bool = True
    """Map 2 MiB at once where the host does and the memslot is aligned like the host's memory."""
    dirty: str = attrs.field(default="map", validator=_is_choice)
    """When the primary MMU learns that a page was written.

    `map`: when it is mapped writable, as Linux does since 6.13; right for every era and batching.
    `zap`: when its mapping is dropped, as before, if the guest did write; only for address spaces
    that announce a change before they make it.
    """
