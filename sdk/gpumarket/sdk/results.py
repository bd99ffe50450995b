"""What a job gives back: the answer, and with it what it cost, who gave it, and why it may be trusted.

Money is in base units (10^-18 token); `cost_text` and the like say it for people.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.terms import Lease, Receipt, Task
from gpumarket.core.units import ZERO_ADDRESS, Address, Hash, Money, format_money

if TYPE_CHECKING:
    from gpumarket.v1 import market_pb2, terms_pb2


NOTHING = Money(0)


class VerdictState(enum.StrEnum):
    """What is known about a result."""

    NOT_DRAWN = "not-drawn"
    """The draw said no: paid at once, as most results are."""
    ACCEPTED = "accepted"
    """Recomputed by another provider and found equal within the profile."""
    GREY = "grey"
    """Between the bounds: paid, its provider is checked more from now on."""
    REJECTED = "rejected"
    """Recomputed and found wrong: not paid, and never handed out as a result."""
    UNCHECKED = "unchecked"
    """Drawn for a check, but nobody could make it: accepted for lack of evidence."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one result. `checkers` are the providers whose numbers decided, `cost` what their jobs cost."""

    state: VerdictState
    reason: str = ""
    statistic: float = 0.0
    checkers: tuple[Address, ...] = ()
    cost: Money = NOTHING


@dataclass(frozen=True, slots=True)
class InputTruncated:
    """Warning: an input was longer than the model takes and was cut. `index` counts inputs from 0; lengths are tokens."""

    index: int
    tokens: int
    kept: int

    def __str__(self) -> str:
        return f"input {self.index} has {self.tokens} tokens; the model takes {self.kept}: the rest was left out"


@dataclass(frozen=True, slots=True)
class OutputLimited:
    """Warning: the model's context leaves room for fewer tokens than were asked for."""

    asked: int
    allowed: int

    def __str__(self) -> str:
        return f"{self.asked} tokens were asked for; the model's context leaves room for {self.allowed}"


@dataclass(frozen=True, slots=True)
class LogprobsLost:
    """Warning: logprobs were asked for, but the job was interrupted and they are not kept in the journal."""

    def __str__(self) -> str:
        return "the logprobs of this answer were lost when the job was interrupted"


Warnings = tuple[InputTruncated | OutputLimited | LogprobsLost, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens in and out, as billed."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt. `outcome` is "completed" or why it ended; `amount` is what the client pays for it, fee included."""

    number: int
    provider: Address
    outcome: str
    detail: str
    units: int
    amount: Money


@dataclass(frozen=True, slots=True)
class RejectedResult:
    """A result that was checked, refused and not paid. `cost` is what attempts that were lost before it had earned."""

    job: Hash
    provider: Address
    reason: str
    cost: Money = NOTHING


@dataclass(frozen=True, slots=True)
class Quote:
    """A price before anything is sent. `maximum` is what the job costs at most, fee included."""

    model: str
    digest: Hash
    provider: Address
    prompt_price_per_mtok: Money
    output_price_per_mtok: Money
    fee_ppm: int
    maximum: Money
    prompt_tokens: int
    max_output_tokens: int

    @property
    def maximum_text(self) -> str:
        return format_money(self.maximum)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """What every result carries.

    `cost` is what the job itself costs, `check_cost` what its checks and those of `rejected` cost on top; with what `rejected` cost this
    is `total_cost`, which never passes max_cost. `receipt` is the provider's verified statement, `signed_receipt` the same, signed: None
    only for a text that ended at a stop string and whose provider said nothing more.
    """

    job: Hash
    model: str
    provider: Address
    receipt: Receipt | None
    signed_receipt: terms_pb2.SignedReceipt | None
    lease: Lease
    verdict: Verdict
    cost: Money
    check_cost: Money
    usage: Usage
    attempts: tuple[AttemptRecord, ...]
    rejected: tuple[RejectedResult, ...] = ()
    warnings: Warnings = ()
    explanation: market_pb2.Explanation | None = None

    @property
    def total_cost(self) -> Money:
        """All that was paid on the way to this result."""
        return Money(self.cost + self.check_cost + sum(r.cost for r in self.rejected))

    @property
    def cost_text(self) -> str:
        return format_money(self.cost)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbedResult(JobOutcome, Sequence[NDArray[np.float32]]):
    """Embeddings, one row for each input, in order. `vectors` is the read-only array of shape (inputs, dimensions), `input_tokens` what
    each input was billed with."""

    vectors: NDArray[np.float32]
    input_tokens: tuple[int, ...]

    @overload
    def __getitem__(self, index: int) -> NDArray[np.float32]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[NDArray[np.float32]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self.vectors[index] if isinstance(index, int) else list(self.vectors[index])

    def __len__(self) -> int:
        return len(self.vectors)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return iter(self.vectors)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChatResult(JobOutcome):
    """Text. `finish_reason` is "stop" (the model ended, or a stop string came, before which `text` ends) or "length" (max_tokens).

    `tokens` are all that were delivered and billed, a few of them perhaps after the stop string; `logprobs`, where they were asked for,
    are of all of `tokens`.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InferResult(JobOutcome):
    """Tensors: read-only arrays by the name of the output; `usage.prompt_tokens` are the rows that were billed."""

    outputs: Mapping[str, NDArray[Any]]


JobResult = EmbedResult | ChatResult | InferResult


class Alternative(NamedTuple):
    """A token that might have come, with the bytes it stands for and its logprob."""

    token: int
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model thought of a token: natural logarithms of the softmax of its raw logits, at temperature 1 and before top_p.

    The provider's word alone, which nobody checks. `raw` are the token's bytes (a part of a character, perhaps), `top` the likeliest
    tokens, likeliest first, among which the one that came may be missing.
    """

    token: int
    text: str
    raw: bytes
    logprob: float
    top: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text as it came. `text` lags behind `tokens` while a character is incomplete or a stop string may be in the making.
    `logprobs` are those of `tokens`; None where none were asked for."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How a stream ended, and what it cost.

    `outcome` is "completed", "cancelled" (the reader left), "rejected" (checked and refused: `cost` is what stays paid) or "failed".
    `units` are the output tokens that were delivered; a cancelled job pays for these alone, unless its provider had the whole answer out.
    `usage` counts the prompt all the same. `receipt` is the provider's last statement, None where it gave none.
    """

    outcome: str
    job: Hash
    provider: Address | None
    usage: Usage
    units: int
    cost: Money
    receipt: Receipt | None = None
    signed_receipt: terms_pb2.SignedReceipt | None = None
    finish_reason: str = ""


@dataclass(frozen=True, slots=True)
class JobSummary:
    """A job in the journal. `state`: ordered, leased, delivered, done, rejected, cancelled, failed. Times are unix seconds."""

    job: Hash
    task: Task
    model: str
    purpose: str
    state: str
    provider: Address | None
    attempts: int
    cost: Money
    max_cost: Money
    verdict: str
    created_at: int
    deadline: int

    @property
    def resumable(self) -> bool:
        """Whether `resume` still has something to do."""
        return self.state in ("ordered", "leased", "delivered")


@dataclass(frozen=True, slots=True)
class Spent:
    """What a purchase cost until now, in base units, with its checks and reruns. `over`: nothing of it runs any more."""

    amount: Money
    over: bool


@dataclass(frozen=True, slots=True)
class OfferView:
    """A provider of a model as the scheduler's book and the registry show it. Prices per 1,000,000 tokens."""

    provider: Address
    owner: Address | None
    stake: Money
    endpoint: str
    tls_key_hash: Hash
    region: str
    gpus: tuple[str, ...]
    measured_mflops: int
    """The provider's own word, of its GPUs together: 10^6 float32 operations per second; 0 before the first."""
    model: Hash
    name: str
    dtype: str
    warm: bool
    checks: bool
    prompt_price_per_mtok: Money
    output_price_per_mtok: Money
    profile: Hash
    reputation_ppm: int
    capacity: int = 0
    """Jobs that the provider says it runs at once."""
    proven_mflops: int = 0
    """What the scheduler's own challenge measured of its slowest GPU, the way there and back included; 0 while no proof holds."""


@dataclass(frozen=True, slots=True)
class AccountView:
    """The client's money: wallet, and the channel to its scheduler (None before the first job)."""

    address: Address
    """The payment key's."""
    balance: Money
    """Of the owner's wallet, which is the same where one key is both."""
    scheduler: Address
    channel: Hash | None = None
    deposit: Money = NOTHING
    voucher: Money = NOTHING
    """Everything promised so far."""
    billed: Money = NOTHING
    """What the client's own acks add up to."""
    scheduler_used: Money = NOTHING
    """What the scheduler says it has earned."""
    held: Money = NOTHING
    open: Money = NOTHING
    expires_at: int = 0
    warnings: tuple[str, ...] = field(default=())
    owner: Address = ZERO_ADDRESS
    """Whose tokens the channel holds."""
