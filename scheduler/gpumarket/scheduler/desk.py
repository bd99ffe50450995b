"""The order desk: from a signed order to a signed lease, in one synchronous step; the answer leaves when the ledger has committed it.

Nothing here waits. What it changes (voucher, reserved maximum, lease) is in the ledger's next commit, and `reply` is called after it. The
same order sent again answers the same lease. Must never: lease without the client's money reserved, or without the provider's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from gpumarket.core.codec import from_proto, open_order, parse, to_proto
from gpumarket.core.errors import BadSignature, Busy, GpumarketError, OutOfFunds, ProtocolError
from gpumarket.core.ports import Clock
from gpumarket.core.signing import Domain, Signer, recover
from gpumarket.core.terms import JobSpec, Lease, Task, keccak256
from gpumarket.core.units import PER_MILLION, ZERO_HASH, Address, Hash, Money, money_from_bytes
from gpumarket.scheduler import answers, lifecycle
from gpumarket.scheduler.book import Book
from gpumarket.scheduler.channels import Channels
from gpumarket.scheduler.explain import explain
from gpumarket.scheduler.filters import Limits, Moment, Wanted
from gpumarket.scheduler.ledger import Ledger, Spoke
from gpumarket.scheduler.lifecycle import Attempt, Job
from gpumarket.scheduler.listings import Listings
from gpumarket.scheduler.match import NoMatch, Plan, Removed, match, stopped_by
from gpumarket.scheduler.presence import Presence
from gpumarket.scheduler.reputation import Reputation
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.settlement.chain.view import require_untroubled
from gpumarket.settlement.demands import SANDBOX_TIERS
from gpumarket.settlement.pricing import attempt_maximum
from gpumarket.settlement.verification.profiles import PROFILES
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2

Reply = Callable[[pb.MatchReply], None]
_NOBODY: frozenset[Address] = frozenset()
DRAWS_MAX = 4
"""Providers tried when exact money does not fit where the float filter said it would."""


class Desk:
    """Takes orders and quotes."""

    def __init__(
        self,
        settings: SchedulerSettings,
        signer: Signer,
        domain: Domain,
        clock: Clock,
        book: Book,
        listings: Listings,
        ledger: Ledger,
        channels: Channels,
        presence: Presence,
    ) -> None:
        self._settings, self._signer, self._domain, self._clock = settings, signer, domain, clock
        self._book, self._listings, self._ledger = book, listings, ledger
        self._channels, self._presence = channels, presence
        self.on_placed: Callable[[Job], None] = lambda job: None
        self.closed = False
        """Draining: no new orders."""
        self.trouble: Callable[[], str] = lambda: ""
        """Why the chain cannot be relied on for new orders now; empty while it can."""
        self.orders = self.quotes = self.unmatched = 0
        self.leases: Counter[Task] = Counter()
        self.no_match: Counter[str] = Counter()
        """Orders and quotes that nobody could be found for, by the filter that stopped the provider which came farthest."""
        self.refused: Counter[str] = Counter()
        """Orders and quotes that were refused, by the error's code."""

    def handle(self, request: pb.MatchRequest, reply: Reply) -> None:
        """Answer one request through `reply`: at once, or after the commit for an order that was granted."""
        try:
            if request.quote:
                reply(self._quote(request))
                return
            answer = self._order(request)
        except GpumarketError as error:
            self.refused[error.code] += 1
            reply(answers.problem(request.id, error))
            return
        self._ledger.after_commit(lambda error: reply(answer if error is None else answers.problem(request.id, error)))

    def again(self, job: Job, prefix_units: int, prefix_hash: Hash) -> pb.MatchReply:
        """Open the next attempt of a job elsewhere (`Market.Retry`). The caller commits.

        At a provider that no attempt was lost at, where there is one; else anywhere but where the newest was lost or output was bad: where
        all have been tried, it may be the client's own link that broke. Raises FundsError for a channel that takes no more orders: one
        whose close we signed must never earn again.
        """
        spec = job.spec
        self._channels.hub(job.channel)
        constraints = parse(terms_pb2.JobOrder, job.order).constraints
        for excluded in (lifecycle.lost_at(job), lifecycle.barred_at(job)):
            wanted = self._wanted(spec, constraints, spent=job.spent, prefix_units=prefix_units, excluded=excluded)
            answer = self._grant(0, job, spec.struct_hash, wanted, prefix_units, prefix_hash, told=False)
            if answer.HasField("granted"):
                break
        return answer

    def story(self, order: terms_pb2.JobOrder) -> pb.Explanation:
        """Why this order would go where it goes, now."""
        spec, _ = open_order(self._domain, order, check_signature=False)
        wanted = self._wanted(spec, order.constraints, spent=0, prefix_units=0)
        return self._story(wanted, match_seed(spec.key, 1))

    def granted(self, request_id: int, job: Job, number: int) -> pb.MatchReply:
        """The answer for an attempt that is in the ledger."""
        attempt = job.attempt(number)
        hub = self._ledger.hubs[job.channel]
        lease, offer = terms_pb2.SignedLease.FromString(attempt.signed), terms_pb2.SignedOffer.FromString(attempt.offer)
        return answers.granted(request_id, lease, offer, hub.state)

    # --- orders --------------------------------------------------------------------------------------------------------------

    def _order(self, request: pb.MatchRequest) -> pb.MatchReply:
        order = request.order
        spec = from_proto(JobSpec, order.spec)
        key = spec.key
        raw = order.SerializeToString(deterministic=True)
        known = self._ledger.jobs.get(key)
        if known is None and spec.deadline <= self._clock.now():
            known = self._ledger.find(key)  # only an order whose deadline is past can be known and not in memory
        if known is not None:
            if known.order != raw:
                raise ProtocolError("this job id was used for another order", hint="make a new job id")
            return self.granted(request.id, known, len(known.attempts))
        self._admit(spec, order.constraints)
        spec_hash = spec.struct_hash
        if recover(self._domain.digest(spec_hash), order.signature) != spec.client:
            raise BadSignature("the order is not signed by its client")
        channel = self._cover(request, spec)
        job = Job(key, spec, raw, channel, self._clock.now())
        wanted = self._wanted(spec, order.constraints, spent=0, prefix_units=0)
        self.orders += 1
        return self._grant(request.id, job, spec_hash, wanted, 0, ZERO_HASH, told=request.explain)

    def _cover(self, request: pb.MatchRequest, spec: JobSpec) -> Hash:
        """The client's channel, once its voucher covers the order."""
        channel = Hash(request.client_channel)
        hub = self._channels.receive(request.voucher) if request.HasField("voucher") else self._channels.hub(channel)
        if hub.state.id != channel or spec.client not in (hub.payer, hub.state.signer):
            raise ProtocolError("the order, its channel and its voucher are not of one client")
        self._require_standing(hub.payer)
        if spec.max_amount > hub.state.free:
            raise answers.short_of_funds(spec.max_amount, hub.state)
        if self._presence.reserved_on(channel) >= self._settings.reservations_per_channel:
            raise Busy(
                f"{self._settings.reservations_per_channel} leases of this channel wait to be used",
                retry_after_seconds=self._settings.reservation_seconds,
                hint="use the leases you have, or wait until they lapse",
            )
        return channel

    def _require_standing(self, payer: Address) -> None:
        until = self._ledger.reputations.get(payer, Reputation()).jailed_until
        if until > self._clock.now():
            raise ProtocolError(
                f"this account is jailed for {until - self._clock.now()} s more, and no orders are taken: it closed an attempt below an "
                "ack that it had signed, or work of its own was checked and rejected",
                hint="wait, and send the last ack of your journal with Market.Retry",
            )

    def _admit(self, spec: JobSpec, constraints: bytes) -> None:
        if self.closed:
            raise Busy("the scheduler is draining", hint="choose another scheduler, or try again when it is back")
        require_untroubled(self.trouble())
        self._ledger.require_space()
        now = self._clock.now()
        if constraints_of(constraints)[0] != spec.constraints_hash:
            raise ProtocolError("the order's constraints are not those that its spec names")
        if spec.scheduler != self._signer.address:
            raise ProtocolError("the order is for another scheduler")
        if not now < spec.deadline <= now + self._settings.max_job_seconds:
            raise ProtocolError(
                f"the order's deadline is {spec.deadline - now} s from now; taken are 1 to {self._settings.max_job_seconds}",
                hint="set the clock (NTP), or choose another deadline",
            )
        if spec.profile not in PROFILES:
            raise ProtocolError(f"verification profile 0x{spec.profile.hex()} is not known here", hint="name the profile of the offer")
        if spec.max_output_units < 1 or not spec.max_amount:
            raise ProtocolError("an order for nothing, or for no money")

    def _grant(
        self, request_id: int, job: Job, spec_hash: Hash, wanted: Wanted, prefix_units: int, prefix_hash: Hash, *, told: bool
    ) -> pb.MatchReply:
        seed = match_seed(job.key, len(job.attempts) + 1)
        moment = Moment(self._clock.now(), self._clock.monotonic())
        story = self._story(wanted, seed) if told else None
        for turn in range(DRAWS_MAX):
            plan = match(self._book, wanted, seed if turn == 0 else seed + bytes([turn]), moment, self._settings.explore_share)
            if isinstance(plan, NoMatch):
                break
            listing, spoke = self._listings.get(plan.provider), self._channels.spoke(plan.provider)
            if listing is None or spoke is None or _over_limit(wanted.limits, plan):
                continue
            lease = self._lease(job, spec_hash, plan, spoke, prefix_units, prefix_hash)
            digest = lease.struct_hash
            signed = terms_pb2.SignedLease(
                lease=to_proto(lease, terms_pb2.Lease()), signature=self._signer.sign_digest(self._domain.digest(digest))
            )
            attempt = Attempt(lease, digest, signed.SerializeToString(), listing.raw)
            try:
                self._place(job, attempt, spoke)
            except OutOfFunds:
                if job.spec.max_amount - job.spent - job.open > self._ledger.hubs[job.channel].state.free:
                    raise  # the client's money, not this provider's
                continue
            self._ledger.keep_offer(listing.digest, listing.raw)
            self.leases[job.spec.task] += 1
            return answers.granted(request_id, signed, listing.message, self._ledger.hubs[job.channel].state, story)
        else:
            size = len(self._book.entries)
            plan = NoMatch(size, (Removed("spoke", size, f"{DRAWS_MAX} draws in a row had too little left in their channels"),))
        self.unmatched += 1
        return self._nobody(request_id, plan)

    def _nobody(self, request_id: int, found: NoMatch) -> pb.MatchReply:
        self.no_match[stopped_by(found)] += 1
        return answers.no_match(request_id, found)

    def _place(self, job: Job, attempt: Attempt, spoke: Spoke) -> None:
        until = job.spec.deadline + self._settings.channel_margin_seconds
        self.on_placed(self._ledger.apply(lifecycle.grant(job, attempt, until), self._clock.now()))
        self._presence.reserve(attempt.hash, spoke.provider, job.spec.model, job.channel)

    def _lease(self, job: Job, spec_hash: Hash, plan: Plan, spoke: Spoke, prefix_units: int, prefix_hash: Hash) -> Lease:
        spec, sale, settings = job.spec, plan.sale, self._settings
        prices = (sale.prompt_price, sale.output_price)
        maximum = attempt_maximum(spec, *prices, settings.fee_ppm, spent=job.spent, prefix_units=prefix_units)
        return Lease(
            job=job.key,
            spec=spec_hash,
            attempt=len(job.attempts) + 1,
            client=spec.client,
            scheduler=self._signer.address,
            provider=plan.provider,
            model=spec.model,
            task=spec.task,
            prompt_price_per_mtok=sale.prompt_price,
            output_price_per_mtok=sale.output_price,
            maximum=maximum,
            fee_ppm=settings.fee_ppm,
            client_channel=job.channel,
            provider_channel=spoke.state.id,
            profile=spec.profile,
            window_units=self._window(spec),
            prefix_units=prefix_units,
            prefix_hash=prefix_hash,
            issued_at=self._clock.now(),
            deadline=spec.deadline,
        )

    def _window(self, spec: JobSpec) -> int:
        if spec.task is Task.GENERATE:
            return self._settings.window_units
        if spec.task is Task.INFER:
            return self._settings.infer_window_units
        if spec.task is Task.CHECK:
            return max(self._settings.embed_window_units, spec.prompt_units)  # a check of text is one item; it cannot be cut
        return self._settings.embed_window_units

    # --- quotes --------------------------------------------------------------------------------------------------------------

    def _quote(self, request: pb.MatchRequest) -> pb.MatchReply:
        message = request.order.spec
        self.quotes += 1
        digest, limits = constraints_of(request.order.constraints)
        if digest != message.constraints_hash or len(message.model) != 32 or len(message.profile) != 32:
            raise ProtocolError("a quote for a spec that is none: constraints, model or profile")
        try:
            task, most = Task(message.task), money_from_bytes(message.max_amount)
        except ValueError as error:
            raise ProtocolError(f"a quote for a spec that is none: {error}") from error
        wanted = Wanted(
            task=task,
            model=Hash(message.model),
            profile=Hash(message.profile),
            prompt_units=message.prompt_units,
            output_units=message.max_output_units if task is Task.GENERATE else 0,
            budget=self._budget(most),
            deadline=message.deadline,
            spoke_margin_seconds=self._settings.channel_margin_seconds,
            longest_input=message.prompt_units + message.max_output_units if task is Task.GENERATE else 0,
            limits=limits,
        )
        moment = Moment(self._clock.now(), self._clock.monotonic())
        seed = message.client + message.job_id
        plan = match(self._book, wanted, seed, moment, self._settings.explore_share)
        if isinstance(plan, NoMatch):
            return self._nobody(request.id, plan)
        return answers.quote(request.id, plan, wanted, self._settings.fee_ppm)

    def _wanted(
        self, spec: JobSpec, constraints: bytes, *, spent: int, prefix_units: int, excluded: frozenset[Address] = frozenset()
    ) -> Wanted:
        generate = spec.task is Task.GENERATE
        limits = constraints_of(constraints)[1]
        if excluded:
            limits = replace(limits, exclude_providers=limits.exclude_providers | excluded)
        return Wanted(
            task=spec.task,
            model=spec.model,
            profile=spec.profile,
            prompt_units=spec.prompt_units if generate else max(0, spec.prompt_units - prefix_units),
            output_units=max(0, spec.max_output_units - prefix_units) if generate else 0,
            budget=self._budget(spec.max_amount - spent),
            deadline=spec.deadline,
            spoke_margin_seconds=self._settings.channel_margin_seconds,
            longest_input=spec.prompt_units + spec.max_output_units if generate else 0,
            limits=limits,
        )

    def _budget(self, money: int) -> Money:
        exact = max(0, money) * PER_MILLION // (PER_MILLION + self._settings.fee_ppm)
        return Money(exact + exact // 10**12 + 1)  # room for the filter's floats; the lease's maximum is exact

    def _story(self, wanted: Wanted, seed: bytes) -> pb.Explanation:
        moment = Moment(self._clock.now(), self._clock.monotonic())
        return answers.explanation(seed, explain(self._book, wanted, seed, moment, self._settings.explore_share))


def match_seed(job: Hash, attempt: int) -> bytes:
    """Seed of an attempt's draw: told in `Explain`, so that anyone can draw it again."""
    return job + attempt.to_bytes(4, "big")


@lru_cache(maxsize=4_096)
def constraints_of(raw: bytes) -> tuple[Hash, Limits]:
    """Constraints' hash, and what they say as the filters take it. Raises ProtocolError."""
    c = parse(terms_pb2.Constraints, raw)
    addresses = [c.require_provider] if c.require_provider else []
    addresses += [*c.exclude_providers, *c.exclude_owners]
    if any(len(a) != 20 for a in addresses) or len(addresses) > 1_000:
        raise ProtocolError("constraints name something that is no address, or too many of them")
    if c.min_sandbox not in SANDBOX_TIERS:
        raise ProtocolError(f"{c.min_sandbox!r} is no sandbox tier", hint=f"one of {', '.join(filter(None, SANDBOX_TIERS))}")
    try:
        min_stake = money_from_bytes(c.min_stake)
        prices = [money_from_bytes(p) if p else None for p in (c.max_prompt_price_per_mtok, c.max_output_price_per_mtok)]
    except ValueError as error:
        raise ProtocolError(f"constraints with an amount that is none: {error}") from error
    limits = Limits(
        gpu_class=c.gpu_class,
        min_vram_bytes=c.min_vram_bytes,
        region=c.region,
        min_reputation_ppm=c.min_reputation_ppm,
        min_stake=min_stake,
        max_prompt_price=prices[0],
        max_output_price=prices[1],
        min_sandbox=SANDBOX_TIERS[c.min_sandbox],
        require_provider=Address(c.require_provider) if c.require_provider else None,
        exclude_providers=frozenset(Address(a) for a in c.exclude_providers),
        exclude_owners=frozenset(Address(a) for a in c.exclude_owners),
    )
    return keccak256(raw), limits


def _over_limit(limits: Limits, plan: Plan) -> bool:
    """The price limits in integers: the filter compares floats."""
    caps = ((plan.sale.prompt_price, limits.max_prompt_price), (plan.sale.output_price, limits.max_output_price))
    return any(cap is not None and price > cap for price, cap in caps)
