"""`gpumarket model`: names of models you buy (your lock file), and models you sell (a provider's store)."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gpumarket.cli import buyer, settings
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb
from gpumarket.core.terms import ModelManifest, Task
from gpumarket.core.units import hex0x

app = noun("Models you use and models you sell.")
StoreOption = Annotated[Path | None, typer.Option("--store", help="A provider's model store; the settings' one by default.")]


class Kind(StrEnum):
    """What a model does."""

    embed = "embed"
    generate = "generate"
    infer = "infer"


@verb(app, "add")
async def add(
    name: Annotated[str, typer.Argument(help="Name to use from now on.")],
    digest: Annotated[str, typer.Argument(help="The model's digest (0x...), from its publisher or gpumarket market ls.")],
    config: ConfigOption = None,
) -> None:
    """Give a model a name in your lock file; its tokenizer is fetched and verified against the digest."""
    async with buyer.market(config) as market:
        entry = await market.add_model(name, digest)
    current().emit({"name": entry.name, "digest": hex0x(entry.digest), "task": entry.task.name.lower(), "dtype": entry.dtype})


@verb(app, "list")
def list_models(
    sold: Annotated[bool, typer.Option("--sold", help="Those in a provider's store instead.")] = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Models in your lock file, or with --sold in a provider's store."""
    if sold or store is not None:
        from gpumarket.node.models.store import ModelStore

        current().emit([_manifest(manifest) for manifest in ModelStore(_store(store, config)).list()])
        return
    from gpumarket.sdk.lock import read_lock
    from gpumarket.sdk.settings import ClientSettings

    entries = read_lock(settings.role(ClientSettings, config).lock_file)
    current().emit(
        [
            {"name": e.name, "digest": hex0x(e.digest), "task": e.task.name.lower(), "dtype": e.dtype, "max_input": e.max_input_tokens}
            for e in entries.values()
        ]
    )


@verb(app, "import")
def import_model(
    folder: Annotated[Path, typer.Argument(help="A model in safetensors with its tokenizer, or a tensor model's .onnx file.")],
    name: Annotated[str, typer.Option(help="Alias in the store.")],
    task: Annotated[Kind, typer.Option(help="What it does.")],
    licence: Annotated[str, typer.Option(help="SPDX identifier, e.g. Apache-2.0.")],
    max_input: Annotated[int, typer.Option(min=1, help="Longest input, in tokens; most rows of a request to a tensor model.")],
    dtype: Annotated[str, typer.Option(help="What the computation is sold as; a tensor model's file says it.")] = "float32",
    quantization: Annotated[str, typer.Option()] = "none",
    whole: Annotated[bool, typer.Option("--whole", help="A tensor model whose rows depend on each other: a request is one unit.")] = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Copy a model into a provider's store, content-addressed, and print the digest that buyers name it by."""
    from gpumarket.node.models.store import ModelStore

    place = ModelStore(_store(store, config))
    manifest = (
        place.add_onnx(folder, name, licence=licence, rows_max=max_input, batched=not whole, progress=_tell)
        if task is Kind.infer
        else place.add(
            folder,
            name,
            task=Task.EMBED if task is Kind.embed else Task.GENERATE,
            dtype=dtype,
            quantization=quantization,
            licence=licence,
            max_input_tokens=max_input,
            progress=_tell,
        )
    )
    place.set_alias(name, manifest.digest)
    current().emit(_manifest(manifest))


@verb(app, "make-tiny")
async def make_tiny() -> None:
    """Make the testnets' small Llama (random weights, once per user) and print its folder, to be imported."""
    from gpumarket.testnet.models import tiny_llama

    current().emit({"folder": str(await tiny_llama(current().progress))})


def _tell(path: str, done: int, size: int) -> None:
    if done == size:
        current().progress(f"{path}: {done} of {size} bytes")


def _store(given: Path | None, config: Path | None) -> Path:
    if given is not None:
        return given
    from gpumarket.node.settings import ProviderSettings

    return settings.role(ProviderSettings, config).model_store


def _manifest(manifest: ModelManifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "digest": hex0x(manifest.digest),
        "task": manifest.task.name.lower(),
        "dtype": manifest.dtype,
        "quantization": manifest.quantization,
        "licence": manifest.licence,
        "bytes": sum(file.size for file in manifest.files),
    }
