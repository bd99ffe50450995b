"""The process that is killed, or whose disk fails: forks a child per run, so that the imports are paid once.

    python -m journal_kill.victim ROLE        ROLE: provider, scheduler, client

Reads one JSON object a line: {"folder", "mode", "n", "synchronous"?, "trace"?} (shim.c tells the modes), lets a child do the role's work
there, and answers with a line {"said": [...], "changes": how many changes of files, "killed": bool, "failed": "error or empty"}.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from gpumarket.core.daemon import configure_logging
from gpumarket.core.errors import GpumarketError
from gpumarket.settlement import database, journal


def child(role: str, order: dict[str, Any], pipe: int) -> None:
    scenario = importlib.import_module(f"journal_kill.{role}")
    shim = ctypes.CDLL(None)
    shim.shim_count.restype = ctypes.c_long
    if "synchronous" in order:
        database.PRAGMAS = tuple(p if not p.startswith("synchronous") else f"synchronous={order['synchronous']}" for p in database.PRAGMAS)
    journal.CHECKPOINT_FRAMES, journal.CHECKPOINT_BATCHES = 25, 1  # a life here is short, and checkpoints shall happen in it
    if "trace" in order:
        shim.shim_trace(os.open(order["trace"], os.O_WRONLY | os.O_CREAT, 0o600))

    def say(fact: Any) -> None:
        data = json.dumps(fact).encode() + b"\n"
        os.write(pipe, data)
        if "trace" in order:
            shim.shim_mark(data, ctypes.c_uint64(len(data)))

    shim.shim_arm(order["folder"].encode(), ctypes.c_char(order["mode"].encode()), ctypes.c_long(order["n"]))
    failed = ""
    try:
        asyncio.run(scenario.work(Path(order["folder"]), say))
    except GpumarketError as error:
        failed = f"{error.code}: {error.message} | {error.hint}"
    os.write(pipe, json.dumps({"changes": shim.shim_count(), "failed": failed}).encode() + b"\n")


def run(role: str, order: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and tell what the child said."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            child(role, order, writer)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = [json.loads(line) for line in pipe]
    _, status = os.waitpid(pid, 0)
    last = lines.pop() if lines and "changes" in lines[-1] else {"changes": 0, "failed": ""}
    return {"said": lines, "killed": os.WIFSIGNALED(status)} | last


def main() -> None:
    role = sys.argv[1]
    configure_logging(role, level=logging.CRITICAL)
    importlib.import_module(f"journal_kill.{role}")
    for line in sys.stdin:
        print(json.dumps(run(role, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
