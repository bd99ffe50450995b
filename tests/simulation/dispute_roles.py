"""The parties of disputes as simulated processes: members with the product's panel role, a challenger with the product's `pursue`.

What is scripted: the engine's rows, the number that a hostile member stands for, whom a hostile challenger shows nothing. The order, lease
and receipt in dispute are signed by their parties as if the job had run.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from dispute_kit import DOMAIN
from numpy.typing import NDArray
from simulation.dispute_chain import Account, Blocks
from simulation.medium import Medium, SimJournal
from simulation.shop import CHAIN_ID, MODELS, SimEngine, SimRandom, key_hash
from simulation.virtual import Process, SimClock
from simulation.wire import Network

from gpumarket.core.codec import CallGuard
from gpumarket.core.errors import GpumarketError, Unreachable
from gpumarket.core.rpc import abort
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import Task, keccak256
from gpumarket.core.units import Address, Hash
from gpumarket.node.engine.base import Engine, GenerateRequest, Segment
from gpumarket.node.engines import Engines, Seat
from gpumarket.node.panel.judging import Judge
from gpumarket.node.panel.member import Panel
from gpumarket.node.panel.records import PanelRecords
from gpumarket.sdk import dispute_records
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.dispute_records import StoredDispute
from gpumarket.sdk.disputes import pursue
from gpumarket.sdk.peers import Peers
from gpumarket.settlement.disputes import Dispute, Rules
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1 import terms_pb2 as pb

LOOK_SECONDS = 20.0
"""How often a member looks at the chain: a block comes every 5 s, and the shortest window is several times as long."""
TRY_AGAIN_SECONDS = 20.0
Lies = Callable[[Dispute, Address], int | None]


class LyingJudge(Judge):
    """Stands for what `lies` says instead of what was computed, where it says something."""

    def __init__(self, engines: Engines, lies: Lies, me: Address) -> None:
        super().__init__(DOMAIN, engines)
        self._lies, self._me = lies, me

    async def number(self, dispute: Dispute, evidence: bytes) -> int:
        number = await super().number(dispute, evidence)
        lie = self._lies(dispute, self._me)
        return number if lie is None else lie


class MemberRole:
    """A provider that may sit on panels, or stand accused."""

    def __init__(self, net: Network, blocks: Blocks, rng: random.Random, index: int, medium: Medium, lies: Lies) -> None:
        self.key = LocalKey(keccak256(b"sim verifier %d" % index))
        self.name, self.endpoint = f"member {index}", f"member-{index}:1"
        self.medium = medium
        self.ties: Callable[[int], NDArray[np.float32]] = lambda tokens: np.zeros(tokens, dtype=np.float32)
        """The gaps that its decoder finds for an honest text of so many tokens."""
        self._net, self._blocks, self._rng, self._lies = net, blocks, rng, lies
        self.start()

    def start(self) -> None:
        """A new process over what the medium and the chain say."""
        self.process = Process(self._net.timeline, self.name)
        self.process.loop.call_soon(self._begin)

    def _begin(self) -> None:
        clock, random_ = SimClock(self._net.timeline), SimRandom(self._rng)
        seats = {m.manifest.digest: Seat(m, partial(self._engine, task), 16, clock) for task, m in MODELS.items()}
        judge = LyingJudge(Engines(seats), self._lies, self.key.address)
        records = PanelRecords(cast(Any, SimJournal(self.medium, self.process)))
        account = Account(self._blocks, self.key.address)
        self.panel = Panel(
            self.key.address,
            self._blocks.watch(self.key.address),
            account,
            judge,
            records,
            _rules(self._blocks),
            clock,
            random_,
            on_home=_nothing_left,
            look_seconds=LOOK_SECONDS,
        )
        self.process.services["gpumarket.v1.Provider"] = _Evidence(self.panel, CallGuard(DOMAIN, self.key.address, clock))
        self._net.listen(self.endpoint, self.process)
        self.process.spawn(self.panel.run())

    def _engine(self, task: Task) -> Engine:
        return cast(Engine, _Decoder(task, self.ties, self._rng))


class _Decoder(SimEngine):
    """Finds the gaps that it is told."""

    def __init__(self, task: Task, ties: Callable[[int], NDArray[np.float32]], rng: random.Random) -> None:
        super().__init__(task, cheats=False, rng=rng)
        self._ties = ties

    async def replay(self, request: GenerateRequest, output: Sequence[int], segments: Sequence[Segment] = ()) -> NDArray[np.float32]:
        await self._work()
        return self._ties(len(output))


class _Evidence:
    """`Provider.TakeEvidence`, as the daemon's service has it."""

    def __init__(self, panel: Panel, guard: CallGuard) -> None:
        self._panel, self._guard = panel, guard

    async def TakeEvidence(self, request: pb.SignedCall, context: Any) -> ppb.EvidenceTaken:
        try:
            caller, body = self._guard.open("Provider/TakeEvidence", request, ppb.PanelEvidence)
            await self._panel.take(caller, Hash(body.dispute), body.evidence)
        except GpumarketError as error:
            await abort(context, error)
        return ppb.EvidenceTaken()


class ChallengerRole:
    """The client that disputes. `posts`: what it seals on chain for those who miss the evidence: "sealed", "rubbish" or "nothing"."""

    def __init__(self, net: Network, blocks: Blocks, rng: random.Random, key: LocalKey, medium: Medium, members: list[MemberRole]) -> None:
        self.name, self.key, self.medium, self.posts = "challenger", key, medium, "sealed"
        self._net, self._blocks, self._rng, self._members = net, blocks, rng, members
        self.start()

    def start(self) -> None:
        """A new process: it takes up every dispute that its journal says is not over."""
        self.process = Process(self._net.timeline, self.name)
        self.process.loop.call_soon(self._begin)

    def challenge(self, opening: mpb.Opening, dispute: Hash) -> None:
        """Write a dispute down, as `disputes.open_dispute` does once it has looked at the job, and see it through."""
        raw = opening.SerializeToString(deterministic=True)
        stored = StoredDispute(dispute, dispute, Hash(self._rng.randbytes(32)), raw, "", 0)
        if self.process.alive:
            self.process.call(lambda: self.process.spawn(self._write_and_pursue(stored)) and None)

    def _begin(self) -> None:
        self._journal = SimJournal(self.medium, self.process)
        self._desk = self._make_desk()
        for stored in self._journal.read(dispute_records.everything):
            if not stored.outcome:
                self.process.spawn(self._pursue(stored.job))

    async def _write_and_pursue(self, stored: StoredDispute) -> None:
        await self._journal.transact(lambda c: dispute_records.add(c, stored))
        await self._pursue(stored.job)

    async def _pursue(self, job: Hash) -> None:
        """As often as it takes: a caller runs `gpumarket dispute open` again when it failed."""
        while True:
            try:
                await pursue(self._desk, job, wait=True, on_change=None)
                return
            except GpumarketError:
                await asyncio.sleep(TRY_AGAIN_SECONDS)

    def _make_desk(self) -> Desk:
        account = _Withholding(self._blocks, self.key.address, self)
        chain = _ChainPort(self._members, SimpleNamespace(actions=account, watch=self._blocks.watch(self.key.address)))
        parts: Any = dict.fromkeys(("settings", "account", "schedulers"))
        clock, random_ = SimClock(self._net.timeline), SimRandom(self._rng)
        return Desk(
            **parts, signer=self.key, chain=cast(Any, chain), journal=cast(Any, self._journal), peers=Peers(), clock=clock, random=random_
        )


class _Withholding(Account):
    """Posts what its role says."""

    def __init__(self, blocks: Blocks, me: Address, role: ChallengerRole) -> None:
        super().__init__(blocks, me)
        self._role = role

    async def post_evidence(self, dispute: Hash, sealed: bytes) -> Any:
        if self._role.posts == "nothing":
            raise Unreachable("it keeps the evidence to itself")
        return await super().post_evidence(dispute, sealed if self._role.posts == "sealed" else b"rubbish")


class _ChainPort:
    """`sdk.chain_port.ChainPort` and `HasDisputes`, as far as a dispute asks."""

    chain_id, market_domain = CHAIN_ID, DOMAIN

    def __init__(self, members: list[MemberRole], port: Any) -> None:
        self.nodes = {m.key.address: SimpleNamespace(endpoint=m.endpoint, tls_key_hash=key_hash(m.endpoint)) for m in members}
        self._port = port

    def disputes(self, key: LocalKey, journal: Any) -> Any:
        return self._port


def _rules(blocks: Blocks) -> Rules:
    terms = blocks.contract.terms
    return Rules(terms.report_seconds, terms.reveal_seconds, terms.challenge_seconds)


async def _nothing_left() -> None:
    """The seat needs nothing."""
