"""The demo: a market with three honest providers and a cheater, real jobs from advert to settled payment, and the proof that it all holds.

This process never imports torch: models run in the providers' engines.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gpumarket.core import keystore
from gpumarket.core.codec import from_proto, open_receipt, parse
from gpumarket.core.errors import BadSignature, GpumarketError, WrongChain, WrongPassword
from gpumarket.core.settings import ChainSettings, load
from gpumarket.core.terms import Lease, Task
from gpumarket.core.units import Address, Hash, Money
from gpumarket.node.tables import SETTLED
from gpumarket.sdk import Client
from gpumarket.sdk.settings import ClientSettings
from gpumarket.settlement.chain import Chain, connect
from gpumarket.testnet import chain_facts, invariants, ledgers, passages, plan, story
from gpumarket.testnet.demo_report import DemoReport, JobLine, ReceiptLine, Seconds, VerificationLine, WalletLine
from gpumarket.testnet.evidence import Evidence
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import CLIENT, SCHEDULER
from gpumarket.v1 import terms_pb2 as pb

CHEATER = "cheater"
SETTLE_SECONDS = 90.0
"""Longest wait for held claims (check time is 60 s) and for the redemptions' blocks."""
_POLL_SECONDS = 0.25
_ASK_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What to read, what to ask, and where the testnet lies (a temporary folder by default, removed unless `keep`)."""

    file: Path | None = None
    question: str = passages.DEFAULT_QUESTION
    folder: Path | None = None
    keep: bool = False


async def run(options: DemoOptions, say: Callable[[str], None]) -> DemoReport:
    """The whole demonstration. Raises what fails; what merely does not hold is in `DemoReport.problems`."""
    texts = passages.paragraphs(passages.read_document(options.file))
    folder = options.folder or Path(tempfile.mkdtemp(prefix="gpumarket-demo-"))
    # Warm: the text's provider and its checker load side by side, while set-up waits for blocks (measured on 2 busy cores: 73 s to 55 s).
    sellers = (*plan.honest(3, text=2, warm=True), plan.cheater(CHEATER))
    network = Network(folder, plan.Plan(sellers, client={"check_probability": 1.0}), say)
    try:
        return await Demo(network, texts, options.question, say).run()
    finally:
        if not options.keep and options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
        elif options.keep:
            say(f"the testnet's folder is {folder}")


class Demo:
    """One run over one network."""

    def __init__(self, network: Network, texts: list[str], question: str, say: Callable[[str], None]) -> None:
        self.network, self.texts, self.question, self.say = network, texts, question, say
        self.started = time.monotonic()

    async def run(self) -> DemoReport:
        async with self.network:
            up = self._elapsed()
            self.say(f"everything is up after {up:.1f} s")
            config = self.network.client_config
            chain = await connect(load(ChainSettings, file=config, env={}))
            try:
                before = await self._balances(chain)
                async with Client(load(ClientSettings, file=config, env={}), load(ChainSettings, file=config, env={})) as market:
                    told = await story.tell(market, self.texts, self.question, self._address(CHEATER), self.say)
                    await self._decide()
                    await market.close_channel()  # at what was used: the scheduler is credited that, the rest of the deposit comes back
                await self._redeem(chain)
                return await self._report(chain, told, up, before)
            finally:
                await chain.close()

    async def _decide(self) -> None:
        """Wait until every claim is owed, rejected or closed."""
        self.say("waiting until every claim is decided")
        await self._until(self._decided, "claims are still open")

    async def _redeem(self, chain: Chain) -> None:
        """Have every payee redeem what it holds, and wait for the chain to say so."""
        self.say("redeeming every voucher")
        asked = 0.0

        async def redeemed() -> bool:
            nonlocal asked
            if time.monotonic() - asked > _ASK_SECONDS:  # again, for a payee whose view was some blocks behind
                asked = time.monotonic()
                for name in self.network.names():
                    self.network.processes.signal(name, signal.SIGUSR1)
            return await self._redeemed(chain)

        await self._until(redeemed, "vouchers are not redeemed yet")

    async def _decided(self) -> bool:
        books = [ledgers.provider_books(self.network.folder.state(name)) for name in self._providers()]
        return all(row.state in SETTLED for book in books for row in book.attempts)

    async def _redeemed(self, chain: Chain) -> bool:
        facts = await chain_facts.read_facts(chain)
        owed = {Hash(row.channel): row.cumulative for name in self._providers() for row in self._provider_books(name).vouchers}
        owed |= {Hash(row.id): row.used for row in self._scheduler_books().client_channels}
        return not facts.credited and all(facts.channels[channel].claimed >= amount for channel, amount in owed.items())

    async def _until(self, condition: Callable[[], Any], otherwise: str) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS
        while not await condition():
            if time.monotonic() > deadline:
                raise GpumarketError(f"after {SETTLE_SECONDS:.0f} s {otherwise}", hint="run it again with --keep and look at the logs")
            await asyncio.sleep(_POLL_SECONDS)

    async def _report(self, chain: Chain, told: story.Story, up: float, before: dict[str, Money]) -> DemoReport:
        self.say("checking the invariants")
        facts = await chain_facts.read_facts(chain)
        client = ledgers.client_books(self.network.folder.state(CLIENT))
        told.refusals |= await self._probe(chain, facts)
        found = invariants.check_all(self._scene(chain, facts, client, told))
        after = await self._balances(chain)
        cheater = self._address(CHEATER)
        verifications = _verifications(client)
        return DemoReport(
            jobs=_jobs(client, told),
            receipts=_receipts(chain, client),
            verifications=verifications,
            settlements=facts.settlements,
            cheater=cheater,
            caught=any(line.provider == cheater and line.verdict == "rejected" for line in verifications),
            paid_to_cheater=Money(sum(s.amount for s in facts.settlements if s.payee == cheater)),
            question=self.question,
            answer=told.answer,
            text=told.text,
            invariants=found,
            seconds=Seconds(round(up, 2), round(told.first_result - self.started, 2), round(self._elapsed(), 2)),
            wallets=tuple(WalletLine(n, self._address(n), before[n], after[n]) for n in before),
            gas=facts.gas,
            names={key.address: name for name, key in self.network.wallets.items()},
        )

    def _scene(self, chain: Chain, facts: chain_facts.ChainFacts, client: ledgers.ClientBooks, told: story.Story) -> invariants.Scene:
        pids = [role.process.pid for role in self.network.processes.roles.values()]
        family = [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]
        secrets = [text[:48].encode() for text in (*self.texts, self.question, story.PROMPT)]
        secrets += [file.read_bytes().strip() for file in self.network.folder.keys.glob("*.password")]
        secrets += [key.secret.hex().encode() for key in self.network.wallets.values()]
        books = Evidence(
            domain=chain.market_domain,
            channels_domain=chain.channels_domain,
            chain=facts,
            schedulers={SCHEDULER: self._scheduler_books()},
            providers={name: self._provider_books(name) for name in self._providers()},
            clients={CLIENT: client},
            exposure={CLIENT: load(ClientSettings, file=self.network.client_config, env={}).exposure_limit},
        )
        return invariants.Scene(
            books=books,
            secrets=secrets,
            places=invariants.log_places(self.network.folder.logs) + invariants.process_places([*pids, *family]),
            processes=len(pids) + len(family),
            refusals=told.refusals,
        )

    async def _probe(self, chain: Chain, facts: chain_facts.ChainFacts) -> dict[str, bool]:
        """What must be refused outside the SDK: a forged voucher, a stranger's chain, a wrong password."""
        from web3.exceptions import ContractLogicError

        async def forged() -> None:
            channel = next(iter(facts.channels.values()))
            signature = self.network.wallets[CHEATER].sign_digest(bytes(32))
            await chain.channels.functions.redeem(channel.id, channel.deposit, signature).call()

        async def other_chain() -> None:
            book = type(chain.book)(**{**vars(chain.book), "chain_id": chain.book.chain_id + 1})
            await book.verify(chain.w3)

        async def wrong_password() -> None:
            keystore.load(self.network.folder.keys / f"{CLIENT}.json", "not the password")

        refused = {}
        for name, probe in {"a forged voucher": forged, "another chain": other_chain, "a wrong password": wrong_password}.items():
            try:
                await probe()
            except (ContractLogicError, BadSignature, WrongChain, WrongPassword):
                refused[name] = True
            else:
                refused[name] = False
        return refused

    async def _balances(self, chain: Chain) -> dict[str, Money]:
        return {name: await chain_facts.balance(chain, key.address) for name, key in self.network.wallets.items()}

    def _providers(self) -> list[str]:
        return [name for name in self.network.names() if name != SCHEDULER]

    def _provider_books(self, name: str) -> ledgers.ProviderBooks:
        return ledgers.provider_books(self.network.folder.state(name))

    def _scheduler_books(self) -> ledgers.SchedulerBooks:
        return ledgers.scheduler_books(self.network.folder.state(SCHEDULER))

    def _address(self, name: str) -> Address:
        return self.network.wallets[name].address

    def _elapsed(self) -> float:
        return time.monotonic() - self.started


def _jobs(client: ledgers.ClientBooks, told: story.Story) -> tuple[JobLine, ...]:
    providers = _last_providers(client)
    rows = sorted(client.jobs, key=lambda row: row.created_at)
    return tuple(
        JobLine(
            id=Hash(row.job),
            task=Task(row.task).name.lower(),
            model=row.alias,
            provider=providers.get(row.job),
            state=row.state,
            amount=row.billed,
            attempts=row.attempt,
            purpose=row.purpose,
            why=told.why.get(Hash(row.job), ""),
        )
        for row in rows
    )


def _last_providers(client: ledgers.ClientBooks) -> dict[bytes, Address]:
    return {row.job: Address(row.provider) for row in sorted(client.attempts, key=lambda row: row.number)}


def _receipts(chain: Chain, client: ledgers.ClientBooks) -> tuple[ReceiptLine, ...]:
    lines = []
    for row in client.attempts:
        if not row.receipt:
            continue
        lease = from_proto(Lease, parse(pb.SignedLease, row.lease).lease)
        try:
            valid = open_receipt(chain.market_domain, parse(pb.SignedReceipt, row.receipt), lease.provider).lease == lease.struct_hash
        except GpumarketError:
            valid = False
        lines.append(ReceiptLine(Hash(row.job), valid))
    return tuple(lines)


def _verifications(client: ledgers.ClientBooks) -> tuple[VerificationLine, ...]:
    providers = _last_providers(client)
    judged = [row for row in client.jobs if row.verdict and row.job in providers and (row.purpose != "check" or row.verdict == "rejected")]
    return tuple(
        VerificationLine(Hash(row.job), providers[row.job], row.verdict, str(json.loads(row.verdict_json).get("reason", "")))
        for row in judged
    )
