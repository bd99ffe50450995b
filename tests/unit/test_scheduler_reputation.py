"""Reputation: bounds, decay, jail."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpumarket.scheduler.reputation import HALF_LIFE_SECONDS, JAIL_SECONDS, JAIL_SECONDS_MAX, RETRY_DEEDS, Deed, Reputation

NOW = 1_800_000_000


def after(*deeds: Deed) -> Reputation:
    reputation = Reputation()
    for deed in deeds:
        reputation = reputation.after(deed, NOW)
    return reputation


@given(st.lists(st.tuples(st.sampled_from(list(Deed)), st.integers(0, 10**8)), max_size=30))
def test_reputation_after_any_deeds_stays_within_bounds(deeds: list[tuple[Deed, int]]) -> None:
    reputation, now = Reputation(), NOW
    for deed, seconds in deeds:
        now += seconds
        reputation = reputation.after(deed, now)
    assert 0 < reputation.mean_ppm(now) < 1_000_000
    assert 0.0 <= reputation.low(now) <= reputation.mean_ppm(now) / 1e6 + 1e-6
    assert reputation.jailed_until <= now + JAIL_SECONDS_MAX


def test_reputation_of_a_newcomer_is_its_prior() -> None:
    assert Reputation().mean_ppm(NOW) == 800_000
    assert Reputation().observations(NOW) == 0.0


def test_one_rejection_weighs_more_than_ten_unchecked_deliveries_and_jails() -> None:
    good, bad = after(*[Deed.DELIVERED] * 10), after(*[Deed.DELIVERED] * 10, Deed.REJECTED)
    assert bad.mean_ppm(NOW) < Reputation().mean_ppm(NOW) < good.mean_ppm(NOW)
    assert (good.jailed_until, bad.jailed_until) == (0, NOW + JAIL_SECONDS)


def test_jail_doubles_with_each_rejection() -> None:
    assert after(Deed.REJECTED, Deed.REJECTED).jailed_until == NOW + 2 * JAIL_SECONDS


def test_evidence_halves_with_the_half_life() -> None:
    reputation = after(Deed.CHECKED)
    assert reputation.observations(NOW + HALF_LIFE_SECONDS) == 0.5
    assert reputation.mean_ppm(NOW + 100 * HALF_LIFE_SECONDS) == 800_000


def test_clients_word_alone_never_weighs_like_a_failure_admitted() -> None:
    assert all(deed.value[1] < Deed.FAILED.value[1] for deed in RETRY_DEEDS.values())
    assert RETRY_DEEDS["client-restart"] is RETRY_DEEDS["bad-output"] is Deed.BLAMELESS
