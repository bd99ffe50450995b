"""What a key's transactions have cost since the process started. Counted where the sender writes a receipt down, never read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class GasTally:
    """Counts of one sender. Wei are the node's word: for display, no decision rests on them."""

    mined: int = 0
    reverted: int = 0
    gas_used: int = 0
    spent_wei: int = 0

    def count(self, receipt: Any, max_fee: int) -> None:
        """One mined transaction; `max_fee` is the most that it offered a unit of gas, where the node does not say what it took."""
        self.mined += receipt["status"] == 1
        self.reverted += receipt["status"] != 1
        used = int(receipt["gasUsed"])
        self.gas_used += used
        self.spent_wei += used * min(max_fee, int(receipt.get("effectiveGasPrice", max_fee)))
