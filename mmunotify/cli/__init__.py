"""The `mmunotify` command: what it needs beyond the core is the extra `cli`."""

from __future__ import annotations


def main() -> int | str:
    """Run the command line of this process; the exit status, or the line that explains it."""
    try:
        from .app import run
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("mmunotify"):
            raise
        return f"mmunotify: the command line needs {error.name}: pip install 'mmunotify[cli]'"
    return run()
