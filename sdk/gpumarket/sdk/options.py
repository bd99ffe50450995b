"""What a caller may say about a purchase of text, and how it says amounts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from gpumarket.core.errors import ConfigError
from gpumarket.core.units import Money, parse_money
from gpumarket.sdk.constraints import Constraints
from gpumarket.sdk.ordering import Approve

Amount = str | Money | None
"""Text in tokens ("0.01"), or base units."""
Messages = Sequence[Mapping[str, str]]


class TextOptions(TypedDict, total=False):
    """Options of `complete`, and of `chat`. Defaults: 256 tokens, temperature 0.7, top_p 1 (requests.Sampling).

    `seed` (64 bits, signed) makes the same request give the same text again at every honest provider of the same profile; such a result is
    checked, and may be rejected, but never disputed. `stop` names at most 4 strings, before the first of which the text ends: what the
    provider has drawn by then is paid, and nobody checks a text that ended so early. `logprobs`: the chosen token's, and so many (0 to 20)
    alternatives', as the provider states them; None is off. `job_id` (32 bytes, your own) makes the call repeatable: again with the same id
    and the same request it answers with the same job, resumed where it was interrupted, and pays nothing more; with another request it
    raises JobIdReused. `approve` is asked between quote and order, and answers what all of it may cost, or raises (ordering.Terms).
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    job_id: bytes | None
    max_cost: Amount
    approve: Approve | None
    constraints: Constraints
    explain: bool


class ChatOptions(TextOptions, total=False):
    """Options of `chat`: with `messages` instead of a prompt, a conversation of {"role", "content"}."""

    messages: Messages | None


def amount_of(value: Amount) -> Money | None:
    """Base units. Raises ConfigError for a text that is no amount."""
    if value is None or isinstance(value, int):
        return value
    try:
        return parse_money(value)
    except ValueError as error:
        raise ConfigError(str(error)) from error
