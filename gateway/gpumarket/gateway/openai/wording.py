"""Parts of answers that endpoints share: usage, log probabilities, what ends a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpumarket.sdk.results import JobOutcome, TokenLogprob

DONE = b"data: [DONE]\n\n"
REJECTED = "result_rejected"
VOID = "a check found what was streamed wrong: it is void and not paid; ask again"


def usage_of(results: Sequence[JobOutcome]) -> dict[str, Any]:
    """Tokens of all choices added up, as billed: each choice reads the prompt for itself."""
    prompt = sum(result.usage.prompt_tokens for result in results)
    output = sum(result.usage.output_tokens for result in results)
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def chat_logprobs(tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    """As chat completions and responses have them; None where none were asked for."""
    return None if tokens is None else {"content": [token_entry(token) for token in tokens], "refusal": None}


def token_entry(token: TokenLogprob) -> dict[str, Any]:
    """A token and its likeliest rivals."""
    top = [{"token": t.text, "bytes": list(t.raw), "logprob": t.logprob} for t in token.top]
    return {"token": token.text, "bytes": list(token.raw), "logprob": token.logprob, "top_logprobs": top}
