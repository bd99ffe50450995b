"""Where a library says what went wrong beside its answers: to whatever logging its program set up, else to stderr."""

from __future__ import annotations

import logging
import sys

import structlog

log = structlog.get_logger()


def log_to_stderr() -> None:
    """Warnings to stderr, where the program has not said otherwise: a library must not write between its user's output."""
    if not structlog.is_configured():
        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
            logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # the one of the moment: a program may put another in its place
        )
