"""The match as a pure function: determinism, filters, counts, exploration, and that no draw misses the only one that fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumarket.core.terms import Task, keccak256
from gpumarket.core.units import Address, Hash, Money
from gpumarket.scheduler.book import Advert, Book, ModelOnSale
from gpumarket.scheduler.explain import explain
from gpumarket.scheduler.filters import NAMES, Limits, Moment, Wanted
from gpumarket.scheduler.match import NoMatch, Plan, match
from gpumarket.scheduler.score import Weights

MODELS = [Hash(keccak256(b"model %d" % i)) for i in range(3)]
PROFILES = [Hash(keccak256(b"profile %d" % i)) for i in range(2)]
NOW = Moment(1_000_000, 500.0)
TOKEN = 10**18


def address(number: int) -> Address:
    return Address(number.to_bytes(20, "big"))


def add(book: Book, number: int, **changes: Any) -> Address:
    """A provider that passes every filter, but for `changes` of its advert, sale or standing."""
    sale: dict[str, Any] = {
        "model": MODELS[0],
        "name": "m",
        "task": Task.EMBED,
        "profile": PROFILES[0],
        "prompt_price": Money(10**15),
        "output_price": Money(0),
        "max_input_tokens": 512,
        "tokens_per_second": 100.0,
        "warm": True,
    }
    advert: dict[str, Any] = {
        "provider": address(number),
        "owner": address(number + 10**6),
        "gpu_class": "CPU",
        "vram_bytes": 2**33,
        "region": "DE",
        "sandbox": 1,
        "checks": True,
        "capacity": 8,
        "expires_at": NOW.now + 100,
    }
    standing: dict[str, Any] = {
        "heartbeat": NOW.monotonic,
        "proven": True,
        "stake": 10 * TOKEN,
        "stake_room": 5 * TOKEN,
        "spoke_free": 5 * TOKEN,
        "spoke_expires": NOW.now + 10**6,
        "reputation_ppm": 800_000,
        "reputation_low": 0.64,
        "observations": 100.0,
        "free": 4,
    }
    for name, value in changes.items():
        next(part for part in (sale, advert, standing) if name in part)[name] = value
    entry = book.put(Advert(**advert, models=(ModelOnSale(**sale),)))
    for name, value in standing.items():
        setattr(entry.standing, name, value)
    book.refresh(entry.advert.provider)
    return entry.advert.provider


def wanted(**changes: Any) -> Wanted:
    limits = Limits(**{k: changes.pop(k) for k in list(changes) if k in Limits.__slots__})
    base = Wanted(Task.EMBED, MODELS[0], PROFILES[0], 1_000_000, 0, Money(TOKEN), NOW.now + 60, limits=limits)
    return replace(base, **changes)


def book_of(*providers: dict[str, Any]) -> Book:
    book = Book(Weights())
    for i, changes in enumerate(providers):
        add(book, i + 1, **changes)
    return book


FAILING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model": ({"model": MODELS[1]}, {}),
    "task": ({"task": Task.GENERATE}, {}),
    "profile": ({"profile": PROFILES[1]}, {}),
    "checks": ({"checks": False}, {"task": Task.CHECK}),
    "gpu_class": ({}, {"gpu_class": "NVIDIA H200"}),
    "vram": ({}, {"min_vram_bytes": 2**34}),
    "region": ({}, {"region": "US"}),
    "sandbox": ({"sandbox": 0}, {"min_sandbox": 1}),
    "input_tokens": ({}, {"longest_input": 600}),
    "prompt_price": ({}, {"max_prompt_price": 10**14}),
    "output_price": ({"output_price": Money(2)}, {"max_output_price": 1}),
    "stake": ({}, {"min_stake": 11 * TOKEN}),
    "reputation": ({}, {"min_reputation_ppm": 800_001}),
    "heartbeat": ({"heartbeat": NOW.monotonic - 3.5}, {}),
    "offer_expired": ({"expires_at": NOW.now - 1}, {}),
    "gpu_proof": ({"proven": False}, {}),
    "jail": ({"jailed_until": NOW.now + 1}, {}),
    "spoke_expiry": ({"spoke_expires": NOW.now + 59}, {}),
    "capacity": ({"free": 0}, {}),
    "max_amount": ({}, {"budget": Money(10**15 - 10**6)}),
    "spoke": ({"spoke_free": 10**14}, {}),
    "exposure": ({"stake_room": 10**14}, {}),
    "excluded": ({}, {"exclude_providers": frozenset({address(1)})}),
    "provider": ({}, {"require_provider": address(77)}),
}


@pytest.mark.parametrize("name", FAILING)
def test_filter_failing_alone_removes_and_is_named(name: str) -> None:
    theirs, ours = FAILING[name]
    if "jailed_until" in theirs:
        book = book_of({})
        book.entries[address(1)].standing.jailed_until = theirs["jailed_until"]
        book.refresh(address(1))
    else:
        book = book_of(theirs)
    found = match(book, wanted(**ours), b"seed", NOW)
    assert isinstance(found, NoMatch)
    assert [(r.filter, r.count) for r in found.removed] == [(name, 1)]
    assert found.removed[0].example
    assert name in NAMES


def test_filters_all_have_a_test() -> None:
    assert set(FAILING) == set(NAMES)


def test_provider_that_passes_everything_is_matched() -> None:
    found = match(book_of({}), wanted(), b"seed", NOW)
    assert isinstance(found, Plan)
    assert found.provider == address(1)
    assert 0.0 <= found.score <= 1.0


def test_owner_excluded_removes_all_of_its_providers() -> None:
    book = book_of({"owner": address(5)}, {"owner": address(5)}, {})
    found = match(book, wanted(exclude_owners=frozenset({address(5)})), b"seed", NOW)
    assert isinstance(found, Plan)
    assert found.provider == address(3)


def test_required_provider_is_the_only_candidate() -> None:
    book = book_of(*[{} for _ in range(30)])
    found = match(book, wanted(require_provider=address(17)), b"seed", NOW)
    assert isinstance(found, Plan)
    assert found.provider == address(17)


def test_only_one_of_many_fits_and_is_found() -> None:
    book = book_of(*[{"free": 0} for _ in range(500)])
    add(book, 501)
    for i in range(20):
        found = match(book, wanted(), b"%d" % i, NOW)
        assert isinstance(found, Plan)
        assert found.provider == address(501)


def test_index_by_class_and_region_finds_what_a_scan_finds() -> None:
    book = book_of(*[{"gpu_class": f"GPU {i % 50}", "region": f"R{i % 7}"} for i in range(400)])
    found = match(book, wanted(gpu_class="GPU 11", region="R3"), b"seed", NOW)
    assert isinstance(found, Plan)
    number = int.from_bytes(found.provider, "big") - 1
    assert (number % 50, number % 7) == (11, 3)


def test_cheaper_provider_is_drawn_more_often() -> None:
    book = book_of({"prompt_price": Money(10**15)}, {"prompt_price": Money(4 * 10**15)})
    draws = [match(book, wanted(), b"%d" % i, NOW, 0.0) for i in range(300)]
    cheap = sum(isinstance(d, Plan) and d.provider == address(1) for d in draws)
    assert 160 < cheap < 300


def test_exploration_share_goes_to_newcomers() -> None:
    book = book_of(*[{"observations": 100.0} for _ in range(7)], {"observations": 0.0, "prompt_price": Money(10**18)})
    none = [match(book, wanted(), b"%d" % i, NOW, 0.0) for i in range(200)]
    some = [match(book, wanted(), b"%d" % i, NOW, 0.5) for i in range(200)]
    explored = [d for d in some if isinstance(d, Plan) and d.explored]
    assert not any(isinstance(d, Plan) and d.explored for d in none)
    assert 60 < len(explored) < 140
    assert {d.provider for d in explored} == {address(8)}


def test_removed_provider_is_never_matched_and_its_rows_are_reused() -> None:
    book = book_of(*[{} for _ in range(100)])
    for i in range(1, 100):
        book.drop(address(i))
    size = len(book.table)
    assert {d.provider for d in (match(book, wanted(), b"%d" % i, NOW) for i in range(50)) if isinstance(d, Plan)} == {address(100)}
    for i in range(1, 100):
        add(book, i)
    assert len(book.table) == size


def test_labels_of_offers_that_changed_or_left_are_forgotten() -> None:
    book = book_of({"region": "DE"}, {"region": "DE"})
    kept = len(book.labels)
    for i in range(200):
        add(book, 3, region=f"region {i}", gpu_class=f"class {i}")
    assert len(book.labels) == kept + 4, "region, class, provider and owner of the last one"
    book.drop(address(3))
    assert len(book.labels) == kept
    book.drop(address(1))
    assert isinstance(match(book, wanted(limits=Limits(region="DE")), b"seed", NOW), Plan), "the other one still uses the word"
    book.drop(address(2))
    assert len(book.labels) == 0


def test_label_that_came_back_has_another_number_and_still_matches() -> None:
    book = book_of({"region": "DE"})
    before = book.labels.find("DE")
    book.drop(address(1))
    assert book.labels.find("DE") == -1
    add(book, 2, region="FR")
    add(book, 1, region="DE")
    assert book.labels.find("DE") not in (before, book.labels.find("FR"))
    found = match(book, wanted(limits=Limits(region="DE")), b"seed", NOW)
    assert isinstance(found, Plan)
    assert found.provider == address(1)


def test_reserved_places_run_out() -> None:
    book = book_of({"free": 2})
    for _ in range(2):
        assert isinstance(match(book, wanted(), b"seed", NOW), Plan)
        book.move_places(address(1), MODELS[0], -1)
    found = match(book, wanted(), b"seed", NOW)
    assert isinstance(found, NoMatch)
    book.move_places(address(1), MODELS[0], 1)
    assert isinstance(match(book, wanted(), b"seed", NOW), Plan)


def test_reserved_places_of_one_model_leave_those_of_another() -> None:
    book = book_of({})
    entry = book.entries[address(1)]
    book.put(replace(entry.advert, models=(*entry.advert.models, replace(entry.advert.models[0], model=MODELS[1]))))
    entry.standing.free, entry.standing.places = 3, {MODELS[0]: 1, MODELS[1]: 2}
    book.refresh(address(1))

    def fitting() -> list[bool]:
        return [isinstance(match(book, wanted(model=model), b"seed", NOW), Plan) for model in MODELS[:2]]

    assert fitting() == [True, True]
    book.move_places(address(1), MODELS[0], -1)
    assert fitting() == [False, True]
    book.move_places(address(1), MODELS[1], -2)
    assert fitting() == [False, False]
    book.move_places(address(1), MODELS[0], 1)
    assert fitting() == [True, False]


def test_weights_that_do_not_sum_to_one_are_refused() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        Weights(price=0.5)


ANY_PROVIDER = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(MODELS),
        "profile": st.sampled_from(PROFILES),
        "gpu_class": st.sampled_from(["CPU", "NVIDIA H200"]),
        "region": st.sampled_from(["DE", "US", ""]),
        "vram_bytes": st.sampled_from([2**30, 2**33, 2**36]),
        "prompt_price": st.integers(0, 3 * 10**15).map(Money),
        "free": st.integers(-1, 3),
        "proven": st.booleans(),
        "heartbeat": st.sampled_from([NOW.monotonic, NOW.monotonic - 10]),
        "stake": st.integers(0, 20 * TOKEN),
        "spoke_free": st.integers(0, 3 * 10**15),
        "stake_room": st.integers(-(10**15), 3 * 10**15),
        "reputation_ppm": st.integers(0, 1_000_000),
        "observations": st.floats(0, 100),
        "checks": st.booleans(),
    },
)
ANY_WANTED = st.fixed_dictionaries(
    {},
    optional={
        "task": st.sampled_from([Task.EMBED, Task.CHECK]),
        "gpu_class": st.sampled_from(["", "CPU", "none such"]),
        "region": st.sampled_from(["", "DE", "US"]),
        "min_vram_bytes": st.sampled_from([0, 2**32]),
        "min_stake": st.integers(0, 20 * TOKEN),
        "min_reputation_ppm": st.integers(0, 1_000_000),
        "max_prompt_price": st.one_of(st.none(), st.integers(0, 3 * 10**15)),
        "budget": st.integers(0, 3 * 10**15).map(Money),
        "exclude_providers": st.frozensets(st.integers(1, 10).map(address), max_size=3),
        "exclude_owners": st.frozensets(st.integers(10**6, 10**6 + 10).map(address), max_size=2),
    },
)


def fits(book: Book, provider: Address, job: Wanted) -> bool:
    """The filters, said again in the plainest way."""
    entry = book.entries[provider]
    advert, s, limits = entry.advert, entry.standing, job.limits
    sale = next((m for m in advert.models if m.model == job.model), None)
    if sale is None:
        return False
    cost = sale.prompt_price * job.prompt_units / 1e6
    return all(
        (
            sale.profile == job.profile,
            job.task is not Task.CHECK or advert.checks,
            limits.gpu_class in ("", advert.gpu_class),
            limits.region in ("", advert.region),
            advert.vram_bytes >= limits.min_vram_bytes,
            limits.max_prompt_price is None or sale.prompt_price <= limits.max_prompt_price,
            s.stake >= limits.min_stake,
            s.reputation_ppm >= limits.min_reputation_ppm,
            s.heartbeat >= NOW.monotonic - 3,
            s.proven,
            s.free >= 1,
            cost <= min(job.budget, s.spoke_free, s.stake_room),
            provider not in limits.exclude_providers,
            advert.owner not in limits.exclude_owners,
        )
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(ANY_PROVIDER, max_size=30), ANY_WANTED, st.binary(max_size=40), st.floats(0, 1))
def test_match_on_any_book_chooses_one_that_fits_or_counts_all(
    providers: list[dict[str, Any]], job_changes: dict[str, Any], seed: bytes, share: float
) -> None:
    book, job = book_of(*providers), wanted(**job_changes)
    found = match(book, job, seed, NOW, share)
    assert match(book, job, seed, NOW, share) == found
    able = {p for p in book.entries if fits(book, p, job)}
    told = explain(book, job, seed, NOW, share)
    if isinstance(found, Plan):
        assert found.provider in able
        chosen = [s for s in told.candidates if s.chosen]
        assert [s.provider for s in chosen] == [found.provider]
        assert all(0.0 <= s.total <= 1.0 and sum(s.parts.values()) == pytest.approx(s.total) for s in told.candidates)
        assert {s.provider for s in told.candidates} <= able
    else:
        assert not able
        assert sum(r.count for r in found.removed) == found.considered == len(book.entries)
        assert len(told.rejected) == found.considered
        assert {r.filter for r in told.rejected} == {r.filter for r in found.removed}
        assert told.removed == found.removed


def test_explanation_of_a_large_book_counts_all_and_tells_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumarket.scheduler.explain.LOOKED_AT_MAX", 64)
    book = book_of(*[{"free": 0} if i % 3 else {} for i in range(900)], *[{"model": MODELS[1]} for _ in range(300)])
    told = explain(book, wanted(), b"seed", NOW, 0.05)
    assert told.considered == 1_200
    assert [(r.filter, r.count) for r in told.removed] == [("model", 300), ("capacity", 600)]
    assert {t.filter for t in told.rejected} <= {"model", "capacity"}
    assert 0 < len(told.rejected) <= 128
    book.walked = 0
    explain(book, wanted(), b"seed", NOW, 0.05)
    assert 900 <= book.walked <= 900 + 64, "the count alone looks at every seller"


def test_walks_of_the_book_are_metered_and_draws_that_fit_are_not() -> None:
    book = book_of(*[{} for _ in range(200)])
    for i in range(50):
        match(book, wanted(), b"%d" % i, NOW)
    assert book.walked == 0
    match(book, wanted(max_prompt_price=1), b"seed", NOW)
    assert book.walked >= 200
