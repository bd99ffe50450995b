"""The receipt of an attempt that the client left: what its provider did until it heard so, and what that costs.

Invariant: the ack stands whatever comes here; a receipt only adds the prompt, where the whole answer was out within a window of that ack.
"""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Connection

from gpumarket.core.errors import BadSignature, ProtocolError
from gpumarket.core.units import Money, hex0x
from gpumarket.sdk import store
from gpumarket.sdk.account import PaidChannelState, bill
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.infer_stream import finished_receipt
from gpumarket.sdk.logs import log
from gpumarket.sdk.receipts import left_receipt_flaw
from gpumarket.sdk.session import Progress, left_amount
from gpumarket.v1 import provider_pb2 as ppb


async def keep(desk: Desk, job: store.StoredJob, channel: PaidChannelState, left: Progress, finished: ppb.Finished) -> Progress | None:
    """Journal the receipt with what the attempt costs by it; None, and a line in the log, for one that does not hold."""
    lease, end = left.lease, left.ends[-1]
    assert lease is not None
    try:
        receipt = finished_receipt(desk.domain, finished, lease.provider)
        flaw = left_receipt_flaw(receipt, lease, job.spec, left.nonce, end.units)
    except (ProtocolError, BadSignature) as error:
        flaw = error.message
    if flaw:
        log.warning("last_receipt_refused", job=hex0x(job.job), reason=flaw)
        return None
    dearer = replace(end, amount=left_amount(left, receipt))
    ended = replace(left, ends=(*left.ends[:-1], dearer))
    more = Money(dearer.amount - end.amount)

    def work(connection: Connection) -> None:
        store.end_attempt(connection, job.job, dearer, None, finished.receipt)
        store.set_job(connection, job.job, billed=ended.billed)
        bill(connection, channel.id, more)

    await desk.journal.transact(work)
    desk.account.release(channel, Money(0), more)
    return ended
