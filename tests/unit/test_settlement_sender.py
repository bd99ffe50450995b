"""The sender against anvil: nonces through restarts, reorganisations, stuck transactions and refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from settlement_chain import LocalChain, account, chain_journal, local_chain, party, until

from gpumarket.core.errors import ChainError, TransactionFailed, Unreachable
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Address, Hash
from gpumarket.settlement.chain import Actions, Chain, Sender, outbox
from gpumarket.settlement.chain.reverts import revert_text
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.vouchers import sign_voucher

KEY, OTHER = account(3), account(4)
FAR = 4_000_000_000


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[LocalChain]:
    """A chain of the test's own, to be killed."""
    with local_chain(tmp_path) as running:
        yield running


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    opened = chain_journal(tmp_path / "sender.db")
    yield opened
    await opened.close()


@pytest.fixture
async def actions(chain: Chain, journal: Journal) -> AsyncIterator[Actions]:
    made = await party(chain, KEY, journal)
    yield made
    await made.sender.close()


def faucet(chain: Chain, key: LocalKey = KEY) -> Any:
    return chain.token.functions.faucet(chain.w3.to_checksum_address(key.address))


async def mined_nonces(chain: Chain, key: LocalKey = KEY) -> int:
    return int(await chain.w3.eth.get_transaction_count(chain.w3.to_checksum_address(key.address)))


def rows(journal: Journal, *states: str) -> list[outbox.Outgoing]:
    return journal.read(lambda c: outbox.in_state(c, *states))


async def leave_pending(local: LocalChain, chain: Chain, file: Path, label: str, *, key: LocalKey = KEY, broadcast: bool) -> None:
    """What a crash leaves: a committed transaction, broadcast or not, that nobody waits for any more."""
    journal = chain_journal(file)
    sender = Sender(chain, key, journal)
    if broadcast:
        task = asyncio.create_task(sender.send(label, faucet(chain, key)))
        await until(lambda: bool(rows(journal, outbox.PENDING)) and local.waiting() > 0, task)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    else:
        draft = await sender._draft(label, faucet(chain, key), None)
        nonce = await sender._next_nonce()
        signed = sender._sign(replace(draft, nonce=nonce))
        await journal.transact(partial(outbox.add, transaction=signed))
    await sender.close()
    await journal.close()


async def test_sender_transaction_is_journaled_with_its_outcome(chain: Chain, journal: Journal, actions: Actions) -> None:
    receipt = await actions.faucet()
    (row,) = [r for r in rows(journal, outbox.MINED) if r.tx_hash == receipt.tx_hash]
    assert (row.label, row.block, row.gas_used) == ("faucet", receipt.block, receipt.gas_used)
    assert row.nonce == await mined_nonces(chain) - 1


async def test_sender_many_at_once_use_consecutive_nonces(chain: Chain, actions: Actions) -> None:
    before = await mined_nonces(chain)
    receipts = await asyncio.gather(*(actions.sender.send(f"faucet {i}", faucet(chain)) for i in range(8)))
    assert await mined_nonces(chain) == before + 8
    assert len({r.tx_hash for r in receipts}) == 8


async def test_sender_dependent_calls_go_out_together(local: LocalChain, chain: Chain, journal: Journal) -> None:
    sender = Sender(chain, OTHER, journal)
    channels, token, w3 = chain.channels, chain.token, chain.w3
    payee, me = w3.to_checksum_address(KEY.address), w3.to_checksum_address(OTHER.address)
    with local.mining_stopped():
        task = asyncio.create_task(
            sender.send_all(
                [
                    ("faucet", token.functions.faucet(me), 100_000),
                    ("approve", token.functions.approve(channels.address, 2**255), 80_000),
                    ("open", channels.functions.open(payee, me, 5, FAR), 200_000),
                ]
            )
        )
        await until(lambda: local.waiting() == 3, task)
        local.mine()
        receipts = await task
    assert len({r.block for r in receipts}) == 1  # one block for all three


async def test_sender_restart_sends_the_same_bytes_again_and_no_second_ones(local: LocalChain, chain: Chain, tmp_path: Path) -> None:
    file = tmp_path / "crash.db"
    before = await mined_nonces(chain)
    await leave_pending(local, chain, file, "crashed before broadcast", broadcast=False)
    assert await mined_nonces(chain) == before
    journal = chain_journal(file)
    sender = Sender(chain, KEY, journal)
    await sender.send("next", faucet(chain))
    await until(lambda: not rows(journal, outbox.PENDING))
    assert await mined_nonces(chain) == before + 2
    assert [r.label for r in rows(journal, outbox.MINED)] == ["crashed before broadcast", "next"]
    await sender.close()
    await journal.close()


async def test_sender_restart_with_one_in_the_pool_does_not_reuse_its_nonce(local: LocalChain, chain: Chain, tmp_path: Path) -> None:
    file = tmp_path / "crash.db"
    before = await mined_nonces(chain)
    with local.mining_stopped():
        await leave_pending(local, chain, file, "in the pool", broadcast=True)
        journal = chain_journal(file)
        sender = Sender(chain, KEY, journal)
        task = asyncio.create_task(sender.send("next", faucet(chain)))
        await until(lambda: local.waiting() == 2, task)
        assert [r.nonce for r in rows(journal, outbox.PENDING)] == [before, before + 1]
        local.mine()
        await task
    await sender.close()
    await journal.close()


async def test_sender_caller_that_goes_away_at_any_step_leaves_nothing_unsent(
    local: LocalChain, chain: Chain, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await mined_nonces(chain)
    sender = Sender(chain, KEY, journal)
    for step in ("committing", "offering"):
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def held(*given: Any, real: Any, reached: asyncio.Event = reached, go_on: asyncio.Event = go_on) -> Any:
            reached.set()
            await go_on.wait()
            return await real(*given)

        holder, name = {"committing": (journal, "transact"), "offering": (sender._mempool, "offer")}[step]
        with monkeypatch.context() as patched:
            patched.setattr(holder, name, partial(held, real=getattr(holder, name)))
            task = asyncio.create_task(sender.send(step, faucet(chain)))
            await reached.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            go_on.set()
        await until(lambda step=step: step in [r.label for r in rows(journal, outbox.MINED)])  # type: ignore[misc]
    assert await mined_nonces(chain) == before + 2
    await sender.close()


async def test_sender_once_is_not_sent_twice_even_by_the_next_process(local: LocalChain, chain: Chain, tmp_path: Path) -> None:
    file = tmp_path / "once.db"
    before = await mined_nonces(chain)
    hashes = set()
    for _ in range(2):
        journal = chain_journal(file)
        sender = Sender(chain, KEY, journal)
        for _ in range(2):
            hashes.add((await sender.send("open spoke 1", faucet(chain), once=True)).tx_hash)
        await sender.close()
        await journal.close()
    assert len(hashes) == 1
    assert await mined_nonces(chain) == before + 1


async def test_sender_once_left_pending_by_a_crash_is_the_one_that_counts(local: LocalChain, chain: Chain, tmp_path: Path) -> None:
    file = tmp_path / "once.db"
    before = await mined_nonces(chain)
    await leave_pending(local, chain, file, "open spoke 2", broadcast=False)
    journal = chain_journal(file)
    sender = Sender(chain, KEY, journal)
    receipt = await sender.send("open spoke 2", faucet(chain), once=True)
    assert [r.tx_hash for r in rows(journal, outbox.MINED)] == [receipt.tx_hash]
    assert await mined_nonces(chain) == before + 1
    await sender.close()
    await journal.close()


async def test_sender_stuck_transaction_is_replaced_at_its_nonce_with_a_higher_fee(
    local: LocalChain, chain: Chain, journal: Journal
) -> None:
    before = await mined_nonces(chain)
    sender = Sender(chain, KEY, journal, stuck_seconds=0.1)
    with local.mining_stopped():
        task = asyncio.create_task(sender.send("stuck", faucet(chain)))
        await until(lambda: len(rows(journal, outbox.PENDING)) >= 3, task)
        tried = rows(journal, outbox.PENDING)
        local.mine()
        receipt = await task
    assert {t.nonce for t in tried} == {before}
    for lower, higher in pairwise(tried):
        assert higher.max_fee * 8 >= lower.max_fee * 9
        assert higher.priority_fee * 8 >= lower.priority_fee * 9
        assert (higher.data, higher.recipient, higher.gas) == (lower.data, lower.recipient, lower.gas)
    assert await mined_nonces(chain) == before + 1  # one of them, once
    (mined,) = [r for r in rows(journal, outbox.MINED) if r.nonce == before]
    assert mined.tx_hash == receipt.tx_hash
    assert not rows(journal, outbox.PENDING)


async def test_sender_forgotten_by_the_node_is_sent_again(local: LocalChain, chain: Chain, journal: Journal) -> None:
    sender = Sender(chain, KEY, journal, stuck_seconds=0.1)
    with local.mining_stopped():
        task = asyncio.create_task(sender.send("forgotten", faucet(chain)))
        await until(lambda: bool(rows(journal, outbox.PENDING)) and local.waiting() > 0, task)
        local.anvil.rpc("anvil_dropAllTransactions")
    while not task.done():
        await asyncio.sleep(0.05)
        local.mine()
    assert (await task).gas_used > 0


async def test_sender_confirmed_waits_out_a_reorganisation(local: LocalChain, journal: Journal) -> None:
    chain = await local.connect(confirmations=2)
    sender = Sender(chain, KEY, journal)
    receipt = await sender.send("reorganised", faucet(chain))
    local.anvil.rpc("anvil_reorg", 1, [])
    task = asyncio.create_task(sender.confirmed(receipt))
    while not task.done():
        await asyncio.sleep(0.05)
        local.mine()
    confirmed = await task
    assert confirmed.tx_hash == receipt.tx_hash
    found = await chain.w3.eth.get_transaction_receipt(receipt.tx_hash)  # type: ignore[arg-type]
    assert bytes(found["blockHash"]) == confirmed.block_hash
    await sender.close()
    await chain.close()


async def test_sender_restart_after_a_reorganisation_sends_the_mined_one_again(local: LocalChain, chain: Chain, tmp_path: Path) -> None:
    file = tmp_path / "reorg.db"
    journal = chain_journal(file)
    receipt = await Sender(chain, KEY, journal).send("taken back", faucet(chain))
    await journal.close()
    local.anvil.rpc("anvil_reorg", 1, [])
    local.anvil.rpc("anvil_dropAllTransactions")
    journal = chain_journal(file)
    sender = Sender(chain, KEY, journal)
    await sender.resume()
    await until(lambda: local.anvil.rpc("eth_getTransactionReceipt", "0x" + receipt.tx_hash.hex()) is not None)
    await sender.close()
    await journal.close()


# --- refusals ------------------------------------------------------------------------------------------------------------------


async def test_sender_revert_is_named_before_anything_is_sent(chain: Chain, journal: Journal, actions: Actions) -> None:
    before = await mined_nonces(chain)
    nobody = Hash(b"\7" * 32)
    with pytest.raises(TransactionFailed, match=r"request close 0x0707\w+ would revert: UnknownChannel\(id=0x0707") as caught:
        await actions.request_close(nobody)
    assert not caught.value.retryable
    channel = await actions.open_channel(OTHER.address, 10, FAR)
    with pytest.raises(TransactionFailed, match=r"AboveDeposit\(id=0x.*cumulative=11, deposit=10\)"):
        await actions.redeem(channel, 11, sign_voucher(KEY, chain.channels_domain, channel, 11))
    with pytest.raises(TransactionFailed, match="NotSigner"):
        await actions.redeem(channel, 5, sign_voucher(OTHER, chain.channels_domain, channel, 5))
    with pytest.raises(TransactionFailed, match="TooEarly"):
        await actions.close(channel)
    assert await mined_nonces(chain) == before + 1


async def test_sender_revert_in_a_block_is_named_too(chain: Chain, journal: Journal, actions: Actions) -> None:
    call = chain.channels.functions.close(Hash(b"\7" * 32))
    with pytest.raises(TransactionFailed, match=r"blind reverted: UnknownChannel"):
        await actions.sender.send("blind", call, gas=200_000)
    assert [r.label for r in rows(journal, outbox.FAILED)] == ["blind"]
    await actions.faucet()  # its nonce was spent; the next one goes on


async def test_sender_without_gas_money_is_refused_and_its_nonce_is_free_again(local: LocalChain, chain: Chain, journal: Journal) -> None:
    poor = LocalKey(keccak256(b"poor"))
    sender = Sender(chain, poor, journal)
    with pytest.raises(TransactionFailed, match="refuses"):
        await sender.send("poor", faucet(chain, poor), gas=100_000)
    assert not rows(journal, outbox.PENDING)
    local.anvil.rpc("anvil_setBalance", "0x" + poor.address.hex(), hex(10**18))
    await sender.send("richer", faucet(chain, poor))
    assert await mined_nonces(chain, poor) == 1


async def test_sender_nonce_spent_by_a_stranger_is_said(local: LocalChain, chain: Chain, journal: Journal, tmp_path: Path) -> None:
    with local.mining_stopped():
        task = asyncio.create_task(Sender(chain, KEY, journal).send("ours", faucet(chain)))
        await until(lambda: bool(rows(journal, outbox.PENDING)) and local.waiting() > 0, task)
        local.anvil.rpc("anvil_dropAllTransactions")
        local.anvil.rpc("anvil_setNonce", "0x" + KEY.address.hex(), hex(rows(journal, outbox.PENDING)[0].nonce + 1))
        with pytest.raises(TransactionFailed, match="not in this journal") as caught:
            await task
    assert "one key is for one process" in caught.value.hint


async def test_sender_never_mined_gives_up_and_keeps_it(local: LocalChain, chain: Chain, journal: Journal) -> None:
    sender = Sender(chain, KEY, journal, patience_seconds=0.2)
    with local.mining_stopped():
        with pytest.raises(ChainError, match="not mined within") as caught:
            await sender.send("patience", faucet(chain))
        assert caught.value.retryable
        assert [r.label for r in rows(journal, outbox.PENDING)] == ["patience"]


async def test_sender_chain_gone_is_unreachable(mortal: LocalChain, journal: Journal) -> None:
    chain = await mortal.connect()
    call = faucet(chain)
    mortal.anvil.kill()
    with pytest.raises(Unreachable):
        await Sender(chain, KEY, journal).send("gone", call)
    await chain.close()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no reason given"),
        ("0x12345678", "unknown error 0x12345678"),
        (bytes.fromhex("4e487b71") + (17).to_bytes(32, "big"), "panic 0x11"),
        ("0x08c379a0" + (32).to_bytes(32, "big").hex() + (2).to_bytes(32, "big").hex() + b"no".ljust(32, b"\0").hex(), "no"),
        (keccak256(b"ZeroAmount()")[:4], "ZeroAmount()"),
    ],
)
def test_reverts_every_form_has_a_text(data: object, text: str) -> None:
    assert revert_text(data) == text


async def test_actions_open_channel_with_a_label_opens_one(chain: Chain, actions: Actions) -> None:
    payee = Address(b"\x99" * 20)
    first = await actions.open_channel(payee, 10, FAR, label="spoke to 99")
    again = await actions.open_channel(payee, 10, FAR, label="spoke to 99")
    other = await actions.open_channel(payee, 10, FAR)
    assert first == again != other
