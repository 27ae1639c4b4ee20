"""Linux's MMU notifiers as an async Python framework.

Whoever keeps a second copy of an address translation (a shadow page table, a device's TLB, another
host's mapping, a registration cache) must drop it before the page behind it is freed. A driver
(`AtomicDriver`, `SleepableDriver`, `DeferredDriver`) registers at the `Notifiers` of an address
space, which tell it of every change before it happens.
"""

from __future__ import annotations

from ._version import __version__ as __version__
from .audience import Audience as Audience
from .audience import Subscription as Subscription
from .device import Device as Device
from .drivers import AnyDriver as AnyDriver
from .drivers import AtomicDriver as AtomicDriver
from .drivers import DeferredDriver as DeferredDriver
from .drivers import SleepableDriver as SleepableDriver
from .errors import AddressSpaceExited as AddressSpaceExited
from .errors import AlreadyRegistered as AlreadyRegistered
from .errors import BadAddress as BadAddress
from .errors import BrokenInvalidate as BrokenInvalidate
from .errors import CallbackHung as CallbackHung
from .errors import CalledFromCallback as CalledFromCallback
from .errors import DriverConfigError as DriverConfigError
from .errors import DriverConflict as DriverConflict
from .errors import DriverError as DriverError
from .errors import DriverIncompatible as DriverIncompatible
from .errors import DriverLoadError as DriverLoadError
from .errors import DriverNotFound as DriverNotFound
from .errors import ForeignThread as ForeignThread
from .errors import Interrupted as Interrupted
from .errors import LockdepViolation as LockdepViolation
from .errors import LockError as LockError
from .errors import MmuNotifyError as MmuNotifyError
from .errors import NotifierError as NotifierError
from .errors import NotRegistered as NotRegistered
from .errors import PluginError as PluginError
from .errors import RangeError as RangeError
from .errors import ScheduleWhileAtomic as ScheduleWhileAtomic
from .errors import SpinlockHeld as SpinlockHeld
from .errors import StaleTranslation as StaleTranslation
from .errors import UnknownCallback as UnknownCallback
from .errors import WouldBlock as WouldBlock
from .errors import WrongColour as WrongColour
from .intervals import AtomicInterval as AtomicInterval
from .intervals import IntervalNotifier as IntervalNotifier
from .intervals import IntervalStatistics as IntervalStatistics
from .intervals import SleepableInterval as SleepableInterval
from .locks import SRCU as SRCU
from .locks import LockModel as LockModel
from .locks import RWSemaphore as RWSemaphore
from .locks import RwSems as RwSems
from .locks import SeqCount as SeqCount
from .locks import SpinLock as SpinLock
from .locks import SpinLocks as SpinLocks
from .log import Log as Log
from .log import Record as Record
from .log import Ring as Ring
from .log import define_event as define_event
from .notifiers import Notifiers as Notifiers
from .notifiers import NotifiersStatistics as NotifiersStatistics
from .plugins import API_VERSION as API_VERSION
from .plugins import Candidate as Candidate
from .plugins import Capability as Capability
from .plugins import DriverSpec as DriverSpec
from .plugins import PluginState as PluginState
from .plugins import Registry as Registry
from .primary import Pin as Pin
from .primary import Primary as Primary
from .primary import Region as Region
from .primary import Translation as Translation
from .primary import Translations as Translations
from .ranges import ADDRESS_END as ADDRESS_END
from .ranges import PAGE_SHIFT as PAGE_SHIFT
from .ranges import PAGE_SIZE as PAGE_SIZE
from .ranges import PMD_SHIFT as PMD_SHIFT
from .ranges import PMD_SIZE as PMD_SIZE
from .ranges import ULONG_MAX as ULONG_MAX
from .ranges import Event as Event
from .ranges import Range as Range
from .sections import AtomicSection as AtomicSection
from .sections import NonblockSection as NonblockSection
from .sections import Section as Section
