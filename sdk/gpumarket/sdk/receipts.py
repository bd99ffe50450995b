"""Whether a receipt says what happened. Pure: every field is compared with what the client holds itself."""

from __future__ import annotations

from gpumarket.core.terms import JobSpec, Lease, Receipt
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


def _show(value: object) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)
