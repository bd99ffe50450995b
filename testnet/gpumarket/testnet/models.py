"""The testnet's models: the real all-MiniLM-L6-v2, a small Llama with random weights and three tensor models, in one store.

What is made is made once per user, in a process of its own (this one must load neither torch nor onnx), and kept in the cache folder.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gpumarket.core.errors import EngineFailed
from gpumarket.core.terms import ModelManifest, Task
from gpumarket.testnet.plan import MINILM, TENSOR_MODELS, TINY_LLAMA
from gpumarket.testnet.processes import clean_environment

TINY_LLAMA_VERSION = "1"
TENSORS_VERSION = "2"
"""Part of the cache folder's name; raise it when the recipe changes."""


def cache_folder() -> Path:
    """Where this user's downloads and made models are kept ($XDG_CACHE_HOME/gpumarket)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpumarket"


async def fill_store(root: Path, names: frozenset[str], report: Callable[[str], None]) -> dict[str, ModelManifest]:
    """Put the named models into the store at `root` (a no-op for those that are there). Manifests by name.

    A name that is none of the testnet's own is one that somebody put there under this alias. Raises UnknownModel where nobody did.
    """
    folders = {}
    if MINILM in names:
        from gpumarket.node.models.minilm import minilm_path

        folders[MINILM] = minilm_path()
    if TINY_LLAMA in names:
        folders[TINY_LLAMA] = await tiny_llama(report)
    tensors = await tensor_models(report) if names.intersection(TENSOR_MODELS) else None
    onnx = {name: tensors for name in TENSOR_MODELS if tensors and name in names}
    return await asyncio.to_thread(_add_all, root, folders, onnx, names - folders.keys() - onnx.keys())


async def tiny_llama(report: Callable[[str], None]) -> Path:
    """The folder of the small Llama, made when it is not in the cache yet. Raises EngineFailed."""
    report_once = partial(report, "making a small Llama (once)")
    return await _made("gpumarket.node.models.tiny_llama", f"tiny-llama-{TINY_LLAMA_VERSION}", "the small Llama", report_once)


async def tensor_models(report: Callable[[str], None]) -> Path:
    """The folder of the tensor models, NAME.onnx each, made when it is not in the cache yet. Raises EngineFailed."""
    report_once = partial(report, "making three tensor models (once)")
    return await _made("gpumarket.testnet.tensor_models", f"tensor-models-{TENSORS_VERSION}", "the tensor models", report_once)


async def _made(module: str, name: str, what: str, report: Callable[[], None]) -> Path:
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    report()
    draft = folder.with_name(f"{folder.name}.{os.getpid()}")
    draft.parent.mkdir(parents=True, exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        str(draft),
        env=clean_environment(),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, errors = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        raise
    if process.returncode != 0:
        shutil.rmtree(draft, ignore_errors=True)
        raise EngineFailed(f"{what} could not be made: {errors.decode(errors='replace')[-500:]}", hint="gpumarket doctor")
    try:
        draft.rename(folder)
    except OSError:  # another testnet made it meanwhile: same recipe, same bytes
        shutil.rmtree(draft)
    return folder


def _add_all(root: Path, folders: dict[str, Path], tensors: dict[str, Path], others: frozenset[str]) -> dict[str, ModelManifest]:
    from gpumarket.node.models.store import ModelStore

    store = ModelStore(root)
    manifests = {}
    if MINILM in folders:
        manifests[MINILM] = store.add(folders[MINILM], MINILM, task=Task.EMBED, dtype="float32", licence="Apache-2.0", max_input_tokens=256)
    if TINY_LLAMA in folders:
        manifests[TINY_LLAMA] = store.add(
            folders[TINY_LLAMA], TINY_LLAMA, task=Task.GENERATE, dtype="float32", licence="Apache-2.0", max_input_tokens=1024
        )
    for name, folder in tensors.items():
        manifests[name] = store.add_onnx(folder / f"{name}.onnx", name, licence="Apache-2.0", rows_max=4096)
    for manifest in manifests.values():
        store.set_alias(manifest.name, manifest.digest)
    return manifests | {name: store.manifest(store.alias(name)) for name in others}
