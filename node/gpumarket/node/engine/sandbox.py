"""What an engine process gives up before it reads anything of a model. Linux; elsewhere it gives up nothing and says so.

Invariant: the returned report names only what the kernel has confirmed. Must run before any other import of weight: a user namespace
can be entered by a process of one thread only, and torch starts threads when it is imported.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from typing import Final

OPEN_FILES_MAX: Final = 512
TENSOR_MEMORY_MIB: Final = 4096
"""Of a process that runs tensor models: what a pass takes may depend on numbers that a client sends."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_NO_NEW_PRIVS: Final = 39
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_CAPABILITY_VERSION_3: Final = 0x20080522

ENVIRONMENT_PASSED: Final = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "ONEDNN_MAX_CPU_ISA")
ENVIRONMENT_SET: Final = {
    "HOME": "/nonexistent",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def scrubbed_environment(parent: dict[str, str]) -> dict[str, str]:
    """The environment of an engine process: an allow-list, so that no key or password of its parent can be in it."""
    return {name: parent[name] for name in ENVIRONMENT_PASSED if name in parent} | ENVIRONMENT_SET


def enter(parent_pid: int) -> dict[str, bool | str]:
    """Give up rights, network and core files; die with the parent. Returns what is in force.

    `tier` is "process+netns" when the process has no network, else "process". RuntimeError when the parent has gone already.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    open_files = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    report: dict[str, bool | str] = {"tier": "process", "no_network": False, "no_capabilities": False, "no_new_privileges": False}
    if not sys.platform.startswith("linux"):
        return report
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        raise RuntimeError("the process that started this engine has ended")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    report["no_new_privileges"] = libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1
    report["no_network"] = _leave_network(libc)
    report["no_capabilities"] = _drop_capabilities(libc)
    if report["no_network"]:
        report["tier"] = "process+netns"
    return report


def limit_memory(mebibytes: int) -> None:
    """Bound what this process may allocate, what it has already included. Data only: a GPU's driver reserves addresses by the terabyte."""
    if not sys.platform.startswith("linux"):
        return
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = mebibytes << 20 if hard == resource.RLIM_INFINITY else min(hard, mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _leave_network(libc: ctypes.CDLL) -> bool:
    """A network namespace of its own, whose loopback is down. Refused where user namespaces are switched off."""
    before = os.readlink("/proc/self/ns/net")
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    return os.readlink("/proc/self/ns/net") != before


def _drop_capabilities(libc: ctypes.CDLL) -> bool:
    """Empty effective, permitted and inheritable sets, read back from /proc."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)())
    with open("/proc/self/status", encoding="ascii") as status:
        sets = dict(line.split(":", 1) for line in status if line.startswith(("CapEff", "CapPrm", "CapInh")))
    return len(sets) == 3 and all(int(value, 16) == 0 for value in sets.values())
