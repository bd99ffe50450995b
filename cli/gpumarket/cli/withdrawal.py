"""Pulling credited money out of the channels' contract: the wallet, its journal (nonces live there) and the chain, without a scheduler."""

from __future__ import annotations

from gpumarket.core import keystore
from gpumarket.core.daemon import StateFolder
from gpumarket.core.settings import ChainSettings
from gpumarket.core.units import Money
from gpumarket.sdk.settings import ClientSettings
from gpumarket.sdk.tables import METADATA


async def withdraw_credit(settings: ClientSettings, chain_settings: ChainSettings, password: str) -> Money:
    """Withdraw to the wallet what was credited to it; 0 when nothing was. Raises WalletError, ChainError, StateLocked."""
    from gpumarket.settlement.chain import Actions, Sender, connect
    from gpumarket.settlement.journal import Journal

    key = keystore.load(settings.key_file, password)
    with StateFolder(settings.state) as state:
        journal = Journal(f"sqlite:///{(state / 'journal.db').resolve()}", METADATA)
        journal.open()
        try:
            chain = await connect(chain_settings)
            try:
                actions = Actions(chain, Sender(chain, key, journal))
                credited = await actions.credited()
                if credited:
                    await actions.withdraw()
                return Money(credited)
            finally:
                await chain.close()
        finally:
            await journal.close()
