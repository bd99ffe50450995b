"""What a testnet consists of, as frozen values; nothing here starts anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MINILM = "all-MiniLM-L6-v2"
TINY_LLAMA = "tiny-llama"
SHAPE_CLASSIFIER = "shape-classifier"
TELEMETRY_ANOMALY = "telemetry-anomaly"
CARD_FRAUD = "card-fraud"
TENSOR_MODELS = (SHAPE_CLASSIFIER, TELEMETRY_ANOMALY, CARD_FRAUD)
SCHEDULER = "scheduler"
"""Name of the role; providers are named by the plan."""
CLIENT = "client"
GATEWAY = "gateway"
CHEATS: Mapping[str, str] = {
    "lower-precision": "computes in bf16 what it sells as fp32",
    "cheaper-model": "serves a model of half the layers",
    "cut-prompt": "reads the first half of the input only",
    "inflated-count": "states twice the tokens that it delivered",
    "forged-receipt": "signs its receipts with a key that is not its own",
    "silence": "takes the job and never answers",
    "copied-offer": "advertises another provider's machine as its own",
}
"""Kinds of dishonest provider (`gpumarket.testnet.cheaters`), in words."""
COPIED_OFFER = "copied-offer"


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model on sale; prices in tokens of the market per 1,000,000 tokens of text, or rows of tensors."""

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

    @property
    def matchable(self) -> bool:
        """Whether it can ever get a job: nobody lists an offer that is another provider's."""
        return self.cheat != COPIED_OFFER


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole network: one chain, one scheduler, providers, the settings of one client, and perhaps a gateway."""

    providers: tuple[ProviderPlan, ...]
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """More of SchedulerSettings."""
    client: Mapping[str, Any] = field(default_factory=dict)
    """More of ClientSettings."""
    chain: Mapping[str, Any] = field(default_factory=dict)
    """More of ChainSettings."""
    gateway: Mapping[str, Any] | None = None
    """More of GatewaySettings; None: no gateway."""


def honest(count: int, *, text: int | None = None, warm: bool = False, tensors: bool = False) -> tuple[ProviderPlan, ...]:
    """`count` honest providers that sell MiniLM at slightly different prices; the first `text` of them (all by default) also tiny-llama,
    and with `tensors` all of them the tensor models."""
    plans = []
    for index in range(count):
        models = [ModelPlan(MINILM, f"0.02{index}")]
        if text is None or index < text:
            models.append(ModelPlan(TINY_LLAMA, f"0.05{index}", f"0.20{index}", warm))
        models += [ModelPlan(name, f"0.50{index}") for name in TENSOR_MODELS if tensors]
        plans.append(ProviderPlan(f"provider-{index + 1}", tuple(models)))
    return tuple(plans)


def cheater(name: str = "cheater", kind: str = "lower-precision") -> ProviderPlan:
    """A provider that sells MiniLM for less than anybody asks, and cheats: that is what a cheater does. Raises ValueError for no kind.

    It takes no check jobs: as a checker its numbers would be compared too.
    """
    if kind not in CHEATS:
        raise ValueError(f"there is no cheat {kind!r}; there are {', '.join(CHEATS)}")
    return ProviderPlan(name, (ModelPlan(MINILM, "0.01"),), kind, {"checks": False})


def cheaters(kinds: Sequence[str]) -> tuple[ProviderPlan, ...]:
    """One of each kind, named after what it does; "cheater" if it is the only one."""
    return tuple(cheater(kind if len(kinds) > 1 else "cheater", kind) for kind in dict.fromkeys(kinds))
