"""Two keys of one client: the payment key that signs all day, and the owner key whose tokens the channels hold.

Without an owner in the settings one key is both. With one, the channels are the owner's on chain and name the payment key as their signer:
who steals that key can promise away what the channels hold, and nothing else. The owner's key is opened for deposits and closes only.
Never: a transaction of the owner in the payment key's journal (each account counts its own nonces).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import MetaData

from gpumarket.core import keystore
from gpumarket.core.errors import ConfigError, OutOfFunds
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Address, format_money, hex0x
from gpumarket.sdk.settings import ClientSettings
from gpumarket.settlement.chain.outbox import sender_tables
from gpumarket.settlement.journal import Journal

if TYPE_CHECKING:
    from gpumarket.sdk.chain_link import ChainLink

OWNER_METADATA = MetaData()
sender_tables(OWNER_METADATA)


@dataclass(frozen=True, slots=True)
class Funding:
    """Whose tokens pay. `key` is None while the owner's key is not at hand: then nothing can be opened, topped up or closed."""

    payer: Address
    key: LocalKey | None

    def require(self, settings: ClientSettings) -> LocalKey:
        """The key that pays. Raises OutOfFunds where only the payment key is here."""
        if self.key is None:
            raise OutOfFunds(
                f"only the owner {hex0x(self.payer)} can put tokens into a channel or close it, and its key is not open here",
                hint=f"gpumarket wallet deposit {format_money(settings.deposit_amount)} (it asks for the owner's key)",
            )
        return self.key


def funding_of(settings: ClientSettings, signer: LocalKey, owner_key: LocalKey | None) -> Funding:
    """Who pays by the settings. Raises ConfigError for an owner key that is not the one they name."""
    payer = owner_of(settings)
    if payer is None:
        if owner_key is not None:
            raise ConfigError("an owner key was given, and the settings name no owner", hint="set GPUMARKET_CLIENT_OWNER_KEY_FILE")
        return Funding(signer.address, signer)
    if owner_key is not None and owner_key.address != payer:
        raise ConfigError(
            f"the owner key given is that of {hex0x(owner_key.address)}; the settings name {hex0x(payer)}",
            hint="gpumarket config show client",
        )
    return Funding(payer, owner_key)


def owner_of(settings: ClientSettings) -> Address | None:
    """The owner that the settings name, by address or by keystore; None where the payment key is its own. Raises WalletError."""
    if settings.owner_address is not None:
        return settings.owner_address
    return keystore.address_in(settings.owner_key_file) if settings.owner_key_file is not None else None


def owner_journal(state: Path, owner: Address) -> Journal:
    """Journal of the owner's transactions, open: it holds nonces, and nothing of the payment key."""
    journal = Journal(f"sqlite:///{(state / f'owner-{owner.hex()}.db').resolve()}", OWNER_METADATA)
    journal.open()
    return journal


async def connect(chain_settings: ChainSettings, signer: Address, funding: Funding, key: LocalKey, journal: Journal) -> ChainLink:
    """The chain for both keys; `key` sends what is sent, from its journal.

    Raises WrongChain, Unreachable, ConfigError, or WalletError for a key that everyone has.
    """
    from gpumarket.sdk.chain_link import ChainLink

    link = await ChainLink.open(chain_settings, key, journal, signer=signer, payer=funding.payer)
    try:
        for address in (signer, funding.payer):
            keystore.refuse_test_key(address, link.chain_id)
    except BaseException:
        await link.close()
        raise
    return link
