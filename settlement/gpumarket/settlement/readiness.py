"""Checks of a daemon's readiness that both roles share: chain view and journal. Each answers what is wrong, in words for a stranger."""

from __future__ import annotations

import asyncio

import structlog
from sqlalchemy import literal, select
from sqlalchemy.exc import SQLAlchemyError

from gpumarket.core.errors import Busy
from gpumarket.settlement.chain.view import ChainView
from gpumarket.settlement.journal import Journal

_log = structlog.get_logger()


async def chain_trouble(view: ChainView) -> str:
    """The rule by which new work is refused."""
    return "the view is too old or too doubtful for new work; the log says why" if view.trouble else ""


async def journal_trouble(journal: Journal) -> str:
    """A real query of one of its tables, off the event loop, and the room that new work needs. Raises JournalError."""
    query = select(literal(1)).select_from(journal.metadata.sorted_tables[0]).limit(1)
    try:
        await asyncio.to_thread(journal.read, lambda connection: connection.execute(query).all())
        journal.require_space()
    except SQLAlchemyError as error:
        _log.warning("journal_unreadable", reason=type(error).__name__)
        return f"it cannot be read ({type(error).__name__}); the log says more"
    except Busy:
        return "the disk has too little room for new work"
    return ""
