"""Reading recorded sequences: JSON lines, plain or compressed with xz."""

from __future__ import annotations

import json
import lzma
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs

from mmunotify.errors import RecordingError

if TYPE_CHECKING:
    from collections.abc import Iterator

Json: TypeAlias = dict[str, Any]

EXCUSES: Final = Path(__file__).with_name("excuses.toml")
"""Operations that need not agree, each with its reason."""


@attrs.frozen
class Operation:
    """What was done, and what the kernel did."""

    index: int
    kind: str
    arguments: Json
    recorded: Json
    alternatives: dict[str, list[Any]]
    """By field: what a second, identical run recorded instead; None where it recorded no change."""

    @property
    def detail(self) -> str:
        """The kind, and the advice or mode if it has one: what a table has one row for."""
        for key in ("adv", "how", "mode"):
            if key in self.arguments and self.kind != "msync":
                return f"{self.kind} {self.arguments[key]}"
        if self.kind in {"touch", "gtouch"}:
            return f"{self.kind} {self.arguments['rw']}"
        return self.kind

    def __str__(self) -> str:
        words = [self.kind, *(f"{key}={value}" for key, value in self.arguments.items())]
        return " ".join(words)


@attrs.frozen
class Sequence:
    """Operations on one fresh process and the children that it forks."""

    id: str
    operations: list[Operation]
    execs: bool
    """Whether the process ends by execve; otherwise it exits."""
    exit_announcements: list[list[Any]]
    """What was announced when it ended."""
    thp: bool
    """Whether transparent huge pages were enabled for the process."""
    guest: bool
    """Whether the process has a KVM guest. What it is told is then among what a child is told."""
    page_limit: int
    """Pages from here on were not looked at."""


@attrs.frozen
class Excuses:
    """Operations that are counted as agreeing whatever the model does, because they say why."""

    rules: list[tuple[Json, str]]

    @classmethod
    def load(cls, path: Path = EXCUSES) -> Excuses:
        """Read a TOML file of [[excuse]] tables: the arguments that match, and a `reason`."""
        rules = []
        for table in tomllib.loads(path.read_text()).get("excuse", []):
            reason = table.pop("reason")
            rules.append((table, reason))
        return cls(rules)

    def reason(self, operation: Operation) -> str | None:
        """Why this operation is excused, or None."""
        facts = {"op": operation.kind, **operation.arguments}
        for match, reason in self.rules:
            if match.items() <= facts.items():
                return reason
        return None


def read_recordings(path: Path) -> Iterator[Sequence]:
    """The sequences of one file, `.jsonl` or `.jsonl.xz`; raises RecordingError."""
    opener = lzma.open if path.suffix == ".xz" else open
    number = 0
    with opener(path, "rt", encoding="utf-8") as lines:
        while True:
            number += 1
            try:
                line = lines.readline()
                if not line:
                    return
                sequence = _sequence(json.loads(line))
            except (KeyError, TypeError, ValueError, EOFError, lzma.LZMAError) as error:
                raise RecordingError(
                    f"{path}:{number}: expected a recorded sequence "
                    f"(id, ops, results, exit_ev): {type(error).__name__}: {error}"
                ) from error
            yield sequence


def _sequence(record: Json) -> Sequence:
    alternatives: dict[int, dict[str, list[Any]]] = {}
    for place, other in record.get("nondet", ()):
        index, field = place.split(".", 1)
        alternatives.setdefault(int(index), {}).setdefault(field, []).append(other)
    ops = record["ops"]
    end = ops.pop() if ops and ops[-1]["op"] == "end" else {}
    operations = []
    for index, (op, result) in enumerate(zip(ops, record["results"], strict=True)):
        arguments = dict(op)
        kind = arguments.pop("op")
        operations.append(Operation(index, kind, arguments, result, alternatives.get(index, {})))
    return Sequence(
        id=record["id"],
        operations=operations,
        execs=end.get("how") == "exec",
        exit_announcements=record["exit_ev"],
        thp=bool(record.get("thp")),
        guest=bool(record.get("guest")),
        page_limit=record.get("pages", 1 << 21),
    )
