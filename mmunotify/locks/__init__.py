"""The locks that sections run under: spinlocks, rwsems, SRCU, sequence counts, and their order.

None of them suspends, or makes anything of the event loop's, before there is contention. Made while
`lockdep.enabled`, they check how they are used.
"""

from __future__ import annotations

from . import lockdep as lockdep
from .models import LockModel as LockModel
from .models import RmapLock as RmapLock
from .models import RwSems as RwSems
from .models import SpinLocks as SpinLocks
from .rwsem import RWSemaphore as RWSemaphore
from .rwsem import RWSemaphoreStatistics as RWSemaphoreStatistics
from .seqcount import SeqCount as SeqCount
from .seqcount import SeqCountStatistics as SeqCountStatistics
from .spinlock import SpinLock as SpinLock
from .spinlock import SpinLockStatistics as SpinLockStatistics
from .spinlock import SpinRWLock as SpinRWLock
from .srcu import SRCU as SRCU
from .srcu import SRCUReadSection as SRCUReadSection
from .srcu import SRCUStatistics as SRCUStatistics
from .take_all import Flagged as Flagged
from .take_all import MmBarrier as MmBarrier
from .take_all import SortedArray as SortedArray
from .take_all import StopMachine as StopMachine
from .take_all import TakeAll as TakeAll
