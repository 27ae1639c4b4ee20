"""Which code is the program's: the reports leave out anyio, the explorer and Python's library."""

from __future__ import annotations

import os
import sysconfig
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import CodeType

_LIBRARY: Final = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib"))
_PACKAGES: Final = tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib"))
_OURS: Final = tuple(
    os.path.join(os.path.dirname(spec.origin), "")
    for spec in map(find_spec, (__package__, "anyio", "sniffio", "_pytest", "pluggy", "hypothesis"))
    if spec is not None and spec.origin is not None
)


@cache
def is_ours(filename: str) -> bool:
    """Whether the file is part of what runs the program rather than of the program."""
    if filename.startswith((*_OURS, "<")):
        return True
    return filename.startswith(_LIBRARY) and not filename.startswith(_PACKAGES)


def place(code: CodeType, line: int) -> str:
    """`file:line in function`, the file relative to the working directory if it is below."""
    return f"{shown(code.co_filename)}:{line} in {code.co_qualname.rpartition('<locals>.')[2]}"


@cache
def shown(filename: str) -> str:
    """The file as it is shown."""
    relative = os.path.relpath(filename)
    return filename if relative.startswith("..") else relative


def named(function: object) -> str:
    """The name of a function, without those it is local to."""
    name = getattr(function, "__qualname__", None) or repr(function)
    return str(name).rpartition("<locals>.")[2]
