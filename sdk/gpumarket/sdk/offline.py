"""The client's journal without a market: for what needs no network, the day's cap and the guard's export among it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gpumarket.core.daemon import StateFolder
from gpumarket.sdk.settings import ClientSettings
from gpumarket.sdk.tables import METADATA
from gpumarket.settlement.journal import Journal


@asynccontextmanager
async def journal_of(settings: ClientSettings) -> AsyncIterator[Journal]:
    """The journal, open; made where there is none. Raises StateLocked while another process works on it, JournalError."""
    with StateFolder(settings.state) as state:
        journal = Journal(f"sqlite:///{(state / 'journal.db').resolve()}", METADATA)
        journal.open()
        try:
            yield journal
        finally:
            await journal.close()
