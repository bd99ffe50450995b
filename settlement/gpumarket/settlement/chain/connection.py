"""A connection to the chain that was checked: the right chain id, and our code at the contracts' addresses.

With a second endpoint (`check_url`), both are checked, and what decides about money is read from the second one too.
Never: work against a chain or contract that the address book does not describe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gpumarket.contracts.deploy import AddressBook
from gpumarket.core.errors import ChainError, GpumarketError, Unreachable, WrongChain
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import Domain, channels_domain, market_domain
from gpumarket.core.units import parse_address

if TYPE_CHECKING:
    from web3 import AsyncWeb3

RPC_SECONDS = 10.0


class Chain:
    """web3, the address book, the contracts as web3 objects, and the two signing domains."""

    def __init__(self, w3: AsyncWeb3[Any], book: AddressBook, settings: ChainSettings, second: Chain | None = None) -> None:
        from gpumarket.contracts.artifacts import artifact

        self.w3, self.book, self.settings = w3, book, settings
        self.second = second
        """The same chain at the second endpoint, where one is configured."""
        self.market_domain: Domain = market_domain(book.chain_id, parse_address(book.registry))
        self.channels_domain: Domain = channels_domain(book.chain_id, parse_address(book.channels))
        self.token: Any = w3.eth.contract(address=w3.to_checksum_address(book.token), abi=artifact("MarketToken").abi)
        self.registry: Any = w3.eth.contract(address=w3.to_checksum_address(book.registry), abi=artifact("StakeRegistry").abi)
        self.channels: Any = w3.eth.contract(address=w3.to_checksum_address(book.channels), abi=artifact("PaymentChannels").abi)

    async def close(self) -> None:
        """Close the HTTP sessions."""
        await self.w3.provider.disconnect()
        if self.second is not None:
            await self.second.close()

    async def verify(self) -> None:
        """Check chain id and code again, at both endpoints. Raises WrongChain or Unreachable."""
        with reachable(self.settings.rpc_url):
            await self.book.verify(self.w3)
        if self.second is not None:
            await self.second.verify()

    async def verify_id(self) -> None:
        """Check the chain id alone: one short call. Raises WrongChain or Unreachable."""
        with reachable(self.settings.rpc_url):
            found = int(await self.w3.eth.chain_id)
        if found != self.book.chain_id:
            why = f"the node at {self.settings.rpc_url} is on chain {found} now, the address book is of chain {self.book.chain_id}"
            raise WrongChain(why, hint="point GPUMARKET_CHAIN_RPC_URL and GPUMARKET_CHAIN_ADDRESS_BOOK at the same network")

    async def block_number(self) -> int:
        """Number of the newest block. Raises Unreachable."""
        with reachable(self.settings.rpc_url):
            return int(await self.w3.eth.block_number)

    async def time(self) -> int:
        """Unix seconds of the newest block. Raises Unreachable."""
        with reachable(self.settings.rpc_url):
            return int((await self.w3.eth.get_block("latest"))["timestamp"])


async def connect(settings: ChainSettings) -> Chain:
    """Raises Unreachable (nobody answers), ConfigError (no address book) or WrongChain (another chain, or other code at an address)."""
    book = AddressBook.load(settings.address_book)
    second = _open(settings.model_copy(update={"rpc_url": settings.check_url}), book) if settings.check_url else None
    chain = _open(settings, book, second)
    try:
        await chain.verify()
    except BaseException:
        await chain.close()
        raise
    return chain


def _open(settings: ChainSettings, book: AddressBook, second: Chain | None = None) -> Chain:
    from web3 import AsyncWeb3

    from gpumarket.settlement.chain.transport import BoundedProvider

    w3 = AsyncWeb3(BoundedProvider(settings.rpc_url, timeout=RPC_SECONDS))
    w3.middleware_onion.remove("validation")  # it asks for the chain id before every call; what we sign and believe is held to one anyway
    return Chain(w3, book, settings, second)


@contextmanager
def reachable(url: str) -> Iterator[None]:
    """Turn transport failures inside into Unreachable, the node's own refusals and its senseless answers into ChainError; reverts, and
    transactions that are not found, pass through. Senseless is what web3 or its reader stumbles over: a field that is missing, or no
    number where one belongs."""
    from aiohttp import ClientError
    from web3.exceptions import BadResponseFormat, BlockNotFound, ContractLogicError, TransactionNotFound, Web3Exception, Web3RPCError

    try:
        yield
    except (GpumarketError, ContractLogicError, TransactionNotFound):
        raise
    except BlockNotFound as error:
        raise ChainError(f"the chain at {url} does not know the block yet: {str(error)[:200]}", hint="it is behind; try again") from error
    except (ClientError, OSError, TimeoutError) as error:
        raise Unreachable(
            f"the chain at {url} does not answer: {str(error) or type(error).__name__}",
            hint="start a local one with `gpumarket testnet up`, or name another with GPUMARKET_CHAIN_RPC_URL",
        ) from error
    except Web3RPCError as error:
        raise ChainError(f"the chain at {url} refused: {error.message}") from error
    except (BadResponseFormat, Web3Exception, ValueError, TypeError, LookupError, AttributeError) as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise ChainError(
            f"the chain at {url} gave an answer that makes no sense ({what})",
            hint="is it an Ethereum JSON-RPC endpoint? name another with GPUMARKET_CHAIN_RPC_URL",
        ) from error
