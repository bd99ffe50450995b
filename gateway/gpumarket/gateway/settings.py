"""Settings of a gateway: table `[gateway]`, variables GPUMARKET_GATEWAY_*. Its wallet and models are those of table `[client]`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import NonNegativeInt, field_validator

from gpumarket.core.settings import Settings
from gpumarket.core.units import Money, parse_money


class GatewaySettings(Settings):
    """The gateway. Amounts are decimal text in tokens, durations seconds."""

    section: ClassVar[str] = "gateway"

    state: Path = Path("gateway")
    """API keys' hashes, what each has spent, ready.json. One process at a time."""
    listen: str = "127.0.0.1:8080"
    """host:port of the API. Plain HTTP: loopback, or behind whatever ends TLS for you."""
    grpc_listen: str = "127.0.0.1:8081"
    """host:port of the Open Inference Protocol over gRPC, without TLS like `listen`. Empty: none; over REST it is at `listen`."""
    observe_listen: str = "127.0.0.1:0"
    """host:port of /metrics, /healthz and /readyz; `ready.json` names the one that a port 0 became. Empty: none of it."""

    job_cost_max: str = "1"
    """Most that one job, its checks and reruns may cost, whatever a key's budget allows. Each choice of `n` is a job."""
    jobs_max: int = 256
    """Jobs that run at once; what comes on top hears 429 at once instead of waiting."""
    shared_jobs_max: NonNegativeInt = 1
    """Jobs of small requests of one key and embedding model that run at once; those that come meanwhile leave together. 0: never."""
    choices_max: int = 16
    """Most jobs of one request: `n`, times the prompts of a completion."""
    inputs_max: int = 2_048
    """Most inputs of one embedding request, as at OpenAI."""
    output_tokens_default: int = 1_024
    """Output of a chat or a response that names no limit; a model's context may leave less. (A completion's is 16, as at OpenAI.)"""

    body_bytes_max: int = 8 * 1024 * 1024
    """Largest request body."""
    body_seconds: float = 30.0
    """Longest wait for a body that was announced."""
    idempotency_hours: int = 24
    """How long an Idempotency-Key stands for its answer. Keep it below the client's `keep_output_days`: the answer is read from there."""
    drain_seconds: float = 60.0
    """How long jobs under way may go on after SIGTERM; then they are cancelled, and what was delivered is paid."""

    @field_validator("job_cost_max")
    @classmethod
    def _is_money(cls, value: str) -> str:
        if not parse_money(value):
            raise ValueError("a job that may cost nothing can be bought nowhere")
        return value

    @field_validator("jobs_max", "choices_max", "inputs_max", "output_tokens_default", "body_bytes_max", "idempotency_hours")
    @classmethod
    def _at_least_one(cls, value: int) -> int:
        if value < 1:
            raise ValueError("must be at least 1")
        return value

    @property
    def job_cost_limit(self) -> Money:
        """Base units."""
        return parse_money(self.job_cost_max)
