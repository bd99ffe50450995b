"""What a caller hears when something fails: one table from the market's errors to HTTP, in OpenAI's shape.

Invariant: a caller learns what it can do about it, and nothing of the gateway's files, wallet or peers. 4xx is the caller's to mend,
429 and 503 come with when to try again, 502 is a provider's or scheduler's fault, 500 the gateway's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gpumarket.core import errors

RETRY_SECONDS = 2.0
"""When to come back, where nothing says it better: a match is made again within seconds."""
OURS = "the gateway cannot do this now; its log says why"


class Problem(Exception):
    """An answer that is an error. `param` names the parameter at fault; `again_seconds` becomes Retry-After."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        again_seconds: float | None = None,
        retry: bool | None = None,
    ) -> None:
        """`retry`: whether OpenAI's clients should try again by themselves; None leaves it to them."""
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.again_seconds, self.retry = again_seconds, retry

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        if self.code == "insufficient_quota":
            return self.code
        if self.status >= 500:
            return "server_error"
        return _KINDS.get(self.status, "invalid_request_error")

    @property
    def document(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def plain(self) -> dict[str, Any]:
        """The Open Inference Protocol's error object."""
        return {"error": self.message}

    @property
    def headers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.again_seconds is not None:
            found["retry-after"] = str(max(1, math.ceil(self.again_seconds)))
        if self.retry is not None:
            found["x-should-retry"] = "true" if self.retry else "false"
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True)
class Answer:
    """How a class of the market's errors is told. `message` replaces the error's own where that speaks to the gateway's owner."""

    status: int
    message: str = ""
    again: bool = False


TABLE: dict[type[errors.GpumarketError], Answer] = {
    errors.GpumarketError: Answer(500, OURS),
    errors.ConfigError: Answer(500, OURS),
    errors.InvalidRequest: Answer(400),
    errors.JobIdReused: Answer(409),
    errors.WalletError: Answer(500, OURS),
    errors.BadSignature: Answer(502, "a peer's signature does not hold; nothing was paid for it"),
    errors.FundsError: Answer(503, "the gateway's own funds do not cover this job now", again=True),
    errors.OverMaxCost: Answer(400),
    errors.SpendLimitReached: Answer(503, "the gateway has reached the limit that its owner set for a day", again=True),
    errors.NetworkError: Answer(503, "the market cannot be reached now", again=True),
    errors.ChainError: Answer(503, "the chain cannot be relied on now", again=True),
    errors.WrongChain: Answer(500, OURS),
    errors.MatchError: Answer(503, again=True),
    errors.UnknownModel: Answer(404, "the model does not exist, or nobody sells it now"),
    errors.Busy: Answer(503, "every provider that fits is busy", again=True),
    errors.VerificationError: Answer(502),
    errors.ProtocolError: Answer(502, "a peer broke the protocol; what was delivered before is paid, nothing else"),
    errors.JobFailed: Answer(502, "the job ended without a result; what was delivered is paid, nothing else"),
    errors.EngineFailed: Answer(502, "the provider's engine failed"),
    errors.JournalError: Answer(500, OURS),
}
"""An error is told by the first of its classes that is here. One without `message` is told in its own words."""
CODES: dict[type[errors.GpumarketError], str] = {errors.UnknownModel: "model_not_found"}
"""OpenAI's codes, where it has one for the same; else the market's own code."""


OWN_CODES = frozenset(
    {
        "context_length_exceeded",
        "draining",
        "expectation_failed",
        "idempotency_key_in_use",
        "idempotency_key_reused",
        "insufficient_quota",
        "internal_error",
        "invalid_api_key",
        "invalid_body",
        "invalid_idempotency_key",
        "invalid_json",
        "invalid_value",
        "method_not_allowed",
        "missing_required_parameter",
        "model_not_found",
        "model_not_supported",
        "not_found",
        "rate_limit_exceeded",
        "request_timeout",
        "request_too_large",
        "result_rejected",
        "unknown_parameter",
        "unsupported_media_type",
        "unsupported_parameter",
        "unsupported_value",
    }
)
"""What the gateway itself says."""


def codes() -> list[str]:
    """Every code that a caller may hear."""
    return sorted(OWN_CODES | {_code(cls) for cls in errors.by_code().values()})


def problem_of(error: errors.GpumarketError) -> Problem:
    """How one error of the market is told."""
    answer = _answer(type(error))
    again = getattr(error, "retry_after_seconds", RETRY_SECONDS) if answer.again else None
    param = "model" if isinstance(error, errors.UnknownModel) else getattr(error, "param", None)
    return Problem(answer.status, _code(type(error)), answer.message or error.message, again_seconds=again, param=param)


def _answer(cls: type[errors.GpumarketError]) -> Answer:
    return TABLE[next(c for c in cls.__mro__ if c in TABLE)]


def _code(cls: type[errors.GpumarketError]) -> str:
    return "internal_error" if _answer(cls).message == OURS else CODES.get(cls, cls.code)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> Problem:
    """The caller's request is wrong."""
    return Problem(400, code, message, param=param)


def unsupported(param: str, why: str = "") -> Problem:
    """What is asked for is documented by OpenAI, and not done here."""
    return Problem(400, "unsupported_parameter", f"{param} is not supported by this gateway{': ' + why if why else ''}", param=param)


def model_not_found(name: str) -> Problem:
    return Problem(404, "model_not_found", f"the model {name[:200]!r} does not exist, or this key may not use it", param="model")
