"""The watch over disputes: whatever the chain takes back, what is seen equals what a clean read sees."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from reliability import record

from gpumarket.core.errors import ChainError
from gpumarket.core.terms import keccak256
from gpumarket.settlement.chain import dispute_watch
from gpumarket.settlement.chain.dispute_watch import DisputeWatch
from gpumarket.settlement.chain.reading import Checkpoint, Event, MovedUnderfoot

SEEDS = 200


@dataclass
class Block:
    hash: bytes
    events: tuple[Event, ...] = ()


@dataclass
class Settings:
    rpc_url: str = "http://127.0.0.1:0"
    confirmations: int = 2


@dataclass
class Book:
    deployed_block: int = 3


@dataclass
class Chain:
    """Blocks that a test makes and takes back; also the reader of them."""

    blocks: list[Block] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)
    book: Book = field(default_factory=Book)
    made: int = 0
    moves: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)

    @property
    def w3(self) -> Any:
        return self

    @property
    def eth(self) -> Any:
        return self

    @property
    def block_number(self) -> Awaitable[int]:
        async def number() -> int:
            return len(self.blocks) - 1

        return number()

    async def hash(self, number: int) -> bytes | None:
        return self.blocks[number].hash if number < len(self.blocks) else None

    async def read(self, start: int, end: int, cursor: Checkpoint | None) -> tuple[list[Event], Checkpoint]:
        if self.moves:
            self.moves -= 1
            raise MovedUnderfoot
        assert cursor is None or self.blocks[cursor.number].hash == cursor.hash
        self.ranges.append((start, end))
        found = [event for block in self.blocks[start : end + 1] for event in block.events]
        return found, Checkpoint(end, self.blocks[end].hash)

    def mine(self, *events: Event) -> None:
        self.made += 1
        self.blocks.append(Block(keccak256(b"%d" % self.made), events))


def event(block: int, name: str, number: int, **args: Any) -> Event:
    return Event("0x", block, name, {"id": keccak256(b"dispute %d" % number), **args})


def challenged(block: int, number: int) -> Event:
    address, word = "0x" + "11" * 20, bytes(32)
    facts: dict[str, Any] = {"provider": address, "challenger": address, "model": word, "task": 3, "evidenceHash": word, "slashable": True}
    return event(block, "Challenged", number, **facts, bound=1, amount=1, locked=1, bond=1, drawBlock=1, drawUntil=1)


def drawn(block: int, number: int) -> Event:
    members = ["0x" + f"{n:02x}" * 20 for n in range(1, 6)]
    return event(block, "PanelDrawn", number, members=members, reportUntil=block, postUntil=block, commitUntil=block)


async def watch_of(chain: Any) -> DisputeWatch:
    watch = DisputeWatch(chain, chain)
    await watch.sync()
    return watch


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispute_watch, "BLOCKS_PER_QUERY", 4)


async def test_watch_after_any_reorganisation_equals_one_that_begins_anew() -> None:
    for seed in range(SEEDS):
        random, chain = Random(seed), Chain()
        for _ in range(8):
            chain.mine()
        watch = await watch_of(chain)
        alive: list[int] = []
        for step in range(12):
            if random.random() < 0.4:
                del chain.blocks[max(3, len(chain.blocks) - random.randrange(1, 9)) :]
                known = {e.args["id"] for block in chain.blocks for e in block.events}
                alive = [number for number in alive if keccak256(b"dispute %d" % number) in known]
            for _ in range(random.randrange(0, 5)):
                at = len(chain.blocks)
                if alive and random.random() < 0.5:
                    chain.mine(drawn(at, random.choice(alive)), event(at, "Enrolled", 0))
                else:
                    alive.append(100 * step + random.randrange(100))
                    chain.mine(challenged(at, alive[-1]))
            await watch.sync()
            again = await watch_of(chain)
            if watch.block <= len(chain.blocks) - 1 - chain.settings.confirmations:
                assert (watch.disputes, watch.block) == (again.disputes, again.block), f"seed {seed}, step {step}"
    record("F32 disputes after reorganisations", SEEDS * 12, "0 differences from a clean read", "0")


async def test_watch_stays_behind_the_head_and_reads_in_ranges() -> None:
    chain = Chain()
    for number in range(15):
        chain.mine(challenged(number, number))
    watch = await watch_of(chain)
    assert chain.ranges == [(3, 6), (7, 10), (11, 12)]
    assert (watch.block, len(watch.disputes)) == (12, 10)


async def test_watch_while_the_chain_keeps_moving_gives_up_for_now_and_goes_on_later() -> None:
    chain = Chain(moves=dispute_watch.READS_MAX)
    for number in range(8):
        chain.mine(challenged(number, number))
    watch = await watch_of(chain)
    assert (watch.block, watch.disputes) == (-1, {})
    await watch.sync()
    assert watch.block == 5


async def test_watch_of_an_event_whose_challenge_was_left_out_takes_nothing_of_the_range() -> None:
    chain = Chain()
    for _ in range(6):
        chain.mine()
    watch = await watch_of(chain)
    for at in (6, 7):
        chain.mine(challenged(at, 1) if at == 6 else drawn(at, 2))
    for _ in range(2):
        chain.mine()
    with pytest.raises(ChainError, match="never opened"):
        await watch.sync()
    assert (watch.disputes, watch.block) == ({}, 3)
