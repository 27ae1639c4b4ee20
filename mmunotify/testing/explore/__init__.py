"""The interleaving explorer: run an async program under every schedule.

    from mmunotify.testing.explore import explore

    async def scenario():
        ...                     # plain anyio code: tasks, locks, deadlines, and what must hold

    explore(scenario).check()   # raises ExplorationFailed with the schedule that fails, if any

The tasks of the scenario run on an event loop of anyio's kind whose scheduler is a choice, and the
choices are tried one after the other.
"""

from __future__ import annotations

from .exploration import Exploration as Exploration
from .exploration import Failure as Failure
from .explore import explore as explore
from .hooks import always as always
from .hooks import choose as choose
from .hooks import exploring as exploring
from .hooks import fault_point as fault_point
from .hooks import touches as touches
from .network import Endpoint as Endpoint
from .network import Network as Network
from .strategies import DFS as DFS
from .strategies import PCT as PCT
from .strategies import Drawn as Drawn
from .strategies import Hypothesis as Hypothesis
from .strategies import Random as Random
from .strategies import Replay as Replay
from .strategies import SleepSets as SleepSets
from .strategies import Strategy as Strategy
