"""The model store keeps what a digest names, and refuses folders that would harm whoever loads them."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import onnx_corpus
import pytest

from gpumarket.cli import main
from gpumarket.core.errors import ConfigError, UnknownModel
from gpumarket.core.terms import ModelManifest, Task
from gpumarket.core.units import Hash
from gpumarket.node.models.minilm import minilm_path
from gpumarket.node.models.safetensors_header import check_safetensors
from gpumarket.node.models.store import ModelStore


def safetensors(header: object, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def byte_span(start: int, stop: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}


SOUND = safetensors({"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, bytes(24))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    (made / "1_Pooling").mkdir(parents=True)
    (made / "config.json").write_text('{"model_type": "bert"}')
    (made / "1_Pooling" / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(SOUND)
    (made / "README.md").write_text("hello")
    (made / ".gitattributes").write_text("x")
    return made


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def add(store: ModelStore, folder: Path, name: str = "m", **changed: object) -> ModelManifest:
    terms = {"task": Task.EMBED, "dtype": "float32", "licence": "Apache-2.0", "max_input_tokens": 256} | changed
    return store.add(folder, name, **terms)  # type: ignore[arg-type]


def test_add_keeps_model_files_only_and_is_idempotent(store: ModelStore, folder: Path, tmp_path: Path) -> None:
    manifest = add(store, folder)
    assert [f.path for f in manifest.files] == ["1_Pooling/config.json", "config.json", "model.safetensors"]
    assert add(store, folder) == manifest == store.manifest(manifest.digest)
    assert store.list() == (manifest,)
    assert not list(tmp_path.rglob(".partial-*"))
    store.verify(manifest.digest)


def test_digest_follows_content_and_terms_but_not_name(store: ModelStore, folder: Path) -> None:
    manifest = add(store, folder)
    assert add(store, folder, "other name").digest == manifest.digest
    assert add(store, folder, dtype="bfloat16").digest != manifest.digest
    (folder / "model.safetensors").write_bytes(SOUND[:-1] + b"\1")
    assert add(store, folder).digest != manifest.digest


def test_materialise_gives_a_loadable_folder_once(store: ModelStore, folder: Path) -> None:
    manifest = add(store, folder)
    made = store.materialise(manifest.digest)
    assert made == store.materialise(manifest.digest)
    for entry in manifest.files:
        assert (made / entry.path).read_bytes() == (folder / entry.path).read_bytes()
    assert not (made / "README.md").exists()


def test_real_model_survives_the_store(store: ModelStore) -> None:
    manifest = add(store, minilm_path(), link=True)
    made = store.materialise(manifest.digest)
    assert os.path.samefile(made / "model.safetensors", store._blobs.path(manifest.file("model.safetensors").sha256))
    assert (made / "tokenizer.json").read_bytes() == (minilm_path() / "tokenizer.json").read_bytes()


def test_progress_is_told_up_to_the_size(store: ModelStore, folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    add(store, folder, progress=lambda *row: told.append(row))
    assert ("model.safetensors", len(SOUND), len(SOUND)) in told


def test_interrupted_add_is_continued(store: ModelStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store._blobs._copy

    def power_cut(source: Path, target: Path, sha256: Hash) -> None:
        if source.name == "model.safetensors":
            raise KeyboardInterrupt
        real(source, target, sha256)

    with monkeypatch.context() as patched:
        patched.setattr(store._blobs, "_copy", power_cut)
        with pytest.raises(KeyboardInterrupt):
            add(store, folder)
    assert store.list() == ()
    assert store.list() == () and add(store, folder) in store.list()


def test_changed_blob_is_found(store: ModelStore, folder: Path) -> None:
    manifest = add(store, folder)
    entry = manifest.file("model.safetensors")
    blob = store._blobs.path(entry.sha256)
    blob.chmod(0o644)
    blob.write_bytes(SOUND[:-1] + b"\1")
    with pytest.raises(ConfigError, match="was changed"):
        store.verify(manifest.digest)
    with pytest.raises(ConfigError, match="was changed"):
        store.promote("m", manifest.digest)
    with pytest.raises(ConfigError, match="was changed"):
        store.read_blob(entry.sha256, 1 << 20)
    with pytest.raises(UnknownModel):
        store.alias("m")


def test_changed_manifest_is_found(store: ModelStore, folder: Path, tmp_path: Path) -> None:
    manifest = add(store, folder)
    path = tmp_path / "store" / "manifests" / f"{manifest.digest.hex()}.json"
    path.write_text(path.read_text().replace("Apache-2.0", "MIT"))
    with pytest.raises(ConfigError, match="was changed"):
        store.manifest(manifest.digest)
    path.write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        store.manifest(manifest.digest)


def test_read_blob_over_the_limit_or_unknown_is_refused(store: ModelStore, folder: Path) -> None:
    entry = add(store, folder).file("model.safetensors")
    assert store.read_blob(entry.sha256, entry.size) == SOUND
    with pytest.raises(ConfigError, match="over"):
        store.read_blob(entry.sha256, entry.size - 1)
    with pytest.raises(UnknownModel):
        store.read_blob(Hash(bytes(32)), 10)


def test_alias_switches_keeps_previous_and_rolls_back(store: ModelStore, folder: Path) -> None:
    old, new = add(store, folder).digest, add(store, folder, dtype="bfloat16").digest
    store.set_alias("m", old)
    with pytest.raises(ConfigError, match="no previous"):
        store.rollback("m")
    store.promote("m", new)
    store.promote("m", new)  # twice is once: the previous version is not lost
    assert store.alias("m") == new and store.aliases()["m"].previous == old
    assert store.rollback("m") == old == store.alias("m")
    assert store.rollback("m") == new


def test_alias_of_what_is_not_stored_is_refused(store: ModelStore, folder: Path) -> None:
    with pytest.raises(UnknownModel):
        store.set_alias("m", Hash(bytes(32)))
    for call in (store.alias, store.rollback):
        with pytest.raises(UnknownModel):
            call("nobody")
    with pytest.raises(UnknownModel):
        store.materialise(Hash(bytes(32)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pkl", "modeling.py", "sub/weights.PT"])
def test_add_of_files_that_could_run_is_refused(store: ModelStore, folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="could run code"):
        add(store, folder)


def test_add_of_link_out_of_the_folder_is_refused(store: ModelStore, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (folder / "vocab.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ConfigError, match="link out"):
        add(store, folder)
    (folder / "vocab.json").unlink()
    (folder / "up").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="link out"):
        add(store, folder)


def test_add_of_special_file_is_refused(store: ModelStore, folder: Path) -> None:
    os.mkfifo(folder / "config2.json")
    with pytest.raises(ConfigError, match="no file"):
        add(store, folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_add_of_incomplete_folder_is_refused(store: ModelStore, folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match="has no"):
        add(store, folder)


def test_add_of_file_that_is_too_large_is_refused(store: ModelStore, folder: Path) -> None:
    with (folder / "big.json").open("wb") as file:
        file.truncate(300 * 1024 * 1024)
    with pytest.raises(ConfigError, match="too large"):
        add(store, folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 1 << 40) + b"{}",
        safetensors(b"not json", b""),
        safetensors([], b""),
        safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4)),
        safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(12)),
        safetensors({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors({"w": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, b""),
        safetensors({"w": byte_span(0, 4), "v": byte_span(2, 6)}, bytes(6)),
        safetensors(b"[" * 100_000, b""),
    ],
)
def test_safetensors_header_that_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="no sound safetensors"):
        check_safetensors(tmp_path / "w.safetensors")


def test_safetensors_header_that_is_sound_passes(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(SOUND)
    check_safetensors(tmp_path / "w.safetensors")
    check_safetensors(minilm_path() / "model.safetensors")


# --- tensor models ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx_corpus.sound().SerializeToString())
    return path


def test_add_onnx_keeps_the_file_and_a_signature_under_one_digest(store: ModelStore, onnx_file: Path) -> None:
    manifest = store.add_onnx(onnx_file, "m", licence="MIT", rows_max=64)
    assert [f.path for f in manifest.files] == ["model.onnx", "signature.json"]
    assert (manifest.task, manifest.dtype, manifest.max_input_tokens) == (Task.INFER, "float32", 64)
    assert store.add_onnx(onnx_file, "other", licence="MIT", rows_max=64).digest == manifest.digest
    assert store.signature(manifest).batched
    folder = store.materialise(manifest.digest)
    assert (folder / "model.onnx").read_bytes() == onnx_file.read_bytes()
    store.verify(manifest.digest)
    whole = store.add_onnx(onnx_file, "whole", licence="MIT", batched=False)
    assert whole.digest != manifest.digest and not store.signature(whole).batched and whole.max_input_tokens == 1


def test_signature_of_a_model_that_has_none_or_a_damaged_one_is_refused(store: ModelStore, folder: Path, onnx_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"signature\.json"):
        store.signature(add(store, folder))
    manifest = store.add_onnx(onnx_file, "m", licence="MIT")
    blob = (store.materialise(manifest.digest) / "signature.json").resolve()
    blob.chmod(0o644)
    blob.write_bytes(b"{}")
    with pytest.raises(ConfigError, match="was changed"):
        store.signature(manifest)


def test_command_line_imports_a_tensor_model_and_refuses_a_hostile_one(
    tmp_path: Path, onnx_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--name", "m", "--task", "infer", "--licence", "MIT", "--max-input", "32", "--store", str(tmp_path / "sold"), "-o", "json"]
    assert main.run(["model", "import", str(onnx_file), *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["task"], document["dtype"]) == ("infer", "float32")
    assert ModelStore(tmp_path / "sold").alias("m").hex() == document["digest"][2:]
    onnx_file.write_bytes(onnx_corpus.corpus(tmp_path / "canary")["external data above it"][1])
    assert main.run(["model", "import", str(onnx_file), *words]) == 3
    told = json.loads(capsys.readouterr().out)["error"]
    assert told["code"] == "config" and "external-data" in told["message"]
