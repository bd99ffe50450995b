"""Settings as a TOML file: strings, numbers, booleans, lists of strings, and lists of tables, which is all that settings classes hold."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(path: Path, sections: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write one table per section, atomically. Raises TypeError for a value that settings do not hold."""
    lines: list[str] = []
    for section, values in sections.items():
        lines += _table(section, values)
    draft = path.with_name(f".{path.name}.new")
    draft.write_text("\n".join(lines) + "\n")
    os.replace(draft, path)
    return path


def _table(name: str, values: Mapping[str, Any]) -> list[str]:
    plain = {key: value for key, value in values.items() if not _is_tables(value)}
    lines = [f"[{name}]", *(f"{key} = {_value(value)}" for key, value in plain.items()), ""]
    for key, tables in values.items():
        if key in plain:
            continue
        for table in tables:
            lines += [f"[[{name}.{key}]]", *(f"{k} = {_value(v)}" for k, v in table.items()), ""]
    return lines


def _is_tables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, Path)):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # a JSON string is a TOML basic string but for DEL
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"{type(value).__name__} is no value of a settings file")
