"""Room on the disk that a journal lies on: new paid work is refused while there is little, so that what runs can still be written down.

Ends by itself when room is made. Never: a refusal to write what is owed already.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from gpumarket.core.errors import Busy

BYTES_MIN = 64 << 20
"""Below this nothing new is begun: more than all open attempts of a busy day write."""
LOOK_SECONDS = 1.0
_RETRY_SECONDS = 30.0


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged process may still write to the file system of a folder."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


class Space:
    """The file system of one database file."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._looked_at, self._free = float("-inf"), 0

    def require(self) -> None:
        """Raises Busy, with path and bytes, where there is too little room for new work. Looks once a second at most."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at, self._free = now, free_bytes(self._database.parent)
        if self._free < BYTES_MIN:
            raise Busy(
                f"no new work is taken: {self._free} bytes are free where {self._database} lies, {BYTES_MIN} are wanted",
                retry_after_seconds=_RETRY_SECONDS,
                hint=f"free some space there (df -h {self._database.parent}); work is taken again by itself",
            )
