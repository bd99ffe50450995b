"""StakeRegistry and MarketToken on a chain: identity, stake and its way out, locks, and that events alone rebuild every field."""

from __future__ import annotations

from typing import Any

import pytest
from contracts_fixtures import ONE, UNBONDING_SECONDS, Chain, contracts_chain
from eth_account.signers.local import LocalAccount

from gpumarket.contracts.artifacts import artifact
from gpumarket.testnet.anvil import Anvil

__all__ = ["contracts_chain"]

ZERO = "0x" + "00" * 20
KEY_HASH = b"\x11" * 32
FIELDS = ("owner", "roles", "stakedSince", "availableAt", "stake", "unbonding", "locked", "tlsKeyHash", "p2pId", "endpoint")


@pytest.fixture
def chain(contracts_chain: Chain) -> Chain:
    return contracts_chain


@pytest.fixture
def operator(chain: Chain) -> LocalAccount:
    """A fresh node, registered as provider, with tokens and no stake."""
    account = chain.rich(chain.stranger())
    chain.send(register(chain), account)
    return account


def register(chain: Chain, *, roles: int = 1, p2p: str = "12D3KooWx", key: bytes = KEY_HASH, endpoint: str = "127.0.0.1:7001") -> Any:
    return chain.registry.functions.register(roles, p2p, key, endpoint)


def node(chain: Chain, operator: LocalAccount) -> dict[str, Any]:
    return dict(zip(FIELDS, chain.registry.functions.node(operator.address).call(), strict=True))


def staked(chain: Chain, operator: LocalAccount, amount: int) -> None:
    chain.send(chain.registry.functions.stake(operator.address, amount), operator)


# ---------------------------------------------------------------- identity


def test_register_publishes_the_node_and_makes_the_caller_its_owner(chain: Chain, operator: LocalAccount) -> None:
    found = node(chain, operator)
    assert (found["owner"], found["roles"], found["p2pId"]) == (operator.address, 1, "12D3KooWx")
    assert (found["tlsKeyHash"], found["endpoint"], found["stake"]) == (KEY_HASH, "127.0.0.1:7001", 0)


def test_register_again_updates_and_keeps_owner_and_stake(chain: Chain, operator: LocalAccount) -> None:
    staked(chain, operator, 5)
    receipt = chain.send(register(chain, roles=7, endpoint=""), operator)
    (event,) = chain.events(chain.registry, "Registered", receipt)
    assert (event["operator"], event["owner"], event["roles"], event["endpoint"]) == (operator.address, operator.address, 7, "")
    assert node(chain, operator)["stake"] == 5


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"roles": 0}, "InvalidRoles"),
        ({"roles": 8}, "InvalidRoles"),
        ({"p2p": ""}, "InvalidP2PId"),
        ({"p2p": "x" * 129}, "InvalidP2PId"),
        ({"endpoint": "x" * 257}, "InvalidEndpoint"),
        ({"key": bytes(32)}, "InvalidTlsKeyHash"),
    ],
)
def test_register_with_a_bad_argument_is_refused(chain: Chain, change: dict[str, Any], error: str) -> None:
    assert chain.refused(register(chain, **change), chain.accounts[3])[0] == error


def test_register_with_an_owner_needs_its_approval_and_fixes_it(chain: Chain) -> None:
    hot, cold, thief = chain.stranger(), chain.rich(chain.stranger()), chain.accounts[4]
    with_owner = chain.registry.functions.registerWithOwner
    call = with_owner(cold.address, 1, "12D3KooWx", KEY_HASH, "")
    assert chain.refused(call, hot) == ("OwnerNotApproving", (cold.address.lower(), hot.address.lower()))
    receipt = chain.send(chain.registry.functions.approveOperator(hot.address, True), cold)
    approval = {"owner": cold.address, "operator": hot.address, "approved": True}
    assert chain.events(chain.registry, "OperatorApproved", receipt) == [approval]
    chain.send(call, hot)
    chain.send(register(chain), hot)  # an update by the hot key alone leaves the owner
    assert node(chain, hot)["owner"] == cold.address
    assert chain.refused(with_owner(thief.address, 1, "12D3KooWx", KEY_HASH, ""), hot)[0] == "OwnerIsFixed"
    assert chain.refused(with_owner(ZERO, 1, "12D3KooWx", KEY_HASH, ""), hot)[0] == "InvalidOwner"
    chain.send(chain.registry.functions.stake(hot.address, 10), cold)
    assert chain.refused(chain.registry.functions.beginUnbond(hot.address, 10), hot)[0] == "NotOwner"
    chain.send(chain.registry.functions.beginUnbond(hot.address, 10), cold)


def test_register_with_an_owner_whose_approval_was_taken_back_is_refused(chain: Chain) -> None:
    hot, cold = chain.stranger(), chain.stranger()
    for approved in (True, False):
        chain.send(chain.registry.functions.approveOperator(hot.address, approved), cold)
    call = chain.registry.functions.registerWithOwner(cold.address, 1, "12D3KooWx", KEY_HASH, "")
    assert chain.refused(call, hot)[0] == "OwnerNotApproving"


def test_deregister_leaves_the_stake_to_its_owner(chain: Chain, operator: LocalAccount) -> None:
    staked(chain, operator, 5)
    receipt = chain.send(chain.registry.functions.deregister(), operator)
    assert chain.events(chain.registry, "Deregistered", receipt) == [{"operator": operator.address}]
    found = node(chain, operator)
    assert (found["roles"], found["p2pId"], found["endpoint"], found["owner"]) == (0, "", "", operator.address)
    assert chain.refused(chain.registry.functions.deregister(), operator)[0] == "NotRegistered"
    assert chain.refused(chain.registry.functions.stake(operator.address, 1), operator)[0] == "NotRegistered"
    chain.send(chain.registry.functions.beginUnbond(operator.address, 5), operator)


# ---------------------------------------------------------------- stake


def test_stake_comes_in_and_leaves_after_the_delay(chain: Chain, operator: LocalAccount) -> None:
    before = chain.balance(operator.address)
    receipt = chain.send(chain.registry.functions.stake(operator.address, ONE), operator)
    (event,) = chain.events(chain.registry, "Staked", receipt)
    mined = chain.w3.eth.get_block(receipt["blockNumber"])["timestamp"]
    assert event == {"operator": operator.address, "from": operator.address, "amount": ONE, "stake": ONE, "stakedSince": mined}
    receipt = chain.send(chain.registry.functions.beginUnbond(operator.address, ONE), operator)
    (started,) = chain.events(chain.registry, "UnbondingStarted", receipt)
    withdraw = chain.registry.functions.withdraw(operator.address)
    assert chain.refused(withdraw, operator)[0] == "StillUnbonding"
    chain.pass_time(UNBONDING_SECONDS)
    assert chain.now() >= started["availableAt"]
    receipt = chain.send(withdraw, operator)
    paid = {"operator": operator.address, "to": operator.address, "amount": ONE}
    assert chain.events(chain.registry, "Withdrawn", receipt) == [paid]
    assert chain.balance(operator.address) == before
    assert chain.refused(withdraw, operator)[0] == "NothingUnbonding"


def test_stake_moves_seniority_by_the_new_amounts_share(chain: Chain, operator: LocalAccount) -> None:
    staked(chain, operator, 3 * ONE)
    began = node(chain, operator)["stakedSince"]
    chain.pass_time(1000)
    staked(chain, operator, ONE)
    moved = node(chain, operator)["stakedSince"] - began
    assert -(-(chain.now() - began) // 4) == moved


def test_stake_refuses_zero_and_unknown_operators(chain: Chain, operator: LocalAccount) -> None:
    assert chain.refused(chain.registry.functions.stake(operator.address, 0), operator)[0] == "ZeroAmount"
    stranger = chain.stranger()
    assert chain.refused(chain.registry.functions.stake(stranger.address, 1), operator)[0] == "NotRegistered"


def test_unbonding_and_withdrawal_are_refused_to_others_and_beyond_the_stake(chain: Chain, operator: LocalAccount) -> None:
    staked(chain, operator, 5)
    unbond, withdraw = chain.registry.functions.beginUnbond, chain.registry.functions.withdraw
    assert chain.refused(unbond(operator.address, 5), chain.accounts[3])[0] == "NotOwner"
    assert chain.refused(unbond(operator.address, 6), operator)[0] == "InsufficientStake"
    assert chain.refused(unbond(operator.address, 0), operator)[0] == "ZeroAmount"
    assert chain.refused(unbond(chain.stranger().address, 1), operator)[0] == "NotRegistered"
    assert chain.refused(withdraw(operator.address), chain.accounts[3])[0] == "NotOwner"
    assert chain.refused(withdraw(operator.address), operator)[0] == "NothingUnbonding"


def test_unbonding_again_restarts_the_delay_for_all(chain: Chain, operator: LocalAccount) -> None:
    staked(chain, operator, 5)
    unbond = chain.registry.functions.beginUnbond
    chain.send(unbond(operator.address, 1), operator)
    chain.pass_time(UNBONDING_SECONDS)
    chain.send(unbond(operator.address, 1), operator)
    assert chain.refused(chain.registry.functions.withdraw(operator.address), operator)[0] == "StillUnbonding"


# ---------------------------------------------------------------- disputes


def test_locked_stake_can_neither_be_withdrawn_nor_locked_twice(chain: Chain, operator: LocalAccount) -> None:
    staked(chain, operator, 10)
    chain.send(chain.registry.functions.beginUnbond(operator.address, 10), operator)
    chain.send(chain.registry.functions.lock(operator.address, 10), chain.disputes)
    assert chain.refused(chain.registry.functions.lock(operator.address, 1), chain.disputes)[0] == "InsufficientStake"
    chain.pass_time(UNBONDING_SECONDS)
    withdraw = chain.registry.functions.withdraw(operator.address)
    assert chain.refused(withdraw, operator)[0] == "StakeLocked"
    chain.send(chain.registry.functions.unlock(operator.address, 4), chain.disputes)
    receipt = chain.send(withdraw, operator)
    assert chain.events(chain.registry, "Withdrawn", receipt)[0]["amount"] == 4
    assert node(chain, operator)["unbonding"] == 6


def test_slash_takes_locked_stake_only_and_also_while_unbonding(chain: Chain, operator: LocalAccount) -> None:
    staked(chain, operator, 10)
    chain.send(chain.registry.functions.beginUnbond(operator.address, 7), operator)
    victim = chain.stranger().address
    slash = chain.registry.functions.slash
    assert chain.refused(slash(operator.address, 1, victim), chain.disputes)[0] == "InsufficientStake"
    chain.send(chain.registry.functions.lock(operator.address, 8), chain.disputes)
    receipt = chain.send(slash(operator.address, 5, victim), chain.disputes)
    expected = {"operator": operator.address, "to": victim, "amount": 5, "stake": 0, "unbonding": 5, "locked": 3}
    assert chain.events(chain.registry, "Slashed", receipt) == [expected]
    assert chain.balance(victim) == 5
    for nowhere in (ZERO, chain.registry.address):
        assert chain.refused(slash(operator.address, 1, nowhere), chain.disputes)[0] == "InvalidRecipient"


def test_locks_are_refused_to_everyone_but_disputes_and_at_zero(chain: Chain, operator: LocalAccount) -> None:
    staked(chain, operator, 10)
    functions = chain.registry.functions
    calls = [
        functions.lock(operator.address, 1),
        functions.unlock(operator.address, 1),
        functions.slash(operator.address, 1, operator.address),
    ]
    for call in calls:
        assert chain.refused(call, operator)[0] == "NotDisputes"
    for call in (functions.lock(operator.address, 0), functions.unlock(operator.address, 0)):
        assert chain.refused(call, chain.disputes)[0] == "ZeroAmount"
    assert chain.refused(functions.unlock(operator.address, 1), chain.disputes)[0] == "InsufficientStake"


# ---------------------------------------------------------------- events, constructor, token


def test_events_alone_rebuild_every_field(chain: Chain) -> None:
    """The rules here are all that a follower needs; amounts never have to be read back from the contract."""
    operator = chain.rich(chain.stranger())
    start, functions = chain.w3.eth.block_number + 1, chain.registry.functions
    for call, sender in (
        (register(chain), operator),
        (functions.stake(operator.address, 100), operator),
        (functions.beginUnbond(operator.address, 60), operator),
        (functions.lock(operator.address, 90), chain.disputes),
        (functions.slash(operator.address, 50, chain.disputes.address), chain.disputes),
        (functions.unlock(operator.address, 30), chain.disputes),
        (functions.stake(operator.address, 7), operator),
        (register(chain, roles=5, endpoint="[::1]:9"), operator),
    ):
        chain.send(call, sender)
    assert _followed(chain, operator.address, start) == node(chain, operator)
    chain.pass_time(UNBONDING_SECONDS)
    chain.send(functions.withdraw(operator.address), operator)
    chain.send(functions.beginUnbond(operator.address, 7), operator)
    chain.send(functions.deregister(), operator)
    assert _followed(chain, operator.address, start) == node(chain, operator)


def _followed(chain: Chain, operator: str, start: int) -> dict[str, Any]:
    state: dict[str, Any] = {name: 0 for name in FIELDS} | {"p2pId": "", "endpoint": "", "tlsKeyHash": bytes(32)}
    logs = [log for name in _event_names() for log in chain.registry.events[name]().get_logs(from_block=start)]
    for log in sorted(logs, key=lambda log: (log["blockNumber"], log["logIndex"])):
        if log["args"].get("operator") == operator:
            _apply(state, log["event"], log["args"])
    return state


def _event_names() -> list[str]:
    return [entry["name"] for entry in artifact("StakeRegistry").abi if entry["type"] == "event" and entry["name"] != "OperatorApproved"]


def _apply(state: dict[str, Any], event: str, args: Any) -> None:
    if event == "Registered":
        state |= {name: args[name] for name in ("owner", "roles", "p2pId", "tlsKeyHash", "endpoint")}
    elif event == "Deregistered":
        state |= {"roles": 0, "p2pId": "", "tlsKeyHash": bytes(32), "endpoint": ""}
    elif event == "UnbondingStarted":
        state["stake"] -= args["amount"]
        state["unbonding"] += args["amount"]
        state["availableAt"] = args["availableAt"]
    elif event == "Withdrawn":
        state["unbonding"] -= args["amount"]
    else:  # Staked, Locked, Unlocked, Slashed carry the new values
        state |= {name: args[name] for name in ("stake", "stakedSince", "unbonding", "locked") if name in args}
    if not state["stake"]:
        state["stakedSince"] = 0
    if not state["unbonding"]:
        state["availableAt"] = 0


def test_constructor_refuses_a_token_without_code_and_a_bad_delay(chain: Chain) -> None:
    compiled, money = artifact("StakeRegistry"), chain.token.address
    make = chain.w3.eth.contract(abi=compiled.abi, bytecode=compiled.bytecode).constructor
    for token, delay, error in ((ZERO, 1, "InvalidToken"), (money, 0, "InvalidUnbondingDelay"), (money, 2**39, "InvalidUnbondingDelay")):
        with pytest.raises(Exception, match="0x") as caught:
            make(token, ZERO, delay, ZERO, 0, 0).estimate_gas({"from": chain.accounts[0].address})
        assert chain.decode_error(caught.value)[0] == error


def test_market_token_mints_a_fixed_amount_to_anyone(chain: Chain) -> None:
    lucky = chain.stranger()
    chain.send(chain.token.functions.faucet(lucky.address), chain.accounts[6])
    assert chain.balance(lucky.address) == chain.token.functions.FAUCET_AMOUNT().call() == 10_000 * ONE
    assert chain.token.functions.decimals().call() == 18


def test_market_token_refuses_every_chain_but_the_test_chain(chain: Chain) -> None:
    from web3 import HTTPProvider, Web3

    compiled = artifact("MarketToken")
    with Anvil.start(block_time=None, chain_id=8453) as elsewhere:
        w3 = Web3(HTTPProvider(elsewhere.url))
        with pytest.raises(Exception, match="0x") as caught:
            w3.eth.contract(abi=compiled.abi, bytecode=compiled.bytecode).constructor().estimate_gas()
    assert chain.decode_error(caught.value) == ("TestNetworksOnly", (8453,))
