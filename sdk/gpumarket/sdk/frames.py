"""What may stand in a frame: the shape of output items, judged before anything is stored or handed out. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpumarket.sdk.job_plan import JobPlan

ITEM_BYTES_MAX = 4 * 1024 * 1024
"""Largest row taken: a million float32 numbers, more than any embedding has dimensions or any answer tokens."""


def accept_items(plan: JobPlan, first: int, item_bytes: int, items: Sequence[bytes]) -> str:
    """Why these items cannot follow as number `first` and on; empty when they can. `item_bytes` is the size of a row, 0 while unknown."""
    if not items:
        return "an empty frame"
    if plan.item_flaw is not None:
        return _tensors_flaw(plan, first, items)
    if plan.item_units:
        return _rows_flaw(len(plan.item_units) - first, item_bytes, bool(plan.item_bytes), items)
    return _tokens_flaw(plan, first, items)


def _rows_flaw(room: int, item_bytes: int, item_bytes_given: bool, items: Sequence[bytes]) -> str:
    """Gaps of a text check (the one case whose size is known before) may be infinite; an embedding may not."""
    if len(items) > room:
        return f"{len(items)} rows; {room} are missing"
    size = item_bytes or len(items[0])
    if not 0 < size <= ITEM_BYTES_MAX or size % 4:
        return f"a row of {size} bytes is no row of float32"
    if any(len(item) != size for item in items):
        return f"rows of different sizes; expected {size} bytes each"
    if not item_bytes_given and not np.isfinite(np.frombuffer(b"".join(items), dtype="<f4")).all():
        return "a row with numbers that are not finite"
    return ""


def _tensors_flaw(plan: JobPlan, first: int, items: Sequence[bytes]) -> str:
    assert plan.item_flaw is not None
    if len(items) > len(plan.item_units) - first:
        return f"{len(items)} rows; {len(plan.item_units) - first} are missing"
    if any(len(item) > ITEM_BYTES_MAX for item in items):
        return f"an item of over {ITEM_BYTES_MAX} bytes"
    return next(filter(None, map(plan.item_flaw, items)), "")


def _tokens_flaw(plan: JobPlan, first: int, items: Sequence[bytes]) -> str:
    if first + len(items) > plan.spec.max_output_units:
        return f"{first + len(items)} tokens; at most {plan.spec.max_output_units} were ordered"
    if any(len(item) != 4 for item in items):
        return "an item that is no token"
    if any(int.from_bytes(item, "little") in plan.stop_tokens for item in items[:-1]):
        return "tokens after a stop token"
    return ""
