"""What a caller may demand of a provider beyond the model, in everyday units."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gpumarket.core.errors import ConfigError
from gpumarket.core.units import PER_MILLION, Address, money_bytes, parse_money
from gpumarket.settlement.demands import SANDBOX_TIERS
from gpumarket.v1 import terms_pb2 as pb

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Constraints:
    """Hard limits; empty or 0 demands nothing. Prices and stake are text in tokens, prices per 1,000,000 tokens; reputation lies in
    0..1."""

    gpu_class: str = ""
    min_vram_gib: float = 0.0
    region: str = ""
    min_reputation: float = 0.0
    min_stake: str = "0"
    max_prompt_price: str = ""
    max_output_price: str = ""
    min_sandbox: str = ""
    require_provider: Address | None = None
    exclude_providers: Sequence[Address] = ()
    exclude_owners: Sequence[Address] = ()

    def to_proto(self, distrusted: Collection[Address] = ()) -> pb.Constraints:
        """As an order carries them, without the distrusted providers. Raises ConfigError for a number that is none."""
        if not 0 <= self.min_reputation <= 1:
            raise ConfigError(f"min_reputation is {self.min_reputation}; it must lie between 0 and 1")
        if self.min_vram_gib < 0:
            raise ConfigError(f"min_vram_gib is {self.min_vram_gib}; it must not be negative")
        if self.min_sandbox not in SANDBOX_TIERS:
            raise ConfigError(f"min_sandbox is {self.min_sandbox!r}", hint=f"one of {', '.join(filter(None, SANDBOX_TIERS))}")
        return pb.Constraints(
            gpu_class=self.gpu_class,
            min_vram_bytes=round(self.min_vram_gib * GIB),
            region=self.region,
            min_reputation_ppm=round(self.min_reputation * PER_MILLION),
            min_stake=_money(self.min_stake or "0"),
            max_prompt_price_per_mtok=_money(self.max_prompt_price) if self.max_prompt_price else b"",
            max_output_price_per_mtok=_money(self.max_output_price) if self.max_output_price else b"",
            min_sandbox=self.min_sandbox,
            require_provider=self.require_provider or b"",
            exclude_providers=sorted({*self.exclude_providers, *distrusted}),
            exclude_owners=sorted(self.exclude_owners),
        )


def _money(text: str) -> bytes:
    try:
        return money_bytes(parse_money(text))
    except ValueError as error:
        raise ConfigError(str(error)) from error
