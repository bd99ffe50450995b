"""The models that the gateway offers: its client's lock file, read again when it changes. A key sees those that it may use, no others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpumarket.core.terms import Task
from gpumarket.gateway.keys import Key
from gpumarket.gateway.problems import Problem, model_not_found
from gpumarket.sdk.lock import LockedModel, read_lock


class Catalog:
    """Aliases of one lock file."""

    def __init__(self, lock_file: Path) -> None:
        self._file = lock_file
        self._stamp: tuple[int, int, int] | None = None
        self._models: dict[str, LockedModel] = {}
        self.created_at = 0
        """When the file was last written, unix seconds."""

    def models(self, key: Key | None = None) -> Sequence[LockedModel]:
        """By name; those that `key` may use, or all. Raises ConfigError for a file that is damaged."""
        self._renew()
        return [entry for name, entry in sorted(self._models.items()) if key is None or key.may_use(name)]

    def find(self, key: Key, name: str, task: Task | None = None) -> LockedModel:
        """One model. Raises Problem: 404 where the key has no such model, 400 where it does another task."""
        self._renew()
        entry = self._models.get(name)
        if entry is None or not key.may_use(name):
            raise model_not_found(name)
        if task is not None and entry.task is not task:
            told = f"{name} is a model for {entry.task.name.lower()}, not for {task.name.lower()}"
            raise Problem(400, "model_not_supported", told, param="model")
        return entry

    def _renew(self) -> None:
        try:
            found = self._file.stat()
        except FileNotFoundError:
            self._stamp, self._models = None, {}
            return
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        if stamp != self._stamp:
            self._models, self._stamp, self.created_at = read_lock(self._file), stamp, int(found.st_mtime)
