"""What a testnet consists of, as frozen values; nothing here starts anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MINILM = "all-MiniLM-L6-v2"
TINY_LLAMA = "tiny-llama"


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model on sale; prices in tokens of the market per 1,000,000 tokens of text."""

    name: str
    prompt_price: str
    output_price: str = "0"
    warm: bool = False


@dataclass(frozen=True, slots=True)
class ProviderPlan:
    """One provider. `cheat` names a kind of `gpumarket.testnet.cheaters`; empty is honest."""

    name: str
    models: tuple[ModelPlan, ...]
    cheat: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """More of ProviderSettings, over the testnet's own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole network: one chain, one scheduler, providers, and the settings of one client."""

    providers: tuple[ProviderPlan, ...]
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """More of SchedulerSettings."""
    client: Mapping[str, Any] = field(default_factory=dict)
    """More of ClientSettings."""
    chain: Mapping[str, Any] = field(default_factory=dict)
    """More of ChainSettings."""


def honest(count: int, *, text: int | None = None, warm: bool = False) -> tuple[ProviderPlan, ...]:
    """`count` honest providers that sell MiniLM at slightly different prices; the first `text` of them (all by default) also tiny-llama."""
    plans = []
    for index in range(count):
        models = [ModelPlan(MINILM, f"0.02{index}")]
        if text is None or index < text:
            models.append(ModelPlan(TINY_LLAMA, f"0.05{index}", f"0.20{index}", warm))
        plans.append(ProviderPlan(f"provider-{index + 1}", tuple(models)))
    return tuple(plans)


def cheater(name: str = "cheater", kind: str = "lower-precision") -> ProviderPlan:
    """A provider that sells a bf16 MiniLM as fp32, for less than anybody asks: that is what a cheater does.

    It takes no check jobs: as a checker its numbers would be compared too.
    """
    return ProviderPlan(name, (ModelPlan(MINILM, "0.01"),), kind, {"checks": False})
