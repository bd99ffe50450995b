"""What a provider shows of itself: am I earning, why not, is anything at risk. The table of its metrics, and where each is read.

Everything is read when somebody looks, from state that is there anyway; no address, job, lease or peer's word is a label's value. Labels
are the models on this provider's own price list, and closed sets of this program.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from gpumarket.core.errors import by_code
from gpumarket.core.terms import ModelManifest, Outcome
from gpumarket.core.units import Address, Hash
from gpumarket.node.admission import Spoke
from gpumarket.node.provider import Provider
from gpumarket.node.tables import CLOSED, OWED, REJECTED
from gpumarket.p2p.link import Link
from gpumarket.p2p.readings import P2P_METRICS, P2P_SECONDS, p2p_readings
from gpumarket.settlement.chain import Actions, ChainView, Follower
from gpumarket.settlement.chain.readings import CHAIN_METRICS, WALLET_METRICS, WALLET_SECONDS, chain_readings, wallet_readings
from gpumarket.settlement.redeemer import Redeemer
from gpumarket.telemetry.measuring import ProcessMetrics
from gpumarket.telemetry.metrics import Metric, Reading, counter, gauge, histogram, tokens

LABEL_CHARS_MAX = 40
FIRST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds. An embedding answers in tens of milliseconds, a text waits for its prompt to be read, a cold engine for its weights."""
CODES = tuple(sorted(by_code()))
MONEY = ("due", "held", "owed", "vouchered", "redeemed", "short")


def metrics_of(models: Sequence[str], source: Metric) -> tuple[Metric, ...]:
    """Every metric of a provider that sells these models (labels as `model_labels` makes them)."""
    own = (
        gauge("build_info", "1, for the version that runs.", "version", (version("gpumarket"),)),
        gauge("money_tokens", "Earnings: billed, held, ever owed, vouchered, redeemed; acked and unpaid.", "state", MONEY),
        gauge("unredeemed_tokens", "Under vouchers, and not yet paid out by the chain."),
        gauge("credit_used_tokens", "What schedulers owe, with one window of every open job."),
        gauge("credit_limit_tokens", "What they may owe, together."),
        gauge("credit_exhausted", "Schedulers that may owe nothing more, and so get no work done."),
        gauge("bills", "Bills by state: not answered yet, held for a check.", "state", ("due", "held")),
        counter("claims_total", "Final answers to claims, by state.", "state", (CLOSED, OWED, REJECTED)),
        counter("claims_failed_total", "Claims that got no answer, by the error's code; they are made again.", "code", CODES),
        gauge("channel_expiry_seconds", "Until the first channel with unredeemed money expires; absent while there is none."),
        gauge("channels_closing", "Channels with unredeemed money that their payer is closing."),
        counter("redemptions_total", "Vouchers that were turned into tokens."),
        counter("redemptions_failed_total", "Rounds of redeeming that the chain let down; they are made again."),
        counter("attempts_total", "Attempts that ended, by outcome.", "outcome", [outcome.name.lower() for outcome in Outcome]),
        counter("refusals_total", "Attempts that were not taken, by the error's code.", "code", CODES),
        gauge("attempts_open", "Attempts being served."),
        counter("tokens_total", "Tokens computed: generated, embedded, or checked.", "model", models),
        counter("prompt_tokens_total", "Input tokens of attempts that gave output.", "model", models),
        histogram("first_token_seconds", "From a client's opening to its first output.", FIRST_BUCKETS, "model", models),
        gauge("running_jobs", "Jobs that hold a slot.", "model", models),
        gauge("queue_jobs", "Jobs that wait for a slot.", "model", models),
        gauge("slots", "Jobs that may run at once.", "model", models),
        gauge("engine_up", "1 while a started engine is there; a text model waits for its first job.", "model", models),
        gauge("pace_tokens_per_second", "Measured pace of one job; 0 while unknown.", "model", models),
        counter("canaries_total", "Canary jobs that readiness asked for, by outcome.", "outcome", ("ok", "failed")),
        gauge("schedulers", "Schedulers: to be served, connected, and giving a reason why no jobs come.", "state", _SCHEDULERS),
        gauge("gpu_proven_flops", "Slowest rate that a GPU proof has measured; 0 while none was made."),
        gauge("draining", "1 while nothing more is taken."),
        source,
    )
    return (*own, *CHAIN_METRICS, *WALLET_METRICS, *P2P_METRICS)


_SCHEDULERS = ("wanted", "connected", "noticed")


@dataclass(frozen=True, slots=True)
class Watched:
    """What a provider daemon consists of, as far as it is shown."""

    provider: Provider
    redeemer: Redeemer
    link: Link
    view: ChainView
    follower: Follower
    actions: Actions
    me: Address


class ProviderMetrics(ProcessMetrics):
    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._labels = model_labels({d: m.manifest for d, m in watched.provider.house.models.items()})
        super().__init__(
            {
                "p2p": (lambda: p2p_readings(watched.link), P2P_SECONDS),
                "wallet": (lambda: wallet_readings(watched.actions), WALLET_SECONDS),
            },
            lambda failures: metrics_of(list(self._labels.values()), failures),
        )
        observers = {d: self.exposition.observer("first_token_seconds", label) for d, label in self._labels.items()}
        watched.provider.tally.on_first = lambda model, seconds: observers[model](seconds)

    def read(self) -> Mapping[str, Reading]:
        w = self._watched
        return {
            "build_info": {version("gpumarket"): 1},
            **self._money(),
            **self._work(),
            **self._engines(),
            **chain_readings(w.view, w.follower, w.actions.sender, w.me),
        }

    def _money(self) -> dict[str, Reading]:
        w, accounts, service = self._watched, self._watched.provider.accounts, self._watched.provider.service
        channels = [(v, c) for v in accounts.vouchers.values() if (c := w.view.channels.get(v.channel)) is not None]
        sums = accounts.sums | {"redeemed": sum(channel.claimed for _, channel in channels)}
        waiting = [(v.cumulative - c.claimed, c) for v, c in channels if v.cumulative > c.claimed and not c.closed]
        found: dict[str, Reading] = {
            "money_tokens": {state: tokens(sums[state]) for state in MONEY},
            "unredeemed_tokens": tokens(sum(amount for amount, _ in waiting)),
            "credit_used_tokens": tokens(sum(standing.owed for standing in accounts.standings.values())),
            "credit_limit_tokens": tokens(sum(service.credit_limit(scheduler) for scheduler in accounts.standings)),
            "credit_exhausted": sum(not service.credit_left(scheduler) for scheduler in accounts.standings),
            "bills": {"due": accounts.fresh_bills, "held": len(accounts.bills) - accounts.fresh_bills},
            "claims_total": dict(w.provider.claims.settled),
            "claims_failed_total": dict(w.provider.claims.failed),
            "channels_closing": sum(channel.closes_at > 0 for _, channel in waiting),
            "redemptions_total": w.redeemer.count,
            "redemptions_failed_total": w.redeemer.failures,
        }
        expiry = soonest_expiry([channel for _, channel in waiting], w.provider.now())
        return found if expiry is None else found | {"channel_expiry_seconds": expiry}

    def _work(self) -> dict[str, Reading]:
        provider = self._watched.provider
        presence, tally = provider.heartbeats.presence.values(), provider.tally
        states = (len(presence), sum(p.connected for p in presence), sum(p.connected and bool(p.notice) for p in presence))
        return {
            "attempts_total": dict(tally.attempts),
            "refusals_total": dict(tally.refusals),
            "attempts_open": provider.service.open_attempts,
            "canaries_total": dict(tally.canaries),
            "schedulers": dict(zip(_SCHEDULERS, states, strict=True)),
            "gpu_proven_flops": min(provider.prover.measured_mflops.values(), default=0) * 1e6,
            "draining": float(provider.service.draining),
        }

    def _engines(self) -> dict[str, Reading]:
        seats = {self._labels[digest]: seat for digest, seat in self._watched.provider.engines.seats.items()}
        tally = self._watched.provider.tally
        return {
            "tokens_total": {self._labels[digest]: count for digest, count in tally.tokens.items()},
            "prompt_tokens_total": {self._labels[digest]: count for digest, count in tally.prompt_tokens.items()},
            "running_jobs": {label: seat.running for label, seat in seats.items()},
            "queue_jobs": {label: seat.waiting for label, seat in seats.items()},
            "slots": {label: seat.model.slots for label, seat in seats.items()},
            "engine_up": {label: float(seat.warm) for label, seat in seats.items()},
            "pace_tokens_per_second": {label: seat.pace.per_kilosecond / 1_000 for label, seat in seats.items()},
        }


def soonest_expiry(channels: Collection[Spoke], now: int) -> int | None:
    """Seconds until the first of these channels expires; None of none."""
    return min((channel.expires_at - now for channel in channels), default=None)


def model_labels(models: Mapping[Hash, ModelManifest]) -> dict[Hash, str]:
    """A short label for each model on sale: its name, with the start of its digest where two have the same."""
    short = {digest: re.sub(r"[^\w.:/-]", "_", manifest.name)[:LABEL_CHARS_MAX] for digest, manifest in models.items()}
    names = list(short.values())
    return {digest: name if names.count(name) == 1 else f"{name}-{digest[:4].hex()}" for digest, name in short.items()}
