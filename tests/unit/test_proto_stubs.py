"""The committed gRPC stubs are those that the .proto files make, and the .proto files say what each of their fields does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "proto" / "gpumarket" / "v1"
PROTOS = sorted(FOLDER.glob("*.proto"))
STUBS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
MESSAGES, ENUMS, SERVICES = 4, 5, 6
"""Numbers of these lists in FileDescriptorProto; within each of them its fields, values or rpcs are list 2."""


def protoc(*outs: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outs, *map(str, PROTOS)]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def stubs(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.name.endswith(STUBS)}


def test_proto_stubs_regenerated_change_nothing(tmp_path: Path) -> None:
    kinds = (("python_out", ""), ("grpc_python_out", ""), ("mypy_out", "quiet:"), ("mypy_grpc_out", "quiet:"))
    protoc(*(f"--{kind}={prefix}{tmp_path}" for kind, prefix in kinds))
    plain = [
        file.stem for file in PROTOS if "\nservice " not in file.read_text()
    ]  # protoc makes an empty _grpc of these; make proto drops it
    made = {
        name: text
        for name, text in stubs(tmp_path / "gpumarket" / "v1").items()
        if not name.startswith(tuple(f"{p}_pb2_grpc" for p in plain))
    }
    kept = stubs(FOLDER)
    assert sorted(made.keys() - kept.keys()) == [], "not committed; run make proto"
    assert sorted(kept.keys() - made.keys()) == [], "stubs of nothing; delete them"
    assert [name for name in kept if kept[name] != made[name]] == [], "stale stubs; run make proto"


def test_every_field_value_and_rpc_is_commented(tmp_path: Path) -> None:
    protoc("--include_source_info", f"--descriptor_set_out={tmp_path / 'set'}")
    files = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    assert len(files) == len(PROTOS)
    bare = [f"{file.name}: {name}" for file in files for name in uncommented(file)]
    assert bare == [], "say what it does, and its unit"


def uncommented(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    said = {tuple(at.path): (at.leading_comments + at.trailing_comments).strip() for at in file.source_code_info.location}
    parts = [(MESSAGES, file.message_type, "field"), (ENUMS, file.enum_type, "value"), (SERVICES, file.service, "method")]
    for number, owners, members in parts:
        for i, owner in enumerate(owners):  # type: ignore[arg-type, var-annotated]
            for j, member in enumerate(getattr(owner, members)):
                if not said.get((number, i, 2, j)):
                    yield f"{owner.name}.{member.name}"
