"""The model store: immutable manifests over content-addressed blobs, and names that point at them.

    ROOT/blobs/ab/ab12…       files by SHA-256
    ROOT/manifests/DIGEST.json
    ROOT/folders/DIGEST/      links to the blobs under the names that transformers expects
    ROOT/aliases.json         name → present and previous digest, switched by one rename

Invariant: what a digest names never changes. A model folder is a stranger's: names that leave it, links out of it, files that could run and
safetensors headers that lie are refused before anything is stored.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gpumarket.core.errors import ConfigError, ProtocolError, UnknownModel
from gpumarket.core.tensors import ROWS_MAX, SIGNATURE_FILE, Signature, signature_from_json, signature_to_json
from gpumarket.core.terms import ManifestFile, ModelManifest, Task
from gpumarket.core.units import Hash
from gpumarket.node.models.blobs import BlobStore, write_atomically
from gpumarket.node.models.onnx_import import MODEL_FILE, read_model
from gpumarket.node.models.safetensors_header import check_safetensors

KEPT_SUFFIXES: Final = (".safetensors", ".json", ".txt", ".jinja", ".model")
"""What belongs to a model. Read-me files, pictures and the like are left out of the digest."""
REFUSED_SUFFIXES: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".py", ".pyc", ".so")
FILES_MAX: Final = 2000
TEXT_BYTES_MAX: Final = 256 * 1024 * 1024
BYTES_MAX: Final = 4 * 1024**4

Progress = Callable[[str, int, int], None]
"""(path, bytes done, bytes in all) of the file being read."""


@dataclass(frozen=True, slots=True)
class Alias:
    """A name's digest and the one before it, if there was one."""

    digest: Hash
    previous: Hash | None = None


class ModelStore:
    """Models below `root`. Several processes may use one store."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._blobs = BlobStore(root / "blobs")

    def add(
        self,
        folder: Path,
        name: str,
        *,
        task: Task,
        dtype: str,
        quantization: str = "none",
        licence: str,
        max_input_tokens: int,
        link: bool = False,
        progress: Progress | None = None,
    ) -> ModelManifest:
        """Take a model folder in; its manifest. The same content gives the same digest, whatever its name.

        `link`: see `BlobStore.add`. Raises ConfigError for a folder that is refused.
        """
        entries = []
        for relative, path in model_files(folder):
            if path.suffix == ".safetensors":
                check_safetensors(path)
            size = path.stat().st_size
            told = _teller(progress, relative, size)
            sha256, stored = self._blobs.add(path, told, link=link)
            entries.append(ManifestFile(relative, sha256, stored))
        try:
            manifest = ModelManifest(name, task, dtype, quantization, licence, max_input_tokens, tuple(sorted(entries)))
        except ValueError as error:
            raise ConfigError(f"{folder} makes no model: {error}", hint="name the folder that the model was saved to") from error
        if not self._manifest_path(manifest.digest).exists():
            write_atomically(self._manifest_path(manifest.digest), _to_json(manifest))
        return manifest

    def add_onnx(
        self,
        file: Path,
        name: str,
        *,
        licence: str,
        rows_max: int = ROWS_MAX,
        batched: bool = True,
        link: bool = False,
        progress: Progress | None = None,
    ) -> ModelManifest:
        """Take a tensor model in; its manifest. `rows_max` is the most rows of a request. `batched` False: a request is one unit, though
        the model has a batch dimension (its rows depend on each other). Raises RefusedModel (`onnx_file`), ConfigError."""
        raw, model = read_model(file)
        signature = model.signature if batched else replace(model.signature, batched=False)
        described = signature_to_json(signature)
        size = len(raw)
        sha256, stored = self._blobs.add(file, _teller(progress, file.name, size), link=link)
        if sha256 != hashlib.sha256(raw).digest():
            raise ConfigError(f"{file.name} changed while it was read", hint="try again when nobody writes to it")
        entries = (ManifestFile(MODEL_FILE, sha256, stored), ManifestFile(SIGNATURE_FILE, self._blobs.put(described), len(described)))
        rows = min(rows_max, ROWS_MAX) if signature.batched else 1
        manifest = ModelManifest(name, Task.INFER, model.dtype, "none", licence, rows, entries)
        if not self._manifest_path(manifest.digest).exists():
            write_atomically(self._manifest_path(manifest.digest), _to_json(manifest))
        return manifest

    def signature(self, manifest: ModelManifest) -> Signature:
        """What a tensor model takes and gives. ConfigError when its file is missing or damaged."""
        try:
            return signature_from_json(self._blobs.read(manifest.file(SIGNATURE_FILE).sha256, TEXT_BYTES_MAX))
        except (KeyError, ProtocolError) as error:
            raise ConfigError(
                f"{manifest.name} has no {SIGNATURE_FILE} that can be read", hint="gpumarket model import it again"
            ) from error

    def manifest(self, digest: Hash) -> ModelManifest:
        """The manifest of a stored model. UnknownModel when it is not here, ConfigError when the file was changed."""
        path = self._manifest_path(digest)
        if not path.exists():
            raise UnknownModel(f"model {digest.hex()[:12]} is not in the store", hint="gpumarket model add FOLDER")
        try:
            found = _from_json(path.read_bytes())
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"the manifest {path.name} is damaged: {error}", hint="gpumarket model add the model again") from error
        if found.digest != digest:
            raise ConfigError(f"the manifest {path.name} was changed", hint="remove it and gpumarket model add again")
        return found

    def list(self) -> tuple[ModelManifest, ...]:
        """All stored models, by name and digest."""
        paths = (self._root / "manifests").glob("*.json")
        found = [self.manifest(Hash(bytes.fromhex(path.stem))) for path in paths]
        return tuple(sorted(found, key=lambda m: (m.name, m.digest)))

    def verify(self, digest: Hash) -> None:
        """Read every blob of a model again. ConfigError names the first that is missing or changed."""
        for entry in self.manifest(digest).files:
            self._blobs.verify(entry.sha256, entry.size)

    def read_blob(self, sha256: Hash, limit: int) -> bytes:
        """A whole blob of at most `limit` bytes, verified. UnknownModel when it is not here."""
        return self._blobs.read(sha256, limit)

    def materialise(self, digest: Hash) -> Path:
        """A folder of links that transformers can load. Made once, with one rename; reading it never changes the blobs."""
        manifest = self.manifest(digest)
        target = self._root / "folders" / digest.hex()
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
        try:
            for entry in manifest.files:
                blob = self._blobs.path(entry.sha256)
                if not blob.exists() or blob.stat().st_size != entry.size:
                    self._blobs.verify(entry.sha256, entry.size)
                place = draft / entry.path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(os.path.relpath(blob.resolve(), place.parent.resolve()))
            draft.chmod(0o755)
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return target

    # --- names ------------------------------------------------------------------------------------------------------

    def alias(self, name: str) -> Hash:
        """The digest that a name points at. UnknownModel when there is no such name."""
        return self._alias(self.aliases(), name).digest

    def aliases(self) -> dict[str, Alias]:
        """All names."""
        path = self._root / "aliases.json"
        if not path.exists():
            return {}
        rows: dict[str, dict[str, str]] = json.loads(path.read_bytes())
        return {name: Alias(_hash(row["digest"]), _hash(row["previous"]) if row["previous"] else None) for name, row in rows.items()}

    def set_alias(self, name: str, digest: Hash) -> None:
        """Point a name at a stored model; where it pointed before is kept for `rollback`."""
        self.manifest(digest)
        with self._changing_aliases() as aliases:
            before = aliases.get(name)
            if before is None or before.digest != digest:
                aliases[name] = Alias(digest, before.digest if before else None)

    def promote(self, name: str, digest: Hash) -> None:
        """`set_alias` after reading every blob of the new model again: what goes live is whole."""
        self.verify(digest)
        self.set_alias(name, digest)

    def rollback(self, name: str) -> Hash:
        """Point a name back at what it pointed at before; the two change places. Returns the digest now in force."""
        with self._changing_aliases() as aliases:
            present = self._alias(aliases, name)
            if present.previous is None:
                raise ConfigError(f"{name} has no previous version", hint="gpumarket model promote another version first")
            aliases[name] = Alias(present.previous, present.digest)
        return present.previous

    @staticmethod
    def _alias(aliases: dict[str, Alias], name: str) -> Alias:
        if name not in aliases:
            raise UnknownModel(f"no model is called {name} here", hint="gpumarket model ls")
        return aliases[name]

    @contextmanager
    def _changing_aliases(self) -> Iterator[dict[str, Alias]]:
        """Read, change and write back under a lock that other processes respect."""
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "aliases.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            aliases = self.aliases()
            yield aliases
            rows = {n: {"digest": a.digest.hex(), "previous": a.previous.hex() if a.previous else ""} for n, a in sorted(aliases.items())}
            write_atomically(self._root / "aliases.json", json.dumps(rows, indent=1).encode())

    def _manifest_path(self, digest: Hash) -> Path:
        return self._root / "manifests" / f"{digest.hex()}.json"


def model_files(folder: Path) -> list[tuple[str, Path]]:
    """The files of a model as (relative path, path), sorted. ConfigError for a folder that is refused."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json", hint="name the folder that the model was saved to")
    inside = folder.resolve()
    found: list[tuple[str, Path]] = []
    total = 0
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
        if path.is_dir() and not path.is_symlink():
            continue
        if not path.resolve().is_relative_to(inside) or not path.is_file() or path.is_dir():
            raise ConfigError(f"{relative} is a link out of the model folder, or no file", hint="copy the files themselves into it")
        if hidden:
            continue
        if path.suffix.lower() in REFUSED_SUFFIXES:
            raise ConfigError(f"{relative} could run code when it is loaded", hint="save the model as safetensors and remove the file")
        if path.suffix.lower() not in KEPT_SUFFIXES:
            continue
        size = path.stat().st_size
        total += size
        if (size > TEXT_BYTES_MAX and path.suffix != ".safetensors") or total > BYTES_MAX or len(found) >= FILES_MAX:
            raise ConfigError(f"{relative} is too large, or the folder has too many files", hint="this is no model folder")
        found.append((relative.as_posix(), path))
    if not any(path.suffix == ".safetensors" for _, path in found):
        raise ConfigError(f"{folder} has no safetensors weights", hint="save the model with save_pretrained")
    return found


def _teller(progress: Progress | None, relative: str, size: int) -> Callable[[int], None]:
    return (lambda done: progress(relative, done, size)) if progress else (lambda _: None)


def _hash(text: str) -> Hash:
    return Hash(bytes.fromhex(text))


def _to_json(manifest: ModelManifest) -> bytes:
    row = {
        "name": manifest.name,
        "task": manifest.task.name,
        "dtype": manifest.dtype,
        "quantization": manifest.quantization,
        "licence": manifest.licence,
        "max_input_tokens": manifest.max_input_tokens,
        "files": [{"path": f.path, "sha256": f.sha256.hex(), "size": f.size} for f in manifest.files],
    }
    return json.dumps(row, indent=1).encode()


def _from_json(raw: bytes) -> ModelManifest:
    row: dict[str, Any] = json.loads(raw)
    files = tuple(ManifestFile(f["path"], _hash(f["sha256"]), f["size"]) for f in row["files"])
    task = Task[row["task"]]
    return ModelManifest(row["name"], task, row["dtype"], row["quantization"], row["licence"], row["max_input_tokens"], files)
