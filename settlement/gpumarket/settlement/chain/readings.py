"""What a daemon shows of its chain view, its stake, its wallet and its transactions. Imported by daemons that have the `metrics` extra."""

from __future__ import annotations

from collections.abc import Mapping

from gpumarket.core.units import Address
from gpumarket.settlement.chain.actions import Actions
from gpumarket.settlement.chain.follower import Follower
from gpumarket.settlement.chain.sender import Sender
from gpumarket.settlement.chain.view import ChainView
from gpumarket.telemetry.metrics import Reading, counter, gauge, tokens

STAKE_STATES = ("bonded", "locked", "unbonding")
_ETHER = 1e18

CHAIN_METRICS = (
    gauge("chain_view_block", "Newest confirmed block that decisions rest on."),
    gauge("chain_head_block", "Newest block that the endpoint told."),
    gauge("chain_lag_blocks", "Confirmed blocks that the view has not taken in yet."),
    gauge("chain_silent_seconds", "Seconds since the endpoint last told a new block."),
    gauge("chain_trouble", "1 while the view is too old or too doubtful to take on new work."),
    counter("chain_rewinds_total", "Times that the chain took back what was in the view."),
    counter("chain_rereads_total", "Times that everything was read again, after a contradiction."),
    gauge("stake_tokens", "This node's stake on chain, by state; locked is the part that disputes hold.", "state", STAKE_STATES),
    counter("transactions_total", "Own transactions mined, by outcome.", "outcome", ("mined", "reverted")),
    gauge("transactions_pending", "Own transactions that wait for their confirmations."),
    counter("gas_used_total", "Gas that own transactions used."),
    counter("gas_spent_ether_total", "What that cost, in whole coins of the chain."),
)
WALLET_METRICS = (
    gauge("wallet_gas_ether", "Coins of the chain in the wallet, for gas."),
    gauge("wallet_tokens", "Tokens in the wallet."),
)
WALLET_SECONDS = 15.0
"""A balance serves every look within this time: each costs the endpoint two calls."""


def chain_readings(view: ChainView, follower: Follower, sender: Sender, me: Address) -> Mapping[str, Reading]:
    """From memory alone."""
    node, tally = view.nodes.get(me), sender.tally
    goal = follower.head - follower.confirmations
    return {
        "chain_view_block": max(0, view.block),
        "chain_head_block": max(0, follower.head),
        "chain_lag_blocks": max(0, goal - view.block),
        "chain_silent_seconds": follower.silent_seconds,
        "chain_trouble": float(bool(view.trouble)),
        "chain_rewinds_total": follower.rewinds,
        "chain_rereads_total": follower.rereads,
        "stake_tokens": {
            "bonded": tokens(node.stake if node else 0),
            "locked": tokens(node.locked if node else 0),
            "unbonding": tokens(node.unbonding if node else 0),
        },
        "transactions_total": {"mined": tally.mined, "reverted": tally.reverted},
        "transactions_pending": sender.watched,
        "gas_used_total": tally.gas_used,
        "gas_spent_ether_total": tally.spent_wei / _ETHER,
    }


async def wallet_readings(actions: Actions) -> Mapping[str, Reading]:
    """Asks the chain. Raises ChainError."""
    return {"wallet_gas_ether": await actions.gas_balance() / _ETHER, "wallet_tokens": tokens(await actions.balance())}
