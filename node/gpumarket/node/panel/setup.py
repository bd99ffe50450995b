"""The panel role of a provider daemon, put together. Brings web3.

A provider that neither wants a seat nor has one does without the role; whoever wants none any more serves the panels it was drawn for.
"""

from __future__ import annotations

from gpumarket.contracts.deploy import ZERO_ADDRESS as NOWHERE
from gpumarket.core.ports import Clock, Random
from gpumarket.node.engines import Engines
from gpumarket.node.panel.enrolment import Enrolment
from gpumarket.node.panel.judging import Judge
from gpumarket.node.panel.member import Panel
from gpumarket.node.panel.records import PanelRecords
from gpumarket.settlement.chain import Actions
from gpumarket.settlement.chain.dispute_watch import DisputeWatch
from gpumarket.settlement.chain.disputes import DisputeActions
from gpumarket.settlement.journal import Journal


async def open_panel(actions: Actions, journal: Journal, engines: Engines, clock: Clock, random: Random, *, wanted: bool) -> Panel | None:
    """The role, its seat in order; None where there is nothing to do. Registration with the verifier's role comes first."""
    if actions.chain.book.disputes == NOWHERE:
        return None
    chain = DisputeActions(actions.chain, actions.sender)
    me, models = actions.sender.address, list(engines.seats)
    seat = await chain.seat(me)
    if not wanted and not seat.models and not seat.panels:
        return None
    records = PanelRecords(journal)
    enrolment = Enrolment(me, chain, random, models if wanted else ())
    await enrolment.reconcile(models)
    return Panel(
        me,
        DisputeWatch(actions.chain),
        chain,
        Judge(actions.chain.market_domain, engines),
        records,
        (await chain.terms()).rules,
        clock,
        random,
        on_home=lambda: enrolment.reconcile(models),
        look_seconds=actions.chain.settings.poll_seconds,
    )
