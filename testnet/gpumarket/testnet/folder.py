"""A testnet's folder: where everything lies, and the two files by which other programs find what runs.

FOLDER/
  testnet.json       what runs and how to reach it       processes.json   pids and start times, for `down`
  contracts.json     addresses of the contracts          chain.json       the chain's state, kept over restarts
  keys/              a wallet and its password per role  models/          the store that the providers share
  <role>.toml        settings of each role and the client
  <role>/            each role's own state               logs/            one log per role
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpumarket.core.errors import ConfigError, StateLocked
from gpumarket.testnet.processes import Mark

DEFAULT_FOLDER = Path(".testnet")


@dataclass(frozen=True, slots=True)
class Folder:
    """Paths of a testnet below `root`."""

    root: Path

    @staticmethod
    def at(path: Path) -> Folder:
        """The folder, absolute: roles run with paths from their settings files."""
        return Folder(path.resolve())

    def create(self) -> None:
        """Make it, private. Raises StateLocked while another testnet runs in it, ConfigError where there can be no folder."""
        running = [mark.name for mark in self.marks() if mark.alive()]
        if running:
            raise StateLocked(f"a testnet runs in {self.root}: {', '.join(running)}", hint=f"gpumarket testnet down --dir {self.root}")
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.manifest.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use the folder {self.root}: {error.strerror}", hint="give another with --dir") from error

    @property
    def manifest(self) -> Path:
        return self.root / "testnet.json"

    @property
    def book(self) -> Path:
        return self.root / "contracts.json"

    @property
    def chain_state(self) -> Path:
        return self.root / "chain.json"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def store(self) -> Path:
        return self.root / "models"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def lock_file(self) -> Path:
        return self.root / "models.lock"

    @property
    def gateway_key(self) -> Path:
        """The API key of the gateway, for whoever uses the testnet."""
        return self.keys / "gateway.api-key"

    def config(self, name: str) -> Path:
        return self.root / f"{name}.toml"

    def state(self, name: str) -> Path:
        return self.root / name

    def log(self, name: str) -> Path:
        """A role's log. Raises ConfigError naming those there are."""
        path = self.logs / f"{name}.log"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in self.logs.glob("*.log"))) or "none"
            raise ConfigError(f"no role {name!r} in {self.root}; there are: {known}", hint="gpumarket testnet status")
        return path

    def describe(self) -> dict[str, Any]:
        """What runs here. Raises ConfigError where nothing does."""
        try:
            document: dict[str, Any] = json.loads(self.manifest.read_text())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"no testnet runs in {self.root}", hint="gpumarket testnet up") from error
        return document

    def write_manifest(self, document: dict[str, Any]) -> None:
        _replace(self.manifest, document)

    def marks(self) -> list[Mark]:
        """The processes that were written down last; empty where none were."""
        try:
            return [Mark(**entry) for entry in json.loads((self.root / "processes.json").read_text())]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def write_marks(self, marks: Sequence[Mark]) -> None:
        _replace(self.root / "processes.json", [asdict(mark) for mark in marks])


def _replace(path: Path, document: Any) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(json.dumps(document, indent=2) + "\n")
    os.replace(draft, path)
