"""A connection to the chain that was checked: the right chain id, and our code at the contracts' addresses.

Never: work against a chain or contract that the address book does not describe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gpumarket.contracts.deploy import AddressBook
from gpumarket.core.errors import ChainError, GpumarketError, Unreachable
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import Domain, channels_domain, market_domain
from gpumarket.core.units import parse_address

if TYPE_CHECKING:
    from web3 import AsyncWeb3

RPC_SECONDS = 10.0


class Chain:
    """web3, the address book, the contracts as web3 objects, and the two signing domains."""

    def __init__(self, w3: AsyncWeb3[Any], book: AddressBook, settings: ChainSettings) -> None:
        from gpumarket.contracts.artifacts import artifact

        self.w3, self.book, self.settings = w3, book, settings
        self.market_domain: Domain = market_domain(book.chain_id, parse_address(book.registry))
        self.channels_domain: Domain = channels_domain(book.chain_id, parse_address(book.channels))
        self.token: Any = w3.eth.contract(address=w3.to_checksum_address(book.token), abi=artifact("MarketToken").abi)
        self.registry: Any = w3.eth.contract(address=w3.to_checksum_address(book.registry), abi=artifact("StakeRegistry").abi)
        self.channels: Any = w3.eth.contract(address=w3.to_checksum_address(book.channels), abi=artifact("PaymentChannels").abi)

    async def close(self) -> None:
        """Close the HTTP sessions."""
        await self.w3.provider.disconnect()

    async def block_number(self) -> int:
        """Number of the newest block. Raises Unreachable."""
        with reachable(self.settings.rpc_url):
            return int(await self.w3.eth.block_number)


async def connect(settings: ChainSettings) -> Chain:
    """Raises Unreachable (nobody answers), ConfigError (no address book) or WrongChain (another chain, or other code at an address)."""
    from web3 import AsyncHTTPProvider, AsyncWeb3

    book = AddressBook.load(settings.address_book)
    w3 = AsyncWeb3(AsyncHTTPProvider(settings.rpc_url, request_kwargs={"timeout": RPC_SECONDS}, exception_retry_configuration=None))
    chain = Chain(w3, book, settings)
    try:
        with reachable(settings.rpc_url):
            await book.verify(w3)
    except BaseException:
        await chain.close()
        raise
    return chain


@contextmanager
def reachable(url: str) -> Iterator[None]:
    """Turn transport failures inside into Unreachable and the node's own refusals into ChainError; reverts pass through."""
    from aiohttp import ClientError
    from web3.exceptions import BadResponseFormat, ContractLogicError, Web3RPCError

    try:
        yield
    except (GpumarketError, ContractLogicError):
        raise
    except (ClientError, OSError, TimeoutError, BadResponseFormat) as error:
        raise Unreachable(
            f"the chain at {url} does not answer: {str(error) or type(error).__name__}",
            hint="start a local one with `gpumarket testnet up`, or name another with GPUMARKET_CHAIN_RPC_URL",
        ) from error
    except Web3RPCError as error:
        raise ChainError(f"the chain at {url} refused: {error.message}") from error
