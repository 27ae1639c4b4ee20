"""The command: found, started when everything else is ready, waited for with all that it made."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import warnings
from typing import TYPE_CHECKING, Final

from mmunotify.errors import RecorderError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PR_SET_CHILD_SUBREAPER: Final = 36
_libc: Final = ctypes.CDLL(None, use_errno=True)


def find(name: str) -> str:
    """The file that a command's name means. Raises RecorderError if there is none to run."""
    found = shutil.which(name)
    if found is not None:
        return found
    if os.path.isfile(name):
        raise RecorderError(f"{name}: expected a program, found a file that is not executable")
    raise RecorderError(f"{name}: expected a program, found none of that name")


class Command:
    """A process that waits to become the command, and what is left of it later.

    Processes that lose their parent become children of this one, so that all can be waited for.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self.path: Final = find(words[0])
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        told, tell = os.pipe2(os.O_CLOEXEC)
        failed, self._failure = os.pipe2(os.O_CLOEXEC)
        with warnings.catch_warnings():
            # Of other threads: between fork and execve the child asks for none of their locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid: Final = os.fork()
        if not self.pid:
            _become(self.path, words, environment, told, tell, self._failure)
        os.close(told)
        os.close(self._failure)
        self._tell, self._failed = tell, failed
        self.status: int | None = None
        """The exit status of the command, as a shell shows it; None while it runs."""
        self._let_go = False
        self.exits: int | None = os.pidfd_open(self.pid)
        """A descriptor that can be read when the command has ended; None when that is known."""
        self.usage = [0.0] * 4
        """Of all that has ended: minor and major faults, seconds in user mode and in the kernel."""

    def start(self) -> None:
        """Let it go. Raises RecorderError if it cannot be run after all."""
        self._let_go = True
        os.write(self._tell, b"g")
        os.close(self._tell)
        code = os.read(self._failed, 16)
        os.close(self._failed)
        if code:
            # Until then it has everything open that this process has.
            os.waitpid(self.pid, 0)
            raise RecorderError(f"{self.path}: cannot be run: {os.strerror(int(code))}")

    def abandon(self) -> None:
        """End it if it has not been let go."""
        if not self._let_go:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.status is None:
            os.kill(self.pid, number)

    def reap(self) -> bool:
        """Take note of all that has ended; whether anything still runs."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if not pid:
                return True
            for index, amount in enumerate(
                (usage.ru_minflt, usage.ru_majflt, usage.ru_utime, usage.ru_stime)
            ):
                self.usage[index] += amount
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code
                if self.exits is not None:
                    os.close(self.exits)
                    self.exits = None


def _become(
    path: str,
    words: Sequence[str],
    environment: Mapping[str, str],
    told: int,
    tell: int,
    failure: int,
) -> None:
    """In the child: wait for the word, and run the program. Does not return."""
    try:
        os.close(tell)
        if os.read(told, 1):
            # Python ignores these, and what is ignored stays so.
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os.execve(path, list(words), dict(environment))
    except OSError as error:
        os.write(failure, str(error.errno).encode())
    finally:
        os._exit(127)
