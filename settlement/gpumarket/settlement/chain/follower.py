"""Follows the chain's events into a ChainView, `confirmations` blocks behind the head, and takes them back when the chain does.

The cursor is a block's number *and hash*. When another hash stands there, the follower undoes its changes back to the newest block that
both chains share, and reads on from there; deeper than it remembers, it reads everything again from the deployment. An endpoint that is
merely behind takes nothing back. What is new is compared with the contracts' own state before it enters the view (`audit`); where the two
contradict each other, the view stays as it was and everything is read again.
Never: state from a block that was not on one chain with all the others; a view that shrinks because an endpoint knows less.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import structlog

from gpumarket.core.errors import ChainError, InconsistentChain, NetworkError, WrongChain
from gpumarket.core.units import Address, Hash, parse_address
from gpumarket.settlement.chain.audit import Auditor, Derived
from gpumarket.settlement.chain.connection import Chain, reachable
from gpumarket.settlement.chain.reading import Checkpoint, Event, MovedUnderfoot, Reader
from gpumarket.settlement.chain.view import ChainEvent, ChainView, ChannelChanged, NodeChanged, channel_after, node_after
from gpumarket.settlement.chain.view_file import Saved, Undo, ViewFile

BLOCKS_PER_QUERY = 2_000
REMEMBERED = 256
"""Checkpoints kept: how many synchronisations back a reorganisation can be undone without starting again."""
AUDITED_MAX = 256
"""New entries that are compared at once after a long absence; the rest gets its turn."""
PATIENCE = 3
"""So often the newest blocks are read again when they contradict the state: indexes lag. Then everything is."""
SAVE_SECONDS = 30.0
_log = structlog.get_logger()


class _Staged(NamedTuple):
    """What a range of blocks changes, not yet in the view."""

    channels: dict[Hash, Any]
    nodes: dict[Address, Any]
    undo: list[Undo]


class Follower:
    """`await sync()` brings the view up to date once; `run(stop)` keeps it so.

    `me`: whose channels are compared with the contract most often. `file`: where the view survives restarts; it is only a cache.
    """

    def __init__(self, chain: Chain, view: ChainView, *, me: Address | None = None, file: ViewFile | None = None) -> None:
        self._chain, self._view, self._file = chain, view, file
        self._reader, self._auditor = Reader(chain), Auditor(chain, me)
        self._me = me
        self._checkpoints: deque[Checkpoint] = deque(maxlen=REMEMBERED)
        self._undo: list[Undo] = []
        self._anchor = b""
        self._unaudited: set[ChainEvent] = set()
        self._lock = asyncio.Lock()
        self._contradictions = 0
        self._saved_at, self._saved_block = 0.0, -1
        self._audited_at = -math.inf
        self._news_at, self._head = time.monotonic(), -1
        self.rewinds = 0
        """How many times the chain took something back that was already in the view."""
        self.rereads = 0
        """How many times everything was read again from the deployment."""
        if file is not None:
            self._restore(file)

    @property
    def head(self) -> int:
        """Newest block that the endpoint told; -1 before the first."""
        return self._head

    @property
    def confirmations(self) -> int:
        """Blocks on top of an event before it counts."""
        return self._chain.settings.confirmations

    @property
    def silent_seconds(self) -> float:
        """Since the endpoint last told a new block."""
        return time.monotonic() - self._news_at

    async def sync(self) -> None:
        """Follow to head - confirmations. Raises Unreachable, WrongChain, InconsistentChain or another ChainError; the view is then as of
        its last block."""
        async with self._lock:
            changed: set[ChainEvent] = set()
            before = self._view.block
            try:
                await self._chain.verify_id()
                with reachable(self._chain.settings.rpc_url):
                    while not await self._step(changed):
                        pass
                    if self._view.block != before and self._checkpoints and self._audit_is_due():
                        await self._audit_in_turn(changed)
            finally:
                for event in sorted(changed, key=repr):  # also after a failure: what is in the view is published
                    self._view.publish(event)
        self._save_now_and_then()

    async def run(self, stop: asyncio.Event) -> None:
        """Sync every `poll_seconds` until `stop`. A chain that fails is logged and tried again; other errors end it. `view.trouble` says
        when the view is too old, or too doubtful, to decide about money."""
        told = ""
        while not stop.is_set():
            reason = hint = ""
            try:
                await self.sync()
            except NetworkError as error:
                reason, hint = error.message, error.hint
                doubtful = isinstance(error, (WrongChain, InconsistentChain))
            else:
                doubtful = False
            self._view.trouble = self._trouble(reason, doubtful)
            if reason and not told:
                _log.warning("chain_unusable", reason=reason, hint=hint)
            elif told and not reason:
                _log.info("chain_usable_again", block=self._view.block)
            told = reason
            try:
                await asyncio.wait_for(stop.wait(), self._chain.settings.poll_seconds)
            except TimeoutError:
                continue
        self.save()

    def save(self) -> None:
        """Write the view's file, where there is one."""
        if self._file is None or not self._checkpoints or self._saved_block == self._view.block:
            return
        self._file.save(Saved(self._anchor, list(self._checkpoints), list(self._undo), dict(self._view.channels), dict(self._view.nodes)))
        self._saved_at, self._saved_block = time.monotonic(), self._view.block

    # --- one range -----------------------------------------------------------------------------------------------------------

    async def _step(self, changed: set[ChainEvent]) -> bool:
        """One range of blocks. True when there is no more to do now."""
        self._anchor = self._anchor or await self._reader.hash(self._chain.book.deployed_block) or b""
        if not await self._rewind(changed):
            return True
        head = int(await self._chain.w3.eth.block_number)
        if head > self._head:
            self._news_at = time.monotonic()
        self._head = head
        goal = head - self._chain.settings.confirmations
        start = self._checkpoints[-1].number + 1 if self._checkpoints else self._chain.book.deployed_block
        end = min(goal, start + BLOCKS_PER_QUERY - 1)
        if end < start:
            return True
        try:
            events, checkpoint = await self._reader.read(start, end, self._checkpoints[-1] if self._checkpoints else None)
            if not await self._take(events, checkpoint, changed, audited=end == goal):
                return True
        except MovedUnderfoot:
            await asyncio.sleep(0.05)  # a reorganisation in progress; the rewind at the next step finds where it forked
            return False
        return end == goal

    async def _take(self, events: Sequence[Event], checkpoint: Checkpoint, changed: set[ChainEvent], *, audited: bool) -> bool:
        """Bring a range into the view, compared with the contracts' state where that is recent. False when all was read again instead."""
        try:
            staged = self._derive(events)
            if audited:
                await self._auditor.check(self._to_audit(staged), checkpoint)
        except MovedUnderfoot:
            raise
        except ChainError as error:
            if not isinstance(error, InconsistentChain):
                raise
            self._contradictions += 1
            if self._contradictions < PATIENCE:
                raise
            _log.error("chain_contradiction", reason=error.message)
            await self._read_all_again(checkpoint.number, changed)
            return False
        self._contradictions = 0
        self._commit(staged, checkpoint, changed)
        if audited:
            self._unaudited.clear()
        else:
            self._unaudited |= _events(staged)
        return True

    def _derive(self, events: Sequence[Event]) -> _Staged:
        staged = _Staged({}, {}, [])
        for event in events:
            if event.contract == self._chain.channels.address:
                key: Any = Hash(bytes(event.args["id"])) if "id" in event.args else Hash(b"")
                table, new, after = self._view.channels, staged.channels, channel_after
            else:
                key = parse_address(event.args["operator"])
                table, new, after = self._view.nodes, staged.nodes, node_after  # type: ignore[assignment]
            before = new.get(key, table.get(key))
            try:
                value = after(before, event.name, event.args)
            except ChainError as error:  # an event about what was never announced: an earlier one was left out
                raise InconsistentChain(error.message, hint=error.hint) from error
            if value is not None:
                staged.undo.append(Undo(event.block, "channel" if new is staged.channels else "node", key, before))
                new[key] = value
        return staged

    def _commit(self, staged: _Staged, checkpoint: Checkpoint, changed: set[ChainEvent]) -> None:
        self._view.channels.update(staged.channels)
        self._view.nodes.update(staged.nodes)
        self._undo.extend(staged.undo)
        changed |= _events(staged)
        self._checkpoints.append(checkpoint)
        self._view.block = checkpoint.number
        oldest = self._checkpoints[0].number
        if self._undo and self._undo[0].block <= oldest:
            self._undo = [entry for entry in self._undo if entry.block > oldest]

    def _to_audit(self, staged: _Staged) -> list[Derived]:
        """Everything that changed since the last comparison, own channels first, as it would be."""
        channels = {e.id for e in self._unaudited if isinstance(e, ChannelChanged)} | staged.channels.keys()
        nodes = {e.address for e in self._unaudited if isinstance(e, NodeChanged)} | staged.nodes.keys()
        found: list[Any] = [staged.channels.get(key, self._view.channels.get(key)) for key in channels]
        found.sort(key=lambda c: c is None or self._me not in (c.payer, c.payee))
        found += [staged.nodes.get(key, self._view.nodes.get(key)) for key in nodes]
        return [entry for entry in found if entry is not None][:AUDITED_MAX]

    # --- taking back ---------------------------------------------------------------------------------------------------------

    async def _rewind(self, changed: set[ChainEvent]) -> bool:
        """Undo what the chain took back. False when this endpoint does not know our cursor and nothing stands in its place: it is behind,
        and nothing is to be done until it has caught up."""
        kept, replaced = len(self._checkpoints), False
        while kept:
            at = self._checkpoints[kept - 1]
            found = await self._reader.hash(at.number)
            if found == at.hash:
                break
            replaced |= found is not None
            kept -= 1
        if kept == len(self._checkpoints):
            return True
        if not replaced and await self._reader.hash(self._chain.book.deployed_block) not in (None, self._anchor):
            replaced, kept = True, 0  # a chain begun anew, with the same contracts at the same addresses
        if not replaced or not kept:
            await self._chain.verify()  # another chain, or one begun anew, must not empty the view
        if not replaced:
            return False
        self.rewinds += 1
        if not kept:
            await self._read_all_again(None, changed)
            return True
        while len(self._checkpoints) > kept:
            self._checkpoints.pop()
        self._view.block = self._checkpoints[-1].number
        while self._undo and self._undo[-1].block > self._view.block:
            self._take_back(self._undo.pop(), changed)
        return True

    def _take_back(self, entry: Undo, changed: set[ChainEvent]) -> None:
        table: dict[Any, Any] = self._view.channels if entry.kind == "channel" else self._view.nodes
        if entry.before is None:
            table.pop(entry.key, None)
        else:
            table[entry.key] = entry.before
        changed.add(_event(entry.kind, entry.key))

    async def _read_all_again(self, goal: int | None, changed: set[ChainEvent]) -> None:
        """Derive everything from the deployment on, compare it with the contracts, and only then put it in the view's place."""
        self.rereads += 1
        fresh = Follower(self._chain, ChainView(), me=self._me)
        if goal is None:
            goal = int(await self._chain.w3.eth.block_number) - self._chain.settings.confirmations
        await fresh._catch_up(goal)
        view = self._view
        if fresh._checkpoints:
            await self._auditor.check_gone(self._missing_in(fresh._view), fresh._checkpoints[-1])
        changed |= {ChannelChanged(k) for k in view.channels.keys() | fresh._view.channels.keys()
                    if view.channels.get(k) != fresh._view.channels.get(k)}  # fmt: skip
        changed |= {NodeChanged(k) for k in view.nodes.keys() | fresh._view.nodes.keys() if view.nodes.get(k) != fresh._view.nodes.get(k)}
        for mine, theirs in ((view.channels, fresh._view.channels), (view.nodes, fresh._view.nodes)):
            mine.clear()
            mine.update(theirs)  # type: ignore[arg-type]
        view.block = fresh._view.block
        self._checkpoints, self._undo = fresh._checkpoints, fresh._undo
        self._anchor = await self._reader.hash(self._chain.book.deployed_block) or b""
        self._unaudited.clear()
        self._contradictions = 0

    def _missing_in(self, fresh: ChainView) -> list[Derived]:
        """What is in the view and not in the fresh one, own channels first."""
        gone: list[Any] = [c for key, c in self._view.channels.items() if key not in fresh.channels and not c.closed]
        gone.sort(key=lambda c: self._me not in (c.payer, c.payee))
        gone += [node for key, node in self._view.nodes.items() if key not in fresh.nodes]
        return gone[:AUDITED_MAX]

    async def _catch_up(self, goal: int) -> None:
        """From nothing to `goal`. Raises what the chain cannot answer, or InconsistentChain when it still contradicts itself."""
        start = self._chain.book.deployed_block
        while start <= goal:
            end = min(goal, start + BLOCKS_PER_QUERY - 1)
            try:
                events, checkpoint = await self._reader.read(start, end, self._checkpoints[-1] if self._checkpoints else None)
            except MovedUnderfoot as error:
                raise ChainError("the chain moved while everything was read again", hint="it is tried again") from error
            staged = self._derive(events)
            if end == goal:
                try:
                    await self._auditor.check(self._to_audit(staged), checkpoint)
                except MovedUnderfoot as error:
                    raise ChainError("the chain moved while everything was read again", hint="it is tried again") from error
            self._commit(staged, checkpoint, set())
            self._unaudited |= _events(staged)
            start = end + 1

    def _audit_is_due(self) -> bool:
        now = time.monotonic()
        if now - self._audited_at < self._chain.settings.audit_seconds:
            return False
        self._audited_at = now
        return True

    async def _audit_in_turn(self, changed: set[ChainEvent]) -> None:
        """Compare a few entries that did not change: an event about them may have been left out."""
        at = self._checkpoints[-1]
        try:
            await self._auditor.check(self._auditor.next_round(self._view), at)
        except MovedUnderfoot:
            return  # the next synchronisation rewinds
        except InconsistentChain as error:
            _log.error("chain_contradiction", reason=error.message)
            await self._read_all_again(at.number, changed)

    # --- age, and what survives a restart ------------------------------------------------------------------------------------

    def _trouble(self, reason: str, doubtful: bool) -> str:
        if doubtful:
            return reason
        silent = self.silent_seconds
        if silent <= self._chain.settings.stale_seconds:
            return ""
        return reason or f"the chain at {self._chain.settings.rpc_url} has made no new block for {silent:.0f} s"

    def _restore(self, file: ViewFile) -> None:
        saved = file.load()
        if saved is None:
            return
        self._anchor = saved.anchor
        self._checkpoints.extend(saved.checkpoints)
        self._undo = saved.undo
        self._view.channels.update(saved.channels)
        self._view.nodes.update(saved.nodes)
        self._view.block = self._saved_block = saved.checkpoints[-1].number

    def _save_now_and_then(self) -> None:
        if self._file is not None and (self._saved_at == 0.0 or time.monotonic() - self._saved_at >= SAVE_SECONDS):
            self.save()


def _events(staged: _Staged) -> set[ChainEvent]:
    return {ChannelChanged(key) for key in staged.channels} | {NodeChanged(key) for key in staged.nodes}


def _event(kind: str, key: bytes) -> ChainEvent:
    return ChannelChanged(Hash(key)) if kind == "channel" else NodeChanged(Address(key))
