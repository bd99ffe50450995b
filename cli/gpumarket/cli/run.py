"""`gpumarket run MODEL [TEXT]`: a job, by what the model does: vectors of texts, or an answer that streams to stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumarket.cli import buyer
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, with_common_options
from gpumarket.core.errors import ConfigError, UnknownModel
from gpumarket.core.terms import Task

if TYPE_CHECKING:
    from gpumarket.sdk import Client

_SHOWN = 4


@with_common_options
async def command(
    model: Annotated[str, typer.Argument(help="Name in your lock file (gpumarket model list).")],
    text: Annotated[str | None, typer.Argument(help="Prompt, or text to embed; - or nothing reads stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read it from a file; to embed, each line is a text.")] = None,
    max_cost: Annotated[str | None, typer.Option(help="Most to pay, in tokens, checks included, e.g. 0.01.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    config: ConfigOption = None,
) -> None:
    """Run one job: embed texts or chat, whichever the model does."""
    content = _content(text, file)
    async with buyer.market(config) as market:
        entry = next((m for m in market.models() if m.name == model), None)
        if entry is None:
            raise UnknownModel(f"{model!r} is not in your lock file", hint=f"gpumarket model add {model} DIGEST, or gpumarket model list")
        if entry.task is Task.EMBED:
            await _embed(market, model, content, max_cost)
        else:
            await _chat(market, model, content, {"max_cost": max_cost, "max_tokens": max_tokens, "temperature": temperature})


async def _embed(market: Client, model: str, content: str, max_cost: str | None) -> None:
    texts = [line for line in content.splitlines() if line.strip()]
    result = await market.embed(model, texts, max_cost=max_cost)
    rows = [
        {"text": t, "dimensions": len(v), "vector": [round(float(x), 4) for x in v[:_SHOWN]]} for t, v in zip(texts, result, strict=True)
    ]
    current().emit(
        {**buyer.outcome_document(result), "vectors": [[float(x) for x in vector] for vector in result]}, lambda _: current().table(rows)
    )
    current().progress(buyer.outcome_line(result))


async def _chat(market: Client, model: str, content: str, options: dict[str, Any]) -> None:
    stream = market.chat(model, content, stream=True, **options)
    pieces = []
    async for piece in stream:
        pieces.append(piece)
        current().text(piece)
    current().text("\n")
    result = stream.result
    document = {**buyer.outcome_document(result), "text": "".join(pieces), "finish_reason": result.finish_reason}
    current().emit(document, lambda _: None)
    current().progress(buyer.outcome_line(result))


def _content(text: str | None, file: Path | None) -> str:
    if text not in (None, "-") and file is not None:
        raise ConfigError("give either a text or --file", hint="gpumarket run --help")
    try:
        content = file.read_text("utf-8") if file is not None else sys.stdin.read() if text in (None, "-") else text
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", hint="give a file that can be read, or - for standard input") from error
    if not content or not content.strip():
        raise ConfigError("there is nothing to run: the text is empty", hint="gpumarket run --help")
    return content
