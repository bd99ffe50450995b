"""Gas of every move of the market's contracts, from receipts of the deployed code on a local chain.

For the snapshot test and for `make bench-gas`. Nearly the same on every run: accounts and amounts are fixed, only timestamps and a few
random addresses move the price of calldata.
"""

from __future__ import annotations

import json
from typing import Any

from contracts_disputes import BEYOND, MODEL, NONCE, WITHIN, Case, Court
from contracts_fixtures import FAR, ONE, Chain, compact
from contracts_tools import CONTRACTS
from eth_account import Account
from eth_account.signers.local import LocalAccount

SNAPSHOT = CONTRACTS / "gas-snapshot.json"
COUNT = 100
VERIFIERS = 10
DRAWS = 24
AMOUNT = 10**15
PANEL = [BEYOND, BEYOND, BEYOND, BEYOND, WITHIN]


def measure(chain: Chain) -> dict[str, int]:
    """Gas by name; `_each` is the gas of one of a hundred, rounded up."""
    channels, stake = _channels(chain), _stake(chain)
    court = Court.open(chain, verifiers=VERIFIERS)
    return {**channels, **stake, **_dispute(court), **_seats(court)}


def written(found: dict[str, int]) -> str:
    """The snapshot's text."""
    return json.dumps(dict(sorted(found.items())), indent=1) + "\n"


def _cost(chain: Chain, call: Any, sender: LocalAccount) -> int:
    return int(chain.send(call, sender)["gasUsed"])


def _account(number: int) -> LocalAccount:
    account: LocalAccount = Account.from_key(number.to_bytes(32, "big"))
    return account


def _channels(chain: Chain) -> dict[str, int]:
    """Payees hold tokens, and credited balances, already: the state of a market that runs."""
    payer, payee, anyone = chain.accounts[1], chain.accounts[2], chain.accounts[5]
    functions = chain.channels.functions
    call = functions.open(payee.address, payer.address, ONE, FAR)
    found = {"open_first": _cost(chain, call, payer), "open": _cost(chain, call, payer)}
    one = chain.open(payer, payee.address, ONE)
    found["topup"] = _cost(chain, functions.topUp(one, ONE, FAR), payer)
    redeem = [functions.redeem(one, n * AMOUNT, chain.voucher(payer, one, n * AMOUNT)) for n in (1, 2)]
    found["redeem_first"], found["redeem"] = (_cost(chain, call, anyone) for call in redeem)
    to_one = [chain.open(payer, payee.address, ONE) for _ in range(COUNT)]
    for amount, count in ((AMOUNT, COUNT), (2 * AMOUNT, 10), (3 * AMOUNT, 1)):
        claims = [(c, amount, *compact(chain.voucher(payer, c, amount))) for c in to_one[:count]]
        found[f"redeem_batch{count}_each"] = -(-_cost(chain, functions.redeemMany(claims), anyone) // count)
    to_many = [chain.open(payer, _account(1_000 + i).address, ONE) for i in range(COUNT)]
    for name, amount in (("push100_first_each", AMOUNT), ("push100_each", 2 * AMOUNT)):
        found[name] = -(-_cost(chain, functions.push(to_many, [amount] * COUNT), payer) // COUNT)
    last = to_one[-1]
    found["redeem_late"] = _cost(chain, functions.redeem(last, 9 * AMOUNT, chain.voucher(payer, last, 9 * AMOUNT)), anyone)
    found["open_late"] = _cost(chain, functions.open(payee.address, payer.address, ONE, FAR), payer)
    found["withdraw"] = _cost(chain, functions.withdraw(payee.address), payee)
    consent = chain.voucher(payee, one, 3 * AMOUNT, kind="Close")
    found["cooperative_close"] = _cost(chain, functions.cooperativeClose(one, 3 * AMOUNT, consent), payer)
    found["request_close"] = _cost(chain, functions.requestClose(to_one[0]), payer)
    chain.pass_time(functions.closeWindow().call())
    found["close"] = _cost(chain, functions.close(to_one[0]), payer)
    return found


def _stake(chain: Chain) -> dict[str, int]:
    node = chain.rich(chain.adopt(_account(5_000)))
    functions = chain.registry.functions
    register = functions.register(7, "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN", b"\x5b" * 32, "203.0.113.7:7001")
    found = {"register": _cost(chain, register, node), "stake_first": _cost(chain, functions.stake(node.address, ONE), node)}
    found["stake"] = _cost(chain, functions.stake(node.address, ONE), node)
    found["begin_unbond"] = _cost(chain, functions.beginUnbond(node.address, ONE), node)
    chain.pass_time(functions.unbondingDelay().call())
    found["stake_withdraw"] = _cost(chain, functions.withdraw(node.address), node)
    found["deregister"] = _cost(chain, functions.deregister(), node)
    return found


def _seats(court: Court) -> dict[str, int]:
    """A verifier's seat, given up (the list's last moves) and taken; then both while a draw is pending: a hole is left, and sat in.

    Each of the four is the only one of its epoch, so that its count begins or ends at zero.
    """
    enrol, unenrol = court.contract.functions.enrol(MODEL, b"\x0e" * 32), court.contract.functions.unenrol(MODEL)
    leavers = []
    for _ in range(3):
        court.chain.pass_time(court.terms.epoch_seconds)
        leavers.append(court.verifier())
    found = {}
    for name in ("", "_hole"):
        newcomer = court.node(court.terms.seat_stake)
        found[f"unenrol{name}"] = _cost(court.chain, unenrol, leavers.pop(0))
        court.chain.pass_time(court.terms.epoch_seconds)
        found[f"enrol{name}"] = _cost(court.chain, enrol, newcomer)
        court.challenge(court.case(court.node(1_000 * ONE)))
    return found


def _dispute(court: Court) -> dict[str, int]:
    """A dispute that slashes: all five members commit and reveal, four of them beyond the bound."""
    case = court.case(court.node(1_000 * ONE), amount=ONE)
    found = dict(zip(("dispute_challenge", "dispute_draw"), _opened(court, case), strict=True))
    panel = court.panel(case)
    commits = [int(court.commit(case, member, n)["gasUsed"]) for member, n in zip(panel, PANEL, strict=True)]
    reveals = [int(court.reveal(case, member, n)["gasUsed"]) for member, n in zip(panel, PANEL, strict=True)]
    found["dispute_commit"], found["dispute_reveal"] = max(commits), max(reveals)
    found["dispute_finish"] = int(court.finish(case)["gasUsed"])
    assert court.outcome(case) == "SLASHED"
    parts = (found["dispute_challenge"], found["dispute_draw"], found["dispute_finish"])
    return {**found, "dispute_total": sum(parts) + sum(commits) + sum(reveals)}


def _opened(court: Court, case: Case) -> tuple[int, int]:
    """Gas of the challenge, and of a draw that meets five different members at once: luck of a block hash, and each repeat costs more.

    The cheapest of draws from block after block, on a chain that is set back in between; the last one stays done. No draw is repeated to
    be measured: a block that is mined again has another hash.
    """
    costs = []
    for blocks in range(1, DRAWS):
        start = court.chain.anvil.rpc("evm_snapshot")
        costs.append(_drawn(court, case, blocks)[1])
        court.chain.anvil.rpc("evm_revert", start)
    challenged, drawn = _drawn(court, case, 1)
    return challenged, min(drawn, *costs)


def _drawn(court: Court, case: Case, blocks: int) -> tuple[int, int]:
    court.chain.anvil.rpc("anvil_mine", hex(blocks))
    challenged = int(court.challenge(case)["gasUsed"])
    court.chain.anvil.rpc("anvil_mine", hex(court.terms.draw_delay_blocks))
    return challenged, _cost(court.chain, court.contract.functions.draw(case.id, NONCE), court.chain.accounts[5])
