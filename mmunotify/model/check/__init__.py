"""Is the model what the kernel is? Recorded kernel sequences are replayed into it and compared.

A recording has one JSON object per line: operations on an area of 8 GiB, and after each of them
what a Linux 6.18 answered, announced and mapped. `recordings` reads them, `harness` does the
operations to a machine set up like the one that was recorded, `observe` looks at the outcome in
the terms of a recording, `compare` finds the disagreements, and `report` counts and prints them.
"""

from __future__ import annotations

from .compare import Disagreement as Disagreement
from .compare import Verdict as Verdict
from .compare import check_sequence as check_sequence
from .guest import Guest as Guest
from .guest_driver import GuestDriver as GuestDriver
from .recordings import Excuses as Excuses
from .recordings import Sequence as Sequence
from .recordings import read_recordings as read_recordings
from .report import Report as Report
from .report import summary as summary
