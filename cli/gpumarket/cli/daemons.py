"""What `provider` and `scheduler` share: reading a daemon's ready file and asking whether it still runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gpumarket.cli import buyer
from gpumarket.core.errors import ConfigError


def asked_password(key_file: Path, password_file: Path) -> str | None:
    """The password from the terminal, where neither a credential nor the password file has it and somebody is there to ask."""
    return None if password_file.exists() else buyer.asked_password(key_file, None)


def ready_file(state: Path, noun: str) -> dict[str, Any]:
    """What a daemon wrote when it became ready, and whether it runs now. Raises ConfigError where none ever was."""
    file = state / "ready.json"
    try:
        document: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"no {noun} was ready in {state}", hint=f"gpumarket {noun} start, or name its folder with --state") from error
    return {"running": _runs(int(document["pid"])), **document}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's, hence alive
    return True
