"""What may come in at launch: limits and the guardian's pause refuse entry, and nothing that they can do touches a way out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from contracts_fixtures import CLOSE_WINDOW_SECONDS, FAR, UNBONDING_SECONDS, Chain, StandIn, compact, contracts_chain
from eth_account.signers.local import LocalAccount
from web3 import AsyncHTTPProvider, AsyncWeb3

from gpumarket.contracts.artifacts import artifact
from gpumarket.contracts.deploy import AddressBook, EntryLimits, deploy

__all__ = ["contracts_chain"]

ZERO = "0x" + "00" * 20
KEY_HASH = b"\x01" * 32
LIMITS = EntryLimits(channel_max=100, channels_total_max=250, stake_max=100, stakes_total_max=150)


@pytest.fixture(scope="module")
def limited(contracts_chain: Chain) -> Iterator[tuple[Chain, LocalAccount]]:
    """The same chain with contracts of its own: small limits, and a guardian."""
    guardian = contracts_chain.stranger()
    book = asyncio.run(_deployed(contracts_chain, replace(LIMITS, guardian=guardian.address)))
    at = {name: contracts_chain.w3.eth.contract(address=where, abi=artifact(name).abi) for name, where in _where(contracts_chain, book)}
    disputes = StandIn(book.disputes)
    chain = replace(contracts_chain, book=book, registry=at["StakeRegistry"], channels=at["PaymentChannels"], disputes=disputes)
    chain.let_send(disputes.address)
    chain.rich(chain.accounts[1])
    yield chain, guardian


async def _deployed(chain: Chain, limits: EntryLimits) -> AddressBook:
    w3 = AsyncWeb3(AsyncHTTPProvider(chain.anvil.url))
    try:
        return await deploy(
            w3,
            chain.accounts[6],
            unbonding_delay_s=UNBONDING_SECONDS,
            close_window_s=CLOSE_WINDOW_SECONDS,
            token=chain.token.address,
            limits=limits,
        )
    finally:
        await w3.provider.disconnect()


def _where(chain: Chain, book: AddressBook) -> list[tuple[str, Any]]:
    pairs = (("StakeRegistry", book.registry), ("PaymentChannels", book.channels))
    return [(name, chain.w3.to_checksum_address(address)) for name, address in pairs]


@pytest.fixture
def chain(limited: tuple[Chain, LocalAccount]) -> Chain:
    return limited[0]


@pytest.fixture
def guardian(limited: tuple[Chain, LocalAccount]) -> Iterator[LocalAccount]:
    """The guardian; entry is open again after each test."""
    chain, account = limited
    yield account
    for contract in (chain.channels, chain.registry):
        chain.send(contract.functions.pauseEntry(False), account)


@pytest.fixture
def payer(chain: Chain) -> LocalAccount:
    return chain.accounts[1]


@pytest.fixture
def operator(chain: Chain, payer: LocalAccount) -> LocalAccount:
    account = chain.rich(chain.stranger())
    chain.send(chain.registry.functions.register(1, "12D3KooWx", KEY_HASH, ""), account)
    return account


def _closed(chain: Chain, payer: LocalAccount, channel: bytes) -> None:
    chain.send(chain.channels.functions.requestClose(channel), payer)
    chain.pass_time(CLOSE_WINDOW_SECONDS)
    chain.send(chain.channels.functions.close(channel), payer)


# ---------------------------------------------------------------- limits


def test_limits_of_a_deployment_are_those_asked_for_and_none_where_zero(chain: Chain, contracts_chain: Chain) -> None:
    read = [(c.functions.positionMax().call(), c.functions.totalMax().call()) for c in (chain.channels, chain.registry)]
    assert read == [(100, 250), (100, 150)]
    for contract in (contracts_chain.channels, contracts_chain.registry):
        assert contract.functions.guardian().call() == ZERO
        assert (contract.functions.positionMax().call(), contract.functions.totalMax().call()) == (2**96 - 1, 2**256 - 1)


def test_open_above_the_channel_limit_is_refused_and_at_it_works(chain: Chain, payer: LocalAccount) -> None:
    payee = chain.stranger().address
    call = chain.channels.functions.open(payee, payer.address, 101, FAR)
    assert chain.refused(call, payer) == ("AbovePositionMax", (101, 100))
    _closed(chain, payer, chain.open(payer, payee, 100))


def test_topup_counts_what_is_unclaimed_against_the_channel_limit(chain: Chain, payer: LocalAccount) -> None:
    channel = chain.open(payer, chain.stranger().address, 100)
    top_up = chain.channels.functions.topUp(channel, 30, FAR)
    assert chain.refused(top_up, payer) == ("AbovePositionMax", (130, 100))
    chain.send(chain.channels.functions.redeem(channel, 30, chain.voucher(payer, channel, 30)), payer)
    chain.send(top_up, payer)
    chain.send(chain.channels.functions.topUp(channel, 0, FAR + 1), payer)
    _closed(chain, payer, channel)


def test_open_above_the_total_limit_is_refused_until_somebody_leaves(chain: Chain, payer: LocalAccount) -> None:
    payee = chain.stranger().address
    first, second = chain.open(payer, payee, 100), chain.open(payer, payee, 100)
    third = chain.channels.functions.open(payee, payer.address, 51, FAR)
    assert chain.refused(third, payer) == ("AboveTotalMax", (251, 250))
    _closed(chain, payer, first)
    chain.send(third, payer)
    _closed(chain, payer, second)


def test_stake_above_a_nodes_or_the_total_limit_is_refused(chain: Chain, operator: LocalAccount, payer: LocalAccount) -> None:
    stake = chain.registry.functions.stake
    assert chain.refused(stake(operator.address, 101), operator) == ("AbovePositionMax", (101, 100))
    chain.send(stake(operator.address, 100), operator)
    chain.send(chain.registry.functions.beginUnbond(operator.address, 60), operator)
    assert chain.refused(stake(operator.address, 1), operator) == ("AbovePositionMax", (101, 100))
    other = chain.rich(chain.stranger())
    chain.send(chain.registry.functions.register(1, "12D3KooWy", KEY_HASH, ""), other)
    assert chain.refused(stake(other.address, 51), other) == ("AboveTotalMax", (151, 150))
    chain.send(stake(other.address, 50), other)
    for account, amount in ((operator, 40), (other, 50)):
        chain.send(chain.registry.functions.beginUnbond(account.address, amount), account)
    chain.pass_time(UNBONDING_SECONDS)
    for account in (operator, other):
        chain.send(chain.registry.functions.withdraw(account.address), account)


# ---------------------------------------------------------------- pause


def test_pause_is_refused_to_everyone_but_the_guardian(chain: Chain, payer: LocalAccount, contracts_chain: Chain) -> None:
    for contract in (chain.channels, chain.registry):
        for stranger in (payer, chain.accounts[6], chain.disputes):  # a user, who deployed, and who slashes
            assert chain.refused(contract.functions.pauseEntry(True), stranger) == ("NotGuardian", (stranger.address.lower(),))
    nobody = contracts_chain.channels.functions.pauseEntry(True)  # that deployment has no guardian: not even the zero address is one
    with pytest.raises(Exception, match="0x") as caught:
        nobody.call({"from": ZERO})
    assert chain.decode_error(caught.value)[0] == "NotGuardian"


def test_pause_says_so_and_stops_entry_only(chain: Chain, guardian: LocalAccount, payer: LocalAccount, operator: LocalAccount) -> None:
    payee = chain.stranger()
    channel, closing = chain.open(payer, payee.address, 40), chain.open(payer, payee.address, 40)
    chain.send(chain.registry.functions.stake(operator.address, 10), operator)
    for contract in (chain.channels, chain.registry):
        receipt = chain.send(contract.functions.pauseEntry(True), guardian)
        assert chain.events(contract, "EntryPaused", receipt) == [{"paused": True}]
    entries = [
        chain.channels.functions.open(payee.address, payer.address, 1, FAR),
        chain.channels.functions.topUp(channel, 1, FAR),
        chain.registry.functions.stake(operator.address, 1),
    ]
    for call in entries:
        assert chain.refused(call, payer)[0] == "EntryIsPaused"
    before = chain.balance(chain.channels.address)
    functions = chain.channels.functions
    chain.send(functions.redeem(channel, 10, chain.voucher(payer, channel, 10)), chain.accounts[5])
    chain.send(functions.redeemMany([(channel, 20, *compact(chain.voucher(payer, channel, 20)))]), chain.accounts[5])
    chain.send(functions.push([channel], [30]), payer)
    chain.send(functions.withdraw(payee.address), payee)
    chain.send(functions.cooperativeClose(closing, 5, chain.voucher(payee, closing, 5, kind="Close")), payer)
    chain.send(functions.withdraw(payee.address), payee)
    _closed(chain, payer, channel)
    assert chain.balance(chain.channels.address) == before - 80
    chain.send(chain.registry.functions.register(1, "12D3KooWz", KEY_HASH, ""), operator)  # an address may change during a pause
    chain.send(chain.registry.functions.beginUnbond(operator.address, 10), operator)
    chain.send(chain.registry.functions.lock(operator.address, 4), chain.disputes)
    chain.send(chain.registry.functions.slash(operator.address, 1, payee.address), chain.disputes)
    chain.send(chain.registry.functions.unlock(operator.address, 3), chain.disputes)
    chain.pass_time(UNBONDING_SECONDS)
    chain.send(chain.registry.functions.withdraw(operator.address), operator)
    chain.send(chain.registry.functions.deregister(), operator)


def test_pause_lifted_lets_everyone_in_again(chain: Chain, guardian: LocalAccount, payer: LocalAccount) -> None:
    chain.send(chain.channels.functions.pauseEntry(True), guardian)
    chain.send(chain.channels.functions.pauseEntry(False), guardian)
    _closed(chain, payer, chain.open(payer, chain.stranger().address, 1))
