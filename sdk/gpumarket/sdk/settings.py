"""Settings of a client: one TOML table `[client]`, every default with its reason.

Invariant: money is text here ("0.01", in tokens) and becomes base units once, through `parse_money`. No secret is a setting, only paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import field_validator

from gpumarket.core.settings import Settings
from gpumarket.core.units import Address, Hash, Money, parse_address, parse_hash, parse_money


class ClientSettings(Settings):
    """The client: SDK and command line."""

    section: ClassVar[str] = "client"

    state: Path = Path("client")
    """Journal of jobs, vouchers and channels, and the tokenizer cache. One process at a time: two would sign against each other."""
    key_file: Path = Path("client/key.json")
    password_file: Path | None = None
    """File with the key's password; without it the caller passes the password (the command line asks)."""
    owner: str = ""
    """Address of the owner, whose tokens the channels hold; empty: that of `owner_key_file`, and without one the key above pays for itself.
    With an owner, whoever steals the key above gets at the channels' deposits and nothing else."""
    owner_key_file: Path | None = None
    """The owner's keystore; opened by `gpumarket wallet deposit` and `close-channel` only. With `owner` set it may be away between them."""
    owner_password_file: Path | None = None
    lock_file: Path = Path("models.lock")
    """Aliases of models, each with its digest: part of your project, to be committed like any lock file."""

    scheduler: str = ""
    """Address of the scheduler to trade through; empty takes the one with the lowest fee in the registry, larger stake first, and
    another one for new orders while that does not answer. A named one is never replaced."""
    deposit: str = "10"
    """Deposit of a channel when one is opened: enough for thousands of small jobs, and all that a channel can ever cost."""
    channel_days: int = 30
    """Life of a channel; what is left of its deposit comes back after it, or at a cooperative close at once."""
    exposure: str = "1"
    """W: a voucher never exceeds what was used by more than this, so a scheduler that vanishes takes at most this; each of several does."""
    spend_limit: str = ""
    """Most that vouchers may add within any 24 hours; empty: no cap but the deposit. `gpumarket wallet limit` sets one in the journal; the
    smaller one holds."""
    faucet: bool = False
    """Take test tokens when the balance is short; works on the local test chain (31337) only."""

    check_probability: float = 0.05
    """Share of results that are recomputed by another provider: at 5 % a cheat is caught after 20 jobs on average, for 5 % of the cost."""
    check_share: float = 0.1
    """Share of an embedding job's inputs, or a tensor job's rows, that a check recomputes (at least one)."""
    checks_max: int = 3
    """Checkers asked about one result before it counts as undecided; the third is only asked when the first two disagree."""
    reruns_max: int = 2
    """How often a rejected job is run again elsewhere, within the same max_cost."""
    profiles: str = ""
    """Comma separated digests of verification profiles to accept; empty accepts those shipped (gpumarket.settlement.verification)."""

    job_seconds: int = 300
    """Deadline of a job: after it no attempt starts or earns."""
    attempts_max: int = 5
    """Attempts of one job over which a failing provider is replaced."""
    stall_seconds: float = 60.0
    """Silence on a running attempt after which it counts as lost; a model that is loaded on its first lease needs most of it."""
    patience_seconds: float = 30.0
    """How long a scheduler that does not answer is tried again, and then another one for new orders: a restart takes a few seconds, and a
    channel to another one its own deposit."""
    busy_seconds: float = 10.0
    """How long an order is tried again while every provider that fits is busy: places come free as jobs end."""
    failover_seconds: float = 10.0
    """How long another provider is looked for when an attempt was lost and nobody is free."""
    keep_output_days: int = 7
    """Requests and outputs of finished jobs are erased from the journal after this; receipts and amounts stay."""

    @field_validator("deposit", "exposure")
    @classmethod
    def _is_money(cls, value: str) -> str:
        parse_money(value)
        return value

    @field_validator("spend_limit")
    @classmethod
    def _is_money_or_nothing(cls, value: str) -> str:
        if value:
            parse_money(value)
        return value

    @field_validator("scheduler", "owner")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if value:
            parse_address(value)
        return value

    @field_validator("profiles")
    @classmethod
    def _are_digests(cls, value: str) -> str:
        for part in filter(None, value.split(",")):
            parse_hash(part.strip())
        return value

    @field_validator("check_probability")
    @classmethod
    def _is_probability(cls, value: float) -> float:
        if not 0.0 <= value <= 1.0:
            raise ValueError("a probability lies between 0 and 1")
        return value

    @field_validator("check_share")
    @classmethod
    def _is_share(cls, value: float) -> float:
        if not 0.0 < value <= 1.0:
            raise ValueError("a share lies above 0 and not above 1")
        return value

    @field_validator("job_seconds", "attempts_max", "checks_max", "channel_days")
    @classmethod
    def _at_least_one(cls, value: int) -> int:
        if value < 1:
            raise ValueError("must be at least 1")
        return value

    @property
    def scheduler_address(self) -> Address | None:
        return parse_address(self.scheduler) if self.scheduler else None

    @property
    def owner_address(self) -> Address | None:
        return parse_address(self.owner) if self.owner else None

    @property
    def deposit_amount(self) -> Money:
        """Base units."""
        return parse_money(self.deposit)

    @property
    def exposure_limit(self) -> Money:
        """W in base units."""
        return parse_money(self.exposure)

    @property
    def spend_limit_amount(self) -> Money | None:
        """The day's cap in base units, None for none."""
        return parse_money(self.spend_limit) if self.spend_limit else None

    @property
    def accepted_profiles(self) -> frozenset[Hash]:
        """Digests that the owner named; empty means those shipped."""
        return frozenset(parse_hash(part.strip()) for part in filter(None, self.profiles.split(",")))
