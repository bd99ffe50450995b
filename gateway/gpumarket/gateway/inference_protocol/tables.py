"""The JSON part of a tensor request, as a table like those of `openai.tables`: what is not in it is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gpumarket.core.tensors import NAME_LENGTH_MAX, RANK_MAX, TENSORS_MAX
from gpumarket.gateway.openai.fields import Refused

Name = Annotated[str, Meta(min_length=1, max_length=NAME_LENGTH_MAX)]
Datatype = Literal["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64"]
Shape = Annotated[list[Annotated[int, Meta(ge=0, le=2**31 - 1)]], Meta(max_length=RANK_MAX)]
ByteCount = Annotated[int, Meta(ge=0, le=2**40)]


class InputParameters(Struct, forbid_unknown_fields=True):
    """Of an input: how many bytes of the binary part are its data."""

    binary_data_size: ByteCount | None = None
    shared_memory_region: Refused = None


class InputTensor(Struct, forbid_unknown_fields=True):
    """`data` or a binary part, never both."""

    name: Name
    shape: Shape
    datatype: Datatype
    data: list[Any] | None = None
    parameters: InputParameters | None = None


class OutputParameters(Struct, forbid_unknown_fields=True):
    """Of an output: whether it comes in the binary part."""

    binary_data: bool | None = None
    classification: Refused = None
    shared_memory_region: Refused = None


class RequestedOutput(Struct, forbid_unknown_fields=True):
    name: Name
    parameters: OutputParameters | None = None


class RequestParameters(Struct, forbid_unknown_fields=True):
    """Of the request: whether outputs come in the binary part where they do not say so themselves."""

    binary_data_output: bool | None = None
    sequence_id: Refused = None
    priority: Refused = None
    timeout: Refused = None


class InferRequest(Struct, forbid_unknown_fields=True):
    """POST /v2/models/{model}/infer."""

    inputs: Annotated[list[InputTensor], Meta(min_length=1, max_length=TENSORS_MAX)]
    id: Annotated[str, Meta(max_length=256)] | None = None
    outputs: Annotated[list[RequestedOutput], Meta(min_length=1, max_length=TENSORS_MAX)] | None = None
    parameters: RequestParameters | None = None
