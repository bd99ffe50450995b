"""The API key of a testnet's gateway: made once, through the command line as anybody would, and kept in a file of its owner's alone."""

from __future__ import annotations

import json
import subprocess
import sys

from gpumarket.core import private_files
from gpumarket.core.errors import GpumarketError
from gpumarket.testnet.folder import Folder
from gpumarket.testnet.plan import GATEWAY
from gpumarket.testnet.processes import clean_environment

NAME = "testnet"
SECONDS = 60.0


def gateway_key(folder: Folder) -> str:
    """The key. Raises GpumarketError where none can be made."""
    file = folder.gateway_key
    if not file.exists():
        private_files.create(file, (_made(folder) + "\n").encode())
    return private_files.read(file).decode().strip()


def _made(folder: Folder) -> str:
    config = ["--config", str(folder.config(GATEWAY)), "-o", "json"]
    command = [sys.executable, "-m", "gpumarket.cli.main", "gateway", "key", "create", NAME, *config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=clean_environment())
    document = json.loads(done.stdout or "{}")
    if done.returncode:
        told = document.get("error", {}).get("message", done.stderr[-200:])
        raise GpumarketError(f"the gateway's key could not be made: {told}", hint=f"remove {folder.state(GATEWAY)} to begin anew")
    key: str = document["key"]
    return key
