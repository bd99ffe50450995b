"""Prints what a set of extras needs, a requirement a line: dependencies become a layer of an image that a change of code leaves alone.

python tools/requirements.py pyproject.toml [EXTRA ...]
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

OWN = re.compile(r"gpumarket\[([a-z0-9,-]+)\]")


def requirements(project: dict[str, object], extras: list[str]) -> list[str]:
    """The base requirements and those of `extras`, extras of extras included. Raises KeyError for an extra that there is not."""
    table = project["project"]
    assert isinstance(table, dict)
    found: list[str] = list(table["dependencies"])
    waiting, seen = list(extras), set()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in table["optional-dependencies"][extra]:
            if own := OWN.fullmatch(requirement):
                waiting += own.group(1).split(",")
            else:
                found.append(requirement)
    return sorted(set(found))


if __name__ == "__main__":
    print("\n".join(requirements(tomllib.loads(Path(sys.argv[1]).read_text()), sys.argv[2:])))
