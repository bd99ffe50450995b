"""Pulling credited money out of the channels' contract: the wallet, its journal (nonces live there) and the chain, without a scheduler."""

from __future__ import annotations

from gpumarket.core import keystore
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Address, Money
from gpumarket.sdk.logs import log_to_stderr
from gpumarket.sdk.offline import journal_of
from gpumarket.sdk.settings import ClientSettings


async def withdraw_credit(settings: ClientSettings, chain_settings: ChainSettings, key: LocalKey, to: Address | None = None) -> Money:
    """Withdraw what was credited to the key, to itself or `to`; 0 when nothing was. Raises WalletError, ChainError, StateLocked."""
    from gpumarket.settlement.chain import Actions, Sender, connect

    log_to_stderr()
    async with journal_of(settings) as journal:
        chain = await connect(chain_settings)
        try:
            keystore.refuse_test_key(key.address, chain.book.chain_id)
            actions = Actions(chain, Sender(chain, key, journal))
            credited = await actions.credited()
            if credited:
                await actions.withdraw(to)
            return Money(credited)
        finally:
            await chain.close()
