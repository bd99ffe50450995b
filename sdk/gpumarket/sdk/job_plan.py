"""What was ordered, as far as a job's state machine needs it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpumarket.core.terms import JobSpec


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What was ordered, as far as the machine needs it.

    `item_units` are the units of each item (EMBED, INFER, CHECK; empty for GENERATE, where an item is one token). `item_bytes` is the
    size of every item where it is known before (a check of text); 0 lets the first item set it.
    """

    spec: JobSpec
    item_units: tuple[int, ...] = ()
    item_bytes: int = 0
    stop_tokens: frozenset[int] = frozenset()
    attempts_max: int = 5
    top_logprobs: int | None = None
    """Alternatives that come beside each token; None where no logprobs were asked for."""
    item_flaw: Callable[[bytes], str] | None = None
    """INFER and its checks: why an item is not what was asked for; None where items are tokens or float32 rows."""

    def units_of(self, item: int) -> int:
        """Units of the item at an absolute index."""
        return self.item_units[item] if self.item_units else 1

    def completes(self, item: int, data: bytes) -> bool:
        """Whether this item is the answer's last."""
        if self.item_units:
            return item + 1 == len(self.item_units)
        return item + 1 == self.spec.max_output_units or int.from_bytes(data, "little") in self.stop_tokens
