"""What `import mmunotify` costs, where nothing is installed but the core and its dependencies."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

from ._bench import Row, at_most

ROOT = Path(__file__).parent.parent
OURS = "import mmunotify"
THEIRS = "import anyio, attrs, structlog"


def nanoseconds(python: Path, statement: str) -> int:
    """How long a statement takes in a fresh process, its start not counted."""
    clock = "from time import perf_counter_ns as now; began = now()"
    code = f"{clock}; {statement}; print(now() - began)"
    return int(subprocess.check_output([python, "-I", "-c", code]))


def run() -> list[Row]:
    with TemporaryDirectory() as home:
        venv.create(home, with_pip=False)
        python = Path(home, "bin", "python")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", str(ROOT)]
        subprocess.run(pip, check=True)
        rounds = [(nanoseconds(python, OURS), nanoseconds(python, THEIRS)) for _ in range(30)]
    ours, theirs = map(min, zip(*rounds, strict=True))
    return [at_most(OURS, ours / theirs, 1.1, THEIRS)]
