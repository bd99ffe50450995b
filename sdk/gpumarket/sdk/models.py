"""The small files of a model, by digest: fetched from any provider that sells it, verified, kept, and turned into tokenizer and template.

A provider may lie about them as it likes: the manifest must hash to the digest that the lock file names, and each file to the
manifest's entry. Weights are never fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc.aio

from gpumarket.core.codec import manifest_from_proto, manifest_to_proto, parse
from gpumarket.core.errors import ConfigError, GpumarketError, ProtocolError, UnknownModel
from gpumarket.core.rpc import CALL_SECONDS, from_rpc
from gpumarket.core.terms import ManifestFile, ModelManifest, Task
from gpumarket.core.units import Hash, hex0x
from gpumarket.sdk import offers
from gpumarket.sdk.desk import Desk, log
from gpumarket.sdk.lock import LockedModel, find, write_entry
from gpumarket.sdk.template import ChatTemplate, special_tokens, template_source
from gpumarket.sdk.tokens import TextCodec
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1 import provider_pb2_grpc as pgrpc
from gpumarket.v1 import terms_pb2 as pb

WANTED = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
FILE_BYTES_MAX = 64 * 1024 * 1024
"""Largest small file taken; the biggest tokenizers in use have about 35 MB."""
BLOB_SECONDS = 60.0


@dataclass(frozen=True)
class LoadedModel:
    """A model as the client uses it. `files` are the verified small files by path."""

    entry: LockedModel
    files: dict[str, bytes]

    @cached_property
    def codec(self) -> TextCodec:
        """Its tokenizer. Raises ConfigError when the model brings none."""
        if "tokenizer.json" not in self.files:
            raise ConfigError(f"model {self.entry.name} has no tokenizer.json", hint="its owner must publish it with one")
        return TextCodec(self.files["tokenizer.json"])

    @cached_property
    def template(self) -> ChatTemplate:
        """Its chat template. Raises ConfigError when the model brings none."""
        separate = self.files.get("chat_template.jinja")
        config = self._json("tokenizer_config.json")
        source = template_source(config, separate.decode() if separate is not None else None)
        if source is None:
            raise ConfigError(f"model {self.entry.name} has no chat template", hint="use complete() with a raw prompt")
        return ChatTemplate(source, special_tokens(config))

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer: eos of the generation settings, the configuration and the tokenizer."""
        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            value = self._json(name).get("eos_token_id")
            found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int) and v >= 0)
        text = special_tokens(self._json("tokenizer_config.json"))["eos_token"]
        if text and (token := self.codec.token_id(text)) is not None:
            found.add(token)
        return tuple(sorted(found))

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            return {}
        try:
            value = json.loads(self.files[name])
        except ValueError as error:
            raise ConfigError(f"{name} of model {self.entry.name} is not JSON: {error}", hint="its owner must publish it anew") from error
        return value if isinstance(value, dict) else {}


class Models:
    """Aliases of the lock file, and the cache of small files in the state folder."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._loaded: dict[Hash, LoadedModel] = {}

    async def load(self, name: str, task: Task | None = None) -> LoadedModel:
        """The model behind an alias. Raises UnknownModel, or ConfigError when it does another task."""
        entry = find(self._desk.settings.lock_file, name)
        if task is not None and entry.task is not task:
            verb = {Task.EMBED: "embed()", Task.GENERATE: "chat() or complete()"}[entry.task]
            raise ConfigError(f"model {name} is for {entry.task.name.lower()}", hint=f"call {verb} with it")
        return await self.by_digest(entry)

    async def by_digest(self, entry: LockedModel) -> LoadedModel:
        """The model of a lock entry, its files fetched when they are not here yet."""
        found = self._loaded.get(entry.digest)
        if found is None:
            files = self._cached(entry.digest) or (await self._fetch(entry.digest))[1]
            found = self._loaded[entry.digest] = LoadedModel(entry, files)
        return found

    async def add(self, name: str, digest: Hash) -> LockedModel:
        """Fetch and verify a model's small files and write the alias into the lock file."""
        manifest, files = await self._fetch(digest)
        entry = LockedModel.of(name, manifest)
        write_entry(self._desk.settings.lock_file, entry)
        self._loaded[digest] = LoadedModel(entry, files)
        return entry

    # --- cache -------------------------------------------------------------------------------------------------------------

    def _folder(self, digest: Hash) -> Path:
        return self._desk.settings.state / "models" / digest.hex()

    def _cached(self, digest: Hash) -> dict[str, bytes] | None:
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
        return files

    def _keep(self, manifest: ModelManifest, files: dict[str, bytes]) -> None:
        folder = self._folder(manifest.digest)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for entry in _wanted(manifest):
            _write(folder / entry.sha256.hex(), files[entry.path])
        _write(folder / "manifest.pb", manifest_to_proto(manifest).SerializeToString(deterministic=True))

    # --- fetching ----------------------------------------------------------------------------------------------------------

    async def _fetch(self, digest: Hash) -> tuple[ModelManifest, dict[str, bytes]]:
        """From the first provider that has it and tells the truth. Raises UnknownModel with each provider's failure."""
        sellers = await offers.views(self._desk, digest)
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
            return manifest, files
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


def known_digests(entries: Iterable[LockedModel]) -> dict[Hash, LockedModel]:
    """Lock entries by digest."""
    return {entry.digest: entry for entry in entries}
