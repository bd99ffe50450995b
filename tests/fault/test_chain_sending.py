"""Transactions through crashes, outages, drops, gaps, spikes and lies: each intent once, each nonce one intent, nothing forgotten.

The kill tests run the sender in a process of its own that is killed with SIGKILL between the journal and the broadcast, and after it.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from chain_proxy import ChainProxy, Cut, RpcError, always
from reliability import record
from settlement_chain import LocalChain, account, chain_journal, until

from gpumarket.core.errors import ChainError, InconsistentChain, TransactionFailed, WrongChain
from gpumarket.settlement.chain import Chain, Sender, connect, outbox
from gpumarket.settlement.journal import Journal

KEY = account(3)
GWEI = 10**9
VICTIM = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from settlement_chain import account, chain_journal
from gpumarket.core.settings import ChainSettings
from gpumarket.settlement.chain import Sender, connect
from gpumarket.settlement.chain.mempool import Mempool

async def main(book, url, journal, when, label):
    real = Mempool.offer
    async def offer(self, transaction):
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        await real(self, transaction)
        os.kill(os.getpid(), signal.SIGKILL)
    Mempool.offer = offer
    chain = await connect(ChainSettings(rpc_url=url, address_book=Path(book), confirmations=0, poll_seconds=0.02))
    key = account(3)
    call = chain.token.functions.faucet(chain.w3.to_checksum_address(key.address))
    await Sender(chain, key, chain_journal(Path(journal))).send(label, call, once=True)

asyncio.run(main(*sys.argv[2:]))
"""


@pytest.fixture
def proxy(local: LocalChain) -> Iterator[ChainProxy]:
    with ChainProxy(local.anvil.url) as running:
        yield running


@pytest.fixture
async def chain(local: LocalChain, proxy: ChainProxy) -> AsyncIterator[Chain]:
    connected = await connect(local.settings().model_copy(update={"rpc_url": proxy.url}))
    yield connected
    await connected.close()


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    opened = chain_journal(tmp_path / "sender.db")
    yield opened
    await opened.close()


@pytest.fixture
async def sender(chain: Chain, journal: Journal) -> AsyncIterator[Sender]:
    made = Sender(chain, KEY, journal, stuck_seconds=0.2)
    yield made
    await made.close()


def faucet(chain: Chain) -> Any:
    return chain.token.functions.faucet(chain.w3.to_checksum_address(KEY.address))


def count(local: LocalChain) -> int:
    return int(local.anvil.rpc("eth_getTransactionCount", "0x" + KEY.address.hex(), "latest"), 16)


def rows(journal: Journal, *states: str) -> list[outbox.Outgoing]:
    return journal.read(lambda c: outbox.in_state(c, *states))


# --- killed ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
async def test_sending_killed_around_the_broadcast_sends_each_intent_once(local: LocalChain, tmp_path: Path, when: str) -> None:
    before, file, tests = count(local), tmp_path / "killed.db", Path(__file__).parents[1]
    argv = [sys.executable, "-c", VICTIM, str(tests), str(local.book_file), local.anvil.url, str(file), when, "open spoke 1"]
    with local.mining_stopped():
        first = await asyncio.create_subprocess_exec(*argv, start_new_session=True)
        assert await first.wait() == -signal.SIGKILL
        assert local.waiting() == (when == "after")
        second = await asyncio.create_subprocess_exec(*argv, start_new_session=True)  # takes up the first one's, and waits for a block
        try:
            await until(lambda: local.waiting() == 1 and second.returncode is None)
        finally:
            second.kill()
            await second.wait()
        assert local.waiting() == 1
    chain, journal = await local.connect(), chain_journal(file)
    sender = Sender(chain, KEY, journal)
    receipt = await sender.send("open spoke 1", faucet(chain), once=True)
    assert [r.tx_hash for r in rows(journal, outbox.MINED)] == [receipt.tx_hash]
    assert count(local) == before + 1 and not rows(journal, outbox.PENDING)
    await sender.close()
    await journal.close()
    await chain.close()
    record("F34", 2, f"killed {when} the broadcast: intents sent twice 0, lost 0", "double spends 0")


# --- outages ---------------------------------------------------------------------------------------------------------------------


async def test_sending_outage_after_signing_is_waited_out(
    local: LocalChain, proxy: ChainProxy, chain: Chain, journal: Journal, sender: Sender
) -> None:
    """The endpoint dies at the very moment of the broadcast and stays away; what was signed goes out when it is back."""
    before, calls = count(local), faucet(chain)

    def dies(params: list[Any], answer: Any) -> Any:
        proxy.lie("*", lambda params, answer: hang_up())
        return hang_up()

    # the node never hears of it: the proxy asks the node before it lies, so mining is stopped and the pool emptied
    with local.mining_stopped():
        proxy.lie("eth_sendRawTransaction", dies)
        task = asyncio.create_task(sender.send("through the outage", calls))
        await until(lambda: bool(rows(journal, outbox.PENDING)), task)
        await asyncio.sleep(0.5)
        local.anvil.rpc("anvil_dropAllTransactions")
        assert not task.done()
    proxy.honest()
    receipt = await task
    assert receipt.gas_used and count(local) == before + 1
    record("F31", 1, "transactions lost 0, doubled 0", "transactions lost 0; duplicates 0")


def hang_up() -> Any:
    raise Cut


async def test_sending_who_gave_up_waiting_leaves_it_to_the_background(
    local: LocalChain, proxy: ChainProxy, chain: Chain, journal: Journal
) -> None:
    sender, before = Sender(chain, KEY, journal, stuck_seconds=0.2, patience_seconds=0.3), count(local)
    with local.mining_stopped():
        with pytest.raises(ChainError, match="not mined within"):
            await sender.send("left alone", faucet(chain))
        local.anvil.rpc("anvil_dropAllTransactions")  # and the node forgets it
    await until(lambda: not rows(journal, outbox.PENDING))
    assert count(local) == before + 1
    await sender.close()


# --- refused, or not -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["internal error", "rate limit exceeded", "txpool is full", "upstream timed out"])
async def test_sending_doubtful_refusal_does_not_give_the_nonce_back(
    local: LocalChain, proxy: ChainProxy, chain: Chain, journal: Journal, sender: Sender, words: str
) -> None:
    """The node took it and said otherwise: sending something else at that nonce, or the same again at another, would be wrong."""
    before, told = count(local), 0

    def lie(params: list[Any], answer: Any) -> Any:
        nonlocal told
        told += 1
        return RpcError(-32603, words) if told == 1 else answer

    proxy.lie("eth_sendRawTransaction", lie)
    receipt = await sender.send("doubtful", faucet(chain))
    assert receipt.gas_used and count(local) == before + 1
    assert len(rows(journal, outbox.MINED)) == 1 and not rows(journal, outbox.PENDING)


async def test_sending_refused_and_mined_all_the_same_is_recognised(
    local: LocalChain, proxy: ChainProxy, chain: Chain, journal: Journal, sender: Sender
) -> None:
    """A node that refuses, denies that it holds the bytes, and lets them be mined later: the next intent must not pass for the first."""
    before = count(local)
    with local.mining_stopped():
        proxy.lie("eth_sendRawTransaction", always(RpcError(-32000, "insufficient funds for gas")))
        proxy.lie("eth_getTransactionByHash", always(None))
        with pytest.raises(TransactionFailed, match="refuses"):
            await sender.send("first", faucet(chain))
        proxy.honest("eth_getTransactionByHash")
        proxy.lie("eth_sendRawTransaction", always(RpcError(-32000, "already known")))  # the second never gets into the pool
        proxy.lie("eth_getTransactionCount", lambda params, answer: hex(before) if params[1] == "pending" else answer)
        task = asyncio.create_task(sender.send("second", chain.token.functions.approve(chain.channels.address, 7), gas=80_000))
        await until(lambda: bool(rows(journal, outbox.PENDING)), task)
    with pytest.raises(TransactionFailed, match=r"second: its nonce \d+ went to first"):
        await task
    proxy.honest()
    assert [r.label for r in rows(journal, outbox.MINED)] == ["first"]
    await sender.send("second", chain.token.functions.approve(chain.channels.address, 7))
    assert count(local) == before + 2


# --- nonces ----------------------------------------------------------------------------------------------------------------------


async def test_sending_count_told_too_high_leaves_a_gap_that_is_mended(
    local: LocalChain, proxy: ChainProxy, chain: Chain, journal: Journal, sender: Sender
) -> None:
    before = count(local)

    def lie(params: list[Any], answer: Any) -> Any:
        return hex(int(answer, 16) + 2) if params[1] == "pending" else answer

    proxy.lie("eth_getTransactionCount", lie)
    receipt = await sender.send("beyond the gap", faucet(chain))
    assert receipt.gas_used
    assert [r.label for r in rows(journal, outbox.MINED)] == ["fill a gap", "fill a gap", "beyond the gap"]
    assert count(local) == before + 3


async def test_sending_absurd_count_is_refused(proxy: ChainProxy, chain: Chain, journal: Journal, sender: Sender) -> None:
    proxy.lie("eth_getTransactionCount", lambda params, answer: hex(10**6) if params[1] == "pending" else answer)
    with pytest.raises(ChainError, match="does not know") as caught:
        await sender.send("absurd", faucet(chain))
    assert "one key is for one process" in caught.value.hint and not rows(journal, outbox.PENDING)


async def test_sending_random_faults_mine_each_intent_once(local: LocalChain, chain: Chain, tmp_path: Path) -> None:
    """Seeded: transactions sent while blocks stop, pools are emptied, blocks are taken back and the sender is restarted."""
    seed = 5
    print(f"seed {seed}")
    rng, file, before = random.Random(seed), tmp_path / "random.db", count(local)
    journal = chain_journal(file)
    sender, tasks, labels = Sender(chain, KEY, journal, stuck_seconds=0.1), [], []
    faults = 0
    local.anvil.rpc("evm_setAutomine", False)
    try:
        for step in range(12):
            labels.append(f"intent {step}")
            tasks.append(asyncio.create_task(sender.send(labels[-1], faucet(chain), once=True, gas=100_000)))
            await asyncio.sleep(rng.random() * 0.05)
            fault = rng.randrange(5)
            faults += fault < 4
            if fault == 0:
                local.anvil.rpc("anvil_dropAllTransactions")
            elif fault == 1:
                local.mine()
                local.anvil.rpc("anvil_reorg", 1, [])
            elif fault == 2:
                local.mine()
            elif fault == 3:  # a crash: nobody waits any more, and the next process begins with the journal
                for task in tasks:
                    task.cancel()
                await sender.close()
                await asyncio.gather(*tasks, return_exceptions=True)
                await journal.close()
                journal = chain_journal(file)
                sender, tasks = Sender(chain, KEY, journal, stuck_seconds=0.1), []
    finally:
        local.anvil.rpc("evm_setAutomine", True)
        local.mine()
    blocks = asyncio.create_task(keep_mining(local))  # a chain goes on: an automining one makes no block for what lies in its pool
    again = [await sender.send(label, faucet(chain), once=True, gas=100_000) for label in labels]
    await asyncio.gather(*tasks, return_exceptions=True)
    blocks.cancel()
    mined = rows(journal, outbox.MINED)
    ours = [r for r in mined if r.label != "fill a gap"]
    assert sorted(r.label for r in ours) == sorted(labels), "each intent once"
    assert len({r.nonce for r in mined}) == len(mined) == count(local) - before, "each nonce one intent"
    assert {r.tx_hash for r in again} == {r.tx_hash for r in ours}
    record("F34", faults, f"{len(labels)} intents: lost 0, twice 0", "double spends 0")
    await sender.close()
    await journal.close()


async def keep_mining(local: LocalChain) -> None:
    while True:
        local.mine()
        await asyncio.sleep(0.05)


# --- prices ----------------------------------------------------------------------------------------------------------------------


async def test_sending_spike_times_hundred_replaces_at_the_market_price_and_no_further(
    local: LocalChain, chain: Chain, journal: Journal, sender: Sender
) -> None:
    before = count(local)
    with local.mining_stopped():
        task = asyncio.create_task(sender.send("before the spike", faucet(chain)))
        await until(lambda: local.waiting() == 1, task)
        first = rows(journal, outbox.PENDING)[0]
        local.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(100 * first.max_fee))
        local.mine()  # an empty block: nobody pays that
        await asyncio.sleep(1.0)
        tried = rows(journal, outbox.PENDING)
        assert max(t.max_fee for t in tried) <= 16 * first.max_fee  # it is not worth a hundred times the price
        assert {t.nonce for t in tried} == {before}
        local.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(GWEI))
        local.mine()
    await task
    assert count(local) == before + 1
    record("F35", 1, "base fee x100: replacements stopped at 16 times the first offer", "fee cap")


async def test_sending_price_that_would_ruin_is_refused(local: LocalChain, proxy: ChainProxy, chain: Chain, sender: Sender) -> None:
    proxy.lie("eth_maxPriorityFeePerGas", always(hex(10**18)))  # one whole coin per gas
    before = int(local.anvil.rpc("eth_getBalance", "0x" + KEY.address.hex(), "latest"), 16)
    await sender.send("a greedy tip is capped", faucet(chain))
    paid = before - int(local.anvil.rpc("eth_getBalance", "0x" + KEY.address.hex(), "latest"), 16)
    assert paid < 100_000 * 60 * GWEI
    proxy.lie("eth_getBlockByNumber", lambda params, block: {**block, "baseFeePerGas": hex(10**16)})
    with pytest.raises(ChainError, match="not sent") as caught:
        await sender.send("ruinous", faucet(chain))
    assert caught.value.retryable and "tried again" in caught.value.hint
    proxy.honest()
    proxy.lie("eth_estimateGas", always(hex(10**12)))
    with pytest.raises(InconsistentChain, match="plausible"):
        await sender.send("gas without end", faucet(chain))


# --- lies ------------------------------------------------------------------------------------------------------------------------


async def test_sending_to_another_chain_is_refused_before_anything_is_signed(
    proxy: ChainProxy, chain: Chain, journal: Journal, sender: Sender
) -> None:
    proxy.lie("eth_chainId", always("0x1"))
    with pytest.raises(WrongChain):
        await sender.send("elsewhere", faucet(chain))
    assert not rows(journal, outbox.PENDING, outbox.MINED, outbox.DROPPED)


@pytest.mark.parametrize("spoil", ["transactionHash", "from", "to", "blockHash"])
async def test_sending_receipt_of_something_else_is_not_taken(
    local: LocalChain, proxy: ChainProxy, chain: Chain, journal: Journal, sender: Sender, spoil: str
) -> None:
    other = "0x" + "ab" * (20 if spoil in ("from", "to") else 32)
    proxy.lie("eth_getTransactionReceipt", lambda params, receipt: receipt and {**receipt, spoil: other})
    task = asyncio.create_task(sender.send("false receipt", faucet(chain)))
    await until(lambda: proxy.calls["eth_getTransactionReceipt"] > 3, task)
    assert not task.done() and rows(journal, outbox.PENDING)
    proxy.honest()
    assert (await task).gas_used


async def test_sending_nonce_refused_for_good_is_free_again(
    local: LocalChain, proxy: ChainProxy, chain: Chain, journal: Journal, sender: Sender
) -> None:
    before = count(local)
    proxy.lie("eth_sendRawTransaction", lambda params, answer: RpcError(-32000, "insufficient funds for gas"))
    proxy.lie("eth_getTransactionByHash", always(None))
    with local.mining_stopped():
        with pytest.raises(TransactionFailed):
            await sender.send("refused", faucet(chain))
        local.anvil.rpc("anvil_dropAllTransactions")  # the node behind the proxy had it; now nobody does
    proxy.honest()
    await sender.send("next", faucet(chain))
    assert [r.nonce for r in rows(journal, outbox.MINED)] == [before]


# --- transport -------------------------------------------------------------------------------------------------------------------


async def test_sending_cancelled_requests_leave_the_connection_usable(local: LocalChain, chain: Chain) -> None:
    """web3's own session manager is left locked for ever by a request that is cancelled while it waits for the lock."""
    for _ in range(20):
        asked = [asyncio.create_task(chain.block_number()) for _ in range(20)]
        await asyncio.sleep(0)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    async with asyncio.timeout(30):
        assert await chain.block_number() >= 0
