"""What the contracts cost to use: exact, so a figure that rises is a change somebody made."""

from __future__ import annotations

from typing import Any

import pytest
from contracts_fixtures import FAR, ONE, Chain, compact, contracts_chain
from eth_account import Account

__all__ = ["contracts_chain"]

REDEEM_GAS_MAX = 61_500
REDEEM_MANY_GAS_MAX = 19_300
PUSH_GAS_MAX = 16_100
COUNT = 100


@pytest.fixture(scope="module")
def hundred(contracts_chain: Chain) -> list[bytes]:
    """A hundred channels of one payer, each to a payee of its own that holds a credited balance already."""
    chain, payer = contracts_chain, contracts_chain.accounts[1]
    return [chain.open(payer, Account.create().address, ONE) for _ in range(COUNT)]


def cost(chain: Chain, call: Any, sender: Any) -> int:
    return int(chain.send(call, sender)["gasUsed"])


def test_redeem_of_one_voucher_stays_within_its_gas(contracts_chain: Chain, record_property: Any) -> None:
    chain, payer, payee = contracts_chain, contracts_chain.accounts[1], contracts_chain.accounts[2]
    channel = chain.open(payer, payee.address, ONE)
    costs = []
    for amount in (1 * 10**15, 2 * 10**15):
        call = chain.channels.functions.redeem(channel, amount, chain.voucher(payer, channel, amount))
        costs.append(cost(chain, call, chain.accounts[5]))
    record_property("gas_redeem", costs)
    print("redeem", costs)
    assert max(costs) <= REDEEM_GAS_MAX


def test_redeem_many_of_a_hundred_vouchers_to_one_payee_stays_within_its_gas(contracts_chain: Chain) -> None:
    chain, payer, payee = contracts_chain, contracts_chain.accounts[1], contracts_chain.accounts[2]
    channels = [chain.open(payer, payee.address, ONE) for _ in range(COUNT)]
    each = []
    for amount in (10**15, 2 * 10**15):
        claims = [(channel, amount, *compact(chain.voucher(payer, channel, amount))) for channel in channels]
        each.append(cost(chain, chain.channels.functions.redeemMany(claims), chain.accounts[5]) / COUNT)
    print("redeemMany", each)
    assert max(each) <= REDEEM_MANY_GAS_MAX
    assert chain.channels.functions.credited(payee.address).call() == COUNT * 2 * 10**15


def test_push_to_a_hundred_payees_stays_within_its_gas(contracts_chain: Chain, hundred: list[bytes]) -> None:
    chain, payer = contracts_chain, contracts_chain.accounts[1]
    first = cost(chain, chain.channels.functions.push(hundred, [10**15] * COUNT), payer) / COUNT
    later = cost(chain, chain.channels.functions.push(hundred, [3 * 10**15] * COUNT), payer) / COUNT
    print("push", first, later)
    assert later <= PUSH_GAS_MAX


def test_open_costs_little_more_than_its_three_slots(contracts_chain: Chain) -> None:
    chain, payer = contracts_chain, contracts_chain.accounts[1]
    call = chain.channels.functions.open(chain.accounts[2].address, payer.address, ONE, FAR)
    used = cost(chain, call, payer)
    print("open", used)
    assert used <= 165_000
