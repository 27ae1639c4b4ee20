"""A software primary MMU that announces what Linux 6.18 announces; README.md names the rooms."""

from __future__ import annotations

from .filemap import File as File
from .machine import Machine as Machine
from .mm import AddressSpace as AddressSpace
from .vma import Vma as Vma
