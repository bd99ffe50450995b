"""What a scenario tells the world while it runs, as facts that a later look into its database is held against.

A scenario is a module with `work(folder, say, turn=0)`, which drives a role's own code over a database under `folder`, and
`verify(folder, said)`, which opens that database again with the role's own code, in a process that never saw the first one, and goes on
with turn 1. `say` is called at the very moment when something may be seen outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

NOW = 1_800_000_000
Fact = Mapping[str, Any]
Say = Callable[[Fact], None]


class Scenario(Protocol):
    """A module of this folder."""

    FILE: str
    """Name of the database."""

    def work(self, folder: Path, say: Say, turn: int = 0) -> Awaitable[None]: ...
    def verify(self, folder: Path, said: Sequence[Fact]) -> Awaitable[None]: ...


class Lost(AssertionError):
    """Acknowledged, and not there any more."""


class DoublySigned(AssertionError):
    """Two different signatures for one place, or a lower one after a higher one (I3)."""


class WrongBalance(AssertionError):
    """Books that add up to something else than what they say."""


class FixedClock:
    """A clock that stands still."""

    def __init__(self, now: int = NOW) -> None:
        self.at = now

    def now(self) -> int:
        return self.at

    def monotonic(self) -> float:
        return float(self.at)


class SeededRandom:
    """The same tokens in every run of one seed."""

    def __init__(self, seed: str) -> None:
        self._seed, self._count = seed, 0

    def token(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(f"{self._seed} {self._count}".encode()).digest(size)


def of_kind(said: Sequence[Fact], kind: str) -> list[Fact]:
    """Facts of one kind, in order."""
    return [fact for fact in said if fact["kind"] == kind]


def require_one_signature(said: Sequence[Fact]) -> None:
    """I3 over everything signed in all lives: one signature per place, and of a channel's vouchers none below an earlier one."""
    places: dict[tuple[str, str], str] = {}
    highest: dict[str, int] = {}
    for fact in of_kind(said, "signed"):
        place = (fact["what"], fact["at"])
        if places.setdefault(place, fact["signature"]) != fact["signature"]:
            raise DoublySigned(f"two signatures for {place}")
        if fact["what"] == "voucher":
            channel, _, cumulative = fact["at"].partition(" ")
            if int(cumulative) < highest.get(channel, 0):
                raise DoublySigned(f"a voucher of {cumulative} after one of {highest[channel]}")
            highest[channel] = int(cumulative)


def voucher_signed(channel: bytes, cumulative: int, signature: bytes) -> Fact:
    """The fact that a voucher went out."""
    return {"kind": "signed", "what": "voucher", "at": f"{channel.hex()} {cumulative}", "signature": signature.hex()}
