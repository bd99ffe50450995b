"""What one provider has done since its process started, as plain counts: whoever shows them asks. Nothing decides by them.

Models are counted by digest, errors by code: both are sets that this provider knows, nothing that a caller writes becomes a key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from gpumarket.core.units import Hash


def _unobserved(model: Hash, seconds: float) -> None:
    """Nobody watches."""


@dataclass(slots=True)
class Tally:
    """Counts of attempts and of those refused."""

    attempts: Counter[str] = field(default_factory=Counter)
    """Attempts that ended, by outcome."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Attempts that were not taken, by the error's code."""
    tokens: Counter[Hash] = field(default_factory=Counter)
    """Units computed: generated tokens, tokens embedded, tokens checked."""
    prompt_tokens: Counter[Hash] = field(default_factory=Counter)
    """Input tokens of the attempts that began to give output."""
    canaries: Counter[str] = field(default_factory=Counter)
    """Canary jobs: "ok" and "failed"."""
    on_first: Callable[[Hash, float], None] = _unobserved
    """Told of each attempt's first output: the model, and the seconds since its client opened it."""
