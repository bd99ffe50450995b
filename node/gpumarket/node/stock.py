"""From the price list to models that can be served: digests, files, profiles, and the engine that runs each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from gpumarket.core.errors import ConfigError, MissingExtra, UnknownModel
from gpumarket.core.terms import ModelManifest, Task
from gpumarket.core.units import Hash, parse_hash
from gpumarket.node.admission import OnSale
from gpumarket.node.engine.base import Engine
from gpumarket.node.engine.process import EngineProcess
from gpumarket.node.models.store import ModelStore
from gpumarket.node.provider import Stock
from gpumarket.node.settings import ModelSetting
from gpumarket.settlement.verification import profile_for

ENGINE_PACKAGES = ("torch", "transformers", "safetensors")
TENSOR_PACKAGES = ("onnxruntime",)
"""What the engines' processes import. This one never does: it must not pay for them, nor fall with them."""
ENGINES = {Task.EMBED: "embed", Task.GENERATE: "slots", Task.INFER: "onnx"}
"""Which engine does a task."""


def open_stock(store: ModelStore, models: Iterable[ModelSetting]) -> list[Stock]:
    """The models on sale. Raises UnknownModel for one that is not in the store, ConfigError for one that cannot be sold, MissingExtra
    where no engine could start: before a stake is paid for a provider that serves nothing."""
    stock: dict[Hash, Stock] = {}
    for setting in models:
        digest = _digest(store, setting.model)
        if digest in stock:
            raise ConfigError(f"model {setting.model} is on the price list twice", hint="remove one of the two entries")
        manifest = store.manifest(digest)
        if manifest.task not in ENGINES:
            raise ConfigError(f"there is no engine for {setting.model}, a model of task {manifest.task.name}")
        _require_engine(manifest.task)
        profile = profile_for(manifest.task, manifest.dtype)
        signature = store.signature(manifest) if manifest.task is Task.INFER else None
        prices = (setting.prompt_price_per_mtok, setting.output_price_per_mtok)
        on_sale = OnSale(manifest, profile.digest, *prices, setting.slots, signature)
        stock[digest] = Stock(on_sale, store.materialise(digest), setting.warm or manifest.task is Task.EMBED)
    if not stock:
        raise ConfigError(
            "there is nothing to sell: [provider] lists no models", hint="add one with [[provider.models]] and `gpumarket model add`"
        )
    return list(stock.values())


def default_engine_factory(manifest: ModelManifest, folder: Path, slots: int, *, compute_dtype: str = "") -> Engine:
    """An engine in a process of its own that computes in the dtype that is sold, unless another one is named."""
    options: dict[str, int] = {"rows_max": slots} if manifest.task is Task.GENERATE else {}
    return EngineProcess(ENGINES[manifest.task], folder, compute_dtype=compute_dtype or manifest.dtype, options=options)


def _require_engine(task: Task) -> None:
    for package in TENSOR_PACKAGES if task is Task.INFER else ENGINE_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("provider", f"an engine ({package})")


def _digest(store: ModelStore, name: str) -> Hash:
    if name.startswith("0x"):
        try:
            return parse_hash(name)
        except ValueError as error:
            raise UnknownModel(str(error), hint="`gpumarket model list` shows the digests") from error
    return store.alias(name)
