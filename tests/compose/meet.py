"""In a client's container: one job from each provider named, every result checked; prints a JSON document of what became of it."""

from __future__ import annotations

import asyncio
import json
import sys

from gpumarket.core.errors import GpumarketError
from gpumarket.core.units import parse_address
from gpumarket.sdk import Client
from gpumarket.sdk.constraints import Constraints
from gpumarket.testnet.plan import MINILM

TEXT = "The harbour of the town is deep, and ships of every size have come to it since it was dug; none was ever turned away."
PATIENCE_TRIES = 60


async def meet(market: Client, provider: str) -> dict[str, str]:
    """What the client says of the provider's work. A provider that is not matchable yet is asked again."""
    only = Constraints(require_provider=parse_address(provider))
    for _ in range(PATIENCE_TRIES):
        try:
            result = await market.embed(MINILM, [TEXT], max_cost="0.001", constraints=only)
        except GpumarketError as error:
            if error.code not in ("no_provider", "busy"):
                return {"met": "refused", "how": f"{error.code}: {error.message}"}
            await asyncio.sleep(1.0)
        else:
            return {"met": "taken", "how": str(result.verdict.state)}
    return {"met": "never", "how": "no match"}


async def main() -> None:
    async with Client.from_env() as market:
        print(json.dumps({provider: await meet(market, provider) for provider in sys.argv[1:]}))


asyncio.run(main())
