"""Who is in the minority: the delivered result and its checkers' answers, weighed with the rules that the scheduler uses, too. Pure.

One answer against the result proves nothing: either may lie. Two that agree with each other against it reject it; one that agrees with it,
after one that did not, leaves that first checker alone against two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from gpumarket.core.terms import VerificationProfile
from gpumarket.core.units import Address
from gpumarket.settlement.verification import Decision, Evidence, Verdict, decide_items, decide_text, judge


@dataclass(frozen=True, slots=True)
class Panel:
    """A result, the indices of its inputs or rows that were drawn (EMBED, INFER), and the checkers' answers so far."""

    profile: VerificationProfile
    subject: Evidence
    drawn: tuple[int, ...]
    owner_of: Callable[[Address], Address]
    answers: tuple[Evidence, ...] = ()

    def compare(self, answer: Evidence) -> Decision:
        """One answer against the result, whoever of the two is wrong."""
        if self.drawn:
            return decide_items(self.profile, [self.subject.output[i] for i in self.drawn], answer.output)
        return decide_text(self.profile, answer.output[0][4 * self.subject.own_start :] if answer.output else b"")

    def decide(self) -> tuple[Decision, tuple[int, ...]]:
        """The verdict so far, and the indices of the answers that a rejection rests on."""
        for pair in combinations(range(len(self.answers)), 2):
            joint = judge(self.profile, self.subject, [self.answers[i] for i in pair], self.drawn, self.owner_of)
            if joint.verdict is Verdict.REJECTED:
                return joint, pair
        newest = self.compare(self.answers[-1])
        if newest.accepted:
            return newest, ()
        return Decision(Verdict.GREY, newest.statistic, f"contradicted by one checker, which nobody confirms: {newest.reason}"), ()

    @property
    def settled(self) -> bool:
        """Whether no further answer could change the verdict: the newest one agrees with the result, or two reject it."""
        rests_on = self.decide()[1]
        return bool(rests_on) or self.compare(self.answers[-1]).accepted

    def witnesses_against(self, index: int) -> tuple[Evidence, ...]:
        """Two others (answers, or the result itself) that agree with each other against a checker; empty when there are none."""
        accused = self.answers[index]
        others = [*(a for i, a in enumerate(self.answers) if i != index), self.subject]
        if self.compare(accused).accepted:
            return ()
        for pair in combinations(others, 2):
            if judge(self.profile, accused, list(pair), self.drawn, self.owner_of).verdict is Verdict.REJECTED:
                return pair
        return ()
