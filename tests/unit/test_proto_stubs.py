"""The committed gRPC stubs are those that the .proto files make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "proto" / "gpumarket" / "v1"


def test_proto_stubs_regenerated_change_nothing(tmp_path: Path) -> None:
    protos = sorted(str(path) for path in FOLDER.glob("*.proto"))
    outs = [f"--{kind}={prefix}{tmp_path}" for kind, prefix in
            (("python_out", ""), ("grpc_python_out", ""), ("mypy_out", "quiet:"), ("mypy_grpc_out", "quiet:"))]  # fmt: skip
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outs, *protos]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    made = {file.name: file.read_text() for file in (tmp_path / "gpumarket" / "v1").iterdir()}
    kept = {name: (FOLDER / name).read_text() for name in made if (FOLDER / name).exists()}
    with_service = {file.stem for file in FOLDER.glob("*.proto") if "\nservice " in file.read_text()}
    missing = [n for n in made if n not in kept and ("_grpc" not in n or n.partition("_pb2")[0] in with_service)]
    assert not missing, f"not committed: {missing}; run make proto"
    assert [name for name in kept if kept[name] != made[name]] == [], "stale stubs; run make proto"
