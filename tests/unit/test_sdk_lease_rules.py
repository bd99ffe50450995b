"""Every field of a lease that a scheduler could bend is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sdk_terms import CONSTRAINTS, DEADLINE, NOW, TOKEN, a_hash, address, lease, spec

from gpumarket.core.errors import ConfigError, ProtocolError
from gpumarket.core.terms import Task
from gpumarket.core.units import ZERO_HASH, Address, Money, money_bytes
from gpumarket.sdk.constraints import Constraints
from gpumarket.sdk.lease_rules import Expected, Registered, check_lease
from gpumarket.v1 import terms_pb2 as pb

ORDER = spec()
LEASE = lease(ORDER)
GIB = 1 << 30
NODE = Registered(address("owner"), Money(TOKEN), a_hash("tls"))


def expected(**changes: Any) -> Expected:
    values: dict[str, Any] = {
        "spec": ORDER,
        "ordered_at": NOW,
        "constraints": CONSTRAINTS,
        "attempt": 1,
        "channel": a_hash("channel"),
        "fee_ppm": 10_000,
        "spent": Money(0),
        "prefix_units": 0,
        "prefix_hash": ZERO_HASH,
        "lost_providers": frozenset[Address](),
    }
    return Expected(**(values | changes))


HARDWARE = {
    "gpus": [pb.GpuClaim(gpu_class="NVIDIA L4", vram_bytes=24 * GIB), pb.GpuClaim(gpu_class="NVIDIA H200", vram_bytes=141 * GIB)],
    "region": "DE",
    "sandbox": "process",
}
MET = pb.Constraints(
    gpu_class="NVIDIA H200",
    min_vram_bytes=141 * GIB,
    region="DE",
    min_stake=money_bytes(TOKEN),
    max_prompt_price_per_mtok=money_bytes(TOKEN),
    max_output_price_per_mtok=money_bytes(2 * TOKEN),
    min_sandbox="process",
    require_provider=LEASE.provider,
    exclude_providers=[address("somebody else")],
    exclude_owners=[address("somebody else's owner")],
)


def offer(**changes: Any) -> pb.OfferBody:
    model = pb.ModelOffer(
        model=ORDER.model,
        profile=ORDER.profile,
        prompt_price_per_mtok=money_bytes(TOKEN),
        output_price_per_mtok=money_bytes(2 * TOKEN),
    )
    values: dict[str, Any] = {"provider": LEASE.provider, "tls_key_hash": NODE.tls_key_hash, "models": [model], "expires_at": NOW + 60}
    return pb.OfferBody(**(values | changes))


def test_lease_as_ordered_passes() -> None:
    check_lease(LEASE, expected(), offer(), NODE, NOW)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("job", a_hash("x")),
        ("spec", a_hash("x")),
        ("attempt", 2),
        ("client", address("x")),
        ("scheduler", address("x")),
        ("provider", address("x")),
        ("model", a_hash("x")),
        ("task", Task.EMBED),
        ("prompt_price_per_mtok", Money(TOKEN + 1)),
        ("output_price_per_mtok", Money(2 * TOKEN + 1)),
        ("maximum", Money(TOKEN)),
        ("fee_ppm", 20_000),
        ("client_channel", a_hash("x")),
        ("profile", a_hash("x")),
        ("prefix_units", 1),
        ("prefix_hash", a_hash("x")),
        ("issued_at", NOW + 3_600),
        ("issued_at", NOW - 3_600),
        ("deadline", DEADLINE + 1),
        ("deadline", NOW),
    ],
)
def test_lease_with_a_bent_field_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ProtocolError):
        check_lease(replace(LEASE, **{field: value}), expected(), offer(), NODE, NOW)


def test_lease_issued_after_its_own_deadline_is_refused() -> None:
    """A clock that runs ahead explains the one time, not both: no panel hears a dispute about such a lease."""
    check_lease(replace(LEASE, issued_at=NOW + 20, deadline=NOW + 20), expected(), offer(), NODE, NOW)
    with pytest.raises(ProtocolError, match="before it was issued"):
        check_lease(replace(LEASE, issued_at=NOW + 21, deadline=NOW + 20), expected(), offer(), NODE, NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"provider": address("x")},
        {"expires_at": NOW},
        {"models": []},
        {"tls_key_hash": a_hash("x")},
        {"models": [pb.ModelOffer(model=ORDER.model, profile=a_hash("x"))]},
        {"models": [pb.ModelOffer(model=ORDER.model, profile=ORDER.profile, prompt_price_per_mtok=b"\0\1")]},
    ],
)
def test_lease_behind_another_offer_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        check_lease(LEASE, expected(), offer(**changes), NODE, NOW)


@pytest.mark.parametrize(
    "constraints",
    [
        pb.Constraints(require_provider=address("x")),
        pb.Constraints(exclude_providers=[LEASE.provider]),
        pb.Constraints(exclude_owners=[NODE.owner]),
        pb.Constraints(min_stake=money_bytes(2 * TOKEN)),
        pb.Constraints(gpu_class="NVIDIA H100"),
        pb.Constraints(gpu_class="NVIDIA L4"),  # it has one, beside the one it is filed under
        pb.Constraints(min_vram_bytes=141 * GIB + 1),
        pb.Constraints(region="FR"),
        pb.Constraints(min_sandbox="process+netns"),
        pb.Constraints(min_sandbox="a vault"),
        pb.Constraints(max_prompt_price_per_mtok=money_bytes(TOKEN - 1)),
        pb.Constraints(max_output_price_per_mtok=money_bytes(2 * TOKEN - 1)),
        pb.Constraints(max_output_price_per_mtok=b"\0\1"),
    ],
    ids=str,
)
def test_lease_against_the_constraints_is_refused(constraints: pb.Constraints) -> None:
    with pytest.raises(ProtocolError):
        check_lease(LEASE, expected(constraints=constraints), offer(**HARDWARE), NODE, NOW)


@pytest.mark.parametrize("constraints", [MET, pb.Constraints(min_sandbox="none"), pb.Constraints(max_prompt_price_per_mtok=b"")], ids=str)
def test_lease_within_the_constraints_passes(constraints: pb.Constraints) -> None:
    check_lease(LEASE, expected(constraints=constraints), offer(**HARDWARE), NODE, NOW)


@pytest.mark.parametrize("constraints", [pb.Constraints(gpu_class="CPU"), pb.Constraints(min_vram_bytes=1), pb.Constraints(region="DE")])
def test_lease_behind_an_offer_that_says_nothing_meets_no_demand(constraints: pb.Constraints) -> None:
    with pytest.raises(ProtocolError):
        check_lease(LEASE, expected(constraints=constraints), offer(), NODE, NOW)
    with pytest.raises(ProtocolError, match="sandbox"):
        check_lease(LEASE, expected(constraints=pb.Constraints(min_sandbox="process")), offer(sandbox="a vault"), NODE, NOW)


def test_lease_rules_judge_every_constraint_but_the_schedulers_own_opinion() -> None:
    assert {field.name for field in pb.Constraints.DESCRIPTOR.fields} == {field.name for field, _ in MET.ListFields()} | {
        "min_reputation_ppm"
    }


def test_lease_of_an_unregistered_or_lost_provider_is_refused() -> None:
    with pytest.raises(ProtocolError, match="registry"):
        check_lease(LEASE, expected(), offer(), None, NOW)
    with pytest.raises(ProtocolError, match="excluded"):
        check_lease(LEASE, expected(lost_providers=frozenset({LEASE.provider})), offer(), NODE, NOW)


def test_lease_maximum_counts_earlier_attempts_and_the_fee() -> None:
    fits = Money(TOKEN - LEASE.maximum - LEASE.maximum // 100)
    check_lease(LEASE, expected(spent=fits), offer(), NODE, NOW)
    with pytest.raises(ProtocolError, match="maximum"):
        check_lease(LEASE, expected(spent=Money(fits + 1)), offer(), NODE, NOW)


def test_lease_rules_name_every_field_that_matters() -> None:
    """A field that a later version adds must be judged, too, or listed here with its reason."""
    free = {"provider_channel", "window_units"}  # between scheduler and provider; any window of at least 1 is safe for a client
    judged = "job spec attempt client scheduler provider model task prompt_price_per_mtok output_price_per_mtok maximum fee_ppm "
    judged += "client_channel profile prefix_units prefix_hash issued_at deadline"
    assert {name for name, _ in LEASE.WORDS} == free | set(judged.split())


def test_demand_for_a_sandbox_that_nobody_knows_is_the_callers_mistake() -> None:
    assert Constraints(min_sandbox="process").to_proto().min_sandbox == "process"
    with pytest.raises(ConfigError, match="a vault"):
        Constraints(min_sandbox="a vault").to_proto()
