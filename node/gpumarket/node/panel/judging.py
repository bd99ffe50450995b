"""From evidence to a number: opens what the challenge committed to, and has this provider's own engine compute it again.

Whatever the challenger shows that does not open what the provider signed shows nothing: the number is 0, in order. What goes wrong on our
own side is an error and no number, so that a broken engine never judges anybody. Never: a word of the evidence in a log or an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gpumarket.core.codec import parse
from gpumarket.core.errors import BadReceipt, BadSignature, Busy, ConfigError, EngineFailed, ProtocolError, UnknownModel
from gpumarket.core.seeds import require_disputable
from gpumarket.core.signing import Domain
from gpumarket.core.terms import VerificationProfile, keccak256
from gpumarket.core.units import Hash, hex0x
from gpumarket.node.engines import Engines
from gpumarket.node.panel.recompute import recompute, work_of
from gpumarket.settlement.disputes import NUMBER_MAX, Dispute, number
from gpumarket.settlement.verification import Evidence, open_evidence, profile_by_digest
from gpumarket.v1 import market_pb2 as market

NOTHING_SHOWN = 0
SALT_BYTES = 32
"""sha256(salt | request) is the same for other cuts of the same bytes: a salt of another length opens nothing for certain."""


class Judge:
    """Judges evidence about the models on sale here."""

    def __init__(self, domain: Domain, engines: Engines) -> None:
        self._domain, self._engines = domain, engines

    @property
    def models(self) -> Mapping[Hash, object]:
        """What this provider can compute."""
        return self._engines.seats

    async def number(self, dispute: Dispute, evidence: bytes) -> int:
        """The number that this provider stands for. Raises ProtocolError for other bytes than the challenge committed to, EngineFailed."""
        if keccak256(evidence) != dispute.evidence_hash:
            raise ProtocolError("this is not the evidence that the challenge committed to", hint="send the very bytes")
        opened = self._opened(dispute, evidence)
        if opened is None:
            return NOTHING_SHOWN
        subject, profile = opened
        try:
            computed = await self._compute(subject)
        except ProtocolError:  # the provider signed for a result that this model cannot give at all
            return NUMBER_MAX
        return number(profile, subject, computed)

    def _opened(self, dispute: Dispute, evidence: bytes) -> tuple[Evidence, VerificationProfile] | None:
        """None for what shows nothing: a profile that nobody shipped (no honest provider has agreed to it) and a text drawn from its
        client's own seed (NotDisputable) included."""
        try:
            opening = parse(market.Opening, evidence)
            subject = open_evidence(self._domain, opening)
            profile = profile_by_digest(subject.lease.profile)
            require_disputable(subject.request)
        except (ProtocolError, BadSignature, BadReceipt, ConfigError):
            return None
        fits = subject.lease.struct_hash == dispute.id and len(opening.salt) == SALT_BYTES and profile.task is subject.lease.task
        return (subject, profile) if fits else None

    async def _compute(self, subject: Evidence) -> list[bytes]:
        seat = self._engines.seats.get(subject.lease.model)
        if seat is None:
            raise UnknownModel(f"model {hex0x(subject.lease.model)} is not on sale here any more")
        work = work_of(subject, seat.model.manifest)
        while True:
            try:
                place = seat.enter()
                break
            except Busy as error:  # a full queue is no reason to stay away from a panel
                await asyncio.sleep(error.retry_after_seconds)
        try:
            async with place.engine() as engine:
                return await recompute(work, engine)
        except EngineFailed:
            await seat.check()
            raise
