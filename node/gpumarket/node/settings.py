"""Settings of a provider: one TOML table `[provider]`, every default with its reason.

Invariant: money is text here ("0.02", in tokens) and becomes base units once, through `parse_money`. No secret is a setting, only paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import field_validator

from gpumarket.core.settings import Settings, StakedSettings
from gpumarket.core.units import Address, Money, parse_address, parse_money

_ROLE_BITS = {"provider": 1, "verifier": 4}
"""Role bits of the StakeRegistry contract."""


class ModelSetting(Settings):
    """One model on sale."""

    model: str
    """Digest (0x…) or an alias of the model store."""
    prompt_price: str = "0.02"
    """Tokens of the market per 1,000,000 input tokens."""
    output_price: str = "0.10"
    """Tokens of the market per 1,000,000 generated tokens; has no meaning for embeddings."""
    warm: bool = False
    """Load at start. An embedding model is small and is always loaded at start; a decoder takes gigabytes and waits for its first lease."""
    slots: int = 4
    """Jobs of this model that run at once; more of them share one batch, and each gets slower."""

    @field_validator("slots")
    @classmethod
    def _at_least_one(cls, value: int) -> int:
        if value < 1:
            raise ValueError("slots must be at least 1")
        return value

    @field_validator("prompt_price", "output_price")
    @classmethod
    def _is_money(cls, value: str) -> str:
        parse_money(value)
        return value

    @property
    def prompt_price_per_mtok(self) -> Money:
        return parse_money(self.prompt_price)

    @property
    def output_price_per_mtok(self) -> Money:
        return parse_money(self.output_price)


class ProviderSettings(StakedSettings):
    """The provider daemon."""

    section: ClassVar[str] = "provider"

    state: Path = Path("provider")
    """Journal, TLS and p2p keys, `ready.json`. One process at a time."""
    listen: str = "127.0.0.1:0"
    """Address of the Provider service; port 0 takes a free one and keeps it for the next start."""
    advertise: str = ""
    """host:port that others reach it at; empty is what it listens on."""
    key_file: Path = Path("key.json")
    """Wallet key (Web3 keystore v3)."""
    password_file: Path = Path("password")
    """File with the keystore's password, mode 0600."""
    observe_listen: str = "127.0.0.1:0"
    """host:port of /metrics, /healthz and /readyz; `ready.json` names the one that a port 0 became. It asks nobody who they are and shows
    sums of money: loopback, until its owner opens it to the network of whoever watches. Empty: none of it."""
    p2p_listen: str = "/ip4/127.0.0.1/tcp/0"
    p2p_bootstrap: tuple[str, ...] = ()
    """Multiaddrs with /p2p/<id> of nodes to join through. Empty: heartbeats alone carry the offer."""
    region: str = ""
    """ISO 3166 code or a free label; clients can ask for it."""
    stake: str = "200"
    """Stake to hold at least; more exposure needs more. Twice what a dispute locks, so that work of two clients can be judged at once."""
    faucet: bool = True
    """On a local test chain, take test tokens when the balance does not cover the stake. Without meaning elsewhere."""
    roles: tuple[Literal["provider", "verifier"], ...] = ("provider", "verifier")
    schedulers: tuple[str, ...] = ()
    """Addresses of the schedulers to serve; empty is every one registered on chain."""
    models: tuple[ModelSetting, ...] = ()
    model_store: Path = Path("models")
    checks: bool = True
    """Take `check` jobs: paid work that keeps the other providers honest."""

    panel: bool = False
    """Be drawn to judge disputes about the models on sale. Earns fees; locks a seat's stake (Disputes.terms) of what `stake` holds, so
    that is to be raised first; whoever is drawn and stays away pays. Off: the lists are left, panels already drawn are still served."""

    queue_limit: int = 16
    """Jobs that may wait for a slot, per model; the next one is told when to come back."""
    window_units_max: int = 64
    """Largest window of generated tokens that a lease may name: what one job can cost when its client stops acknowledging."""
    embed_window_units_max: int = 32_768
    """The same for input tokens of embeddings and checks, which are cheap."""
    infer_window_units_max: int = 4_096
    """The same for rows of tensor jobs, whose answers come to 4 MiB at most."""
    credit: str = ""
    """Most that one scheduler may owe at first. Empty: one window of every job that can be open at once, of the dearest model."""
    credit_growth: float = 1.0
    """How much the limit grows for each token paid: 1 lets a scheduler owe what it has paid so far, on top."""
    ack_seconds: float = 20.0
    """A client that holds a full window and says nothing for this long has left."""
    final_ack_seconds: float = 10.0
    """How long to wait for the last ack after the receipt; the claim goes out without it then."""
    channel_margin_seconds: int = 600
    """A spoke must live this long past a lease's deadline, so that its voucher can still be redeemed."""
    drain_seconds: float = 20.0
    """After SIGTERM, how long running jobs may go on."""

    offer_seconds: int = 600
    """Life of a signed offer; a fresh one goes out at half of it, or at once when something changed."""
    heartbeat_seconds: float = 1.0
    claim_retry_seconds_max: float = 30.0
    """Longest pause between two tries of one claim."""
    gpu_proof_seconds: float = 5.0
    """At most one proof per scheduler in this time: each costs about a second of the GPU."""
    gpu_proof_size_max: int = 8_192
    """Largest matrix of a proof (n x n float32); 8,192 is 256 MiB each."""

    redeem_gas_share: float = 0.02
    """Redeem a channel when gas costs less than this share of what it brings."""
    gas_value: float = 1.0
    """What one wei of gas money is worth in base units of the token: the exchange rate of the two, for that comparison."""
    redeem_margin_seconds: int = 24 * 3600
    """Redeem whatever gas costs (below the value) when a channel has less than this to live."""
    redeem_exposure: str = ""
    """Redeem when at least this much lies in vouchers, whatever gas costs; empty sets no limit."""
    redeem_seconds: float = 30.0
    """How often to look whether something is due."""
    redeem_at_exit: bool = False
    """Redeem everything on SIGTERM. Off: the vouchers are in the journal; the next start or `gpumarket wallet redeem` brings them in."""

    @field_validator("stake")
    @classmethod
    def _stake_is_money(cls, value: str) -> str:
        parse_money(value)
        return value

    @field_validator("credit", "redeem_exposure")
    @classmethod
    def _may_be_money(cls, value: str) -> str:
        if value:
            parse_money(value)
        return value

    @field_validator("schedulers")
    @classmethod
    def _are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_address(text)
        return value

    @property
    def role_bits(self) -> int:
        """The registry's bitmask."""
        return sum(_ROLE_BITS[role] for role in set(self.roles))

    @property
    def stake_units(self) -> Money:
        return parse_money(self.stake)

    @property
    def scheduler_addresses(self) -> frozenset[Address]:
        return frozenset(parse_address(text) for text in self.schedulers)
