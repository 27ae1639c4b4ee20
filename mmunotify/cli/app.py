"""The commands by name, and what an error looks like. A command is imported when it is run."""

from __future__ import annotations

import logging
import sys

import structlog
from cyclopts import App, CycloptsError

import mmunotify
from mmunotify.errors import MmuNotifyError

app = App(
    name="mmunotify",
    help="Linux's MMU notifiers as an async Python framework.",
    help_epilogue="With --debug, anywhere, an error shows its traceback, and the log is written to "
    "standard error.",
    version=mmunotify.__version__,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
)
app.command(
    "mmunotify.cli.drivers:app",
    name="drivers",
    help="Show driver plugins, and whether they can be used.",
)
app.command(
    "mmunotify.cli.explore:explore",
    name="explore",
    help="Run async code under every schedule that matters, or replay one.",
)
app.command(
    "mmunotify.cli.model:app",
    name="model",
    help="Hold the software model to what a kernel did.",
)
app.command(
    "mmunotify.cli.record:record",
    name="record",
    help="Run a command, and record what it does to its memory and what the kernel announces.",
)
app.command(
    "mmunotify.cli.replay:replay",
    name="replay",
    help="Replay recorded programs into the software model, and print what a driver was told.",
)
app.command(
    "mmunotify.cli.trace:app",
    name="trace",
    help="Show what is in a recording, cut it, or make one of what strace or perf has written.",
)
app.command(
    "mmunotify.cli.compare:compare",
    name="compare",
    help="Replay one recorded program in several designs, and print what each costs.",
)


INTERRUPTED = 130
"""The exit status of who was ended by Ctrl-C."""


def run() -> int | str:
    """Run the command line of this process; the exit status, or the line that explains it."""
    words = sys.argv[1:]
    # What follows `--` is somebody else's command line.
    own = words.index("--") if "--" in words else len(words)
    arguments = [word for word in words[:own] if word != "--debug"] + words[own:]
    debug = len(arguments) < len(words)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.DEBUG if debug else logging.CRITICAL
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        status: int | None = app(arguments)
    except KeyboardInterrupt:
        if debug:
            raise
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        if isinstance(error, MmuNotifyError | CycloptsError):
            return f"mmunotify: {error}"
        if isinstance(error, OSError) and error.filename is not None:
            return f"mmunotify: {error.filename}: {error.strerror}"
        return f"mmunotify: {type(error).__name__}: {error} (--debug shows where)"
    return status or 0
