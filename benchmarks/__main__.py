"""`python -m benchmarks [NAME...]`: run benchmarks, print their rows, store them in results/."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from ._bench import Row

HERE = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("[!_]*.py"))


def show(rows: list[Row]) -> None:
    width = max(len(row.name) for row in rows)
    for row in rows:
        verdict = {True: "ok", False: "NOT OK", None: ""}[row.ok]
        value = "-" if row.value is None else f"{row.value:.3g}"
        unit = "" if row.unit == "ratio" else f" {row.unit}"
        print(
            f"  {row.name:{width}}  {value:>8}{unit}  {row.limit:8} {verdict:6} "
            f" against {row.against}{f' ({row.reason})' if row.reason else ''}"
        )


def main(arguments: list[str]) -> int:
    wanted = arguments or names()
    unknown = sorted(set(wanted) - set(names()))
    if unknown:
        print(f"no benchmark {', '.join(unknown)}: expected some of {', '.join(names())}")
        return 2
    failed = 0
    for name in wanted:
        print(name, flush=True)
        rows: list[Row] = import_module(f"benchmarks.{name}").run()
        show(rows)
        failed += sum(row.ok is False for row in rows)
        results = HERE / "results" / f"{name}.json"
        results.parent.mkdir(exist_ok=True)
        results.write_text(json.dumps([attrs.asdict(row) for row in rows], indent=1) + "\n")
    if failed:
        print(f"{failed} not within its limit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
