"""Tensors on the wire and in the output chain: one form for one value, and bounds for everything that a stranger may send."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from gpumarket.core import tensor_requests
from gpumarket.core.errors import ProtocolError
from gpumarket.core.tensor_requests import Tensor, TensorRequest, require_fits, smallest
from gpumarket.core.tensors import (
    DTYPES,
    OUTPUT_BYTES_MAX,
    REQUEST_BYTES_MAX,
    ROWS_MAX,
    Signature,
    TensorSpec,
    datatype_of,
    decode_item,
    encode_item,
    item_flaw,
    join_items,
    signature_from_json,
    signature_to_json,
)
from gpumarket.v1 import terms_pb2 as pb

arrays = st.sampled_from(list(DTYPES.values())).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=4, max_side=4)))
names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20)
shapes = st.lists(st.just(-1) | st.integers(1, 9), max_size=4).map(tuple)
specs = st.builds(TensorSpec, names, st.sampled_from(list(DTYPES)), shapes)

SIGNATURE = Signature((TensorSpec("a", "FP32", (-1, 3)), TensorSpec("b", "INT64", (-1,))), (TensorSpec("y", "FP32", (-1, 2)),), True)


def tensor(name: str, array: NDArray[Any]) -> Tensor:
    return Tensor(name, datatype_of(array.dtype), array.shape, array.tobytes())


def request(rows: int) -> TensorRequest:
    a, b = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3), np.arange(rows)
    return TensorRequest((tensor("a", a), tensor("b", b)), SIGNATURE.outputs, rows)


@given(st.lists(arrays, min_size=1, max_size=5))
def test_item_comes_back_as_it_was_and_has_one_form(given_arrays: list[NDArray[Any]]) -> None:
    item = encode_item(given_arrays)
    parts = decode_item(item)
    for array, part in zip(given_arrays, parts, strict=True):
        assert part.array.dtype == array.dtype and part.array.tobytes() == array.tobytes() and part.array.shape == array.shape
    assert encode_item([part.array for part in parts]) == item


@given(st.lists(arrays, min_size=1, max_size=3), st.data())
def test_item_that_was_cut_or_bent_never_means_something_else_silently(given_arrays: list[NDArray[Any]], data: st.DataObject) -> None:
    item = encode_item(given_arrays)
    bent = data.draw(st.sampled_from([item[:-1], item + b"\0", item[1:], b"\xff" + item[1:]]))
    try:
        parts = decode_item(bent)
    except ProtocolError:
        return
    assert encode_item([part.array for part in parts]) == bent


@given(st.binary(max_size=200))
def test_item_of_any_bytes_is_refused_or_read(raw: bytes) -> None:
    try:
        parts = decode_item(raw)
    except ProtocolError:
        return
    assert encode_item([part.array for part in parts]) == raw


def test_item_with_a_boolean_that_is_none_is_refused() -> None:
    item = bytearray(encode_item([np.array([True])]))
    item[-1] = 2
    with pytest.raises(ProtocolError):
        decode_item(bytes(item))


@given(
    st.lists(specs, min_size=1, max_size=4, unique_by=lambda s: s.name), st.lists(specs, min_size=1, max_size=4, unique_by=lambda s: s.name)
)
def test_signature_has_one_form(inputs: list[TensorSpec], outputs: list[TensorSpec]) -> None:
    batched = all(spec.shape[:1] == (-1,) for spec in (*inputs, *outputs))
    signature = Signature(tuple(inputs), tuple(outputs), batched)
    raw = signature_to_json(signature)
    assert signature_from_json(raw) == signature
    with pytest.raises(ProtocolError):
        signature_from_json(raw.replace(b'"version"', b' "version"'))


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b'{"inputs": 1}', b"[" * 5_000, b" " * 200_000])
def test_signature_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        signature_from_json(raw)


@pytest.mark.parametrize(
    "arguments", [("", "FP32", ()), ("x\n", "FP32", ()), ("x", "BYTES", ()), ("x", "FP8", ()), ("x", "FP32", (0,)), ("x", "FP32", (1,) * 9)]
)
def test_spec_outside_the_protocol_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ProtocolError):
        TensorSpec(*arguments)


def test_datatype_of_bytes_is_refused_by_name() -> None:
    with pytest.raises(ProtocolError, match="strings are not served"):
        TensorSpec("x", "BYTES", (1,))


@given(st.integers(1, 40), st.data())
def test_rows_taken_from_a_request_are_those_rows(rows: int, data: st.DataObject) -> None:
    whole = request(rows)
    index = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
    part = whole.take(index)
    assert part.rows == part.items == len(index)
    for before, after in zip(whole.inputs, part.inputs, strict=True):
        np.testing.assert_array_equal(after.array, before.array[index])
    assert tensor_requests.from_bytes(tensor_requests.to_proto(part).SerializeToString()) == part


def test_request_without_rows_is_one_unit_and_cannot_be_cut() -> None:
    one = TensorRequest((tensor("x", np.array([1, 2], np.float32)),), (TensorSpec("y", "FP32", (2,)),), 0)
    assert one.items == 1 and one.take([0]) == one
    with pytest.raises(ProtocolError):
        one.take([1])


def body(shape: list[int], contents: bytes, datatype: str = "FP32", out: tuple[int, ...] = (), rows: int = 0) -> pb.TensorRequest:
    given_input = pb.Tensor(name="a", datatype=datatype, shape=shape, contents=contents)
    return pb.TensorRequest(inputs=[given_input], outputs=[pb.TensorSpec(name="y", datatype="FP32", shape=out)], rows=rows)


def several(count: int, name: str) -> pb.TensorRequest:
    made = body([1], b"x", "UINT8", (-1,), 1)
    made.ClearField("inputs")
    made.inputs.extend(pb.Tensor(name=name.format(i), datatype="UINT8", shape=[1], contents=b"x") for i in range(count))
    return made


@pytest.mark.parametrize(
    "broken",
    [
        pb.TensorRequest(),
        pb.TensorRequest(inputs=[pb.Tensor(name="a", datatype="FP32", shape=[1], contents=b"1234")]),
        body([2], b"1234"),
        body([-1], b"1234"),
        body([1 << 40, 1 << 40], b""),
        body([1] * 9, b"1234"),
        body([1], b"\2", "BOOL"),
        body([1], b"x", "BYTES"),
        body([2], b"xy", "UINT8", (-1,), 3),
        body([2], b"xy", "UINT8", (2,), 2),
        body([2], b"xy", "UINT8", (), 2),
        several(2, "a"),
        several(65, "a{}"),
    ],
)
def test_request_that_breaks_a_rule_is_refused(broken: pb.TensorRequest) -> None:
    with pytest.raises(ProtocolError):
        tensor_requests.from_proto(broken)


def test_request_over_its_bounds_is_refused() -> None:
    y = TensorSpec("y", "FP32", (-1, 1024))
    large = np.zeros((2, REQUEST_BYTES_MAX // 2 + 1), np.uint8)
    with pytest.raises(ProtocolError, match="bytes of input"):
        TensorRequest((tensor("x", large),), (y,), 2)
    rows = OUTPUT_BYTES_MAX // 4096 + 1
    with pytest.raises(ProtocolError, match="answer would be over"):
        TensorRequest((tensor("x", np.zeros(rows, np.uint8)),), (y,), rows)
    whole = TensorSpec("y", "FP32", (OUTPUT_BYTES_MAX // 4,))
    with pytest.raises(ProtocolError, match="answer would be over"):
        TensorRequest((tensor("x", np.zeros(1, np.uint8)),), (whole,), 0)
    with pytest.raises(ProtocolError, match="rows"):
        TensorRequest((tensor("x", np.zeros(ROWS_MAX + 1, np.uint8)),), (TensorSpec("y", "UINT8", (-1,)),), ROWS_MAX + 1)


def test_request_is_held_against_the_signature() -> None:
    require_fits(SIGNATURE, request(2))
    require_fits(SIGNATURE, smallest(SIGNATURE))
    good = request(2)
    other = TensorSpec("z", "FP32", (-1, 2))
    for bad in (
        TensorRequest(good.inputs[:1], good.outputs, 2),
        TensorRequest((*good.inputs, Tensor("c", "INT64", (2,), bytes(16))), good.outputs, 2),
        TensorRequest((good.inputs[0], tensor("b", np.zeros(2, np.int32))), good.outputs, 2),
        TensorRequest((tensor("a", np.zeros((2, 4), np.float32)), good.inputs[1]), good.outputs, 2),
        TensorRequest(good.inputs, (other,), 2),
        TensorRequest(good.inputs, good.outputs, 0),
    ):
        with pytest.raises(ProtocolError):
            require_fits(SIGNATURE, bad)


def test_items_are_joined_to_arrays_or_refused() -> None:
    outputs = (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("n", "INT64", (-1,)))
    items = [encode_item([np.array([i, i], np.float32), np.array(i)]) for i in range(3)]
    found = join_items(outputs, True, items)
    np.testing.assert_array_equal(found["y"], [[0, 0], [1, 1], [2, 2]])
    np.testing.assert_array_equal(found["n"], [0, 1, 2])
    assert not found["y"].flags.writeable and not found["n"].flags.writeable
    assert item_flaw(outputs, True, items[0]) == ""
    for bad in (
        encode_item([np.array([1, 2], np.float32)]),
        encode_item([np.array([1], np.float32), np.array(1)]),
        encode_item([np.array([1, 2], np.float64), np.array(1)]),
        b"\1",
    ):
        assert item_flaw(outputs, True, bad)
        with pytest.raises(ProtocolError):
            join_items(outputs, True, [bad])
    open_dims = (TensorSpec("y", "FP32", (-1, -1)),)
    with pytest.raises(ProtocolError, match="differ in shape"):
        join_items(open_dims, True, [encode_item([np.array([1], np.float32)]), encode_item([np.array([1, 2], np.float32)])])
