"""What the demo shows, as values: `as_json` has the documented keys, the rest is for people. Amounts are base units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.testnet.chain_facts import Settlement


@dataclass(frozen=True, slots=True)
class JobLine:
    """One job. `purpose`: user, rerun (after a rejection) or check; `why` is the match in words."""

    id: Hash
    task: str
    model: str
    provider: Address | None
    state: str
    amount: Money
    attempts: int
    purpose: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class ReceiptLine:
    """Whether the receipt that a job's client holds verifies."""

    job: Hash
    valid: bool


@dataclass(frozen=True, slots=True)
class VerificationLine:
    """The verdict on one result."""

    job: Hash
    provider: Address
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True)
class WalletLine:
    """Tokens in a wallet before the first job and after the last redemption."""

    name: str
    address: Address
    before: Money
    after: Money


@dataclass(frozen=True, slots=True)
class Seconds:
    """From the start: everything ready; the first result in hand; everything settled and checked."""

    up: float
    first_result: float
    total: float


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The whole demonstration."""

    jobs: tuple[JobLine, ...]
    receipts: tuple[ReceiptLine, ...]
    verifications: tuple[VerificationLine, ...]
    settlements: tuple[Settlement, ...]
    cheater: Address
    caught: bool
    paid_to_cheater: Money
    question: str
    answer: tuple[str, ...]
    text: str
    invariants: Mapping[str, tuple[bool, str]]
    seconds: Seconds
    wallets: tuple[WalletLine, ...]
    gas: int
    names: Mapping[Address, str] = field(default_factory=dict)

    @property
    def gas_per_job(self) -> float:
        """Gas of all redemptions over all jobs, checks included."""
        return self.gas / max(1, len(self.jobs))

    def problems(self) -> list[str]:
        """What does not hold; empty when the demo succeeded."""
        found = [f"{name} does not hold: {seen}" for name, (holds, seen) in self.invariants.items() if not holds]
        found += [f"the receipt of job {hex0x(line.job)} does not verify" for line in self.receipts if not line.valid]
        redone = any(line.purpose == "rerun" and line.state == "done" and line.provider != self.cheater for line in self.jobs)
        needs = {
            "the cheater was not caught": self.caught,
            f"the cheater was paid {self.paid_to_cheater}": self.paid_to_cheater == 0,
            "the cheater's work was not done again elsewhere": redone,
            "there is no answer": bool(self.answer),
            "no text was generated": bool(self.text),
            "nothing was settled": bool(self.settlements),
            "no receipt was given": bool(self.receipts),
        }
        return found + [problem for problem, holds in needs.items() if not holds]

    def as_json(self) -> dict[str, Any]:
        """The documented document."""
        return {
            "jobs": [self._job(line) for line in self.jobs],
            "receipts": [{"job": hex0x(line.job), "valid": line.valid} for line in self.receipts],
            "verifications": [
                {"job": hex0x(line.job), "provider": hex0x(line.provider), "verdict": line.verdict, "reason": line.reason}
                for line in self.verifications
            ],
            "settlements": [
                {"payer": hex0x(s.payer), "payee": hex0x(s.payee), "amount": s.amount, "tx": hex0x(s.tx), "gas": s.gas}
                for s in self.settlements
            ],
            "cheater": {"provider": hex0x(self.cheater), "caught": self.caught, "paid": self.paid_to_cheater},
            "answer": "\n\n".join(self.answer),
            "invariants": {name: holds for name, (holds, _) in self.invariants.items()},
            "seconds": {"up": self.seconds.up, "first_result": self.seconds.first_result, "total": self.seconds.total},
        }

    def name(self, address: Address | None) -> str:
        """A role's name, or its address."""
        return "" if address is None else self.names.get(address, hex0x(address))

    @staticmethod
    def _job(line: JobLine) -> dict[str, Any]:
        return {
            "id": hex0x(line.id),
            "task": line.task,
            "model": line.model,
            "provider": hex0x(line.provider) if line.provider else "",
            "state": line.state,
            "amount": line.amount,
            "attempts": line.attempts,
            "purpose": line.purpose,
            "match": line.why,
        }
