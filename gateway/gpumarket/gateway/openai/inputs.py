"""Texts or token ids, one or several: what `prompt` and `input` may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from gpumarket.gateway.problems import invalid

Input = str | list[int]
Inputs = list[str] | list[list[int]]


def inputs_of(value: str | Sequence[str | int | list[int]], param: str) -> Inputs:
    """One entry an input. Raises Problem for a list of several kinds, or an empty text in it."""
    if isinstance(value, str):
        return [value]
    if _all_ids(value):
        return [list(value)]
    texts = [entry for entry in value if isinstance(entry, str)]
    lists = [entry for entry in value if isinstance(entry, list)]
    if len(value) not in (len(texts), len(lists)):
        raise invalid(f"{param} is a list of texts, of token ids, or of lists of token ids: not of several kinds", param)
    if "" in texts:
        raise invalid(f"{param}[{texts.index('')}] is empty", f"{param}[{texts.index('')}]")
    return texts or lists


def _all_ids(value: Sequence[str | int | list[int]]) -> TypeGuard[Sequence[int]]:
    return all(isinstance(entry, int) for entry in value)
