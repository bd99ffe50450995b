"""Disputes between a real challenger and real panel roles over a real contract: who is slashed, who is paid, and by how much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import grpc.aio
import pytest
import pytest_asyncio
from dispute_world import DisputeChain, World, cheap_rows, dispute_chain, dispute_world, honest_rows, place
from reliability import record

from gpumarket.core.codec import signed_call
from gpumarket.core.errors import BadSignature, GpumarketError, ProtocolError
from gpumarket.core.ports import SystemClock, SystemRandom
from gpumarket.core.rpc import from_rpc, load_identity, open_channel
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Address, Hash
from gpumarket.sdk.challenging import Challenger
from gpumarket.sdk.dispute_records import everything
from gpumarket.settlement.chain.dispute_watch import DisputeWatch
from gpumarket.settlement.chain.disputes import DisputeActions
from gpumarket.settlement.chain.reading import Event
from gpumarket.settlement.disputes import NUMBER_MAX, Dispute, Outcome, Payout, Seat, Shares, State, settle, withheld
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1.provider_pb2_grpc import ProviderStub

pytestmark = pytest.mark.asyncio(loop_scope="module")
COMMITTED = (Seat.COMMITTED, Seat.REVEALED)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DisputeChain]:
    with dispute_chain(tmp_path_factory.mktemp("dispute-chain")) as chain:
        yield chain


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def everybody(local: DisputeChain, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with dispute_world(local, tmp_path_factory.mktemp("dispute-world")) as world:
        yield world


@pytest.fixture
def world(everybody: World) -> World:
    everybody.fresh()
    return everybody


def finished(dispute: Dispute) -> bool:
    return dispute.state is State.FINISHED


def drawn(dispute: Dispute) -> bool:
    return dispute.state is State.DRAWN


def committed(count: int) -> Callable[[Dispute], bool]:
    return lambda dispute: sum(m.seat in COMMITTED for m in dispute.members) >= count


async def shares(world: World) -> Shares:
    return (await DisputeActions(world.chain, world.client_actions.sender).terms()).shares


async def expected(world: World, dispute: Dispute) -> Payout:
    """By the arithmetic off chain, from what the members revealed."""
    revealed = {m.operator: m.number for m in dispute.members if m.seat is Seat.REVEALED}
    silent = [m.operator for m in dispute.members if m.seat is not Seat.REVEALED]
    return settle(await shares(world), world.stakes(dispute), dispute.bound, revealed, silent)


class Books:
    """Tokens and stakes before and after."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.people = [world.client.address, *(v.key.address for v in world.verifiers)]

    async def _now(self) -> tuple[dict[Address, int], dict[Address, int]]:
        tokens = {who: await self.world.tokens(who) for who in self.people}
        return tokens, {who: await self.world.staked(who) for who in [self.world.provider.address, *self.people[1:]]}

    async def open(self) -> None:
        self.tokens, self.stakes = await self._now()

    async def agree_with(self, payout: Payout) -> None:
        """Every account and every stake moved by what the payout says, to the last base unit."""
        await self.world.quiet()
        tokens, stakes = await self._now()
        assert {who: tokens[who] - self.tokens[who] for who in tokens} == {who: payout.credited.get(who, 0) for who in tokens}
        lost = {who: self.stakes[who] - stakes[who] for who in stakes}
        assert lost == {who: payout.fees.get(who, 0) for who in stakes} | {self.world.provider.address: payout.taken}


async def end_of(world: World, challenger: Challenger) -> tuple[Dispute, Payout]:
    """To the end, and every base unit where it belongs."""
    books = Books(world)
    await books.open()
    dispute = await world.drive(challenger, finished)
    payout = await expected(world, dispute)
    assert (dispute.outcome, dispute.taken, dispute.burned) == (payout.outcome, payout.taken, payout.burned)
    await books.agree_with(payout)
    return dispute, payout


@pytest.mark.parametrize(
    ("hostile", "outcome", "beyond"),
    [
        pytest.param(0, Outcome.SLASHED, 5, marks=pytest.mark.slow),
        (1, Outcome.SLASHED, 4),
        (2, Outcome.RESTITUTION, 3),
        pytest.param(3, Outcome.DISMISSED, 2, marks=pytest.mark.slow),
    ],
)
async def test_dispute_cheater_before_a_panel_with_hostile_members(world: World, hostile: int, outcome: Outcome, beyond: int) -> None:
    world.lies = dict.fromkeys(range(hostile), 0)
    dispute, payout = await end_of(world, await world.challenge(cheap_rows()))
    assert (dispute.outcome, dispute.beyond, dispute.within) == (outcome, beyond, hostile)
    liars = [m.operator for m in dispute.members[:hostile]]
    assert hostile == 3 or all(payout.credited[liar] == 0 for liar in liars)
    record(f"F53 gross cheater before a panel with {hostile} hostile of 5", 1, dispute.outcome.name.lower(), outcome.name.lower())
    if outcome is not Outcome.DISMISSED:
        assert payout.credited[world.client.address] > dispute.bond
        assert payout.burned * 2 >= payout.taken


@pytest.mark.parametrize("hostile", [pytest.param(0, marks=pytest.mark.slow), 2])
async def test_dispute_honest_provider_keeps_its_stake_and_the_bond_goes_to_the_honest(world: World, hostile: int) -> None:
    world.lies = dict.fromkeys(range(hostile), NUMBER_MAX)
    dispute, payout = await end_of(world, await world.challenge(honest_rows()))
    assert (dispute.outcome, dispute.taken, dispute.within) == (Outcome.DISMISSED, 0, 5 - hostile)
    record(f"F53 honest provider before a panel with {hostile} hostile of 5", 1, f"{dispute.taken} slashed", "0 slashed")
    assert {m.operator: payout.credited[m.operator] for m in dispute.members} == {
        m.operator: 0 if index < hostile else dispute.bond // (5 - hostile) for index, m in enumerate(dispute.members)
    }


async def test_dispute_silent_member_pays_those_who_spoke(world: World) -> None:
    world.silent = {1}
    challenger = await world.challenge(cheap_rows())
    books = Books(world)
    await books.open()
    waiting = await world.drive(challenger, committed(4))
    world.local.pass_time(waiting.commit_until - world.local.now())
    dispute = await world.drive(challenger, finished)
    payout = await expected(world, dispute)
    assert (dispute.outcome, dispute.beyond) == (Outcome.SLASHED, 4)
    assert payout.fees == {dispute.members[1].operator: (await shares(world)).no_show_fee}
    world.silent = set()
    await books.agree_with(payout)


async def test_dispute_member_without_evidence_reads_it_sealed_from_the_chain(world: World) -> None:
    world.deaf = {2}
    challenger = await world.challenge(cheap_rows())
    books = Books(world)
    await books.open()
    waiting = await world.drive(challenger, committed(4))
    world.local.pass_time(waiting.report_until - world.local.now() - 600)
    posted: list[bytes] = []

    def done(dispute: Dispute) -> bool:
        posted.extend(dispute.posted)
        return finished(dispute)

    dispute = await world.drive(challenger, done)
    payout = await expected(world, dispute)
    assert (dispute.outcome, dispute.beyond) == (Outcome.SLASHED, 5)
    assert posted, "the evidence went onto the chain"
    assert not any(world.opening_request in raw for raw in posted), "and nobody else can read it"
    await books.agree_with(payout)
    assert not any(v.records.secrets() for v in world.verifiers)
    hunted = [world.opening_request, challenger.stored.evidence, *cheap_rows()]
    members = [file for file in world.folder.glob("verifier-*") if file.is_file()]
    found = [str(file) for file in members for secret in hunted if secret in file.read_bytes()]
    assert len(members) >= 5 and found == [], "a member keeps a number, never the evidence, however it came (docs/decisions/0006)"
    own = b"".join(file.read_bytes() for file in world.folder.glob("client.db*"))
    assert world.opening_request in own and cheap_rows()[0] in own, "where it is kept, at the challenger, this hunt finds it"
    record("F56 evidence in the files of a panel's members", len(members) * len(hunted), f"{len(found)} hits", "0")


async def test_dispute_challenger_who_shows_nothing_pays_the_panel(world: World) -> None:
    challenger = await world.challenge(cheap_rows())
    books = Books(world)
    await books.open()
    world.deaf = set(range(5))
    waiting = await world.drive(challenger, drawn)  # and then it is gone
    world.local.pass_time(waiting.report_until - world.local.now() - 600)
    waiting = await world.drive(None, lambda d: len(d.missing) == 5)
    world.local.pass_time(waiting.post_until - world.local.now())
    dispute = await world.drive(None, finished)
    payout = withheld(await shares(world), world.stakes(dispute), [m.operator for m in dispute.members])
    assert (dispute.outcome, dispute.burned) == (payout.outcome, payout.burned)
    await books.agree_with(payout)


@pytest.mark.slow
async def test_dispute_evidence_that_opens_nothing_accuses_nobody(world: World) -> None:
    dispute, _ = await end_of(world, await world.challenge(cheap_rows(), evidence=b"trust me"))
    assert (dispute.outcome, dispute.within) == (Outcome.DISMISSED, 5)


@pytest.mark.slow
async def test_dispute_nobody_draws_ends_at_the_cost_of_its_challenger(world: World) -> None:
    challenger = await world.challenge(cheap_rows())
    books = Books(world)
    await books.open()
    world.local.pass_time(3_600)
    dispute = await world.drive(challenger, finished)
    assert (dispute.outcome, dispute.burned) == (Outcome.NOT_DRAWN, dispute.bond)
    await books.agree_with(Payout(Outcome.NOT_DRAWN))


async def test_dispute_members_that_crash_reveal_what_they_committed_to_once(world: World) -> None:
    """Thrown away after the number, after the commit, and after the reveal: nobody judges twice, nobody is fined."""
    challenger = await world.challenge(cheap_rows())
    books = Books(world)
    await books.open()
    world.silent = {0, 1, 2, 3, 4}  # nobody acts: numbers are written as evidence comes
    listening = asyncio.create_task(world.drive(challenger, drawn))
    dispute = await listening
    seats = {v.key.address: v for v in world.verifiers}
    members = [seats[m.operator] for m in dispute.members]
    world.silent = set()
    await world.drive(challenger, lambda d: all(m.records.number(d.id) for m in members))
    written = {m.key.address: m.records.number(dispute.id) for m in members}
    for member in members:
        await world.restart(member)
    await world.drive(challenger, committed(5))
    for member in members:
        await world.restart(member)
    dispute = await world.drive(challenger, finished)
    for member in members:
        await world.restart(member)
    assert {m.operator: m.number for m in dispute.members} == {who: number.number for who, number in written.items() if number}
    assert all(m.judge.judged == 0 for m in members), "what was written is not computed again"
    payout = await expected(world, dispute)
    assert (payout.outcome, payout.fees) == (Outcome.SLASHED, {})
    await books.agree_with(payout)


async def test_dispute_challenger_that_crashes_goes_on_from_its_journal(world: World) -> None:
    challenger = await world.challenge(cheap_rows())
    books = Books(world)
    await books.open()
    for wanted in (drawn, committed(1), committed(5)):
        await world.drive(challenger, wanted)  # which cancels it there
        (stored,) = [s for s in world.client_journal.read(everything) if s.dispute == challenger.stored.dispute]
        challenger = world.challenger(stored)
    dispute = await world.drive(challenger, finished)
    assert dispute.outcome is Outcome.SLASHED
    await books.agree_with(await expected(world, dispute))
    (stored,) = [s for s in world.client_journal.read(everything) if s.dispute == dispute.id]
    assert (stored.outcome, stored.evidence) == ("slashed", b""), "the evidence is erased with the end"


class Forgetful(DisputeWatch):
    """A node that leaves events out, until everything is read again."""

    leaves_out = True

    def _take(self, events: Sequence[Event]) -> None:
        super()._take([] if self.leaves_out else events)

    def forget(self) -> None:
        self.leaves_out = False
        super().forget()


@pytest.mark.slow
async def test_dispute_member_whose_node_leaves_the_draw_out_notices_and_takes_part(world: World) -> None:
    for verifier in world.verifiers:
        verifier.panel._watch = Forgetful(world.chain)
    challenger = await world.challenge(cheap_rows())
    dispute = await world.drive(challenger, drawn)
    for _ in range(3):
        await world.look(dispute)
        world.local.anvil.rpc("anvil_mine", hex(20))
    dispute, payout = await end_of(world, challenger)
    assert (dispute.outcome, payout.fees) == (Outcome.SLASHED, {})
    for verifier in world.verifiers:
        await world.restart(verifier)


async def test_evidence_from_anybody_else_or_of_something_else_refused(world: World) -> None:
    world.silent = set(range(5))
    challenger = await world.challenge(cheap_rows())
    dispute = await world.drive(challenger, drawn)
    member = next(v for v in world.verifiers if v.key.address == dispute.members[0].operator)
    outsider = next(v for v in world.verifiers if place_of(dispute, v.key.address) is None)
    world.fresh()
    await world.look(None)
    evidence = challenger.stored.evidence
    with pytest.raises(BadSignature, match="challenger only"):
        await hand(world, world.scheduler, member.key.address, dispute.id, evidence)
    with pytest.raises(ProtocolError, match="not the evidence"):
        await hand(world, world.client, member.key.address, dispute.id, evidence + b"\0")
    with pytest.raises(ProtocolError, match="sits on no panel"):
        await hand(world, world.client, outsider.key.address, dispute.id, evidence)
    with pytest.raises(ProtocolError, match="sits on no panel"):
        await hand(world, world.client, member.key.address, Hash(keccak256(b"no dispute")), evidence)
    assert (await world.drive(challenger, finished)).outcome is Outcome.SLASHED
    with pytest.raises(ProtocolError, match="sits on no panel"):
        await hand(world, world.client, outsider.key.address, dispute.id, evidence)
    await hand(world, world.client, member.key.address, dispute.id, evidence)  # again, after the end: it has its number


def place_of(dispute: Dispute, who: Address) -> int | None:
    return place(dispute, who) if dispute.member(who) else None


async def hand(world: World, caller: LocalKey, member: Address, dispute: Hash, evidence: bytes) -> None:
    """One TakeEvidence call. Raises what the member answers."""
    endpoint = next(v.endpoint for v in world.verifiers if v.key.address == member)
    channel = await open_channel(endpoint, load_identity(world.folder).key_hash)
    body = ppb.PanelEvidence(dispute=dispute, evidence=evidence)
    call = signed_call(
        caller, world.chain.market_domain, "Provider/TakeEvidence", body, member, SystemClock().now(), Hash(SystemRandom().token(32))
    )
    try:
        await ProviderStub(channel).TakeEvidence(call, timeout=60)
    except grpc.aio.AioRpcError as error:
        raised: GpumarketError = from_rpc(error, "the member")
        raise raised from error
    finally:
        await channel.close(None)
