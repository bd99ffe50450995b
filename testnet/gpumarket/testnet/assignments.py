"""What every role of a plan is told, as settings: for processes on one machine's loopback, and for hosts of their own. Pure.

`Site` says where things lie and listen, the plan what is sold and who cheats. Invariant: the two kinds of testnet differ in the site alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumarket.core.units import Hash, hex0x
from gpumarket.testnet.plan import CLIENT, GATEWAY, SCHEDULER, ModelPlan, Plan

Sections = dict[str, dict[str, Any]]
"""Section of a settings file → its values (`settings_file.write`)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one role keeps its things, and more of its settings: where it listens, how others reach it."""

    state: Path
    key_file: Path
    password_file: Path
    settings: Mapping[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        return {"state": self.state, "key_file": self.key_file, "password_file": self.password_file, **self.settings}


@dataclass(frozen=True, slots=True)
class Site:
    """What all roles share, and each one's own place."""

    rpc_url: str
    book: Path
    store: Path
    lock_file: Path
    meeting_point: str
    """Multiaddr of the first scheduler's p2p node, which the others join through."""
    places: Mapping[str, Place]


def sections_of(plan: Plan, site: Site, models: Mapping[str, Hash]) -> dict[str, Sections]:
    """Role → its settings, the client among them. `models`: digests by name. A plan's own settings stand over the site's."""
    chain = {"rpc_url": site.rpc_url, "address_book": site.book, **plan.chain}
    roles: dict[str, Sections] = {}
    for name in filter(is_scheduler, site.places):
        joins = {} if name == SCHEDULER else {"p2p_bootstrap": [site.meeting_point]}
        roles[name] = {"scheduler": {**joins, **site.places[name].values(), **plan.scheduler}, "chain": chain}
    for provider in plan.providers:
        section = {
            "model_store": site.store,
            "p2p_bootstrap": [site.meeting_point],
            "models": [_model(model, models) for model in provider.models],
            **site.places[provider.name].values(),
            **provider.settings,
        }
        roles[provider.name] = {"provider": section, "chain": chain}
    client = {"lock_file": site.lock_file, "faucet": True, **site.places[CLIENT].values(), **plan.client}
    roles[CLIENT] = {"client": client, "chain": chain}
    if plan.gateway is not None:
        roles[GATEWAY] = _gateway(plan.gateway, site, plan.client) | {"chain": chain}
    return roles


def _gateway(settings: Mapping[str, Any], site: Site, client: Mapping[str, Any]) -> Sections:
    """A client of its own, and what makes it a gateway. The client's table comes first: its books are audited as a client's."""
    place = site.places[GATEWAY]
    buyer = {"lock_file": site.lock_file, "faucet": True, **client, **place.values(), "state": place.state / CLIENT}
    return {"client": buyer, "gateway": {"state": place.state, **settings}}


def is_scheduler(name: str) -> bool:
    """Whether a role is one; the others than the first are called scheduler-2 and so on."""
    return name == SCHEDULER or name.startswith(f"{SCHEDULER}-")


def _model(model: ModelPlan, models: Mapping[str, Hash]) -> dict[str, Any]:
    digest = hex0x(models[model.name])
    return {"model": digest, "prompt_price": model.prompt_price, "output_price": model.output_price, "warm": model.warm}
