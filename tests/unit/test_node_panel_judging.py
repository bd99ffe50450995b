"""A judge's number: of what the challenge committed to, by its own engine; what shows nothing accuses nobody, what breaks judges nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dispute_kit import DOMAIN, Deal
from node_fixtures import FixedClock, ScriptedEngine, on_sale

from gpumarket.core.errors import EngineFailed, ProtocolError, TransactionFailed, UnknownModel
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import Task, keccak256
from gpumarket.core.units import Address, Hash
from gpumarket.node.engines import Engines, Seat
from gpumarket.node.panel.enrolment import Enrolment
from gpumarket.node.panel.judging import Judge
from gpumarket.node.panel.pacing import Pacing
from gpumarket.settlement.disputes import NUMBER_MAX, Dispute, Step
from gpumarket.settlement.verification import EMBED_FP32
from gpumarket.v1 import market_pb2 as mpb

CLIENT, SCHEDULER, PROVIDER = (LocalKey(bytes([i]) * 32) for i in range(1, 4))
ME = Address(b"\x09" * 20)
MODEL = on_sale(Task.EMBED)
DEAL = Deal(CLIENT, SCHEDULER, PROVIDER, MODEL.manifest.digest)
INPUTS = [[1, 2, 3], [4, 5]]
ROWS = [np.array([len(ids), ids[0], 0.5], dtype="<f4").tobytes() for ids in INPUTS]


def opening(rows: list[bytes] = ROWS) -> mpb.Opening:
    return DEAL.embed(INPUTS, rows)


def dispute_about(evidence: bytes, of: mpb.Opening | None = None) -> Dispute:
    from gpumarket.core.codec import from_proto
    from gpumarket.core.terms import Lease

    lease = from_proto(Lease, (of or opening()).lease.lease)
    key, other = Address(b"\x05" * 20), Address(b"\x06" * 20)
    return Dispute(
        lease.struct_hash, other, key, lease.model, lease.task, EMBED_FP32.max_abs_diff_nano, 1, 1, 1, 1, 1, True, keccak256(evidence)
    )


def judge(engine: ScriptedEngine | None = None, *, queue: int = 4) -> Judge:
    seat = Seat(MODEL, lambda: engine or ScriptedEngine("embed"), queue, FixedClock())
    return Judge(DOMAIN, Engines({MODEL.manifest.digest: seat}))


async def test_judge_honest_result_is_in_order_and_a_cheap_one_is_not() -> None:
    raw = opening().SerializeToString()
    assert await judge().number(dispute_about(raw), raw) == 0
    cheap = [(np.frombuffer(row, dtype="<f4") + np.float32(0.001)).tobytes() for row in ROWS]
    bad = opening(cheap).SerializeToString()
    assert await judge().number(dispute_about(bad), bad) == pytest.approx(1_000_000, rel=0.01)


async def test_judge_rows_of_another_size_are_beyond_everything() -> None:
    short = opening([row[:4] for row in ROWS]).SerializeToString()
    assert await judge().number(dispute_about(short), short) == NUMBER_MAX


async def test_judge_other_bytes_than_the_challenge_committed_to_refused() -> None:
    raw = opening().SerializeToString()
    with pytest.raises(ProtocolError, match="not the evidence"):
        await judge().number(dispute_about(raw), raw + b"\0")


def spoiled(change: Callable[[mpb.Opening], Any]) -> bytes:
    found = opening([row[::-1] for row in ROWS])  # as wrong as can be: only the evidence's own faults may save the provider
    change(found)
    return found.SerializeToString()


@pytest.mark.parametrize(
    "evidence",
    [
        b"",
        b"\xff\xff",
        spoiled(lambda o: o.output.pop()),
        spoiled(lambda o: setattr(o, "request", o.request + b"\0")),
        spoiled(lambda o: setattr(o, "salt", o.salt[:31])),
        spoiled(lambda o: setattr(o.receipt.receipt, "output_units", 1)),
        spoiled(lambda o: setattr(o.receipt, "signature", o.lease.signature)),
        spoiled(lambda o: setattr(o.lease.lease, "attempt", 2)),
        Deal(CLIENT, SCHEDULER, PROVIDER, MODEL.manifest.digest)
        .embed(INPUTS, [r[::-1] for r in ROWS], name=b"another")
        .SerializeToString(),
    ],
)
async def test_judge_evidence_that_does_not_open_what_was_signed_shows_nothing(evidence: bytes) -> None:
    assert await judge().number(dispute_about(evidence), evidence) == 0


async def test_judge_salt_that_takes_bytes_from_the_request_shows_nothing() -> None:
    """sha256(salt | request) is the same for the cut one byte later; what is asked then is something else."""
    found = opening([row[::-1] for row in ROWS])
    found.salt, found.request = found.salt + found.request[:1], found.request[1:]
    raw = found.SerializeToString()
    assert await judge().number(dispute_about(raw, found), raw) == 0


@pytest.mark.parametrize(("seed", "expected"), [(None, NUMBER_MAX), (7, 0)])
async def test_judge_text_drawn_from_its_clients_own_seed_shows_nothing(seed: int | None, expected: int) -> None:
    """The text is longer than the model takes, which no honest provider signs for: with a seed of the client's not even that accuses."""
    text = on_sale(Task.GENERATE)
    tokens = [9] * (text.manifest.max_input_tokens + 1)
    found = Deal(CLIENT, SCHEDULER, PROVIDER, text.manifest.digest).text([1, 2, 3], tokens, client_seed=seed)
    raw = found.SerializeToString()
    seat = Seat(text, lambda: ScriptedEngine("generate"), 4, FixedClock())
    assert await Judge(DOMAIN, Engines({text.manifest.digest: seat})).number(dispute_about(raw, found), raw) == expected


async def test_judge_broken_engine_gives_no_number() -> None:
    engine = ScriptedEngine("embed")
    engine.alive = False
    raw = opening().SerializeToString()
    with pytest.raises(EngineFailed):
        await judge(engine).number(dispute_about(raw), raw)


async def test_judge_model_that_is_not_here_any_more_gives_no_number() -> None:
    raw = opening().SerializeToString()
    with pytest.raises(UnknownModel):
        await Judge(DOMAIN, Engines({})).number(dispute_about(raw), raw)


# --- the seat ------------------------------------------------------------------------------------------------------------------


class Seats:
    """The contract's lists, for one operator with so much free stake."""

    seat_stake = 100

    def __init__(self, free: int, *enrolled: Hash, locked: int = 0) -> None:
        self.free, self.lists, self.locked, self.models = free, set(enrolled), locked, len(enrolled)
        self.keys: list[bytes] = []

    async def terms(self) -> Seats:
        return self

    async def seat(self, operator: Address) -> Seats:
        return self

    async def enrolled(self, model: Hash, operator: Address) -> bool:
        return model in self.lists

    async def enrol(self, model: Hash, evidence_key: bytes) -> None:
        if self.free < self.seat_stake - self.locked:
            raise TransactionFailed("InsufficientStake")
        self.free, self.locked = self.free - (self.seat_stake - self.locked), self.seat_stake
        self.lists.add(model)
        self.keys.append(evidence_key)

    async def leave(self, model: Hash) -> None:
        self.lists.remove(model)

    async def top_up_seat(self) -> None:
        self.locked = self.seat_stake


class Counted:
    """core.ports.Random that never repeats."""

    def __init__(self) -> None:
        self.count = 0

    def token(self, size: int) -> bytes:
        self.count += 1
        return keccak256(self.count.to_bytes(8, "big"))[:size]


FIRST, SECOND = Hash(keccak256(b"first")), Hash(keccak256(b"second"))


async def test_enrolment_takes_a_seat_for_every_model_and_leaves_what_is_not_wanted() -> None:
    chain = Seats(1_000, SECOND)
    await Enrolment(ME, chain, Counted(), [FIRST]).reconcile([FIRST, SECOND])
    assert (chain.lists, chain.locked) == ({FIRST}, 100)
    assert len(chain.keys) == 1 and any(chain.keys[0])
    await Enrolment(ME, chain, Counted(), []).reconcile([FIRST, SECOND])
    assert chain.lists == set()


async def test_enrolment_tops_a_seat_up_after_a_fee() -> None:
    chain = Seats(1_000, FIRST, locked=95)
    await Enrolment(ME, chain, Counted(), [FIRST]).reconcile([FIRST])
    assert chain.locked == 100


async def test_enrolment_without_the_stake_is_said_and_the_provider_sells_on(capsys: pytest.CaptureFixture[str]) -> None:
    chain = Seats(10)
    await Enrolment(ME, chain, Counted(), [FIRST]).reconcile([FIRST])
    assert chain.lists == set()
    assert "raise the setting stake" in capsys.readouterr().out


# --- pacing --------------------------------------------------------------------------------------------------------------------


def test_pacing_waits_for_the_block_and_longer_after_each_failure() -> None:
    clock = FixedClock()
    pacing = Pacing(clock)
    assert pacing.due(FIRST, Step.COMMIT, 5)
    pacing.done(FIRST, Step.COMMIT, 7)
    assert not pacing.due(FIRST, Step.COMMIT, 6)
    assert pacing.due(FIRST, Step.COMMIT, 7)
    assert pacing.due(FIRST, Step.REVEAL, 6)
    for pause in (1, 2, 4):
        pacing.failed(SECOND, Step.FINISH)
        clock.at += pause - 0.5
        assert not pacing.due(SECOND, Step.FINISH, 9)
        clock.at += 0.5
        assert pacing.due(SECOND, Step.FINISH, 9)
    for _ in range(100):
        pacing.failed(SECOND, Step.FINISH)
    clock.at += 60
    assert pacing.due(SECOND, Step.FINISH, 9)


def test_dispute_equality_sees_every_change() -> None:
    dispute = dispute_about(b"x")
    assert dispute != replace(dispute, bond=2)
