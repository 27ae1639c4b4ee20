"""What the documents say is run: code blocks as programs, examples, and make targets by name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "plugins/*/README.md")
    for path in ROOT.glob(pattern)
)
PROGRAMS = [name for name in DOCUMENTS if "```python\n" in (ROOT / name).read_text()]
EXAMPLES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*.py"))


def program(document: str) -> str:
    """The python blocks of a document, each at its own line numbers."""
    lines, inside = [], False
    for line in document.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return "\n".join(lines) + "\n"


def run(path: Path, cwd: Path) -> None:
    """Run a program in a process of its own, where a warning is an error as in any test."""
    command = [sys.executable, "-W", "error", str(path)]
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_code_in_documents_runs(name: str, tmp_path: Path) -> None:
    """The blocks of one document are one program, in the order in which they are read."""
    path = tmp_path / f"{Path(name).stem}.py"
    path.write_text(program((ROOT / name).read_text()))
    run(path, tmp_path)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path) -> None:
    """From any directory; what they write goes to the current one."""
    run(ROOT / name, tmp_path)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_make_targets_exist(name: str) -> None:
    """A document points at files that are there, and at targets that the Makefile has."""
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    missing = [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing
    used = re.findall(r"(?:^ {4}|`)make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    assert {target for targets in used for target in targets.split()} <= targets


def test_blocks_keep_their_line_numbers() -> None:
    """So that a traceback points into the document."""
    document = "text\n```python\na = 1\n```\n```sh\nrm\n```\n```python\nb = 2\n```\n"
    assert program(document) == "\n\na = 1\n\n\n\n\n\nb = 2\n\n"
