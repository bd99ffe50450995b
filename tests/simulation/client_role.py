"""The client as a simulated process: purchases through the SDK, and what a restart takes up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from simulation.chain_model import Actions
from simulation.medium import Medium, SimJournal
from simulation.shop import (
    CHAIN_ID,
    CHANNELS,
    CLIENT,
    CLIENT_SETTINGS,
    DOMAIN,
    MODELS,
    SCHEDULER,
    Common,
    SimRandom,
    key_hash,
    refusable,
)
from simulation.virtual import SimClock

from gpumarket.core.errors import GpumarketError
from gpumarket.core.terms import Task
from gpumarket.core.units import Address, Hash, Money
from gpumarket.sdk import reports, resuming, store
from gpumarket.sdk.account import Account
from gpumarket.sdk.buying import Purchase
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.hub import Hub, Place
from gpumarket.sdk.ordering import Ask
from gpumarket.sdk.peers import Peers
from gpumarket.sdk.pool import Pool
from gpumarket.sdk.schedulers import Schedulers
from gpumarket.sdk.settings import ClientSettings
from gpumarket.settlement.chain.view import ChainView
from gpumarket.v1 import terms_pb2 as pb


class SimChainPort:
    """`sdk.chain_port.ChainPort` over the simulated chain."""

    chain_id, market_domain, channels_domain = CHAIN_ID, DOMAIN, CHANNELS

    def __init__(self, view: ChainView, actions: Actions) -> None:
        self._view, self._actions = view, actions

    @property
    def nodes(self) -> Mapping[Address, Any]:
        return self._view.nodes

    @property
    def channels(self) -> Mapping[Hash, Any]:
        return self._view.channels

    async def refresh(self) -> None:
        await asyncio.sleep(0.05)

    async def balance(self) -> Money:
        return await self._actions.balance()

    async def faucet(self) -> None:
        raise AssertionError("nobody takes test tokens here")

    async def open_channel(self, label: str, payee: Address, amount: Money, expires_at: int) -> Hash:
        return await self._actions.open_channel(payee, amount, expires_at, label=label)

    async def top_up(self, channel: Hash, amount: Money, expires_at: int) -> None:
        await self._actions.top_up(channel, amount, expires_at)

    async def cooperative_close(self, channel: Hash, cumulative: Money, payee_signature: bytes) -> None:
        await self._actions.cooperative_close(channel, cumulative, payee_signature)

    async def close(self) -> None:
        """Nothing follows."""


@dataclass
class Outcome:
    """How one purchase ended, as its caller sees it."""

    job: Hash | None = None
    error: GpumarketError | None = None
    output: list[bytes] = field(default_factory=list)


class ClientRole:
    """The client's process. `order` starts a purchase; a restart takes up what the last process left."""

    def __init__(self, common: Common, medium: Medium, settings: ClientSettings = CLIENT_SETTINGS) -> None:
        self.common, self.medium, self._settings = common, medium, settings
        self.name = "client"
        self.actions = Actions(common.chain, CLIENT.address)
        self.desk: Desk | None = None
        self.outcomes: list[Outcome] = []
        self.purchases: list[asyncio.Task[None]] = []
        self.start()

    @property
    def alive(self) -> bool:
        return self.process.alive

    def start(self) -> None:
        self.process = self.common.process(self.name)
        self.desk, self.purchases = None, []
        self.process.loop.call_soon(self._begin)

    def order(self, task: Task, sizes: Sequence[int], *, stream_until: int | None = None) -> None:
        """Buy something: texts of these sizes, or `sizes[0]` tokens. The caller leaves after `stream_until` items, if that is set."""
        if self.desk is not None and self.alive:
            purchase = self._buy(self.desk, task, sizes, stream_until)
            self.process.call(lambda: self.purchases.append(self.process.spawn(purchase)))

    def leave(self, index: int) -> None:
        """The caller of a running purchase cancels it."""
        running = [task for task in self.purchases if not task.done()]
        if running:
            self.process.call(running[index % len(running)].cancel)

    def on_desk(self, work: Callable[[Desk], Coroutine[Any, Any, Any]]) -> None:
        """Run something else with the client's parts; a refusal is no defect."""
        if self.desk is not None and self.alive:
            self.process.spawn(refusable(work(self.desk)))

    def _begin(self) -> None:
        common, settings = self.common, self._settings
        view, journal = ChainView(), cast(Any, SimJournal(self.medium, self.process))
        common.chain.follow(self.process, view)
        chain = cast(Any, SimChainPort(view, self.actions))
        clock, chance = SimClock(common.net.timeline), SimRandom(common.rng)

        async def where() -> Place:
            return Place("scheduler:1", key_hash("scheduler:1"))

        hub = Hub(SCHEDULER.address, where, CLIENT, DOMAIN, CHAIN_ID, clock, chance, settings.patience_seconds, settings.busy_seconds)
        account = Account(journal, chain, CLIENT, settings, clock, chance)
        self.desk = Desk(
            settings, CLIENT, chain, journal, account, Schedulers(SCHEDULER.address, lambda _: hub, None), Peers(), clock, chance, Pool()
        )
        self.process.spawn(self._take_up(self.desk))

    async def _take_up(self, desk: Desk) -> None:
        """What the last process left (`opening.open_desk`, `Client.resume_all`), once the chain's view knows our channels again."""
        orphans = desk.journal.read(resuming.orphaned_checks)
        if orphans:
            desk.later(resuming.close_checks(desk, orphans))
        if desk.journal.read(store.waiting_reports):
            desk.later(reports.send_all(desk))
        await self.resume(desk)

    async def resume(self, desk: Desk) -> None:
        """Every interrupted job to its end."""
        for job in desk.journal.read(lambda c: store.job_keys(c, (*store.RUNNING, "delivered"), ("user", "rerun"))):
            try:
                await resuming.resume(desk, job)
            except GpumarketError as error:
                self.outcomes.append(Outcome(job, error))

    async def _buy(self, desk: Desk, task: Task, sizes: Sequence[int], stream_until: int | None) -> None:
        outcome = Outcome()
        self.outcomes.append(outcome)
        purchase = Purchase(desk, ask(task, sizes))
        try:
            stream = purchase.items()
            async for items in stream:
                outcome.output.extend(items)
                if stream_until is not None and len(outcome.output) >= stream_until:
                    break
            await stream.aclose()
            outcome.job = purchase.outcome.job if purchase.outcome else None
        except GpumarketError as error:
            outcome.error = error


def ask(task: Task, sizes: Sequence[int]) -> Ask:
    """A request: embeddings of texts of these lengths, or `sizes[0]` tokens after a prompt of three."""
    model = MODELS[task]
    if task is Task.EMBED:
        body: Any = pb.EmbedRequest(inputs=[pb.TokenList(ids=[index + 1] * size) for index, size in enumerate(sizes)])
        units = output_units = sum(sizes)
    else:
        body = pb.GenerateRequest(prompt=[1, 2, 3], max_tokens=sizes[0], temperature_milli=0, top_p_ppm=1_000_000)
        units, output_units = 3, sizes[0]
    return Ask(
        alias=model.manifest.name,
        model=model.manifest.digest,
        task=task,
        request=body.SerializeToString(deterministic=True),
        units=units,
        output_units=output_units,
        profile=model.profile,
        options={"warnings": [], "max_cost": None},
    )
