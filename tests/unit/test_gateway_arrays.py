"""Tensors of the Open Inference Protocol, in and out: exact, and refused where they are not what they say."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpumarket.core.tensors import DTYPES
from gpumarket.gateway.inference_protocol.arrays import from_contents, from_list, from_raw, to_contents, to_list, to_raw
from gpumarket.gateway.inference_protocol.service import _asked
from gpumarket.gateway.problems import Problem
from gpumarket.v1 import inference_pb2 as ipb

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ARRAYS = st.sampled_from(list(DTYPES.values())).flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(max_dims=3, max_side=4),
        elements=hnp.from_dtype(dtype, allow_nan=False, allow_infinity=False) if dtype.kind == "f" else None,
    )
)


@given(ARRAYS)
@example(np.array([1, 2**63], dtype=np.uint64))
@example(np.array([[0, 2**64 - 1], [2**53 + 1, 3]], dtype=np.uint64))
def test_array_survives_raw_json_and_typed_contents(array: Any) -> None:
    datatype = NAMES[array.dtype]
    shape = list(array.shape)
    np.testing.assert_array_equal(from_raw("x", datatype, shape, to_raw(array)), array, strict=True)
    np.testing.assert_array_equal(from_list("x", datatype, shape, to_list(array)), array, strict=True)
    np.testing.assert_array_equal(from_list("x", datatype, shape, array.tolist()), array, strict=True)
    contents = to_contents(array)
    assert (contents is None) == (datatype == "FP16")
    if contents is not None:
        np.testing.assert_array_equal(from_contents("x", datatype, shape, contents), array, strict=True)


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("UINT8", [1], [256]),
        ("UINT8", [1], [-1]),
        ("INT8", [1], [1.5]),
        ("INT64", [1], [2**63]),
        ("UINT64", [2], [-1, 2**63]),
        ("UINT64", [2], [1.5, 2**63]),
        ("UINT64", [1], [2**64]),
        ("INT32", [1], ["1"]),
        ("INT32", [1], [True]),
        ("BOOL", [1], [1]),
        ("FP16", [1], [1e6]),
        ("FP32", [1], [1e300]),
        ("FP32", [1], [None]),
        ("FP32", [2], [1.0]),
        ("FP32", [2], [[1.0], [2.0, 3.0]]),
        ("FP32", [-1], [1.0]),
        ("FP32", [1] * 9, [1.0]),
        ("BYTES", [1], ["a"]),
        ("FP8", [1], [1.0]),
    ],
)
def test_list_that_is_not_what_it_says_is_refused(datatype: str, shape: list[int], data: list[Any]) -> None:
    with pytest.raises(Problem) as caught:
        from_list("x", datatype, shape, data)
    assert (caught.value.status, caught.value.param) == (400, "x")


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [("FP32", [2], bytes(4)), ("FP32", [1], bytes(5)), ("BOOL", [1], b"\x02"), ("INT64", [2**31 - 1, 2**31 - 1], b""), ("X", [1], b"a")],
)
def test_bytes_that_are_not_what_they_say_are_refused(datatype: str, shape: list[int], raw: bytes) -> None:
    with pytest.raises(Problem):
        from_raw("x", datatype, shape, raw)


def test_numbers_that_json_does_not_have_are_null() -> None:
    assert to_list(np.array([1.5, np.nan, np.inf], "<f4")) == [1.5, None, None]


def request(**more: Any) -> ipb.ModelInferRequest:
    tensor = ipb.ModelInferRequest.InferInputTensor(
        name="x", datatype="FP32", shape=[1], contents=ipb.InferTensorContents(fp32_contents=[1])
    )
    return ipb.ModelInferRequest(**({"model_name": "m", "inputs": [tensor]} | more))


def test_grpc_request_is_read_or_refused_by_name() -> None:
    assert _asked(request()).inputs["x"].tolist() == [1.0]
    bare = ipb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1])
    assert _asked(request(inputs=[bare], raw_input_contents=[b"\0\0\x80?"])).inputs["x"].tolist() == [1.0]
    wrong: list[dict[str, Any]] = [
        {"raw_input_contents": [b"\0\0\x80?"]},
        {"inputs": [bare], "raw_input_contents": [b"\0\0\x80?", b""]},
        {"inputs": [bare]},
        {"inputs": [bare, bare], "raw_input_contents": [bytes(4), bytes(4)]},
        {"parameters": {"priority": ipb.InferParameter(int64_param=1)}},
        {"outputs": [{"name": "y", "parameters": {"classification": ipb.InferParameter(int64_param=1)}}]},
        {"outputs": [{"name": "y"}, {"name": "y"}]},
    ]
    for more in wrong:
        with pytest.raises(Problem):
            _asked(request(**more))


def test_field_numbers_are_those_that_tritonclient_has() -> None:
    """In a process of its own: both files declare the package `inference`."""
    program = (
        "from tritonclient.grpc import service_pb2 as s\n"
        "def told(m): return {f.name: [f.number, f.type] for f in m.fields}\n"
        "def all_of(d, at=''):\n"
        "    for n, m in d.items():\n"
        "        if not m.GetOptions().map_entry:\n"
        "            yield at + n, told(m); yield from all_of(m.nested_types_by_name, at + n + '.')\n"
        "import json; print(json.dumps(dict(all_of(s.DESCRIPTOR.message_types_by_name))))\n"
    )
    import json

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    theirs = json.loads(done.stdout)

    def compare(messages: Any, at: str = "") -> int:
        count = 0
        for name, message in messages.items():
            if message.GetOptions().map_entry:
                continue
            assert {f.name: [f.number, f.type] for f in message.fields} == theirs[at + name], at + name
            count += 1 + compare(message.nested_types_by_name, f"{at}{name}.")
        return count

    assert compare(ipb.DESCRIPTOR.message_types_by_name) == 18
