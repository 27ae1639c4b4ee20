"""Linux's MMU notifiers as an async Python framework."""

from __future__ import annotations

from ._version import __version__ as __version__
