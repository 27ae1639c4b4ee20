"""Every exception of mmunotify, one tree.

MmuNotifyError
├── RangeError (ValueError)            a range that no address space can have
├── LockError (RuntimeError)           a lock used in a way that a kernel would hang on
│   ├── SpinlockHeld                   a spinlock was found held
│   ├── LockNotHeld                    released or asserted, but not held
│   ├── ScheduleWhileAtomic            something suspended where it must not
│   └── LockdepViolation               the order of locks can deadlock, or did
│       ├── LockOrderViolation
│       └── LockRecursion
├── NotifierError (RuntimeError)       a subscription used against its contract
│   ├── AlreadyRegistered
│   ├── NotRegistered
│   ├── AddressSpaceExited             mm_users has reached zero
│   ├── CalledFromCallback             would wait for the callback that it was called from
│   ├── CallbackHung                   a callback outlived the grace that its owner gave it
│   └── ForeignThread                  called from a thread that is not the event loop's
├── DriverError (TypeError)            a driver class that breaks the callback contract
│   ├── WrongColour                    a coroutine where a plain function is due, or the reverse
│   ├── UnknownCallback                a callback that nobody would ever call
│   └── BrokenInvalidate               an interval's invalidate that did not do what it must
├── WouldBlock (BlockingIOError)       -EAGAIN: a non-blockable section met who must sleep
├── Interrupted (InterruptedError)     -EINTR: a signal came while taking many locks
├── TooManyVmas                        -ENOMEM: more VMAs than the cap on taking all their locks
├── ExplorerError                      what the interleaving explorer has to say
│   ├── ExplorationFailed (AssertionError)  a schedule was found that fails
│   ├── Deadlock                       nothing can run, nothing will ever wake anybody
│   ├── Livelock                       steps without end and without progress
│   ├── InvariantViolated (AssertionError)  what must hold after every step did not
│   ├── Nondeterminism                 one schedule, run twice, went two ways
│   ├── BadExploration (ValueError)    a scenario or an option that cannot be explored
│   ├── ScheduleMismatch (ValueError)  a schedule string that does not fit the scenario
│   ├── NotExplorable (RuntimeError)   threads, sockets, processes, foreign event loops
│   └── FaultInjected                  a fault point was told to fail
├── RecordingError (ValueError)        a file does not hold a recording
├── RecorderError (RuntimeError)       a program cannot be recorded, or not in this way
└── PluginError                        a driver plugin cannot be used
    ├── DriverNotFound (LookupError)   nobody installed offers a driver of that name
    ├── DriverConflict                 several distributions offer one name
    ├── DriverLoadError                the spec or the factory is broken, or not what it says
    ├── DriverIncompatible             made for another version of the callback contract
    └── DriverConfigError (ValueError) an option that the driver does not have, or a bad value
"""

from __future__ import annotations

import errno


class MmuNotifyError(Exception):
    """What every exception raised by mmunotify has as its base."""


class RangeError(MmuNotifyError, ValueError):
    """A range is empty, negative, or ends beyond 2**64."""


class LockError(MmuNotifyError, RuntimeError):
    """A lock was used in a way that would hang or corrupt a kernel."""


class SpinlockHeld(LockError):
    """A spinlock was found held: its holder suspended, or this is recursion.

    In one thread nobody else can be about to release it, so waiting would never end.
    """


class LockNotHeld(LockError):
    """A lock was released, downgraded or asserted by somebody who does not hold it."""


class ScheduleWhileAtomic(LockError):
    """The event loop ran, or would have to run, inside a section that must not suspend."""


class LockdepViolation(LockError):
    """Lockdep saw an order of locks that can deadlock; the message shows both chains."""


class LockOrderViolation(LockdepViolation):
    """Two locks (or classes of locks) were taken in both orders."""


class LockRecursion(LockdepViolation):
    """A task took a lock, or a class of locks, that it already holds."""


class NotifierError(MmuNotifyError, RuntimeError):
    """A subscription was used against its contract."""


class AlreadyRegistered(NotifierError):
    """The driver instance already serves an address space."""


class NotRegistered(NotifierError):
    """The subscription was never registered here, or has been unregistered."""


class AddressSpaceExited(NotifierError):
    """The address space has exited (mm_users is 0); nobody can register any more."""


class CalledFromCallback(NotifierError):
    """Called from a driver's callback, it would wait for that very callback to return."""


class CallbackHung(NotifierError):
    """A callback was still running when the grace period that its owner allowed was over."""


class ForeignThread(NotifierError):
    """Called from a thread that does not run the event loop; `post` is the thread-safe entry."""


class DriverError(MmuNotifyError, TypeError):
    """A driver class breaks the callback contract."""


class WrongColour(DriverError):
    """A callback is a coroutine where a plain function is due, or the other way round."""


class UnknownCallback(DriverError):
    """A driver defines what looks like a callback, but nobody would ever call it."""


class BrokenInvalidate(DriverError):
    """An interval's `invalidate` refused where nobody may, or did not call `set_seq`."""


class MmError(MmuNotifyError, OSError):
    """What a system call of the model returns as -errno: what was asked, what was found."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(number, what)


class BadAddress(MmuNotifyError, OSError):
    """-EFAULT: the access is one for which the process itself would get a signal.

    `signal` is "SEGV" or "BUS", `code` its si_code (SEGV: 1 nothing is mapped, 2 not permitted;
    BUS: 2 beyond the end of the file), `address` the byte that was accessed.
    """

    def __init__(self, what: str, *, signal: str = "SEGV", code: int = 1, address: int = 0) -> None:
        super().__init__(errno.EFAULT, what)
        self.signal = signal
        self.code = code
        self.address = address


class StaleTranslation(MmuNotifyError):
    """A translation outlived its frame: somebody missed an invalidation (I-FREE)."""


class WouldBlock(MmuNotifyError, BlockingIOError):
    """-EAGAIN: a section that must not suspend met a driver that has to."""


class Interrupted(MmuNotifyError, InterruptedError):
    """-EINTR: a signal came while many locks were being taken; none of them is held."""


class TooManyVmas(MmuNotifyError):
    """-ENOMEM: an address space has more VMAs than the cap on taking all their locks allows."""


class ExplorerError(MmuNotifyError):
    """The interleaving explorer has found something, or cannot go on."""


class ExplorationFailed(ExplorerError, AssertionError):
    """A schedule was found that fails; the message is the whole report."""


class Deadlock(ExplorerError):
    """Nothing can run and no timer is pending; the message says who waits for what."""


class Livelock(ExplorerError):
    """Many steps went by in which no task was woken, started or finished."""


class InvariantViolated(ExplorerError, AssertionError):
    """A condition that has to hold after every step did not."""


class Nondeterminism(ExplorerError):
    """The same schedule, run twice, did not do the same: the scenario has a hidden input."""


class BadExploration(ExplorerError, ValueError):
    """Something that is no scenario, or an option with a value that it cannot have."""


class ScheduleMismatch(ExplorerError, ValueError):
    """A schedule string is malformed, or belongs to another scenario or other options."""


class NotExplorable(ExplorerError, RuntimeError):
    """The code under test asked for what an explored run cannot give: a thread, a socket."""


class FaultInjected(ExplorerError):
    """A fault point failed because the schedule said so."""


class RecordingError(MmuNotifyError, ValueError):
    """A file does not hold the recording that it should."""


class RecorderError(MmuNotifyError, RuntimeError):
    """A program cannot be recorded, or a kernel does not offer what that would take."""


class PluginError(MmuNotifyError):
    """A driver plugin cannot be used."""


class DriverNotFound(PluginError, LookupError):
    """No installed distribution offers a driver of that name, or the allow-list leaves it out."""


class DriverConflict(PluginError):
    """Several installed distributions offer a driver of one name; uninstall all but one."""


class DriverLoadError(PluginError):
    """A plugin's spec or factory cannot be imported, or is not what the spec says.

    What the plugin raised, if it did, is the `__cause__`.
    """


class DriverIncompatible(PluginError):
    """A plugin was made for a version of the callback contract that this core does not speak.

    `wants` and `have` are (major, minor): majors must be equal, and `wants` may not be newer.
    `hint` is a command that helps.
    """

    def __init__(
        self,
        name: str,
        distribution: str,
        wants: tuple[int, int],
        have: tuple[int, int],
        hint: str,
    ) -> None:
        super().__init__(name, distribution, wants, have, hint)
        self.name = name
        self.distribution = distribution
        self.wants = wants
        self.have = have
        self.hint = hint

    def __str__(self) -> str:
        wants, have = (".".join(map(str, version)) for version in (self.wants, self.have))
        return (
            f"driver {self.name!r} of {self.distribution} wants driver API {wants}, "
            f"this mmunotify has {have}: {self.hint}"
        )


class DriverConfigError(PluginError, ValueError):
    """A driver was asked for with an option that it does not have, or with a bad value."""
