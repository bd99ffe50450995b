"""What the chain itself says of a market's money, read from events and calls, not from anybody's books.

Everything is of one block, so that a chain that goes on meanwhile cannot make the parts disagree.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpumarket.core.units import Address, Hash, Money, hex0x, parse_address
from gpumarket.settlement.chain import Chain

CALLS_AT_ONCE = 32
"""Reads of channels that wait for the node together."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """One payment on chain. `gas` is its share of the transactions that brought it: redemption and, for a batch, withdrawal."""

    payer: Address
    payee: Address
    amount: Money
    tx: Hash
    gas: int


@dataclass(frozen=True, slots=True)
class ChannelFacts:
    """A payment channel by its events; `state` is (deposit, claimed) as the contract has them, None once it was closed and erased."""

    id: Hash
    payer: Address
    payee: Address
    signer: Address
    deposit: int
    """All that was ever put in."""
    claimed: int
    """All that was ever paid or credited."""
    refunded: int
    closed: bool
    state: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class ChainFacts:
    """`escrow` is what the PaymentChannels contract holds, `credited` what it owes beside open channels."""

    block: int
    channels: Mapping[Hash, ChannelFacts]
    settlements: tuple[Settlement, ...]
    refunded: Money
    credited: Money
    escrow: Money
    gas: int
    """Of all redemptions and withdrawals."""


async def read_facts(chain: Chain) -> ChainFacts:
    """Everything up to the newest block."""
    block = await chain.block_number()
    logs = {name: await _logs(chain, name, block) for name in ("Opened", "ToppedUp", "Redeemed", "Closed", "Withdrawn")}
    channels = await _channels(chain, logs, block)
    people = sorted({who for channel in channels.values() for who in (channel.payer, channel.payee)})
    credited = [await _at(block, chain.channels.functions.credited(_checksum(chain, person))) for person in people]
    paying = [*logs["Redeemed"], *logs["Withdrawn"]]
    gas_of = {tx: await _gas(chain, tx) for tx in {bytes(log["transactionHash"]) for log in paying}}
    return ChainFacts(
        block=block,
        channels=channels,
        settlements=tuple(_settlements(logs["Redeemed"], channels, gas_of)),
        refunded=Money(sum(int(log["args"]["refunded"]) for log in logs["Closed"])),
        credited=Money(sum(int(amount) for amount in credited)),
        escrow=Money(int(await _at(block, chain.token.functions.balanceOf(chain.channels.address)))),
        gas=sum(gas_of.values()),
    )


async def balance(chain: Chain, address: Address) -> Money:
    """Tokens in a wallet."""
    return Money(int(await chain.token.functions.balanceOf(_checksum(chain, address)).call()))


async def _channels(chain: Chain, logs: Mapping[str, Sequence[Any]], block: int) -> dict[Hash, ChannelFacts]:
    added, paid = Counter[bytes](), Counter[bytes]()
    for log in (*logs["Opened"], *logs["ToppedUp"]):
        added[bytes(log["args"]["id"])] += int(log["args"]["amount"])
    for log in logs["Redeemed"]:
        paid[bytes(log["args"]["id"])] += int(log["args"]["amount"])
    refunded = {bytes(log["args"]["id"]): int(log["args"]["refunded"]) for log in logs["Closed"]}
    places = asyncio.Semaphore(CALLS_AT_ONCE)

    async def one(log: Any) -> ChannelFacts:
        args = log["args"]
        channel = Hash(bytes(args["id"]))
        payer, payee, signer = (parse_address(args[role]) for role in ("payer", "payee", "signer"))
        async with places:
            _, deposit, _, claimed, *_ = await _at(block, chain.channels.functions.channel(channel))
        known = None if channel in refunded else (int(deposit), int(claimed))
        back = refunded.get(channel, 0)
        return ChannelFacts(channel, payer, payee, signer, added[channel], paid[channel], back, channel in refunded, known)

    found = await asyncio.gather(*(one(log) for log in logs["Opened"]))
    return {channel.id: channel for channel in found}


async def _logs(chain: Chain, name: str, block: int) -> Sequence[Any]:
    found: Sequence[Any] = await chain.channels.events[name]().get_logs(from_block=chain.book.deployed_block, to_block=block)
    return found


async def _at(block: int, function: Any) -> Any:
    return await function.call(block_identifier=block)


async def _gas(chain: Chain, tx: bytes) -> int:
    return int((await chain.w3.eth.get_transaction_receipt(Hash(tx)))["gasUsed"])  # type: ignore[arg-type]


def _settlements(logs: Sequence[Any], channels: Mapping[Hash, ChannelFacts], gas_of: Mapping[bytes, int]) -> list[Settlement]:
    shared = Counter(bytes(log["transactionHash"]) for log in logs)
    found = []
    for log in logs:
        tx = bytes(log["transactionHash"])
        channel = channels[Hash(bytes(log["args"]["id"]))]
        found.append(Settlement(channel.payer, channel.payee, Money(int(log["args"]["amount"])), Hash(tx), gas_of[tx] // shared[tx]))
    return found


def _checksum(chain: Chain, address: Address) -> Any:
    return chain.w3.to_checksum_address(hex0x(address))
