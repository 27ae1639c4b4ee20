"""Drivers that others publish: discover, load, check, create.

A distribution offers a driver by an entry point of the group `mmunotify.drivers` whose value is a
module-level `DriverSpec`. Three steps, each with its own cost and its own failures:

    discover   reads the metadata of what is installed and imports nothing
    load       imports the spec, which is cheap, and compares API versions (the handshake)
    create     imports the factory, which may not be cheap, checks its class and calls it

A plugin that fails is quarantined: it stays in the table with its distribution, version and reason,
and the others go on. Nothing is discovered by importing mmunotify.

    MMUNOTIFY_DRIVERS=kvm,gru    only these; empty means none; unset means all
    MMUNOTIFY_STRICT=1           a plugin that fails to load is an error, not a line in a table
"""

from __future__ import annotations

import difflib
import enum
import os
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, final

import attrs
from attrs.validators import matches_re

from .drivers import AtomicDriver, DeferredDriver, SleepableDriver, check_driver_class, kind_of
from .errors import (
    DriverConfigError,
    DriverConflict,
    DriverIncompatible,
    DriverLoadError,
    DriverNotFound,
    PluginError,
)
from .log import PLUGIN_QUARANTINED, Log

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from .drivers import AnyDriver

API_VERSION: Final = (1, 0)
"""The version of the callback contract, (major, minor).

A minor adds what a driver may leave out; a major changes what a driver relies on.
"""
GROUP: Final = "mmunotify.drivers"
"""The entry point group."""


class Capability(enum.StrEnum):
    """What is known of a driver before its code is imported; the code is held to it.

    A driver names exactly one of the first three. What it does not claim is taken as absent.
    """

    ATOMIC = "atomic"
    """An AtomicDriver: registers under both locking models."""
    SLEEPABLE = "sleepable"
    """A SleepableDriver: registers under RwSems alone."""
    DEFERRED = "deferred"
    """A DeferredDriver: registers under both; pages are held until its sync is done."""
    AGE = "age"
    """Answers clear_flush_young, clear_young or test_young."""
    NONBLOCK = "nonblock"
    """Can serve sections that must not suspend. Atomic drivers always can and do not claim it."""


_KINDS: Final[Mapping[Capability, type[AnyDriver]]] = {
    Capability.ATOMIC: AtomicDriver,
    Capability.SLEEPABLE: SleepableDriver,
    Capability.DEFERRED: DeferredDriver,
}
_PROOFS: Final[Mapping[Capability, tuple[str, ...]]] = {
    Capability.AGE: ("clear_flush_young", "clear_young", "test_young"),
    Capability.NONBLOCK: ("invalidate_range_start_nonblock",),
}


def _is_version(spec: object, field: object, value: Any) -> None:
    match value:
        case (int(), int()):
            return
    raise ValueError(f"DriverSpec.api is {value!r}: expected (major, minor), two integers")


def _capabilities(claims: Iterable[Capability]) -> frozenset[Capability]:
    return frozenset(map(Capability, claims))


def _has_one_kind(spec: object, field: object, value: frozenset[Capability]) -> None:
    if len(value & _KINDS.keys()) != 1:
        raise ValueError(
            f"DriverSpec.capabilities is {sorted(value)}: "
            f"expected exactly one of {', '.join(_KINDS)}"
        )


def _is_config(spec: object, field: object, value: Any) -> None:
    if value is not None and not (isinstance(value, type) and attrs.has(value)):
        raise ValueError(f"DriverSpec.config is {value!r}: expected an attrs class or None")


@attrs.frozen(kw_only=True)
class DriverSpec:
    """What a plugin says of its driver, at module level; keep the module that holds it light.

    Raises ValueError for a field that is not as described.
    """

    name: str = attrs.field(validator=matches_re("[a-z][a-z0-9_-]*"))
    """The entry point's name: lower-case letters, digits, - and _."""
    api: tuple[int, int] = attrs.field(validator=_is_version)
    """The `API_VERSION` that the driver was written for, as a literal."""
    summary: str
    """One line: what the driver is for."""
    capabilities: frozenset[Capability] = attrs.field(
        converter=_capabilities, validator=_has_one_kind
    )
    """Its kind, and what else it claims."""
    factory: str = attrs.field(validator=matches_re(r"[\w.]+:[\w.]+"))
    """'module:attribute' of the driver class, or of a function that returns a driver."""
    config: type[attrs.AttrsInstance] | None = attrs.field(default=None, validator=_is_config)
    """The options as an attrs class: the factory is given an instance of it; None: no argument."""


class PluginState(enum.StrEnum):
    """How far the registry has come with a plugin."""

    DISCOVERED = "discovered"
    LOADED = "loaded"
    QUARANTINED = "quarantined"


@attrs.define(slots=True)
class Candidate:
    """One entry point: which driver, offered by whom, and what became of it."""

    name: str
    value: str
    """'module:attribute' of the spec."""
    distribution: str
    version: str
    read: Callable[[], object] = attrs.field(repr=False)
    """Imports the spec."""
    state: PluginState = PluginState.DISCOVERED
    spec: DriverSpec | None = None
    """Once loaded."""
    error: PluginError | None = None
    """Once quarantined."""

    def __str__(self) -> str:
        return f"driver {self.name!r} of {self.distribution} {self.version} ({self.value})"

    @property
    def reason(self) -> str | None:
        """Why it is quarantined."""
        return None if self.error is None else str(self.error)


@final
class Registry:
    """The drivers that installed distributions offer, and what became of each.

    `allow` are the names that may be used (None: all), and `strict` makes `load_all` raise; what is
    not given is taken from the environment. What was discovered is kept: a new registry sees what
    was installed since. Nothing here suspends or takes a lock.
    """

    def __init__(self, *, allow: Collection[str] | None = None, strict: bool | None = None) -> None:
        listed = os.environ.get("MMUNOTIFY_DRIVERS")
        if allow is None and listed is not None:
            allow = [name.strip() for name in listed.split(",")]
        if strict is None:
            strict = os.environ.get("MMUNOTIFY_STRICT", "") not in ("", "0")
        self.strict: Final = strict
        self._allow = allow
        self._claims: list[Candidate] | None = None
        self._factories: dict[str, Callable[..., AnyDriver]] = {}

    @classmethod
    def for_testing(cls, specs: Iterable[DriverSpec]) -> Registry:
        """A strict registry of `specs` alone, whatever is installed and in the environment."""
        registry = cls(allow=None, strict=True)
        registry._allow = None

        def candidate(spec: DriverSpec) -> Candidate:
            return Candidate(spec.name, spec.factory, "for-testing", "0", lambda: spec)

        registry._claims = _settle(map(candidate, specs))
        return registry

    def discover(self) -> tuple[Candidate, ...]:
        """Every driver on offer, sorted by name; reads metadata and imports no plugin.

        A name that several distributions claim appears once for each, all of them quarantined.
        """
        return tuple(filter(self._allowed, self._scanned()))

    def find(self, name: str) -> Candidate:
        """The candidate of that name, in whatever state. Raises DriverNotFound."""
        for candidate in self.discover():
            if candidate.name == name:
                return candidate
        if any(candidate.name == name for candidate in self._scanned()):
            raise DriverNotFound(
                f"driver {name!r} is installed but not allowed: add it to MMUNOTIFY_DRIVERS"
            )
        names = [candidate.name for candidate in self.discover()]
        raise DriverNotFound(f"no driver {name!r}: {_suggest(name, names, 'installed')}")

    def load(self, name: str) -> DriverSpec:
        """Import the spec of one driver, once, and check that the core speaks its API version.

        Raises DriverNotFound, DriverConflict, DriverLoadError and DriverIncompatible; all but the
        first quarantine it, and are raised again at the next attempt.
        """
        candidate = self.find(name)
        if candidate.error is not None:
            raise candidate.error
        if candidate.spec is None:
            with _quarantine(candidate):
                candidate.spec = _handshake(candidate)
            candidate.state = PluginState.LOADED
        return candidate.spec

    def load_all(self) -> tuple[DriverSpec, ...]:
        """Load every driver that loads; with `strict`, the first that does not load raises."""
        specs = []
        for candidate in self.discover():
            try:
                specs.append(self.load(candidate.name))
            except PluginError:
                if self.strict:
                    raise
        return tuple(specs)

    def factory(self, name: str) -> Callable[..., AnyDriver]:
        """Load, import what makes the driver, and hold it to the callback contract and its claims.

        Raises as `load` does; a class that breaks the contract is a DriverLoadError whose cause is
        the DriverError. What a function returns is checked by `create`.
        """
        spec = self.load(name)
        if name not in self._factories:
            candidate = self.find(name)
            with _quarantine(candidate):
                factory = _resolve(spec.factory)
                if not callable(factory):
                    raise TypeError(f"{spec.factory} is {factory!r}: expected a driver class")
                if isinstance(factory, type):
                    _check_claims(spec, factory)
            self._factories[name] = factory
        return self._factories[name]

    def create(self, name: str, /, **options: object) -> AnyDriver:
        """A new driver of that name, which serves no address space yet.

        `options` are the fields of its configuration, already of their types. Raises as `factory`
        does, DriverConfigError for options that do not fit, and what the driver itself raises.
        """
        factory = self.factory(name)
        spec = self.load(name)
        candidate = self.find(name)
        arguments = _configure(spec, options)
        try:
            driver = factory(*arguments)
        except Exception as error:
            error.add_note(f"while creating {candidate}")
            raise
        if not isinstance(factory, type):
            with _quarantine(candidate):
                _check_claims(spec, type(driver))
        return driver

    def _allowed(self, candidate: Candidate) -> bool:
        return self._allow is None or candidate.name in self._allow

    def _scanned(self) -> list[Candidate]:
        if self._claims is None:
            # Some 30 ms to import, which only who asks should pay.
            from importlib.metadata import entry_points

            self._claims = _settle(
                Candidate(point.name, point.value, point.dist.name, point.dist.version, point.load)
                for point in entry_points(group=GROUP)
                if point.dist is not None
            )
        return self._claims


def _settle(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Sort by name, and quarantine every claim to a name that has several."""
    ordered = sorted(candidates, key=attrgetter("name", "distribution"))
    for name, group in groupby(ordered, key=attrgetter("name")):
        claims = list(group)
        if len(claims) > 1:
            who = " and ".join(f"{claim.distribution} {claim.version}" for claim in claims)
            error = DriverConflict(f"driver {name!r} is offered by {who}: uninstall all but one")
            for claim in claims:
                _condemn(claim, error)
    return ordered


def _condemn(candidate: Candidate, error: PluginError) -> None:
    candidate.state = PluginState.QUARANTINED
    candidate.error = error
    Log().emit(
        PLUGIN_QUARANTINED,
        driver=candidate.name,
        distribution=candidate.distribution,
        version=candidate.version,
        value=candidate.value,
        reason=str(error),
    )


@contextmanager
def _quarantine(candidate: Candidate) -> Iterator[None]:
    """Whatever goes wrong inside is the plugin's: name it, and let nobody use it."""
    try:
        yield
    except PluginError as error:
        _condemn(candidate, error)
        raise
    except (Exception, SystemExit) as error:
        wrapped = DriverLoadError(f"{candidate}: {type(error).__name__}: {error}")
        _condemn(candidate, wrapped)
        raise wrapped from error


def _handshake(candidate: Candidate) -> DriverSpec:
    spec = candidate.read()
    if not isinstance(spec, DriverSpec):
        raise DriverLoadError(f"{candidate} is {spec!r}: expected a DriverSpec")
    if spec.name != candidate.name:
        raise DriverLoadError(f"{candidate}: its spec says {spec.name!r}: expected the same name")
    (major, minor), (our_major, our_minor) = spec.api, API_VERSION
    if major != our_major or minor > our_minor:
        outdated = "mmunotify" if spec.api > API_VERSION else candidate.distribution
        raise DriverIncompatible(
            name=spec.name,
            distribution=f"{candidate.distribution} {candidate.version}",
            wants=spec.api,
            have=API_VERSION,
            hint=f"pip install --upgrade {outdated}",
        )
    return spec


def _resolve(path: str) -> object:
    import pkgutil

    return pkgutil.resolve_name(path)


def _check_claims(spec: DriverSpec, driver_class: type) -> None:
    check_driver_class(driver_class)
    kind = kind_of(driver_class)
    claimed = next(_KINDS[claim] for claim in spec.capabilities & _KINDS.keys())
    if kind is not claimed:
        raise TypeError(
            f"{driver_class.__qualname__} is a {kind.__name__}, its spec claims {claimed.__name__}"
        )
    for claim in spec.capabilities & _PROOFS.keys():
        proofs = _PROOFS[claim]
        if all(getattr(driver_class, name, None) is getattr(kind, name, None) for name in proofs):
            raise TypeError(
                f"its spec claims {claim.value!r}: expected {driver_class.__qualname__} "
                f"to define {' or '.join(proofs)}"
            )


def _configure(spec: DriverSpec, options: Mapping[str, object]) -> tuple[attrs.AttrsInstance, ...]:
    """What the factory is called with."""
    fields = () if spec.config is None else attrs.fields(spec.config)
    known = [field.alias for field in fields if field.init]
    for option in options:
        if option not in known:
            hint = _suggest(option, known, "options")
            raise DriverConfigError(f"driver {spec.name!r} has no option {option!r}: {hint}")
    if spec.config is None:
        return ()
    try:
        return (spec.config(**options),)
    except (TypeError, ValueError) as error:
        raise DriverConfigError(f"driver {spec.name!r}: {error}") from error


def _suggest(wrong: str, known: Collection[str], what: str) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"{what}: {', '.join(known) or 'none'}"
