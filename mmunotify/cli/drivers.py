"""`mmunotify drivers`: which driver plugins are installed, and whether they can be used."""

from __future__ import annotations

import json as jsonlib
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import attrs
from cyclopts import App, Parameter
from rich import print as rich_print
from rich.table import Table
from rich.text import Text

from mmunotify import Registry
from mmunotify.errors import PluginError

if TYPE_CHECKING:
    from mmunotify import Candidate

app = App(name="drivers")


@app.command(name="list")
def list_drivers(*, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Show every driver that installed distributions offer.

    MMUNOTIFY_DRIVERS=a,b limits them to these, MMUNOTIFY_STRICT=1 makes one that cannot be loaded
    an error.

    Parameters
    ----------
    json
        Print a JSON array instead of a table.
    """
    registry = Registry()
    for candidate in registry.discover():
        with suppress(PluginError):
            registry.load(candidate.name)
    rows = [_row(candidate) for candidate in registry.discover()]
    if json:
        print(jsonlib.dumps(rows, indent=2))
    elif rows:
        table = Table("name", "version", "distribution", "capabilities", "state", "reason")
        for row in rows:
            table.add_row(*(_text(row[str(column.header)]) for column in table.columns))
        rich_print(table)
    else:
        print("no driver is installed and allowed: pip install mmunotify-kvm, or another plugin")
    if registry.strict:
        registry.load_all()


@app.command
def check(name: str, /) -> None:
    """Show one driver, import it, and hold its class to the callback contract and to its claims.

    Parameters
    ----------
    name
        As `mmunotify drivers list` shows it.
    """
    registry = Registry()
    candidate = registry.find(name)
    try:
        registry.factory(name)
    finally:
        table = Table.grid(padding=(0, 2))
        for key, value in _row(candidate).items():
            table.add_row(key, _text(value))
        rich_print(table)


def _row(candidate: Candidate) -> dict[str, object]:
    spec = candidate.spec
    fields = attrs.fields(spec.config) if spec and spec.config else ()
    return {
        "name": candidate.name,
        "summary": spec and spec.summary,
        "version": candidate.version,
        "distribution": candidate.distribution,
        "spec": candidate.value,
        "api": spec and ".".join(map(str, spec.api)),
        "capabilities": sorted(spec.capabilities) if spec else [],
        "options": [field.alias for field in fields if field.init],
        "state": candidate.state,
        "reason": candidate.reason,
    }


def _text(value: object) -> Text:
    # Not a string: rich would read [brackets] in it as markup.
    return Text(", ".join(value) if isinstance(value, list) else str(value or ""))
