"""A logger that says nothing: explored schedules are many, and each may log."""

from __future__ import annotations

import logging

import structlog

SILENT = structlog.wrap_logger(
    structlog.PrintLogger(), wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
)
