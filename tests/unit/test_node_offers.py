"""Offers, engines' queues and settings of a provider."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from node_fixtures import CHANNEL, DOMAIN, NOW, PROVIDER, STRANGER, Channel, FixedClock, ScriptedEngine, house, on_sale
from provider_market import CHANNELS, CPU, voucher

from gpumarket.core.codec import open_offer
from gpumarket.core.errors import BadSignature, Busy, ChannelExpiring, ConfigError, EngineFailed, ProtocolError
from gpumarket.core.settings import load
from gpumarket.core.terms import Task
from gpumarket.core.units import Hash, parse_money
from gpumarket.node.claims import check_voucher
from gpumarket.node.engines import Engines, Seat
from gpumarket.node.offers import Shop, is_due, next_sequence, offer_body, sign_body, withdrawn_body
from gpumarket.node.provider import credit_start
from gpumarket.node.settings import ProviderSettings
from gpumarket.v1 import terms_pb2 as pb

TEXT = on_sale(Task.GENERATE)
SHOP = Shop(PROVIDER.address, "peer", "127.0.0.1:1", Hash(b"\x02" * 32), "EU", True, 2)


def body(**changes: object) -> pb.OfferBody:
    made = offer_body(SHOP, CPU.gpus, {"": 7}, {TEXT.manifest.digest: TEXT}, [], "process", {TEXT.manifest.digest: 41_500})
    made.MergeFrom(pb.OfferBody(**changes))  # type: ignore[arg-type]
    return made


def test_offer_states_what_is_sold_and_verifies_with_the_wallet_key() -> None:
    opened = open_offer(DOMAIN, sign_body(PROVIDER, DOMAIN, body(), 5, NOW + 60))
    assert (opened.sequence, opened.expires_at, opened.gpus[0].gpu_class, opened.gpus[0].measured_mflops) == (5, NOW + 60, "CPU", 7)
    assert (opened.models[0].profile, opened.models[0].warm, opened.models[0].measured_tokens_per_ks) == (TEXT.profile, False, 41_500)
    with pytest.raises(BadSignature):
        open_offer(DOMAIN, sign_body(STRANGER, DOMAIN, body(), 5, NOW + 60))


def test_offer_is_signed_anew_on_change_and_at_half_its_life_only() -> None:
    assert is_due(None, body(), 0, NOW, 600)
    assert not is_due(body(), body(), NOW, NOW + 299, 600)
    assert is_due(body(), body(), NOW, NOW + 300, 600)
    assert is_due(body(), body(region="X"), NOW, NOW, 600)


def test_offer_sequence_rises_even_when_the_clock_goes_back() -> None:
    assert next_sequence(None, NOW) == NOW * 1000
    assert next_sequence(NOW * 1000, NOW) == NOW * 1000 + 1
    assert next_sequence(NOW * 1000, NOW - 500) == NOW * 1000 + 1


def test_offer_withdrawn_sells_nothing() -> None:
    assert not withdrawn_body(SHOP).models


# --- queues --------------------------------------------------------------------------------------------------------------------


async def test_seat_hands_slots_in_order_and_refuses_beyond_its_queue() -> None:
    clock, engine = FixedClock(), ScriptedEngine("generate")
    seat = Seat(replace(TEXT, slots=1), lambda: engine, 1, clock)
    first, second = seat.enter(), seat.enter()
    assert (first.position, second.position) == (0, 1)
    with pytest.raises(Busy):
        seat.enter()
    async with first.engine():
        waiting = asyncio.create_task(_hold(second))
        await asyncio.sleep(0)
        assert (seat.running, seat.waiting, seat.free) == (1, 1, 0)
    await waiting
    assert (seat.running, seat.waiting, seat.free, engine.starts) == (0, 0, 1, 1)


async def _hold(place: object) -> None:
    async with place.engine():  # type: ignore[attr-defined]
        await asyncio.sleep(0)


async def test_seat_place_given_up_is_free_again() -> None:
    seat = Seat(replace(TEXT, slots=1), lambda: ScriptedEngine("generate"), 0, FixedClock())
    place = seat.enter()
    place.leave()
    place.leave()
    assert seat.free == 1
    seat.enter()


async def test_seat_engine_that_does_not_start_is_not_tried_again_at_once() -> None:
    clock = FixedClock()
    engines = [ScriptedEngine("generate"), ScriptedEngine("generate")]
    engines[0].alive = False
    seat = Seat(TEXT, iter(engines).__next__, 4, clock)
    place = seat.enter()
    with pytest.raises(EngineFailed):
        async with place.engine():
            raise AssertionError("started")
    assert seat.free == 0
    with pytest.raises(Busy, match="failed to start"):
        seat.enter()
    clock.at += 10
    async with seat.enter().engine() as engine:
        assert engine is engines[1]


async def test_engines_claim_no_sandbox_before_one_runs_and_the_weakest_after() -> None:
    seat = Seat(TEXT, lambda: ScriptedEngine("generate"), 4, FixedClock())
    engines = Engines({TEXT.manifest.digest: seat})
    assert await engines.sandbox() == "none"
    await engines.warm_up([TEXT.manifest.digest])
    assert await engines.sandbox() == "process"
    await engines.close()


# --- vouchers and settings ------------------------------------------------------------------------------------------------------


def test_voucher_counts_only_when_it_can_be_redeemed() -> None:
    channels = {CHANNEL: Channel()}
    assert check_voucher(voucher(5), channels, PROVIDER.address, CHANNELS, NOW).cumulative == 5
    with pytest.raises(ProtocolError, match="not one to this provider"):
        check_voucher(voucher(5), {}, PROVIDER.address, CHANNELS, NOW)
    with pytest.raises(ProtocolError, match="deposit"):
        check_voucher(voucher(Channel().deposit + 1), channels, PROVIDER.address, CHANNELS, NOW)
    with pytest.raises(BadSignature):
        check_voucher(voucher(5), {CHANNEL: Channel(signer=STRANGER.address)}, PROVIDER.address, CHANNELS, NOW)
    with pytest.raises(ChannelExpiring):
        check_voucher(voucher(5), channels, PROVIDER.address, CHANNELS, Channel().expires_at)


def test_credit_starts_at_one_window_of_every_job_that_can_be_open() -> None:
    rules = house(on_sale(Task.EMBED, prompt=10**12))
    one_window = 32_768 * 10**12 // 1_000_000 + 1
    assert one_window * 18 - 18 <= credit_start(ProviderSettings(queue_limit=16), rules) <= one_window * 18
    assert credit_start(ProviderSettings(credit="0.5"), rules) == parse_money("0.5")


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"stak": "1"}, "stak"),
        ({"stake": "ten"}, "stake"),
        ({"credit": "-1"}, "credit"),
        ({"schedulers": ["0x12"]}, "schedulers"),
        ({"roles": ["boss"]}, "roles"),
        ({"models": [{"model": "x", "slots": 0}]}, "models"),
        ({"models": [{"model": "x", "prompt_price": "1e"}]}, "models"),
    ],
)
def test_settings_that_make_no_sense_are_named(flags: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load(ProviderSettings, flags=flags, env={})
