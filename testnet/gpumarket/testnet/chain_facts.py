"""What the chain itself says of a testnet's money, read from events and calls, not from anybody's books."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.settlement.chain import Chain, ChainView, ChannelOnChain, Follower


@dataclass(frozen=True, slots=True)
class Settlement:
    """One payment on chain. `gas` is its share of the transactions that brought it: redemption and, for a batch, withdrawal."""

    payer: Address
    payee: Address
    amount: Money
    tx: Hash
    gas: int


@dataclass(frozen=True, slots=True)
class ChainFacts:
    """`escrow` is what the PaymentChannels contract holds, `credited` what it owes beside open channels."""

    channels: Mapping[Hash, ChannelOnChain]
    settlements: tuple[Settlement, ...]
    refunded: Money
    credited: Money
    escrow: Money
    gas: int
    """Of all redemptions and withdrawals."""


async def read_facts(chain: Chain, people: tuple[Address, ...]) -> ChainFacts:
    """Everything up to the newest block; `people` are those who may have credit."""
    view = ChainView()
    settings = chain.settings.model_copy(update={"confirmations": 0})
    await Follower(Chain(chain.w3, chain.book, settings), view).sync()
    events = chain.channels.events
    start = chain.book.deployed_block
    redeemed = await events.Redeemed().get_logs(from_block=start)
    closed = await events.Closed().get_logs(from_block=start)
    withdrawn = await events.Withdrawn().get_logs(from_block=start)
    gas_of = {tx: await _gas(chain, tx) for tx in {bytes(log["transactionHash"]) for log in (*redeemed, *withdrawn)}}
    credited = [int(await chain.channels.functions.credited(_checksum(chain, person)).call()) for person in people]
    return ChainFacts(
        channels=view.channels,
        settlements=tuple(_settlements(redeemed, view, gas_of)),
        refunded=Money(sum(int(log["args"]["refunded"]) for log in closed)),
        credited=Money(sum(credited)),
        escrow=Money(int(await chain.token.functions.balanceOf(chain.channels.address).call())),
        gas=sum(gas_of.values()),
    )


async def balance(chain: Chain, address: Address) -> Money:
    """Tokens in a wallet."""
    return Money(int(await chain.token.functions.balanceOf(_checksum(chain, address)).call()))


async def _gas(chain: Chain, tx: bytes) -> int:
    return int((await chain.w3.eth.get_transaction_receipt(Hash(tx)))["gasUsed"])  # type: ignore[arg-type]


def _settlements(logs: Any, view: ChainView, gas_of: Mapping[bytes, int]) -> list[Settlement]:
    shared = Counter(bytes(log["transactionHash"]) for log in logs)
    found = []
    for log in logs:
        tx = bytes(log["transactionHash"])
        channel = view.channels[Hash(bytes(log["args"]["id"]))]
        found.append(Settlement(channel.payer, channel.payee, Money(int(log["args"]["amount"])), Hash(tx), gas_of[tx] // shared[tx]))
    return found


def _checksum(chain: Chain, address: Address) -> Any:
    return chain.w3.to_checksum_address(hex0x(address))
