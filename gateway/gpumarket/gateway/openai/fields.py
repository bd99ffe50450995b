"""The words that the tables of parameters are written in. Each endpoint's table is a msgspec struct: a field for every documented
parameter, its annotation the check that a request passes and the schema that /openapi.json shows.

A parameter is supported; or taken at the one value at which it changes nothing (`NOTHING`); or refused (`Refused`: null alone passes).
Whatever no table has is refused, too. Invariant: nothing is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

Refused = Annotated[None, Meta(extra={"rule": "refused"})]
"""Documented by OpenAI, not done here."""
NOTHING = {"rule": "no-op"}
"""`Meta(extra=NOTHING)`: taken at the value that changes nothing."""
Zero = Annotated[float, Meta(ge=0, le=0, extra=NOTHING)] | None
Never = Annotated[Literal[False], Meta(extra=NOTHING)] | None
Empty = Annotated[list[Any], Meta(max_length=0, extra=NOTHING)] | None
NoPairs = Annotated[dict[str, Any], Meta(max_length=0, extra=NOTHING)] | None
OneOption = Annotated[int, Meta(ge=1, le=1, extra=NOTHING)] | None
AnyTier = Annotated[Literal["auto", "default"], Meta(extra=NOTHING)] | None

Model = Annotated[str, Meta(min_length=1, max_length=200, description="An alias of the gateway's models, as /v1/models lists them.")]
Temperature = Annotated[float, Meta(ge=0, le=2)] | None
TopP = Annotated[float, Meta(ge=0, le=1)] | None
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="The same seed, request and provider give the same answer.")] | None
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)] | None
Stop = Annotated[str, Meta(min_length=1)] | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=4)] | None
TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Never = None


def rule_of(field_type: Any) -> str:
    """ "supported", "no-op" or "refused", from an annotation as `msgspec.inspect` has it."""
    kinds = getattr(field_type, "types", (field_type,))
    rules = {(getattr(kind, "extra", None) or {}).get("rule") for kind in kinds}
    return next((rule for rule in ("refused", "no-op") if rule in rules), "supported")


def rules(table: type[Struct]) -> dict[str, str]:
    """Parameter → its rule, in the table's order."""
    found = msgspec.inspect.type_info(table)
    assert isinstance(found, msgspec.inspect.StructType)
    return {field.encode_name: rule_of(field.type) for field in found.fields}
