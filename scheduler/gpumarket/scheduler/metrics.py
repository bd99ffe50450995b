"""What a scheduler shows of itself: is it earning, why not, is anything at risk. The table of its metrics, and where each is read.

Everything is read when somebody looks, from state that is there anyway; the desk counts in plain numbers. Labels are closed sets of this
program: no address, job, lease, model or peer's word is one of their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from gpumarket.core.errors import by_code
from gpumarket.core.terms import Task
from gpumarket.core.units import Address
from gpumarket.p2p.link import Link
from gpumarket.p2p.readings import P2P_METRICS, P2P_SECONDS, p2p_readings
from gpumarket.scheduler.filters import NAMES
from gpumarket.scheduler.jobs import AttemptState
from gpumarket.scheduler.market import Market
from gpumarket.scheduler.match import NOBODY
from gpumarket.scheduler.presence import OBSTACLES
from gpumarket.settlement.chain import Actions, ChainView, Follower
from gpumarket.settlement.chain.readings import CHAIN_METRICS, WALLET_METRICS, WALLET_SECONDS, chain_readings, wallet_readings
from gpumarket.settlement.redeemer import Redeemer
from gpumarket.telemetry.measuring import ProcessMetrics
from gpumarket.telemetry.metrics import Metric, Reading, counter, gauge, tokens

CODES = tuple(sorted(by_code()))
CLIENTS_MONEY = ("deposit", "voucher", "open", "held", "used", "redeemed")
PROVIDERS_MONEY = ("deposit", "reserved", "vouchered", "redeemed")
STANDINGS = ("listed", "connected", "proven", "jailed")
TASKS = tuple(task.name.lower() for task in Task)
ENDS = tuple(state.name.lower() for state in AttemptState if state is not AttemptState.OPEN)
VERDICTS = ("accepted", "grey", "suspected", "rejected")


def metrics_of(source: Metric) -> tuple[Metric, ...]:
    """Every metric of a scheduler."""
    own = (
        gauge("build_info", "1, for the version that runs.", "version", (version("gpumarket"),)),
        counter("orders_total", "Orders that were new, signed and covered."),
        counter("quotes_total", "Prices asked."),
        counter("leases_total", "Leases signed, later attempts included, by task; checks are bought like any job.", "task", TASKS),
        counter("no_match_total", "Orders and quotes without a provider, by what stopped who came farthest.", "reason", _REASONS),
        counter("refusals_total", "Orders, quotes and calls refused, by the error's code.", "code", CODES),
        counter("attempt_states_total", "Attempts that came to a state.", "state", ENDS),
        counter("verdicts_total", "Clients' words on results; of those against one, what its evidence showed.", "verdict", VERDICTS),
        gauge("jobs", "Jobs in memory: live, or so fresh that they may be asked for again."),
        gauge(
            "clients_money_tokens",
            "Clients' channels, summed: deposits, and what is promised of them.",
            "state",
            CLIENTS_MONEY,
        ),
        gauge("providers_money_tokens", "Channels to providers, summed.", "state", PROVIDERS_MONEY),
        gauge("unredeemed_tokens", "Used, under clients' vouchers, and not yet paid out by the chain."),
        gauge("channel_expiry_seconds", "Until the first client's channel with unredeemed money expires; absent while there is none."),
        gauge("channels_closing", "Clients' channels with unredeemed money that their payer is closing."),
        counter("redemptions_total", "Vouchers that were turned into tokens."),
        counter("redemptions_failed_total", "Rounds of redeeming that the chain let down; they are made again."),
        gauge("providers", "Providers by standing; one may have several.", "standing", STANDINGS),
        gauge("providers_waiting", "Connected providers that get no jobs, by what stands in the way.", "obstacle", OBSTACLES),
        gauge("places_free", "Jobs that connected providers could start now."),
        gauge("places_reserved", "Places held for leases that their provider has not shown yet."),
        gauge("providers_queue_jobs", "Jobs that wait at connected providers."),
        gauge("draining", "1 while no orders are taken."),
        source,
    )
    return (*own, *CHAIN_METRICS, *WALLET_METRICS, *P2P_METRICS)


_REASONS = (*NAMES, NOBODY)


@dataclass(frozen=True, slots=True)
class Watched:
    """What a scheduler daemon consists of, as far as it is shown."""

    market: Market
    redeemer: Redeemer
    link: Link
    view: ChainView
    follower: Follower
    actions: Actions
    me: Address


class SchedulerMetrics(ProcessMetrics):
    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        super().__init__(
            {
                "p2p": (lambda: p2p_readings(watched.link), P2P_SECONDS),
                "wallet": (lambda: wallet_readings(watched.actions), WALLET_SECONDS),
            },
            metrics_of,
        )

    def read(self) -> Mapping[str, Reading]:
        w = self._watched
        return {
            "build_info": {version("gpumarket"): 1},
            **self._counts(),
            **self._money(),
            **self._providers(),
            **chain_readings(w.view, w.follower, w.actions.sender, w.me),
        }

    def _counts(self) -> dict[str, Reading]:
        market, redeemer = self._watched.market, self._watched.redeemer
        desk, billing = market.desk, market.billing
        return {
            "orders_total": desk.orders,
            "quotes_total": desk.quotes,
            "leases_total": {task.name.lower(): count for task, count in desk.leases.items()},
            "no_match_total": dict(desk.no_match),
            "refusals_total": dict(desk.refused + market.service.refused),
            "attempt_states_total": {state.name.lower(): count for state, count in billing.ended.items()},
            "verdicts_total": dict(billing.verdicts),
            "jobs": len(market.ledger.jobs),
            "redemptions_total": redeemer.count,
            "redemptions_failed_total": redeemer.failures,
            "draining": float(desk.closed),
        }

    def _money(self) -> dict[str, Reading]:
        market = self._watched.market
        hubs = [hub.state for hub in market.ledger.hubs.values() if not hub.state.closed]
        spokes = [spoke.state for spoke in market.ledger.spokes.values() if not spoke.state.closed]
        waiting = [(hub, amount) for hub in hubs if (amount := min(hub.used, hub.voucher) - hub.redeemed) > 0]
        found: dict[str, Reading] = {
            "clients_money_tokens": {name: tokens(sum(getattr(hub, name) for hub in hubs)) for name in CLIENTS_MONEY},
            "providers_money_tokens": {name: tokens(sum(getattr(spoke, name) for spoke in spokes)) for name in PROVIDERS_MONEY},
            "unredeemed_tokens": tokens(sum(amount for _, amount in waiting)),
            "channels_closing": sum(hub.closing > 0 for hub, _ in waiting),
        }
        if waiting:
            found["channel_expiry_seconds"] = min(hub.expires_at for hub, _ in waiting) - market.world.clock.now()
        return found

    def _providers(self) -> dict[str, Reading]:
        market, now = self._watched.market, self._watched.market.world.clock.now()
        sessions = market.presence.sessions
        standings = [entry.standing for entry in market.book.entries.values()]
        here = [entry.standing for provider, entry in market.book.entries.items() if provider in sessions]
        waiting = dict.fromkeys(OBSTACLES, 0)
        for session in sessions.values():
            if session.obstacle:
                waiting[session.obstacle] += 1
        return {
            "providers": {
                "listed": len(standings),
                "connected": len(sessions),
                "proven": sum(standing.proven for standing in standings),
                "jailed": sum(standing.jailed_until > now for standing in standings),
            },
            "providers_waiting": waiting,
            "places_free": sum(max(0, standing.free) for standing in here),
            "places_reserved": market.presence.reserved,
            "providers_queue_jobs": sum(standing.queued for standing in here),
        }
