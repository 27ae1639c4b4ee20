"""What type checkers say about the files in cases/ is what the comments there expect.

line  # E: mypy's error code / basedpyright's rule
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CASES = Path(__file__).parent / "cases"
EXPECTED = re.compile(r"# E: (?P<mypy>[\w-]+) / (?P<basedpyright>\w+)$")


def expected(checker: str) -> set[tuple[str, int, str]]:
    """File, line and error of every mark."""
    return {
        (path.name, number, mark[checker])
        for path in CASES.glob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (mark := EXPECTED.search(line))
    }


def output(*command: str) -> str:
    """What a checker prints when it is run as in the root of the repository."""
    done = subprocess.run(
        [sys.executable, "-m", *command, *map(str, CASES.glob("*.py"))],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_the_marks_are_seen() -> None:
    """Else nothing would be expected, and nothing found."""
    for checker in ("mypy", "basedpyright"):
        assert {name for name, _, _ in expected(checker)} == {"refused.py"}


def test_mypy() -> None:
    """Errors where they are expected, of the kind that is expected, and nowhere else."""
    lines = map(json.loads, output("mypy", "--output=json").splitlines())
    found = {(Path(line["file"]).name, line["line"], line["code"]) for line in lines}
    assert found == expected("mypy")


def test_basedpyright() -> None:
    """The same of the other checker."""
    command = ("basedpyright", "--outputjson", "--pythonpath", sys.executable)
    report = json.loads(output(*command))["generalDiagnostics"]
    found = {
        (Path(entry["file"]).name, entry["range"]["start"]["line"] + 1, entry["rule"])
        for entry in report
    }
    assert found == expected("basedpyright")
