"""While a key is in memory: no core dump, and no look into the process for others of the same user (prctl(2), PR_SET_DUMPABLE).

It cannot be undone by what it protects from; it ends with the process, and a program started from it begins anew. Outside Linux only core
dumps are switched off.
"""

from __future__ import annotations

import ctypes
import resource
import sys

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4


def conceal() -> None:
    """Make this process opaque: core files of size 0, not dumpable, not traceable by its own user. Idempotent."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def is_concealed() -> bool:
    """Whether the kernel says so; True where there is no such switch."""
    if not sys.platform.startswith("linux"):
        return True
    return int(ctypes.CDLL(None).prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)) == 0
