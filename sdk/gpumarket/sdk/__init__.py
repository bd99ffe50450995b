"""The Python SDK: buy embeddings, text and tensors, with typed results, receipts and verdicts. Importing it loads nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpumarket.sdk.client import Client
    from gpumarket.sdk.results import ChatResult, EmbedResult, InferResult, Piece, Quote, StreamEnd, TokenLogprob, Verdict
    from gpumarket.sdk.settings import ClientSettings
    from gpumarket.sdk.streaming import ChatStream

__all__ = [
    "ChatResult",
    "ChatStream",
    "Client",
    "ClientSettings",
    "EmbedResult",
    "InferResult",
    "Piece",
    "Quote",
    "StreamEnd",
    "TokenLogprob",
    "Verdict",
]

_HOME = {
    "ChatResult": "results",
    "ChatStream": "streaming",
    "Client": "client",
    "ClientSettings": "settings",
    "EmbedResult": "results",
    "InferResult": "results",
    "Piece": "results",
    "Quote": "results",
    "StreamEnd": "results",
    "TokenLogprob": "results",
    "Verdict": "results",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
