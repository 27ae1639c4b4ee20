"""Which schedules are tried, and in what order. A strategy lives across executions."""

from __future__ import annotations

from .base import Strategy as Strategy
from .dfs import DFS as DFS
from .drawn import Drawn as Drawn
from .drawn import Hypothesis as Hypothesis
from .pct import PCT as PCT
from .random import Random as Random
from .replay import Replay as Replay
from .sleep_sets import SleepSets as SleepSets
