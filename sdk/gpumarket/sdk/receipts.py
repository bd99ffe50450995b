"""Whether a receipt says what happened. Pure: every field is compared with what the client holds itself."""

from __future__ import annotations

from gpumarket.core.terms import JobSpec, Lease, Receipt, Task
from gpumarket.core.units import Hash


def receipt_flaw(receipt: Receipt, lease: Lease, spec: JobSpec, nonce: Hash, output_hash: Hash, units: int) -> str:
    """The first field that is wrong, with both values; empty when the receipt holds. `units` are those of this attempt."""
    expected: dict[str, object] = {
        "lease": lease.struct_hash,
        "nonce": nonce,
        "request_hash": spec.request_hash,
        "output_hash": output_hash,
        "prefix_units": lease.prefix_units,
        "prefix_hash": lease.prefix_hash,
        "prompt_units": spec.prompt_units,
        "output_units": units,
    }
    for name, value in expected.items():
        found = getattr(receipt, name)
        if found != value:
            return f"{name} is {_show(found)}, not {_show(value)}"
    if receipt.finished_at > lease.deadline:
        return f"finished at {receipt.finished_at}, after the lease's deadline {lease.deadline}"
    return ""


def left_receipt_flaw(receipt: Receipt, lease: Lease, spec: JobSpec, nonce: Hash | None, units: int) -> str:
    """As `receipt_flaw`, for an attempt that the client left after `units`: the provider may have sent more, up to a window."""
    least, most = units, units + lease.window_units
    if receipt.output_units < least or (receipt.output_units > most and spec.task is Task.GENERATE):
        return f"output_units is {receipt.output_units}, not {least} to {most}"
    return receipt_flaw(receipt, lease, spec, nonce or receipt.nonce, receipt.output_hash, receipt.output_units)


def _show(value: object) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)
