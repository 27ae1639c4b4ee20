"""What is published, seen by who installs it: built, put into clean environments, and used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).parent.parent.parent
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
PROJECTS = {"mmunotify": ROOT} | {f"mmunotify-{name}": ROOT / "plugins" / name for name in PLUGINS}

# Nothing of the environment that runs the tests may leak into the ones that they make.
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("MMUNOTIFY_", "PYTHON", "PYTEST_", "VIRTUAL_ENV"))
}


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; all of it is the message if the command fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=CLEAN,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}"
    return done.stdout


@attrs.frozen
class Built:
    """One distribution as it would be published: the wheel is made from the sdist."""

    sdist: Path
    wheel: Path

    @classmethod
    def of(cls, project: Path, output: Path) -> Built:
        run(sys.executable, "-m", "build", "--no-isolation", "-o", output, project, cwd=output)
        (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
        return cls(sdist, wheel)

    def sdist_files(self) -> set[str]:
        """Paths below the directory that an sdist unpacks to."""
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def wheel_files(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


@attrs.frozen
class Environment:
    """A virtual environment that holds what a test installs, and a directory to be in."""

    home: Path

    @classmethod
    def at(cls, home: Path, *requirements: str | Path) -> Environment:
        venv.create(home / "venv", with_pip=False)
        made = cls(home)
        pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", made.python]
        run(*pip, "install", "--quiet", *requirements, cwd=home)
        return made

    @property
    def python(self) -> Path:
        return self.home / "venv" / "bin" / "python"

    def run(self, *arguments: str | Path) -> str:
        """What Python prints; only what is installed can be imported."""
        return run(self.python, "-P", *arguments, cwd=self.home)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """The four distributions."""
    return {
        name: Built.of(project, tmp_path_factory.mktemp(name)) for name, project in PROJECTS.items()
    }


@pytest.fixture(scope="module")
def bare(built: dict[str, Built], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The core's wheel with no extra, and pytest."""
    return Environment.at(tmp_path_factory.mktemp("bare"), built["mmunotify"].wheel, "pytest")


# ------------------------------------------------------------------ contents


@pytest.mark.parametrize("name", PROJECTS)
def test_licence_and_types_are_in_every_distribution(built: dict[str, Built], name: str) -> None:
    """The MIT text and py.typed, in the sdist and in the wheel; the readme in the metadata."""
    module = name.replace("-", "_")
    sdist, wheel = built[name].sdist_files(), built[name].wheel_files()
    assert {"LICENSE", "README.md", f"{module}/py.typed"} <= sdist
    assert f"{module}/py.typed" in wheel
    (licence,) = (path for path in wheel if path.endswith(".dist-info/licenses/LICENSE"))
    (metadata,) = (path for path in wheel if path.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(built[name].wheel) as archive:
        assert archive.read(licence).decode() == (ROOT / "LICENSE").read_text()
        text = archive.read(metadata).decode()
    assert "License-Expression: MIT" in text
    assert (PROJECTS[name] / "README.md").read_text().strip() in text


def test_the_shim_is_in_the_distribution_that_builds_it(built: dict[str, Built]) -> None:
    """It is C, and compiled where it is used."""
    shim = "mmunotify/traces/record/shim.c"
    assert shim in built["mmunotify"].sdist_files() & built["mmunotify"].wheel_files()


@pytest.mark.parametrize("name", PROJECTS)
def test_a_wheel_holds_its_module_alone(built: dict[str, Built], name: str) -> None:
    """No tests, no plugins, no benchmarks end up in site-packages."""
    module = name.replace("-", "_")
    tops = {path.partition("/")[0] for path in built[name].wheel_files()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {module}


def test_the_core_sdist_leaves_the_plugins_out(built: dict[str, Built]) -> None:
    """They are distributions of their own; nor does it carry what only a repository needs."""
    tops = {path.partition("/")[0] for path in built["mmunotify"].sdist_files()}
    assert tops <= {
        *("mmunotify", "tests", "docs", "examples", "conftest.py"),
        *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"),
        *("pyproject.toml", "PKG-INFO", ".gitignore"),
    }


@pytest.mark.parametrize("name", PLUGINS)
def test_plugins_are_released_in_step(name: str) -> None:
    """One version for all, and a requirement of the core that fits it."""
    project = tomllib.loads((ROOT / "plugins" / name / "pyproject.toml").read_text())["project"]
    version: dict[str, str] = {}
    exec((ROOT / "mmunotify" / "_version.py").read_text(), version)
    assert project["version"] == version["__version__"]
    major, minor = map(int, project["version"].split(".")[:2])
    core = [each for each in project["dependencies"] if each.startswith("mmunotify")]
    assert core == [f"mmunotify>={major}.{minor},<{major}.{minor + 1}"]


# ------------------------------------------------------------------ without extras

# Rooms above the core, whose own libraries are not there.
NEED_EXTRAS = tuple(
    f"mmunotify.{room}." for room in ("cli", "inspect", "linux", "model", "testing", "traces")
)


def test_the_core_passes_its_tests_without_extras(
    built: dict[str, Built], bare: Environment
) -> None:
    """The tests of the sdist, on the installed wheel, with nothing but its dependencies."""
    with tarfile.open(built["mmunotify"].sdist) as archive:
        archive.extractall(bare.home, filter="data")
    (unpacked,) = bare.home.glob("mmunotify-*")
    shutil.rmtree(unpacked / "mmunotify")
    where = bare.run("-c", "import mmunotify; print(mmunotify.__file__)")
    assert Path(where).is_relative_to(bare.home / "venv")
    run(bare.python, "-P", "-m", "pytest", "-q", "-m", "not long", "tests/core", cwd=unpacked)


def test_importing_the_core_stays_light(bare: Environment) -> None:
    """Neither the libraries of the extras nor the metadata of what is installed are read."""
    report = bare.run("-X", "importtime", "-c", "import mmunotify")
    imported = {line.rpartition("|")[2].strip() for line in report.splitlines()}
    assert "mmunotify.notifiers" in imported
    assert not imported & {"numpy", "trio", "rich", "importlib.metadata"}


def test_the_public_interface_of_the_core_is_typed(bare: Environment) -> None:
    """Nothing that a user of the installed wheel can reach is unknown to a type checker."""
    # It looks for the package in the first Python on the path, whatever it is told.
    path = f"{bare.python.parent}{os.pathsep}{CLEAN['PATH']}"
    command = (sys.executable, "-m", "basedpyright", "--verifytypes", "mmunotify")
    options = ("--ignoreexternal", "--outputjson")
    done = subprocess.run(
        [*command, *options],
        cwd=bare.home,
        env=CLEAN | {"PATH": path},
        text=True,
        capture_output=True,
        check=False,
    )
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    core = [symbol for symbol in symbols if not symbol["name"].startswith(NEED_EXTRAS)]
    assert "mmunotify.notifiers.Notifiers.register" in {symbol["name"] for symbol in core}
    unknown = {
        symbol["name"]
        for symbol in core
        if not symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]
    }
    assert unknown == set()


def test_the_command_says_how_to_get_its_libraries(bare: Environment) -> None:
    """One line instead of a traceback."""
    command = bare.home / "venv" / "bin" / "mmunotify"
    done = subprocess.run([command, "drivers"], text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'mmunotify[cli]'" in done.stderr


# ------------------------------------------------------------------ somebody else's driver

THEIRS = {
    "pyproject.toml": """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "acme-pager"
version = "7.1"
dependencies = ["mmunotify"]

[project.entry-points."mmunotify.drivers"]
pager = "acme_pager:DRIVER"
""",
    "acme_pager/__init__.py": """
from mmunotify import Capability, DriverSpec
from acme_pager.options import Options

DRIVER = DriverSpec(
    name="pager",
    api=(1, 0),
    summary="remembers what it was told",
    capabilities={Capability.SLEEPABLE},
    factory="acme_pager.driver:Pager",
    config=Options,
)
""",
    "acme_pager/options.py": """
import attrs

@attrs.frozen
class Options:
    depth: int = 1
""",
    "acme_pager/driver.py": """
import mmunotify as mn

class Pager(mn.SleepableDriver):
    def __init__(self, options):
        self.options = options
        self.told = []

    async def invalidate_range_start(self, rng):
        self.told.append((rng.start, rng.end, rng.event.name))
""",
    "use_it.py": """
import sys
import anyio
import mmunotify as mn

async def main():
    registry = mn.Registry()
    (found,) = registry.discover()
    print(found.name, found.distribution, found.version, found.state)
    driver = registry.create("pager", depth=3)
    assert "acme_pager.driver" in sys.modules
    notifiers = mn.Notifiers()
    async with notifiers.attached(driver):
        await notifiers.invalidate(mn.Range(0x1000, 0x3000))
    await notifiers.invalidate(mn.Range(0x3000, 0x4000))
    print(driver.options.depth, driver.told)

anyio.run(main)
""",
}


def test_a_driver_from_elsewhere(built: dict[str, Built], tmp_path: Path) -> None:
    """Built as a wheel, installed beside the core's, discovered, attached, and invalidated."""
    for path, text in THEIRS.items():
        file = tmp_path / "acme" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "dist").mkdir()
    theirs = Built.of(tmp_path / "acme", tmp_path / "dist")
    environment = Environment.at(tmp_path, built["mmunotify"].wheel, theirs.wheel)
    assert environment.run(tmp_path / "acme" / "use_it.py").splitlines() == [
        "pager acme-pager 7.1 discovered",
        "3 [(4096, 12288, 'UNMAP')]",
    ]
