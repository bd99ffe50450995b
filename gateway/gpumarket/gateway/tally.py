"""What a gateway counts as it works, in plain numbers; `metrics` shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gpumarket.sdk.results import JobOutcome


def _unobserved(_seconds: float) -> None: ...


@dataclass(slots=True)
class Tally:
    """Since the process started."""

    requests: Counter[str] = field(default_factory=Counter)
    """By endpoint."""
    answers: Counter[str] = field(default_factory=Counter)
    """By class of status: 2xx, 4xx, 5xx, left (the caller went away)."""
    problems: Counter[str] = field(default_factory=Counter)
    """Errors, by code."""
    jobs: Counter[str] = field(default_factory=Counter)
    """Results, by model."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    observe_first: Callable[[float], None] = _unobserved
    """Takes the seconds from a request to its first piece."""
    observe_whole: Callable[[float], None] = _unobserved

    def bought(self, results: Sequence[JobOutcome]) -> None:
        """Count the results of one answer."""
        for result in results:
            self.jobs[result.model] += 1
            self.prompt_tokens += result.usage.prompt_tokens
            self.output_tokens += result.usage.output_tokens
