"""The small files of a model, by digest: fetched from any provider that sells it, verified, kept.

A provider may lie about them as it likes: the manifest must hash to the digest that the lock file names, and each file to the
manifest's entry. Weights are never fetched.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import grpc.aio

from gpumarket.core.codec import manifest_from_proto, manifest_to_proto, parse
from gpumarket.core.errors import ConfigError, GpumarketError, ProtocolError, UnknownModel
from gpumarket.core.rpc import CALL_SECONDS, from_rpc
from gpumarket.core.tensors import SIGNATURE_FILE
from gpumarket.core.terms import ManifestFile, ModelManifest, Task
from gpumarket.core.units import Hash, hex0x
from gpumarket.sdk import offers
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.lock import LockedModel, find, write_entry
from gpumarket.sdk.logs import log
from gpumarket.sdk.model_files import LoadedModel, ModelFiles
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1 import provider_pb2_grpc as pgrpc
from gpumarket.v1 import terms_pb2 as pb

WANTED = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    SIGNATURE_FILE,
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
FILE_BYTES_MAX = 64 * 1024 * 1024
"""Largest small file taken; the biggest tokenizers in use have about 35 MB."""
BLOB_SECONDS = 60.0


class Models:
    """Aliases of the lock file, and the cache of small files in the state folder."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._files: dict[Hash, ModelFiles] = {}
        self._agreed: dict[str, LockedModel] = {}
        """Entries that were found to be what their digest stands for."""

    async def load(self, name: str, task: Task | None = None) -> LoadedModel:
        """The model behind an alias. Raises UnknownModel, or ConfigError when it does another task or the lock file contradicts it."""
        entry = find(self._desk.settings.lock_file, name)
        if task is not None and entry.task is not task:
            verb = {Task.EMBED: "embed()", Task.GENERATE: "chat() or complete()", Task.INFER: "infer()"}[entry.task]
            raise ConfigError(f"model {name} is for {entry.task.name.lower()}", hint=f"call {verb} with it")
        files = await self.files(entry.digest)
        if self._agreed.get(name) != entry and LockedModel.of(name, files.manifest) != entry:
            raise ConfigError(
                f"the lock file's entry for {name} is not what its digest stands for",
                hint=f"gpumarket model add {name} {hex0x(entry.digest)}",
            )
        self._agreed[name] = entry
        return LoadedModel(entry, files)

    async def files(self, digest: Hash) -> ModelFiles:
        """The small files of a model, fetched when they are not here yet."""
        if digest not in self._files:
            self._files[digest] = self._cached(digest) or await self._fetch(digest)
        return self._files[digest]

    async def add(self, name: str, digest: Hash) -> LockedModel:
        """Fetch and verify a model's small files and write the alias into the lock file."""
        entry = LockedModel.of(name, (await self.files(digest)).manifest)
        write_entry(self._desk.settings.lock_file, entry)
        return entry

    # --- cache -------------------------------------------------------------------------------------------------------------

    def _folder(self, digest: Hash) -> Path:
        return self._desk.settings.state / "models" / digest.hex()

    def _cached(self, digest: Hash) -> ModelFiles | None:
        """Files of the cache, hashed again; None when anything is missing or was changed (it is fetched anew)."""
        folder = self._folder(digest)
        try:
            manifest = manifest_from_proto(parse(pb.ModelManifest, (folder / "manifest.pb").read_bytes()))
            files = {f.path: (folder / f.sha256.hex()).read_bytes() for f in _wanted(manifest)}
        except (OSError, ProtocolError):
            return None
        changed = manifest.digest != digest or any(hashlib.sha256(files[f.path]).digest() != f.sha256 for f in _wanted(manifest))
        if changed:
            log.warning("model_cache_changed", model=hex0x(digest))
            return None
        return ModelFiles(manifest, files)

    def _keep(self, manifest: ModelManifest, files: dict[str, bytes]) -> None:
        folder = self._folder(manifest.digest)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for entry in _wanted(manifest):
            _write(folder / entry.sha256.hex(), files[entry.path])
        _write(folder / "manifest.pb", manifest_to_proto(manifest).SerializeToString(deterministic=True))

    # --- fetching ----------------------------------------------------------------------------------------------------------

    async def _fetch(self, digest: Hash) -> ModelFiles:
        """From the first provider that has it and tells the truth. Raises UnknownModel with each provider's failure."""
        sellers = await self._desk.schedulers.ask(lambda hub: offers.views(self._desk, hub, digest))
        failures: list[str] = []
        for seller in sellers:
            try:
                line = await self._desk.peers.line(seller.endpoint, seller.tls_key_hash)
                try:
                    manifest, files = await _download(line, digest)
                finally:
                    await self._desk.peers.release(seller.endpoint, seller.tls_key_hash)
            except GpumarketError as error:
                failures.append(f"{hex0x(seller.provider)}: {error.message}")
                continue
            self._keep(manifest, files)
            return ModelFiles(manifest, files)
        tried = "; ".join(failures) or "nobody sells it now"
        raise UnknownModel(f"model {hex0x(digest)} could not be fetched: {tried}", hint="gpumarket market ls shows what is on sale")


def _wanted(manifest: ModelManifest) -> list[ManifestFile]:
    return [f for f in manifest.files if f.path in WANTED]


async def _download(line: grpc.aio.Channel, digest: Hash) -> tuple[ModelManifest, dict[str, bytes]]:
    stub: Any = pgrpc.ProviderStub(line)
    try:
        manifest = manifest_from_proto(await stub.GetManifest(ppb.ManifestRequest(model=digest), timeout=CALL_SECONDS))
        if manifest.digest != digest:
            raise ProtocolError(f"its manifest hashes to {hex0x(manifest.digest)}")
        files = {entry.path: await _blob(stub, entry) for entry in _wanted(manifest)}
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, "the provider") from error
    return manifest, files


async def _blob(stub: Any, entry: ManifestFile) -> bytes:
    if entry.size > FILE_BYTES_MAX:
        raise ProtocolError(f"{entry.path} has {entry.size} bytes; at most {FILE_BYTES_MAX} are taken")
    data = bytearray()
    async for piece in stub.GetBlob(ppb.BlobRequest(sha256=entry.sha256), timeout=BLOB_SECONDS):
        data += piece.data
        if len(data) > entry.size:
            raise ProtocolError(f"{entry.path} is longer than the manifest says")
    if hashlib.sha256(data).digest() != entry.sha256:
        raise ProtocolError(f"{entry.path} does not hash to what the manifest says")
    return bytes(data)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
