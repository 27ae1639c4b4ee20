"""The drawing of the house as a test: what may import what. Imports for typing count too."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent

# From the ground up; rooms of one floor may use each other. `mmunotify` is the package's own
# __init__, which re-exports the floors below it: they must not import it, the ones above may.
FLOORS = [
    {"_version", "errors", "ranges", "log"},
    {"locks"},
    {"drivers", "primary", "device", "audience", "dispatch", "sections", "watchers"}
    | {"notifiers", "interval_tree", "intervals", "plugins"},
    {"mmunotify"},
    {"model", "linux"},
    {"traces", "inspect", "testing"},
    {"cli", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Third-party packages, beyond those of the core: the extras of pyproject.toml.
CORE = {"anyio", "attrs", "structlog"}
EXTRAS = {
    "model": {"numpy"},
    "linux": {"numpy"},
    "traces": {"msgspec", "numpy"},
    "inspect": {"msgspec", "rich"},
    "testing": {"hypothesis", "numpy", "pytest", "sniffio", "trio"},
    "cli": {"cattrs", "cyclopts", "msgspec", "rich"},
}


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """The dotted name and the file of every module of a package."""
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        yield name, path


def imports(name: str, source: str) -> Iterator[str]:
    """Everything that a module imports, as `package.module` or `package.module.name`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                parts = name.split(".")[: -node.level] if node.level else []
                parts += [node.module] if node.module else []
                yield from (".".join([*parts, alias.name]) for alias in node.names)


def room(dotted: str) -> str:
    """The room that a dotted name below `mmunotify` is in; `mmunotify` for a re-exported name."""
    parts = dotted.split(".")
    inner = parts[1] if len(parts) > 1 else ""
    return inner if inner in FLOOR else "mmunotify"


def violations(name: str, source: str) -> list[str]:
    """The imports of one module of the core package that the drawing forbids."""
    mine = "mmunotify" if name == "mmunotify.__init__" else name.split(".")[1]
    found = []
    for imported in imports(name, source):
        top = imported.partition(".")[0]
        if top == "mmunotify":
            if FLOOR[room(imported)] > FLOOR[mine]:
                found.append(f"{name} imports {imported}, which is on a higher floor")
        elif top not in CORE | EXTRAS.get(mine, set()) | sys.stdlib_module_names:
            found.append(f"{name} imports {imported}, which {mine} may not need")
    return found


def exports(package: Path) -> set[str]:
    """The public names of a package: those that its __init__ re-exports as `X as X`."""
    tree = ast.parse((package / "__init__.py").read_text())
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


def private_uses(name: str, source: str) -> list[str]:
    """What a plugin's module takes from mmunotify that is not public."""
    found = []
    for imported in imports(name, source):
        package, _, attribute = imported.rpartition(".")
        if imported == "mmunotify" or not (package + ".").startswith("mmunotify."):
            continue
        folder = ROOT.joinpath(*package.split("."))
        public = FLOOR[room(package)] >= FLOOR["mmunotify"] and folder.is_dir()
        if not public or attribute not in exports(folder):
            found.append(imported)
    names = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "mmunotify"
    }
    public_names = exports(ROOT / "mmunotify")
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id=alias), attr=attribute):
                if alias in names and attribute not in public_names:
                    found.append(f"mmunotify.{attribute}")
    return found


CORE_MODULES = dict(modules(ROOT / "mmunotify"))
PLUGIN_MODULES = {
    name: path
    for project in sorted(ROOT.glob("plugins/*/pyproject.toml"))
    for package in project.parent.glob("mmunotify_*")
    for name, path in modules(package)
}


def test_every_room_is_in_the_drawing() -> None:
    """A new file is put on a floor before it is used."""
    rooms = {name.split(".")[1] for name in CORE_MODULES} - {"__init__"}
    assert rooms <= FLOOR.keys()


@pytest.mark.parametrize("name", CORE_MODULES)
def test_imports_go_down(name: str) -> None:
    """No module needs a higher floor, a plugin, or a library that its extra does not bring."""
    assert violations(name, CORE_MODULES[name].read_text()) == []


@pytest.mark.parametrize("name", PLUGIN_MODULES)
def test_plugins_use_public_names(name: str) -> None:
    """A plugin in this repository has no more rights than somebody else's."""
    assert private_uses(name, PLUGIN_MODULES[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("mmunotify.errors", "from .locks import SRCU"),
        ("mmunotify.errors", "from . import notifiers"),
        ("mmunotify.locks.srcu", "from ..drivers import AtomicDriver"),
        ("mmunotify.locks.__init__", "import mmunotify.notifiers"),
        ("mmunotify.notifiers", "if TYPE_CHECKING:\n    from .model import Machine"),
        ("mmunotify.notifiers", "from mmunotify import Range"),
        ("mmunotify.notifiers", "def later():\n    import numpy"),
        ("mmunotify.__init__", "from .model import Machine as Machine"),
        ("mmunotify.model.mm", "from ..cli import main"),
        ("mmunotify.plugins", "import mmunotify_kvm"),
        ("mmunotify.cli.app", "from mmunotify_kvm.driver import KvmDriver"),
    ],
)
def test_what_the_drawing_forbids(name: str, source: str) -> None:
    """Each way of getting at something that is out of reach is seen."""
    assert len(violations(name, source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from mmunotify.notifiers import Notifiers",
        "from mmunotify.locks import SRCU",
        "from mmunotify import notifiers",
        "import mmunotify.errors",
        "from mmunotify import _version",
        "import mmunotify as mn\nmn.notifiers",
        "def later():\n    from mmunotify import nobody",
    ],
)
def test_what_a_plugin_must_not_use(source: str) -> None:
    """Modules of the core are private; its names are public where the package re-exports them."""
    assert len(private_uses("mmunotify_mine.driver", source)) == 1


def test_what_a_plugin_may_use() -> None:
    """Public names, by either form of import."""
    source = "import mmunotify as mn\nfrom mmunotify import Range\nmn.AtomicDriver"
    assert private_uses("mmunotify_mine.driver", source) == []
