"""The challenger's part in one dispute until it is over: draw, hand the evidence over, post it to who misses it, finish, collect.

Each round asks `challenger_step` what is due; members get the evidence side by side, so that one who is slow or silent holds nobody up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc.aio

from gpumarket.core.codec import signed_call
from gpumarket.core.errors import GpumarketError, NetworkError, ProtocolError, TransactionFailed
from gpumarket.core.rpc import from_rpc
from gpumarket.core.units import Address, Hash, hex0x
from gpumarket.sdk import dispute_records
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.dispute_port import DisputePort
from gpumarket.sdk.dispute_records import StoredDispute
from gpumarket.sdk.logs import log
from gpumarket.settlement.disputes import Dispute, State, Step, challenger_step, undelivered
from gpumarket.settlement.sealed_evidence import posted_to, sealed_parts
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1.provider_pb2_grpc import ProviderStub

EVIDENCE_SECONDS = 600.0
"""A member answers once it has computed the result again."""
LOOK_SECONDS = 0.5
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 1.0, 60.0


@dataclass(slots=True)
class Challenger:
    """One open dispute. `run` returns its end; cancelled or crashed, another one takes it up.

    With `leave_delivered` it ends as soon as all five have the evidence and nobody misses it: what is left is done by others, unless a
    member loses it again.
    """

    desk: Desk
    port: DisputePort
    stored: StoredDispute
    on_change: Callable[[Dispute], None] = lambda _: None
    leave_delivered: bool = False
    _delivered: set[Address] = field(default_factory=set)
    _handing: dict[Address, asyncio.Task[None]] = field(default_factory=dict)
    _seen: Dispute | None = None

    async def run(self) -> Dispute:
        """See the dispute through. Raises JournalError; what the chain or a peer refuses is tried again."""
        pause = PAUSE_SECONDS
        try:
            while True:
                try:
                    ended = await self._round()
                    if ended is not None:
                        return ended
                    pause = PAUSE_SECONDS
                    await asyncio.sleep(LOOK_SECONDS)
                except NetworkError as error:
                    log.warning("dispute_waits", dispute=hex0x(self.stored.dispute), reason=error.message)
                    await asyncio.sleep(pause)
                    pause = min(PAUSE_SECONDS_MAX, 2 * pause)
        finally:
            for task in self._handing.values():
                task.cancel()
            await asyncio.gather(*self._handing.values(), return_exceptions=True)

    async def _round(self) -> Dispute | None:
        """One look at the chain, and the step that is due; the dispute once there is no more to do here."""
        await self.port.watch.sync()
        dispute = self.port.watch.disputes.get(self.stored.dispute)
        if dispute is None:
            return None  # the challenge has not its confirmations yet
        if dispute != self._seen:
            self._seen = dispute
            self.on_change(dispute)
        head = await self.port.actions.head()
        rules = (await self.port.actions.terms()).rules
        step = challenger_step(dispute, frozenset(self._delivered), posted_to(dispute.posted), head.time, head.block, rules)
        match step:
            case Step.DRAW:
                await self._confirm((await self.port.actions.draw(dispute.id, self.stored.nonce)).block)
            case Step.DELIVER:
                self._deliver(dispute)
            case Step.POST:
                self._deliver(dispute)
                await self._post(dispute)
            case Step.FINISH:
                await self._finish(dispute)
            case Step.DONE:
                return await self._collect(dispute)
            case _ if self.leave_delivered and dispute.state is State.DRAWN and not dispute.missing and not self._open(dispute):
                return dispute
            case _:
                pass
        return None

    def _open(self, dispute: Dispute) -> tuple[Address, ...]:
        return undelivered(dispute, frozenset(self._delivered))

    async def _finish(self, dispute: Dispute) -> None:
        try:
            await self._confirm((await self.port.actions.finish(dispute.id)).block)
        except TransactionFailed as error:  # most likely a member was first; the next look tells
            log.info("dispute_not_finished_here", dispute=hex0x(dispute.id), reason=error.message)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _confirm(self, block: int) -> None:
        """Wait until the view shows a block of ours, so that its step is not taken twice."""
        while self.port.watch.block < block:
            await asyncio.sleep(LOOK_SECONDS)
            await self.port.watch.sync()

    async def _collect(self, dispute: Dispute) -> Dispute:
        """Take the money, then close the books: a crash in between takes it at the next `run`."""
        if await self.port.actions.credited():
            await self.port.actions.withdraw()
        await self.desk.journal.transact(lambda c: dispute_records.end(c, dispute.id, dispute.outcome.name.lower()))
        return dispute

    # --- evidence ----------------------------------------------------------------------------------------------------------

    def _deliver(self, dispute: Dispute) -> None:
        """Start handing the evidence to every member that does not have it."""
        for member in self._open(dispute):
            task = self._handing.get(member)
            if task is None or task.done():
                self._handing[member] = asyncio.create_task(self._hand(dispute.id, member))

    async def _hand(self, dispute: Hash, member: Address) -> None:
        """Give one member the evidence; on failure wait a little, so that the next look may try again."""
        node = self.desk.chain.nodes.get(member)
        if node is None or not node.endpoint:
            log.warning("panel_member_unreachable", member=hex0x(member), reason="it is registered nowhere")
            await asyncio.sleep(PAUSE_SECONDS)
            return
        body = ppb.PanelEvidence(dispute=dispute, evidence=self.stored.evidence)
        nonce = Hash(self.desk.random.token(32))
        call = signed_call(self.desk.signer, self.desk.domain, "Provider/TakeEvidence", body, member, self.desk.clock.now(), nonce)
        try:
            line = await self.desk.peers.line(node.endpoint, node.tls_key_hash)
            broken = True
            try:
                await ProviderStub(line).TakeEvidence(call, timeout=EVIDENCE_SECONDS)
                broken = False
            except grpc.aio.AioRpcError as error:
                raise from_rpc(error, f"panel member {hex0x(member)}") from error
            finally:
                await self.desk.peers.release(node.endpoint, node.tls_key_hash, broken=broken)
        except GpumarketError as error:
            log.info("evidence_not_taken", member=hex0x(member), reason=error.message)
            await asyncio.sleep(PAUSE_SECONDS)
        else:
            self._delivered.add(member)

    async def _post(self, dispute: Dispute) -> None:
        """Seal the evidence on chain to everybody who reported it missing."""
        for member in set(dispute.missing) - posted_to(dispute.posted):
            key = (await self.port.actions.seat(member)).evidence_key
            try:
                parts = sealed_parts(self.stored.evidence, dispute.id, member, key)
            except ProtocolError as error:  # a member without a usable key can be shown nothing; one post is enough to go on
                log.warning("evidence_not_sealed", member=hex0x(member), reason=error.message)
                parts = [ppb.SealedEvidence(member=member, parts=1, sealed=b"no usable key").SerializeToString()]
            for part in parts:
                await self._confirm((await self.port.actions.post_evidence(dispute.id, part)).block)
