"""Settings of a scheduler. Every default has its reason beside it; amounts are decimal text in tokens, durations seconds."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import field_validator

from gpumarket.core.settings import StakedSettings
from gpumarket.core.units import Money, parse_money
from gpumarket.scheduler.score import Weights


class SchedulerSettings(StakedSettings):
    """Table [scheduler] of the configuration file, variables GPUMARKET_SCHEDULER_*."""

    section: ClassVar[str] = "scheduler"

    state: Path = Path("~/.gpumarket/scheduler")
    """Ledger, TLS key, p2p identity, ready.json. One process at a time."""
    key_file: Path = Path("~/.gpumarket/scheduler/key.json")
    """Keystore v3 of the wallet that stakes, signs leases and pays providers."""
    password_file: Path = Path("~/.gpumarket/scheduler/password")
    """Secrets are never settings: the file holds the keystore's password."""
    listen: str = "127.0.0.1:0"
    """Address of the Market service; loopback and any free port, until its owner opens it to a network."""
    advertise: str = ""
    """host:port that others reach it at, as registered on chain; empty is the address it listens on."""
    observe_listen: str = "127.0.0.1:0"
    """host:port of /metrics, /healthz and /readyz; `ready.json` names the one that a port 0 became. It asks nobody who they are and shows
    sums of money: loopback, until its owner opens it to the network of whoever watches. Empty: none of it."""
    p2p_listen: str = "/ip4/127.0.0.1/tcp/0"
    p2p_bootstrap: tuple[str, ...] = ()
    database: str = ""
    """Empty is SQLite in the state folder. postgresql+psycopg://user@host/database keeps the ledger in PostgreSQL (extra `postgres`): one
    database for each scheduler, reached without a transaction pooler; the password stands in the file that PGPASSFILE names."""

    fee_ppm: int = 10_000
    """1 % on top of what providers earn: what a scheduler lives from, and what clients compare."""
    stake: str = "1000"
    """Five times a provider's: clients hold vouchers against a scheduler, and choose by fee and stake."""
    explore_share: float = 0.05
    """Draws kept for newcomers: one in twenty, so that a new provider is judged within a day at modest traffic."""
    stake_factor: int = 2
    """k: a provider's stake covers its reserved and held earnings this many times, so that cheating on all of them loses."""

    check_seconds: int = 60
    """A held job is owed after this: long enough for two check jobs, short enough that providers wait a minute at most."""
    max_job_seconds: int = 3_600
    """Farthest deadline: bounds how long money stays reserved, and how long orders are remembered against replay."""
    claim_grace_seconds: int = 120
    """After a deadline a provider may be restarting; then the maximum goes back to the client."""
    reservation_seconds: float = 5.0
    """A place that nobody uses is free again after this."""
    reservations_per_channel: int = 500
    """Places one client may hold reserved at once; more are refused as busy."""
    channel_margin_seconds: int = 7_200
    """How long after a deadline a channel must still be open: check time, claim grace and an hour to redeem, twice."""

    faucet: bool = True
    """Take test tokens when the balance is short. Only on the local test chain, where they are worth nothing."""
    redeem_gas_share: float = 0.01
    """Redeem clients' vouchers when gas costs at most this share of them."""
    redeem_margin_seconds: int = 6 * 3_600
    """Redeem at whatever cost this long before a channel may close."""
    redeem_seconds: float = 60.0
    """Between two looks at what is due."""
    gas_value: float = 1.0
    """What a wei of gas is worth in base units of the token; 1 on test networks, where both have 18 decimals and no price."""
    drain_seconds: float = 5.0
    """After SIGTERM, claims and reports are still served this long; they are idempotent and are sent again after a restart."""

    window_units: int = 32
    """Generated tokens that a provider streams ahead of the acks: its exposure, a second or two of work."""
    embed_window_units: int = 16_384
    """The same for input tokens of embeddings: a batch of 64 texts of 256 tokens."""
    infer_window_units: int = 256
    """The same for rows of tensor jobs: a few passes of an engine."""

    spoke_deposit: str = "50"
    """What a provider's channel is opened with: thousands of jobs, so that gas is a small share."""
    spoke_refill: str = "10"
    """Below this much free, the channel is topped up by another deposit."""
    spoke_seconds: int = 30 * 86_400
    """Life of a provider's channel; it is prolonged when a quarter is left."""
    spoke_idle_seconds: int = 7 * 86_400
    """A provider that was not seen for a week has its channel closed, so that the deposit comes back before the channel's expiry. What was
    vouchered is paid out first."""
    spoke_grace_seconds: int = 86_400
    """An expired channel is left to its provider for a day more, in which it may redeem; then what is owed is paid and it is closed."""
    reclaim_seconds: float = 600.0
    """Between two looks at what may come back: nothing is lost by waiting."""

    cpu_challenge_size: int = 512
    cpu_challenge_repeats: int = 8
    """2 GFLOP: 50 ms on one core, enough to be timed."""
    gpu_challenge_size: int = 4_096
    gpu_challenge_repeats: int = 32
    """4.4 TFLOP over 64 MiB matrices: under a second on a GPU, minutes on a CPU that poses as one."""
    gpu_fill_share: float = 0.02
    """Of a GPU's stated memory, filled with products that are kept and read back. Checking costs this machine about 25 ms a product of
    64 MiB, 1 s for this share of an H200; jobs run beside it and need the rest. 0 fills nothing."""
    gpu_read_seconds: float = 1.0
    """Longest usual answer to a read of a few rows, the way there and back included. Who keeps nothing computes half of the chain for each:
    raise the share so that this takes longer than a read may."""
    cpu_floor_mflops: int = 100
    gpu_floor_mflops: int = 500_000
    """Slowest rate taken, transfer and hashing included. 0.5 TFLOP/s is below any GPU of the last ten years and above most CPUs."""
    challenge_seconds: float = 60.0
    """Most time for one provider's answers, all its GPUs together."""
    challenge_repeat_seconds: float = 1_800.0
    """Mean time between two proofs of one provider; drawn at random, so that it cannot be foreseen."""
    challenges_at_once: int = 2
    """Checking costs this machine n² a link."""

    @field_validator("stake", "spoke_deposit", "spoke_refill")
    @classmethod
    def _is_money(cls, text: str) -> str:
        parse_money(text)
        return text

    @field_validator("state", "key_file", "password_file")
    @classmethod
    def _expand(cls, path: Path) -> Path:
        return path.expanduser()

    @property
    def weights(self) -> Weights:
        """The score's published weights."""
        return Weights()

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{(self.state / 'ledger.db').absolute()}"

    @property
    def stake_amount(self) -> Money:
        return parse_money(self.stake)

    @property
    def spoke_deposit_amount(self) -> Money:
        return parse_money(self.spoke_deposit)

    @property
    def spoke_refill_amount(self) -> Money:
        return parse_money(self.spoke_refill)
