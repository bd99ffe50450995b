"""`gpumarket run MODEL [TEXT]`: a job, by what the model does: vectors of texts, an answer that streams to stdout, or tensors."""

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
    from gpumarket.sdk import Client, InferResult

_SHOWN = 4


@with_common_options
async def command(
    model: Annotated[str, typer.Argument(help="Name in your lock file (gpumarket model list).")],
    text: Annotated[str | None, typer.Argument(help="Prompt, or text to embed; - or nothing reads stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read it from a file; to embed, each line is a text.")] = None,
    tensor: Annotated[list[str] | None, typer.Option(help="NAME=@FILE.npy: an input of a tensor model; once for each.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a tensor model's outputs, a .npy file each.")] = None,
    max_cost: Annotated[str | None, typer.Option(help="Most to pay, in tokens, checks included, e.g. 0.01.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    config: ConfigOption = None,
) -> None:
    """Run one job: embed texts, chat, or send tensors, whichever the model does."""
    arrays = _arrays(tensor or [])
    content = _content(text, file) if not arrays else ""
    async with buyer.market(config) as market:
        entry = next((m for m in market.models() if m.name == model), None)
        if entry is None:
            raise UnknownModel(f"{model!r} is not in your lock file", hint=f"gpumarket model add {model} DIGEST, or gpumarket model list")
        if (entry.task is Task.INFER) is not bool(arrays):
            raise ConfigError(
                f"{model} does {entry.task.name.lower()}: it takes {'--tensor NAME=@FILE.npy' if not arrays else 'text'}",
                hint="gpumarket model list shows what a model does",
            )
        if arrays:
            await _infer(market, model, arrays, max_cost, out)
        elif entry.task is Task.EMBED:
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


async def _infer(market: Client, model: str, arrays: dict[str, Any], max_cost: str | None, out: Path | None) -> None:
    result = await market.infer(model, arrays, max_cost=max_cost)
    if out is not None:
        _save(result, out)
    rows = []
    for name, array in result.outputs.items():
        rows.append({"output": name, "dtype": str(array.dtype), "shape": list(array.shape), "first": array.reshape(-1)[:_SHOWN].tolist()})
    document = {**buyer.outcome_document(result), "outputs": buyer.tensors_document(result)}
    current().emit(document, lambda _: current().table(rows))
    current().progress(buyer.outcome_line(result))


def _save(result: InferResult, out: Path) -> None:
    """A file for each output. An output's name is a stranger's, and no path."""
    import numpy as np

    out.mkdir(parents=True, exist_ok=True)
    for number, (name, array) in enumerate(result.outputs.items()):
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        np.save(out / f"{number}-{safe}.npy", array)


def _arrays(given: list[str]) -> dict[str, Any]:
    """Arrays by input name. Raises ConfigError; a file that holds pickled objects is refused by numpy itself."""
    import numpy as np

    arrays: dict[str, Any] = {}
    for word in given:
        name, _, path = word.partition("=@")
        if not name or not path or name in arrays:
            raise ConfigError(f"--tensor {word} is not NAME=@FILE.npy, or names an input again", hint="gpumarket run --help")
        try:
            arrays[name] = np.load(Path(path), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path} as an array ({type(error).__name__})", hint="write it with numpy.save") from error
    return arrays


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
