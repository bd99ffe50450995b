"""API keys: made once, shown once, kept as hashes. The file is read by the gateway and written by `gpumarket gateway key`.

A key is 32 random bytes, so a plain SHA-256 of it can neither be guessed nor looked up in a table, and comparing digests tells nothing
about the key. Invariant: no key is ever stored, logged or shown again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Engine, Integer, LargeBinary, MetaData, String, Table, Text, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from gpumarket.core.errors import ConfigError, JournalError
from gpumarket.core.ports import Clock, Random, SystemClock, SystemRandom
from gpumarket.core.units import Money
from gpumarket.settlement.database import engine_of
from gpumarket.settlement.journal import MoneyType

PREFIX = "gm-"
FILE = "keys.db"
_SHAPE = re.compile(r"gm-[A-Za-z0-9_-]{43}")
METADATA = MetaData()
_keys = Table(
    "gateway_keys",
    METADATA,
    Column("id", String(16), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("hash", LargeBinary(32), nullable=False, unique=True),
    Column("day_limit", MoneyType),
    Column("total_limit", MoneyType),
    Column("per_minute", Integer),
    Column("models", Text),  # JSON list of aliases
    Column("created_at", Integer, nullable=False),
    Column("revoked_at", Integer, nullable=False),  # 0 while it holds
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may do; None is no limit. Money in base units, `per_minute` in requests, `models` by alias."""

    day: Money | None = None
    total: Money | None = None
    per_minute: int | None = None
    models: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.per_minute is not None and self.per_minute < 1:
            raise ConfigError("a key that may ask 0 times a minute is of no use", hint="gpumarket gateway key revoke")


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept. Times are unix seconds; `revoked_at` is 0 while it holds."""

    id: str
    name: str
    hash: bytes
    limits: Limits
    created_at: int
    revoked_at: int = 0

    def may_use(self, model: str) -> bool:
        return self.limits.models is None or model in self.limits.models


def hash_of(secret: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode()).digest()


class KeyFile:
    """The keys of one gateway, in its state folder. Several processes may have it open. Raises JournalError where it cannot be used."""

    def __init__(self, state: Path, clock: Clock | None = None, random: Random | None = None) -> None:
        self._clock, self._random = clock or SystemClock(), random or SystemRandom()
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = state / FILE
        self._engine: Engine = engine_of(f"sqlite:///{self._path.absolute()}", read_only=False)
        with _told(self._path), self._engine.begin() as connection:
            METADATA.create_all(connection)
        self._path.chmod(0o600)
        self._files = (str(self._path), f"{self._path}-wal")
        self._held: dict[bytes, Key] = {}
        self._stamp: tuple[int, ...] = ()

    def create(self, name: str, limits: Limits) -> tuple[Key, str]:
        """A new key and its only copy. Raises ConfigError for a name that is taken."""
        if not name or len(name) > 100 or not name.isprintable():
            raise ConfigError("a key's name is 1 to 100 printable characters")
        secret = PREFIX + urlsafe_b64encode(self._random.token(32)).decode().rstrip("=")
        key = Key(f"key-{self._random.token(4).hex()}", name, hash_of(secret), limits, self._clock.now())
        models = None if limits.models is None else json.dumps(sorted(limits.models))
        row = {"day_limit": limits.day, "total_limit": limits.total, "per_minute": limits.per_minute, "models": models}
        with _told(self._path), self._engine.begin() as connection:
            if connection.execute(select(_keys.c.id).where(_keys.c.name == name)).first():
                raise ConfigError(f"there is a key named {name!r} already", hint="gpumarket gateway key list")
            facts = {"id": key.id, "name": name, "hash": key.hash, "created_at": key.created_at, "revoked_at": 0}
            connection.execute(insert(_keys), row | facts)
        return key, secret

    def revoke(self, which: str) -> Key:
        """End a key, by its id or name. Raises ConfigError where there is none."""
        for key in self.all():
            if which in (key.id, key.name):
                break
        else:
            raise ConfigError(f"there is no key {which!r}", hint="gpumarket gateway key list")
        with _told(self._path), self._engine.begin() as connection:
            still = (_keys.c.id == key.id) & (_keys.c.revoked_at == 0)
            connection.execute(update(_keys).where(still).values(revoked_at=self._clock.now()))
        return next(k for k in self.all() if k.id == key.id)

    def all(self) -> Sequence[Key]:
        """Every key there was, oldest first."""
        with _told(self._path), self._engine.begin() as connection:
            rows = connection.execute(select(_keys).order_by(_keys.c.created_at, _keys.c.id)).mappings().all()
        return [_key(row) for row in rows]

    def find(self, secret: str) -> Key | None:
        """The key that holds, or None. What other processes wrote counts at once."""
        if not _SHAPE.fullmatch(secret):
            return None
        self._renew()
        digest = hash_of(secret)
        key = self._held.get(digest)
        return key if key is not None and hmac.compare_digest(key.hash, digest) else None

    def close(self) -> None:
        self._engine.dispose()

    def _renew(self) -> None:
        """Read the keys again when the file or its log was written to."""
        stamp = tuple(part for path in self._files for part in _stamp(path))
        if stamp != self._stamp:
            self._held = {key.hash: key for key in self.all() if not key.revoked_at}
            self._stamp = stamp


class _told:
    """Says which file fails, without the statement that failed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, SQLAlchemyError):
            cause = getattr(error, "orig", None) or type(error).__name__
            raise JournalError(f"the keys in {self._path} cannot be used: {cause}", hint="is it the gateway's state folder?") from None


def _stamp(path: str) -> tuple[int, int]:
    """What changes with a file; a log that is not there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _key(row: Any) -> Key:
    models = None if row["models"] is None else frozenset(json.loads(row["models"]))
    limits = Limits(row["day_limit"], row["total_limit"], row["per_minute"], models)
    return Key(row["id"], row["name"], bytes(row["hash"]), limits, row["created_at"], row["revoked_at"])
