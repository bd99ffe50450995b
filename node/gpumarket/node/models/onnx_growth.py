"""How large the values of a graph become where the file itself fixes it: chains of Tile, Expand and the like that a few bytes blow up.

A lower bound, followed node by node; dimensions that data decides count as 1. What it cannot see is bounded by the engine process. Pure.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from gpumarket.node.models.protobuf_reader import Message, floats

_SHAPING: Final = {"Expand": 1, "ConstantOfShape": 0, "AffineGrid": 1, "Col2Im": 1, "CenterCropPad": 1, "MaxUnpool": 2}
"""Operator → which input is the shape of its output (at least)."""
_LENGTHS: Final = {"HannWindow": 0, "HammingWindow": 0, "BlackmanWindow": 0, "OneHot": 1, "DFT": 1}
"""Operator → which input is the length of a dimension of its output."""
_SPANS: Final = ("kernel_shape", "strides", "dilations", "output_shape", "output_padding", "scales", "pads", "paddings")
_INT_FORMATS: Final = {6: "<i", 7: "<q"}
_CONSTANTS_READ_MAX: Final = 64


class GrowthError(ValueError):
    """A value with more elements than are served."""


class Growth:
    """Follows one graph. `most` is the largest number of elements of a value."""

    def __init__(self, most: int, initializers: Mapping[str, Message]) -> None:
        self._most = most
        self._sizes: dict[str, int] = {}
        self._numbers: dict[str, list[float]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in initializers.items():
            self._constant(name, tensor)

    def follow(self, node: Message) -> None:
        """Account for a node. Raises GrowthError when its output has to be too large, or when it walks too far to compute it."""
        operator, inputs = node.get("op_type", ""), node.get("input", [])
        attributes = {a.get("name", ""): a for a in node.get("attribute", ())}
        for name in _SPANS:
            self._require(_span(attributes.get(name, {})), f"attribute {name!r} of {operator}")
        if operator == "Constant":
            self._literal(node["output"][0], attributes)
            return
        size = self._size(operator, inputs, attributes)
        self._require(size, f"the output of a node {operator}")
        for name in filter(None, node.get("output", ())):
            self._sizes[name] = size

    def _size(self, operator: str, inputs: list[str], attributes: Mapping[str, Message]) -> int:
        carried = max((self._sizes.get(name, 1) for name in inputs), default=1)
        if operator in (
            "Shape",
            "Size",
            "ReduceSum",
            "ReduceMean",
            "ReduceMax",
            "ArgMax",
            "Slice",
            "Gather",
            "Squeeze",
            "TopK",
            "Compress",
        ):
            return 1
        if operator in _SHAPING:
            return max(self._product(inputs, _SHAPING[operator]), carried if operator != "ConstantOfShape" else 1)
        if operator in _LENGTHS:
            return carried * self._product(inputs, _LENGTHS[operator])
        rule: Callable[[list[str], int, Mapping[str, Message]], int] | None = {
            "Tile": self._tile,
            "Range": self._range,
            "Pad": self._pad,
            "Resize": self._resize,
            "Upsample": self._resize,
        }.get(operator)
        if rule is not None:
            return rule(inputs, carried, attributes)
        return max(carried, self._broadcast(inputs))

    def _tile(self, inputs: list[str], _: int, __: Mapping[str, Message]) -> int:
        return self._sizes.get(inputs[0], 1) * self._product(inputs, 1)

    def _range(self, inputs: list[str], _: int, __: Mapping[str, Message]) -> int:
        known = [self._known(inputs, index) for index in range(3)]
        if not all(known):
            return 1
        start, limit, delta = (numbers[0] for numbers in known)
        if not delta:
            raise GrowthError("a Range of endless length")
        return max(0, _whole((limit - start) / delta))

    def _pad(self, inputs: list[str], carried: int, attributes: Mapping[str, Message]) -> int:
        pads = self._known(inputs, 1) or attributes.get("pads", {}).get("ints", [])
        half = len(pads) // 2
        return max(carried, math.prod(1 + max(0, int(pads[i])) + max(0, int(pads[half + i])) for i in range(half)))

    def _resize(self, inputs: list[str], carried: int, attributes: Mapping[str, Message]) -> int:
        sizes = self._known(inputs, 3)
        scales = self._known(inputs, 2 if len(inputs) > 2 else 1)
        if sizes:
            return max(carried, self._product(inputs, 3))
        return _whole(carried * math.prod(max(1.0, s) for s in scales))

    def _broadcast(self, inputs: list[str]) -> int:
        """Elements of constants of known shapes stretched over each other: [n, 1] with [1, n] gives n²."""
        shapes = [self._shapes[name] for name in inputs if name in self._shapes]
        if len(shapes) < 2:
            return 1
        rank = max(map(len, shapes))
        padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
        return math.prod(max(sizes) for sizes in zip(*padded, strict=True))

    def _product(self, inputs: list[str], index: int) -> int:
        return math.prod(max(1, int(n)) for n in self._known(inputs, index))

    def _known(self, inputs: list[str], index: int) -> list[float]:
        """The numbers of a constant input, where there is one. Raises GrowthError for sizes that are no numbers."""
        found = self._numbers.get(inputs[index], []) if index < len(inputs) else []
        if not all(math.isfinite(number) for number in found):
            raise GrowthError("a size that is not finite")
        return found

    def _constant(self, name: str, tensor: Message) -> None:
        dims = tuple(tensor.get("dims", ()))
        self._sizes[name], self._shapes[name] = math.prod(dims), dims
        if math.prod(dims) <= _CONSTANTS_READ_MAX:
            self._numbers[name] = _numbers(tensor)

    def _literal(self, name: str, attributes: Mapping[str, Message]) -> None:
        """A Constant node, in whichever of its forms."""
        if "t" in attributes.get("value", {}):
            self._constant(name, attributes["value"]["t"])
        else:
            several, one = attributes.get("value_ints", {}).get("ints"), attributes.get("value_int", {}).get("i")
            self._numbers[name] = several if several is not None else [] if one is None else [one]

    def _require(self, size: float, what: str) -> None:
        if size > self._most:
            raise GrowthError(f"{what} comes to more than the {self._most} that are served")


def _whole(size: float) -> int:
    if not math.isfinite(size):
        raise GrowthError("a size that is not finite")
    return math.ceil(size)


def _span(attribute: Message) -> float:
    """How far an attribute reaches: the product of its numbers."""
    numbers: list[Any] = [*attribute.get("ints", ()), *_floats(attribute.get("floats", ()))]
    return math.prod(max(1.0, abs(float(n))) for n in numbers[:_CONSTANTS_READ_MAX])


def _numbers(tensor: Message) -> list[float]:
    """The numbers of a small constant that may be a shape or a scale; empty for other types."""
    kind = tensor.get("data_type", 0)
    raw = tensor.get("raw_data")
    if kind in _INT_FORMATS:
        if raw is not None:
            return [value for (value,) in struct.iter_unpack(_INT_FORMATS[kind], raw)]
        return list(tensor.get("int64_data") or tensor.get("int32_data") or ())
    if kind == 1:
        return floats([raw]) if raw is not None else _floats(tensor.get("float_data", ()))
    return []


def _floats(views: Any) -> list[float]:
    return floats(list(views))
