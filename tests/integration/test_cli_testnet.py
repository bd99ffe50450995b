"""The command line against a testnet of its own, as a newcomer types it: up in the background, use it, end it, bring it up again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

SECONDS = 240
pytestmark = pytest.mark.timeout(3 * SECONDS)


@dataclass(frozen=True)
class Shell:
    """A shell with `eval "$(gpumarket testnet env)"` in force."""

    folder: Path
    config: str = ""

    def call(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "GPUMARKET_CONFIG": self.config} if self.config else dict(os.environ)
        command = [sys.executable, "-m", "gpumarket.cli.main", *words]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=SECONDS, env=env, cwd=self.folder.parent)

    def json(self, *words: str, code: int = 0, stdin: str = "") -> Any:
        done = self.call(*words, "-o", "json", stdin=stdin)
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("cli") / "net"
    bare = Shell(folder)
    try:
        up = bare.json("testnet", "up", "--detach", "--providers", "1", "--dir", str(folder))
        yield Shell(folder, up["client"]["config"])
    finally:
        bare.call("testnet", "down", "--dir", str(folder))


def test_testnet_status_lists_running_roles(shell: Shell) -> None:
    status = shell.json("testnet", "status", "--dir", str(shell.folder))
    assert {role["name"]: role["running"] for role in status["roles"]} == {"scheduler": True, "provider-1": True}


def test_testnet_env_is_for_eval(shell: Shell) -> None:
    done = shell.call("testnet", "env", "--dir", str(shell.folder))
    assert done.stdout == f"export GPUMARKET_CONFIG={shell.config}\n"


def test_testnet_up_in_a_folder_that_is_in_use_is_refused(shell: Shell) -> None:
    error = shell.json("testnet", "up", "--detach", "--dir", str(shell.folder), code=3)["error"]
    assert error["code"] == "state_locked" and "testnet down" in error["hint"]


def test_run_embeds_and_streams_and_the_jobs_are_in_the_journal(shell: Shell) -> None:
    vectors = shell.json("run", "all-MiniLM-L6-v2", "a red fox", "--max-cost", "0.01")["vectors"]
    assert len(vectors) == 1 and len(vectors[0]) == 384
    said = shell.json("run", "tiny-llama", "--max-tokens", "6", stdin="Say hello\n")
    assert said["usage"]["output_tokens"] <= 6 and said["text"]
    jobs = shell.json("job", "list")
    assert [job["state"] for job in jobs][:2] == ["done", "done"]
    assert shell.json("job", "get", said["job"][:20])["cost"] == said["cost"]
    assert shell.json("job", "wait", said["job"])["text"] == said["text"]


def test_market_shows_offers_and_explains_a_match(shell: Shell) -> None:
    offers = shell.json("market", "ls", "tiny-llama")
    assert [offer["name"] for offer in offers] == ["tiny-llama"] and offers[0]["gpus"] == ["CPU"]
    explained = shell.json("market", "explain", "all-MiniLM-L6-v2", "hello")
    assert [c["chosen"] for c in explained["candidates"]] == [True]


def test_readme_example_runs_as_it_stands(shell: Shell) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    lines = example.replace("async with", "async def main():\n  async with", 1).replace("\n    ", "\n      ")
    program = f"import asyncio\n{lines}      print(len(vectors))\nasyncio.run(main())\n"
    env = {**os.environ, "GPUMARKET_CONFIG": shell.config}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, env=env, cwd=shell.folder.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("2\n") and len(done.stdout) > 2


@pytest.mark.parametrize(
    ("words", "code", "name"),
    [
        (("run", "no-such-model", "hi"), 7, "unknown_model"),
        (("run", "all-MiniLM-L6-v2", "hi", "--max-cost", "0.000000000000000001"), 5, "over_max_cost"),
        (("run", "all-MiniLM-L6-v2", " "), 3, "config"),
        (("run", "all-MiniLM-L6-v2", "hi", "--max-cost", "cheap"), 3, "config"),
        (("job", "get", "0xffff"), 3, "config"),
        (("wallet", "deposit", "1000000"), 5, "out_of_funds"),
        (("testnet", "logs", "nobody"), 3, "config"),
    ],
)
def test_refusals_have_their_code_and_a_next_step(shell: Shell, words: tuple[str, ...], code: int, name: str) -> None:
    error = shell.json(*words, code=code)["error"]
    assert error["code"] == name
    assert error["message"]


def test_wrong_password_and_wrong_chain_are_told_as_such(shell: Shell, tmp_path: Path) -> None:
    wrong = tmp_path / "password"
    wrong.touch(mode=0o600)
    wrong.write_text("not it\n")
    text = Path(shell.config).read_text()
    config = tmp_path / "client.toml"
    keys = str(shell.folder / "keys" / "client.password")
    config.write_text(text.replace(keys, str(wrong)).replace(str(shell.folder / "client"), str(tmp_path / "state"), 1))
    assert Shell(shell.folder, str(config)).json("market", "ls", code=4)["error"]["code"] == "wrong_password"
    book = json.loads((shell.folder / "contracts.json").read_text())
    (tmp_path / "contracts.json").write_text(json.dumps({**book, "chain_id": 1}))
    config.write_text(text.replace(str(shell.folder / "contracts.json"), str(tmp_path / "contracts.json")))
    assert Shell(shell.folder, str(config)).json("market", "ls", code=6)["error"]["code"] == "wrong_chain"


def test_provider_of_a_running_testnet_is_asked_to_redeem(shell: Shell) -> None:
    config = str(shell.folder / "provider-1.toml")
    shell.json("run", "all-MiniLM-L6-v2", "one more, so that there is something to redeem")
    assert shell.json("provider", "status", "--config", config)["running"] is True
    redeemed = shell.json("wallet", "redeem", "--config", config)
    assert len(redeemed) == 1 and redeemed[0]["gas"] > 0


def test_channel_closes_at_what_was_used(shell: Shell) -> None:
    before = shell.json("wallet", "balance")
    refunded = shell.json("wallet", "close-channel")["refunded"]
    after = shell.json("wallet", "balance")
    assert refunded == before["deposit"] - before["billed"] > 0
    assert after["balance"] == before["balance"] + refunded


@pytest.mark.slow
def test_testnet_comes_up_again_with_its_chain_keys_and_money(shell: Shell) -> None:
    before = shell.json("wallet", "balance")
    ended = shell.json("testnet", "down", "--dir", str(shell.folder))["ended"]
    assert "supervisor" in ended
    assert not [p for p in psutil.process_iter(["cmdline"]) if any(str(shell.folder) in word for word in p.info["cmdline"] or ())]
    assert shell.json("testnet", "status", "--dir", str(shell.folder), code=3)["error"]["hint"] == "gpumarket testnet up"
    shell.json("testnet", "up", "--detach", "--providers", "1", "--dir", str(shell.folder))
    after = shell.json("wallet", "balance")
    assert (after["address"], after["balance"]) == (before["address"], before["balance"])
    assert len(shell.json("run", "all-MiniLM-L6-v2", "still here")["vectors"]) == 1
