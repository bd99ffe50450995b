"""The npm tools of contracts/ (solc, forge, OpenZeppelin), installed when they are missing, for tests that compile."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

CONTRACTS = Path(__file__).resolve().parents[1] / "contracts"
NPM_INSTALL = ("install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")


def tools() -> dict[str, str]:
    """An environment in which `node` and `forge` run. Fails when npm cannot install what the lock pins."""
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join((str(CONTRACTS / "node_modules" / ".bin"), os.environ["PATH"], scripts))
    env = {**os.environ, "PATH": path, "FOUNDRY_DISABLE_NIGHTLY_WARNING": "1"}
    npm = shutil.which("npm", path=path)
    assert npm, "npm is missing: pip install 'gpumarket[testnet]' brings it"
    with (CONTRACTS / "package.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may come here at once
        if not all((CONTRACTS / "node_modules" / name).is_dir() for name in ("solc", "@foundry-rs/cast")):
            done = subprocess.run([npm, *NPM_INSTALL], cwd=CONTRACTS, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
    return env
