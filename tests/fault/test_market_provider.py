"""A provider's process is killed, or told to end, while it works. The market goes on and everybody is paid what they delivered."""

from __future__ import annotations

from fault_market import FaultMarket, assert_delivered_once, assert_paid_once, attempts_of


async def test_provider_killed_in_mid_stream_rest_comes_from_another_and_each_is_paid_its_part(market: FaultMarket) -> None:
    async with market.client() as client:
        stream, pieces, victim = await market.begin(client)
        market.network.processes.kill(victim)
        pieces += [piece async for piece in stream]
        result = stream.result
        tokens = assert_delivered_once(market, result.job)
        assert "".join(pieces) == result.text
        assert result.usage.output_tokens == len(tokens)
    assert [market.name_of(a.provider) for a in result.attempts] == [victim, *(n for n in market.providers if n != victim)]
    await market.restart(victim)
    await market.settle()
    first, second = attempts_of(market.books(), result.job)
    assert 0 < first.units < len(tokens)
    assert first.units + second.units == len(tokens)
    assert_paid_once(market, result.job, len(tokens))
    await market.check_invariants()
