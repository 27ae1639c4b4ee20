"""What the drivers take as options."""

from __future__ import annotations

import attrs


def _is_count(spec: object, field: object, value: int) -> None:
    if value < 0:
        raise ValueError(f"importers={value}: expected 0 or more")


@attrs.frozen
class XpmemOptions:
    """What `--driver xpmem,option=value` takes."""

    importers: int = attrs.field(default=1, validator=_is_count)
    """Importers within the process, which have the whole address space attached; accesses to the
    device are theirs in turn."""
    pin: bool = False
    """Hold the frames of pages that importers have."""
