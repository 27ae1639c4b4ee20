from __future__ import annotations

import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from structlog.testing import capture_logs

import mmunotify as mn
from mmunotify import Capability, DriverSpec, PluginState, Registry

if TYPE_CHECKING:
    from collections.abc import Iterator


class Plain(mn.AtomicDriver):
    def invalidate_range_start(self, rng: mn.Range) -> None: ...


class Waiting(mn.SleepableDriver):
    def clear_young(self, start: int, end: int) -> bool:
        return True


class Marking(mn.DeferredDriver):
    def invalidate_range_start_nonblock(self, rng: mn.Range) -> bool:
        return True


class Misspelled(mn.AtomicDriver):
    def invalidate_range_strat(self, rng: mn.Range) -> None: ...


@attrs.define
class Options:
    size: int = attrs.field(default=1, validator=attrs.validators.gt(0))
    place: str = "here"
    _hidden: int = attrs.field(default=0, init=False)


class Configured(mn.AtomicDriver):
    def __init__(self, options: Options) -> None:
        self.options = options


class Unwilling(mn.AtomicDriver):
    def __init__(self) -> None:
        raise OSError("no such device")


def make_plain() -> Plain:
    return Plain()


def make_something_else() -> object:
    return object()


not_callable = 7


def spec(name: str = "mine", factory: str = "Plain", **fields: Any) -> DriverSpec:
    fields.setdefault("api", mn.API_VERSION)
    fields.setdefault("capabilities", {Capability.ATOMIC})
    return DriverSpec(name=name, summary="for a test", factory=f"{__name__}:{factory}", **fields)


GOOD = """
from mmunotify import Capability, DriverSpec
DRIVER = DriverSpec(
    name="mine",
    api=(1, 0),
    summary="for a test",
    capabilities={Capability.ATOMIC},
    factory="nowhere:Driver",
)
"""


class Installer:
    """Makes what pip would make of a distribution with one driver."""

    def __init__(self, site: Path) -> None:
        self.site = site

    def __call__(
        self, distribution: str, code: str = GOOD, *, name: str = "mine", version: str = "1.2"
    ) -> str:
        module = distribution.replace("-", "_")
        info = self.site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[mmunotify.drivers]\n{name} = {module}:DRIVER\n")
        (self.site / f"{module}.py").write_text(code)
        return module


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    """Installs into an environment that says nothing of drivers."""
    monkeypatch.delenv("MMUNOTIFY_DRIVERS", raising=False)
    monkeypatch.delenv("MMUNOTIFY_STRICT", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield Installer(tmp_path)
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


# ------------------------------------------------------------------ discover


def test_discovery_imports_nothing(install: Installer) -> None:
    """A plugin whose import fails is still found, with its distribution and version."""
    module = install("boom-driver", "raise RuntimeError('imported')")
    (found,) = Registry(allow=["mine"]).discover()
    assert (found.name, found.distribution, found.version) == ("mine", "boom-driver", "1.2")
    assert found.value == f"{module}:DRIVER"
    assert found.state == PluginState.DISCOVERED
    assert found.reason is None
    assert module not in sys.modules


def test_a_new_registry_sees_what_was_installed_since(install: Installer) -> None:
    """A registry keeps its scan; another one scans again."""
    before = Registry(allow=["mine"])
    assert not before.discover()
    install("late-driver")
    assert not before.discover()
    assert len(Registry(allow=["mine"]).discover()) == 1


def test_a_failed_scan_is_not_kept(install: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the metadata cannot be read the error is raised, and the next call tries again."""
    install("good-driver")
    registry = Registry(allow=["mine"])
    with monkeypatch.context() as broken:
        broken.setattr(metadata, "entry_points", unreadable)
        with pytest.raises(OSError, match="disk on fire"):
            registry.discover()
    assert len(registry.discover()) == 1


def unreadable(**selection: str) -> metadata.EntryPoints:
    raise OSError("disk on fire")


def test_two_distributions_that_claim_a_name_are_both_named(install: Installer) -> None:
    """Neither is used: not the first, not the last."""
    install("one-driver")
    install("other-driver", version="3.4")
    registry = Registry(allow=["mine"])
    first, second = registry.discover()
    assert first.state == second.state == PluginState.QUARANTINED
    with pytest.raises(mn.DriverConflict, match=r"one-driver 1\.2 and other-driver 3\.4"):
        registry.load("mine")
    assert registry.load_all() == ()


def test_environment_allows_drivers_by_name(
    install: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMUNOTIFY_DRIVERS=a,b means these; empty means none; an argument wins over it."""
    install("good-driver")
    install("better-driver", name="better")

    def names(registry: Registry) -> set[str]:
        return {candidate.name for candidate in registry.discover()}

    assert names(Registry()) >= {"mine", "better"}
    monkeypatch.setenv("MMUNOTIFY_DRIVERS", "mine, absent")
    assert names(Registry()) == {"mine"}
    assert names(Registry(allow=["better"])) == {"better"}
    monkeypatch.setenv("MMUNOTIFY_DRIVERS", "")
    assert names(Registry()) == set()


def test_a_driver_that_is_not_allowed_is_told_apart_from_one_that_is_not_there(
    install: Installer,
) -> None:
    """The message says what to do about it."""
    install("good-driver")
    with pytest.raises(mn.DriverNotFound, match=r"installed but not allowed: .*MMUNOTIFY_DRIVERS"):
        Registry(allow=["other"]).load("mine")


def test_a_misspelled_name_is_met_with_the_right_one() -> None:
    """Or, when nothing is close, with all that there is."""
    registry = Registry.for_testing([spec("kvm"), spec("gru")])
    with pytest.raises(mn.DriverNotFound, match="no driver 'kwm': did you mean 'kvm'"):
        registry.load("kwm")
    with pytest.raises(LookupError, match="no driver 'xpmem': installed: gru, kvm"):
        registry.load("xpmem")


# ------------------------------------------------------------------ load


def test_load_imports_the_spec_and_not_the_driver(install: Installer) -> None:
    """The factory is nowhere to be found, and loading does not mind."""
    install("good-driver")
    registry = Registry(allow=["mine"])
    assert registry.load("mine").factory == "nowhere:Driver"
    assert registry.load("mine") is registry.load("mine")
    assert registry.find("mine").state == PluginState.LOADED


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("DRIVER = 5", "is 5: expected a DriverSpec"),
        ("syntax error", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("", "AttributeError: .*'DRIVER'"),
        (GOOD.replace('"mine"', '"yours"'), "its spec says 'yours': expected the same name"),
        (GOOD.replace("(1, 0)", "'1.0'"), r"expected \(major, minor\)"),
        (GOOD.replace("nowhere:Driver", "nowhere"), "'factory' must match"),
    ],
)
def test_a_broken_plugin_is_quarantined_and_the_others_load(
    install: Installer, code: str, reason: str
) -> None:
    """The error names distribution, version and entry point, and stays in the table."""
    install("broken-driver", code)
    install("better-driver", GOOD.replace("mine", "better"), name="better")
    registry = Registry(allow=["mine", "better"])
    assert [loaded.name for loaded in registry.load_all()] == ["better"]
    candidate = registry.find("mine")
    assert candidate.state == PluginState.QUARANTINED
    assert candidate.spec is None
    with pytest.raises(mn.DriverLoadError, match=reason) as caught:
        registry.load("mine")
    assert str(caught.value) == candidate.reason
    assert "'mine' of broken-driver 1.2 (broken_driver:DRIVER)" in str(caught.value)


def test_what_the_plugin_raised_is_the_cause(install: Installer) -> None:
    """A driver author finds the place in the traceback."""
    install("broken-driver", "1 / 0")
    with pytest.raises(mn.DriverLoadError) as caught:
        Registry(allow=["mine"]).load("mine")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_strict_makes_a_broken_plugin_an_error(
    install: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMUNOTIFY_STRICT=1 or the argument; 0 and nothing mean lenient."""
    install("broken-driver", "1 / 0")
    for lenient in ("", "0"):
        monkeypatch.setenv("MMUNOTIFY_STRICT", lenient)
        assert Registry(allow=["mine"]).load_all() == ()
    monkeypatch.setenv("MMUNOTIFY_STRICT", "1")
    with pytest.raises(mn.DriverLoadError, match="ZeroDivisionError"):
        Registry(allow=["mine"]).load_all()
    assert Registry(allow=["mine"], strict=False).load_all() == ()


def test_quarantine_is_logged(install: Installer) -> None:
    """One line per plugin, with everything that is needed to find the culprit."""
    install("broken-driver", "1 / 0")
    with capture_logs() as lines:
        Registry(allow=["mine"]).load_all()
    (line,) = lines
    assert line["event"] == "plugin_quarantined"
    assert line["log_level"] == "error"
    assert (line["driver"], line["distribution"], line["version"]) == (
        "mine",
        "broken-driver",
        "1.2",
    )
    assert "ZeroDivisionError" in line["reason"]


@pytest.mark.parametrize(
    ("api", "hint"),
    [
        ((1, 1), "pip install --upgrade mmunotify$"),
        ((2, 0), "pip install --upgrade mmunotify$"),
        ((0, 0), "pip install --upgrade for-testing$"),
    ],
)
def test_handshake_refuses_what_the_core_does_not_speak(api: tuple[int, int], hint: str) -> None:
    """Another major, or a newer minor; the hint upgrades whichever is behind."""
    registry = Registry.for_testing([spec(api=api)])
    with pytest.raises(mn.DriverIncompatible, match=hint) as caught:
        registry.load("mine")
    error = caught.value
    assert (error.name, error.distribution) == ("mine", "for-testing 0")
    assert (error.wants, error.have) == (api, mn.API_VERSION)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_handshake_accepts_an_older_minor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver written for 1.0 serves a core that speaks 1.3."""
    monkeypatch.setattr("mmunotify.plugins.API_VERSION", (1, 3))
    Registry.for_testing([spec(api=(1, 0))]).load("mine")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"name": "Mine"}, "'name' must match"),
        ({"api": (1,)}, r"expected \(major, minor\)"),
        ({"capabilities": {"atomic", "sleepable"}}, "expected exactly one of atomic, sleep"),
        ({"capabilities": {"age"}}, "expected exactly one of atomic, sleepable, deferred"),
        ({"capabilities": {"telepathy"}}, "'telepathy' is not a valid Capability"),
        ({"config": int}, "expected an attrs class or None"),
    ],
)
def test_a_spec_checks_its_fields(fields: dict[str, Any], complaint: str) -> None:
    """At the place where the author wrote it."""
    with pytest.raises(ValueError, match=complaint):
        spec(**fields)


# ------------------------------------------------------------------ create


def test_create_makes_a_driver_that_can_be_attached() -> None:
    """Each call makes another instance: one serves one address space."""
    registry = Registry.for_testing([spec()])
    driver = registry.create("mine")
    assert isinstance(driver, Plain)
    assert registry.create("mine") is not driver


@pytest.mark.parametrize(
    ("factory", "capabilities", "complaint"),
    [
        ("Waiting", {"atomic"}, "Waiting is a SleepableDriver, its spec claims AtomicDriver"),
        ("Plain", {"atomic", "age"}, "claims 'age': expected Plain to define clear_flush_young or"),
        ("Waiting", {"sleepable", "nonblock"}, "define invalidate_range_start_nonblock"),
        ("Misspelled", {"atomic"}, "UnknownCallback: .*did you mean invalidate_range_start"),
        ("Options", {"atomic"}, "WrongColour: Options derives from none"),
        ("not_callable", {"atomic"}, "is 7: expected a driver class"),
        ("absent", {"atomic"}, "AttributeError: .*'absent'"),
    ],
)
def test_the_class_is_held_to_the_contract_and_to_the_claims(
    factory: str, capabilities: set[str], complaint: str
) -> None:
    """What it is not is said before any instance is made, and it stays quarantined."""
    registry = Registry.for_testing([spec(factory=factory, capabilities=capabilities)])
    registry.load("mine")
    with pytest.raises(mn.DriverLoadError, match=complaint):
        registry.create("mine")
    candidate = registry.find("mine")
    assert candidate.state == PluginState.QUARANTINED
    with pytest.raises(mn.DriverLoadError, match=complaint):
        registry.load("mine")


@pytest.mark.parametrize(
    ("factory", "capabilities"),
    [
        ("Plain", {"atomic"}),
        ("Waiting", {"sleepable", "age"}),
        ("Marking", {"deferred", "nonblock"}),
        ("make_plain", {"atomic"}),
    ],
)
def test_claims_that_are_kept(factory: str, capabilities: set[str]) -> None:
    """A class of each kind, and a function that returns a driver."""
    registry = Registry.for_testing([spec(factory=factory, capabilities=capabilities)])
    registry.create("mine")
    assert registry.find("mine").state == PluginState.LOADED


def test_what_a_function_returns_is_held_to_the_contract_too() -> None:
    """It is known only once it was called."""
    registry = Registry.for_testing([spec(factory="make_something_else")])
    registry.factory("mine")
    with pytest.raises(mn.DriverLoadError, match="WrongColour: object derives from none of them"):
        registry.create("mine")


def test_options_reach_the_driver() -> None:
    """As one instance of the spec's attrs class; what is not given has its default."""
    registry = Registry.for_testing([spec(factory="Configured", config=Options)])
    driver = registry.create("mine", size=4)
    assert isinstance(driver, Configured)
    assert driver.options == Options(size=4, place="here")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sise": 4}, "driver 'mine' has no option 'sise': did you mean 'size'?"),
        ({"hidden": 4}, "no option 'hidden': options: size, place"),
        ({"size": 0}, "driver 'mine': 'size' must be > 0: 0"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], complaint: str) -> None:
    """A wrong option is the caller's mistake: the driver is not quarantined for it."""
    registry = Registry.for_testing([spec(factory="Configured", config=Options)])
    with pytest.raises(mn.DriverConfigError, match=complaint):
        registry.create("mine", **options)
    assert registry.find("mine").state == PluginState.LOADED


def test_a_driver_without_options_refuses_any() -> None:
    """Rather than dropping them."""
    with pytest.raises(mn.DriverConfigError, match="no option 'size': options: none"):
        Registry.for_testing([spec()]).create("mine", size=4)


def test_what_the_driver_raises_comes_out_with_a_note() -> None:
    """A missing device is no reason for a quarantine: it may be there at the next attempt."""
    registry = Registry.for_testing([spec(factory="Unwilling")])
    with pytest.raises(OSError, match="no such device") as caught:
        registry.create("mine")
    (note,) = caught.value.__notes__
    assert note.startswith("while creating driver 'mine' of for-testing 0")
    assert registry.find("mine").state == PluginState.LOADED


# ------------------------------------------------------------------ for_testing


def test_for_testing_ignores_what_is_installed_and_the_environment(
    install: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test sees the drivers that it names, on every machine."""
    install("good-driver", name="other")
    monkeypatch.setenv("MMUNOTIFY_DRIVERS", "other")
    registry = Registry.for_testing([spec()])
    assert [candidate.name for candidate in registry.discover()] == ["mine"]
    with pytest.raises(mn.DriverConflict, match="for-testing 0 and for-testing 0"):
        Registry.for_testing([spec(), spec()]).load_all()


def test_import_discovers_nothing() -> None:
    """Importing mmunotify reads no metadata: who never asks for plugins never pays for them."""
    code = "import sys, mmunotify; sys.exit('importlib.metadata' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
