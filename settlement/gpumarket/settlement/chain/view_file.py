"""The view on disk, so that a restart reads only the blocks since: cursor, what can be undone, channels, nodes.

A cache and nothing else: it may be deleted at any time. It is taken only whole, with its checksum, for the contracts it was written for;
anything else is as if there were none. The follower checks its blocks' hashes against the chain before it uses it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from gpumarket.contracts.deploy import AddressBook
from gpumarket.core.units import Address, Hash
from gpumarket.settlement.chain.reading import Checkpoint
from gpumarket.settlement.chain.view import ChannelOnChain, NodeOnChain

NAME = "chain-view.json"
_log = structlog.get_logger()


class Undo(NamedTuple):
    """How to take one event back: `kind` is "channel" or "node", `before` the entry as it was, None where there was none."""

    block: int
    kind: str
    key: bytes
    before: Any


@dataclass(frozen=True, slots=True)
class Saved:
    """A follower's state; at least one checkpoint. `anchor`: hash of the block that the contracts were deployed in."""

    anchor: bytes
    checkpoints: list[Checkpoint]
    undo: list[Undo]
    channels: dict[Hash, ChannelOnChain]
    nodes: dict[Address, NodeOnChain]


class ViewFile:
    """One file, for the contracts of one address book."""

    def __init__(self, path: Path, book: AddressBook) -> None:
        self._path = path
        shape = [[f.name for f in fields(cls)] for cls in (ChannelOnChain, NodeOnChain)]
        self._subject = [book.chain_id, book.registry, book.channels, book.deployed_block, shape]

    def load(self) -> Saved | None:
        """What was saved last; None, and a line in the log, when it is missing, damaged or about other contracts."""
        try:
            digest, _, body = self._path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("chain_view_unreadable", file=str(self._path), reason=error.strerror)
            return None
        if hashlib.sha256(body).hexdigest().encode() != digest:
            _log.warning("chain_view_damaged", file=str(self._path), hint="everything is read from the chain again")
            return None
        subject, *state = json.loads(body)
        if subject != self._subject:
            return None
        anchor, checkpoints, undo, channels, nodes = state
        return Saved(
            bytes.fromhex(anchor),
            [Checkpoint(number, bytes.fromhex(found)) for number, found in checkpoints],
            [Undo(block, kind, bytes.fromhex(key), _entry(kind, before)) for block, kind, key, before in undo],
            {c.id: c for c in (_entry("channel", row) for row in channels)},
            {n.operator: n for n in (_entry("node", row) for row in nodes)},
        )

    def save(self, state: Saved) -> None:
        """Replace the file in one step. A disk that refuses costs only the next start's time, and is logged."""
        undo = [[u.block, u.kind, u.key.hex(), _row(u.before)] for u in state.undo]
        checkpoints = [[c.number, c.hash.hex()] for c in state.checkpoints]
        rows = [[_row(entry) for entry in table.values()] for table in (state.channels, state.nodes)]
        body = json.dumps([self._subject, state.anchor.hex(), checkpoints, undo, *rows]).encode()
        whole = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        fresh = self._path.with_suffix(f".new{os.getpid()}")
        try:
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(whole)
            fresh.replace(self._path)
        except OSError as error:
            _log.warning("chain_view_not_saved", file=str(self._path), reason=error.strerror)


def _row(entry: ChannelOnChain | NodeOnChain | None) -> list[Any] | None:
    return None if entry is None else [v.hex() if isinstance(v, bytes) else v for v in astuple(entry)]


def _entry(kind: str, row: list[Any] | None) -> Any:
    if row is None:
        return None
    cls: type[Any] = ChannelOnChain if kind == "channel" else NodeOnChain
    return cls(*(bytes.fromhex(v) if is_bytes else v for v, is_bytes in zip(row, _BYTES[cls], strict=True)))


_BYTES = {cls: [f.type in ("Hash", "Address") for f in fields(cls)] for cls in (ChannelOnChain, NodeOnChain)}
