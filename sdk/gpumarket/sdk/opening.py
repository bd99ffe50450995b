"""Open a client: its folder, its books, its chain, the scheduler that it chose. What is opened here, the stack closes, last first."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial

from gpumarket.core.daemon import StateFolder
from gpumarket.core.ports import Clock, Random
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Address
from gpumarket.sdk import choosing, reports, resuming, store
from gpumarket.sdk.account import Account
from gpumarket.sdk.chain_port import ChainPort
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.funding import connect, funding_of, owner_journal
from gpumarket.sdk.hub import Hub
from gpumarket.sdk.logs import log_to_stderr
from gpumarket.sdk.peers import Peers
from gpumarket.sdk.pool import Pool, observations
from gpumarket.sdk.schedulers import Schedulers
from gpumarket.sdk.settings import ClientSettings
from gpumarket.sdk.tables import METADATA
from gpumarket.settlement.journal import Journal
from gpumarket.telemetry.tracing import from_environment


async def open_desk(
    stack: AsyncExitStack,
    settings: ClientSettings,
    chain_settings: ChainSettings,
    key: LocalKey,
    clock: Clock,
    random: Random,
    *,
    owner_key: LocalKey | None = None,
    chain: ChainPort | None = None,
) -> Desk:
    """The client's parts. `owner_key`: for deposits and closes where the settings name an owner; `chain` replaces a connection of its own.

    Raises ConfigError, StateLocked, JournalError or ChainError, with what was opened left to the stack.
    """
    log_to_stderr()
    tracing = from_environment("client")
    stack.push_async_callback(asyncio.to_thread, tracing.close)
    state = stack.enter_context(StateFolder(settings.state))
    journal = Journal(f"sqlite:///{(state / 'journal.db').resolve()}", METADATA)
    journal.open()
    stack.push_async_callback(journal.close)
    funding = funding_of(settings, key, owner_key)
    paying = journal
    if funding.key is not None and funding.payer != key.address:
        paying = owner_journal(state, funding.payer)
        stack.push_async_callback(paying.close)
    chain = chain or await connect(chain_settings, key.address, funding, funding.key or key, paying)
    stack.push_async_callback(chain.close)

    def hub_to(address: Address, patience: float) -> Hub:
        where = partial(choosing.locate, chain, address)
        return Hub(address, where, key, chain.market_domain, chain.chain_id, clock, random, patience, settings.busy_seconds)

    named = settings.scheduler_address
    chosen = named or await choosing.choose(chain, hub_to)
    another = partial(choosing.choose, chain, hub_to) if named is None else None
    schedulers, peers = Schedulers(chosen, lambda address: hub_to(address, settings.patience_seconds), another), Peers()
    stack.push_async_callback(schedulers.close)
    stack.push_async_callback(peers.close)
    account = Account(journal, chain, key, settings, clock, random, funding=funding)
    pool = Pool.of(journal.read(observations))
    desk = Desk(settings, key, chain, journal, account, schedulers, peers, clock, random, pool, tracing)
    stack.push_async_callback(desk.settle)
    await _tidy(desk)
    return desk


async def _tidy(desk: Desk) -> None:
    """What an earlier process left: old outputs to erase, checks to close, reports to send."""
    before = desk.clock.now() - desk.settings.keep_output_days * store.DAY_SECONDS
    await desk.journal.transact(lambda c: store.prune(c, before))
    orphans = desk.journal.read(resuming.orphaned_checks)
    if orphans:
        desk.later(resuming.close_checks(desk, orphans))
    if desk.journal.read(store.waiting_reports):
        desk.later(reports.send_all(desk))
