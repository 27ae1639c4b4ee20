"""`NAME[,option=value]...`: which driver to attach, and how it is configured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
import cattrs

from mmunotify import Capability, Registry
from mmunotify.drivers import AtomicDriver, DeferredDriver, SleepableDriver, kind_of
from mmunotify.errors import DriverConfigError
from mmunotify.traces.devices import TLBS
from mmunotify.traces.replay import Choice

if TYPE_CHECKING:
    from mmunotify import AnyDriver

_KINDS: Final[dict[Capability, type[AnyDriver]]] = {
    Capability.ATOMIC: AtomicDriver,
    Capability.SLEEPABLE: SleepableDriver,
    Capability.DEFERRED: DeferredDriver,
}
_TRUTH: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def choose(text: str) -> Choice:
    """The driver that a word of the command line names; raises PluginError."""
    name, *words = text.split(",")
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise DriverConfigError(f"driver {name!r}: expected option=value, found {word!r}")
        options[key.replace("-", "_")] = value
    if name in TLBS:
        if options:
            raise DriverConfigError(f"driver {name!r} has no option {next(iter(options))!r}")
        return Choice(name, kind_of(TLBS[name]), TLBS[name])
    registry = Registry()
    spec = registry.load(name)
    kind = next(_KINDS[claim] for claim in spec.capabilities if claim in _KINDS)
    registry.factory(name)
    typed = _typed(name, spec.config, options)
    return Choice(name, kind, lambda: registry.create(name, **typed))


def _typed(name: str, config: type | None, options: dict[str, str]) -> dict[str, Any]:
    """Options with values of the types that the driver's configuration declares."""
    if config is None or not options:
        return dict(options)
    converter = cattrs.Converter()
    converter.register_structure_hook(bool, lambda value, _: _TRUTH[value.lower()])
    fields = attrs.fields_dict(attrs.resolve_types(config))
    typed: dict[str, Any] = {}
    for key, value in options.items():
        field = fields.get(key)
        try:
            kind: Any = str if field is None else field.type
            typed[key] = converter.structure(value, kind)
        except (KeyError, TypeError, ValueError) as error:
            wanted = getattr(kind, "__name__", kind)
            raise DriverConfigError(
                f"driver {name!r}, option {key}: expected {wanted}, found {value!r}"
            ) from error
    return typed
