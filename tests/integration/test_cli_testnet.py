"""The command line against a testnet of its own, as a newcomer types it: up in the background, use it, end it, bring it up again."""

from __future__ import annotations

import base64
import json
import os
import re
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import pytest
import reliability
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gpumarket.core import keystore
from gpumarket.core.rpc import open_channel
from gpumarket.core.units import hex0x
from gpumarket.telemetry.metrics import PREFIX
from gpumarket.testnet.plan import TENSOR_MODELS

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
    assert {role["name"]: role["running"] for role in status["roles"]} == {"scheduler": True, "provider-1": True, "gateway": True}


def test_testnet_env_is_for_eval(shell: Shell) -> None:
    done = shell.call("testnet", "env", "--dir", str(shell.folder))
    first, url, key = done.stdout.splitlines()
    assert first == f"export GPUMARKET_CONFIG={shell.config}"
    assert re.fullmatch(r"export OPENAI_BASE_URL=http://127\.0\.0\.1:\d+/v1", url)
    assert re.fullmatch(r"export OPENAI_API_KEY=gm-[\w-]{43}", key)
    assert (shell.folder / "keys" / "gateway.api-key").stat().st_mode & 0o777 == 0o600


def test_page_on_openai_clients_runs_as_it_stands(shell: Shell) -> None:
    """The Python and curl blocks, one after the other, each in a shell with the testnet's environment; Node's in the slow tests."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "openai.md").read_text("utf-8")
    env = {**os.environ, **shell.json("testnet", "env", "--dir", str(shell.folder))}
    for language, argv in (("python", [sys.executable, "-c"]), ("bash", ["bash", "-ec"])):
        (block,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        done = subprocess.run([*argv, block], capture_output=True, text=True, timeout=SECONDS, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"error"' not in done.stdout
        # With one provider there is nobody to check the answers that are drawn for it.
        assert "not-drawn" in done.stdout or "unchecked" in done.stdout


def test_page_on_tasks_runs_as_it_stands_and_its_programs_are_right(shell: Shell) -> None:
    """Each block a program of its own, judged by what is planted in its data."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text("utf-8")
    blocks = {part.partition(":")[0]: part.partition("```python\n")[2].partition("\n```")[0] + "\n" for part in page.split("\n## ")[1:]}
    assert list(blocks) == ["Spam detection", "Image triage", "Fraud scoring", "Machine-failure prediction"]
    env = {**os.environ, **shell.json("testnet", "env", "--dir", str(shell.folder))}

    def said(task: str, more: str = "") -> list[str]:
        done = subprocess.run([sys.executable, "-c", blocks[task] + more], capture_output=True, text=True, timeout=SECONDS, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    hard = "We could not deliver your package, log in here to pay the customs charge"
    assert hard in page
    *judged, miss = said("Spam detection", f"print(spam_margins([{hard!r}])[0] < 0)")
    assert [line.split()[0] for line in judged] == 4 * ["spam"] + 4 * ["genuine"]
    assert miss == "True", "the page says that it passes as genuine"
    *_, triage = said("Image triage")
    sure, right, unsure, _ = map(int, re.findall(r"\d+", triage))
    assert sure + unsure == 100 and sure > 60 and right / sure > 0.97
    ordinary, strange, told = said("Fraud scoring")
    assert (ordinary.split()[0], strange.split()[0]) == ("paid", "held")
    for line in (told, said("Machine-failure prediction")[0]):
        found, planted, false, sound = map(int, re.findall(r"\d+", line))
        assert planted + sound == 2_000 and planted > 20
        assert found / planted > 0.9 and false / sound < 0.02


def test_gateway_keys_are_made_listed_and_revoked(shell: Shell) -> None:
    config = ("--config", str(shell.folder / "gateway.toml"))
    made = shell.json("gateway", "key", "create", "mine", "--per-day", "0.5", "--per-minute", "60", "--model", "tiny-llama", *config)
    assert (made["per_day"], made["total"], made["models"]) == (5 * 10**17, None, ["tiny-llama"])
    env = {**os.environ, **shell.json("testnet", "env", "--dir", str(shell.folder)), "OPENAI_API_KEY": made["key"]}
    program = "from openai import OpenAI\nprint([m.id for m in OpenAI(max_retries=0).models.list()])"

    def ask() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, env=env)

    assert ask().stdout == "['tiny-llama']\n"
    listed = shell.json("gateway", "key", "list", *config)
    assert [(key["name"], key["revoked_at"]) for key in listed] == [("testnet", 0), ("mine", 0)]
    assert listed[0]["spent"] > 0 == listed[1]["spent"]
    assert not [key for key in listed if "key" in key or "hash" in key]
    assert shell.json("gateway", "key", "revoke", "mine", *config)["revoked_at"] > 0
    assert "AuthenticationError" in ask().stderr
    assert shell.json("gateway", "key", "create", "mine", *config, code=3)["error"]["code"] == "config"
    assert shell.json("gateway", "status", *config)["running"] is True


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


def test_testnet_audit_of_running_roles_holds(shell: Shell) -> None:
    shell.json("run", "all-MiniLM-L6-v2", "a blue fox")
    document = shell.json("testnet", "audit", "--dir", str(shell.folder))
    assert document["holds"] is True
    assert document["read"] == {"schedulers": ["scheduler"], "providers": ["provider-1"], "clients": ["client", "gateway"], "left_out": {}}
    assert document["invariants"]["I6"]["figures"]["jobs"] > 0


@pytest.mark.parametrize(("role", "service"), [("scheduler", "gpumarket.v1.Market"), ("provider-1", "gpumarket.v1.Provider")])
async def test_roles_answer_standard_health_and_reflection(shell: Shell, role: str, service: str) -> None:
    ready = json.loads((shell.folder / role / "ready.json").read_text())
    async with await open_channel(ready["endpoint"], bytes.fromhex(ready["tls_key_hash"][2:])) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", service):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=SECONDS)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await stub.Check(health_pb2.HealthCheckRequest(service="gpumarket.v1.Nothing"), timeout=SECONDS)
        asking = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        call = asking(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=SECONDS)
        listed = {entry.name async for reply in call for entry in reply.list_services_response.service}
    assert listed == {service, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


@pytest.mark.parametrize("role", ["scheduler", "provider-1"])
def test_roles_show_their_metrics_without_prompts_and_are_ready(shell: Shell, role: str) -> None:
    status = shell.json(role.partition("-")[0], "status", "--state", str(shell.folder / role))
    with urllib.request.urlopen(f"{status['observe']}/readyz", timeout=SECONDS) as answer:  # anything but 200 raises
        assert json.loads(answer.read()) == {"ready": True, "reasons": []}
    with urllib.request.urlopen(f"{status['observe']}/metrics", timeout=SECONDS) as answer:
        text = answer.read().decode()
    assert f"{PREFIX}chain_trouble 0.0" in text
    assert not [secret for secret in ("fox", "hello", status["address"], status["address"][2:]) if secret in text]


def test_market_shows_offers_and_explains_a_match(shell: Shell) -> None:
    offers = shell.json("market", "ls", "tiny-llama")
    assert [offer["name"] for offer in offers] == ["tiny-llama"] and offers[0]["gpus"] == ["CPU"]
    assert offers[0]["proven_mflops"] > 0
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


def test_payment_key_apart_from_its_owner_buys_within_the_owners_deposit_and_the_days_cap(shell: Shell, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.touch(mode=0o600)
    secret.write_text("a password of its own\n")
    hot = shell.json("wallet", "create", "--key-file", str(tmp_path / "hot.json"), "--password-file", str(secret))
    text = Path(shell.config).read_text()
    keys = shell.folder / "keys"
    lines = [line for line in text.splitlines() if not line.startswith(("state", "key_file", "password_file"))]
    own = {"state": tmp_path / "state", "key_file": tmp_path / "hot.json", "password_file": secret, "deposit": "2"}
    own |= {"owner_key_file": keys / "client.json", "owner_password_file": keys / "client.password"}
    head = lines.index("[client]") + 1
    config = tmp_path / "client.toml"
    config.write_text("\n".join([*lines[:head], *(f'{name} = "{value}"' for name, value in own.items()), *lines[head:]]) + "\n")
    two = Shell(shell.folder, str(config))
    error = two.json("run", "all-MiniLM-L6-v2", "too early", code=5)["error"]
    assert error["code"] == "out_of_funds" and error["hint"].startswith("gpumarket wallet deposit 2")
    account = two.json("wallet", "deposit", "1")
    assert (account["address"], account["owner"]) == (hot["address"], hex0x(keystore.address_in(keys / "client.json")))
    assert account["deposit"] == 3 * 10**18
    job = two.json("run", "all-MiniLM-L6-v2", "a red fox")
    assert two.json("wallet", "limit", "0.000000000000000001")["day_left"] == 0
    error = two.json("run", "all-MiniLM-L6-v2", "a red fox " * 40, code=5)["error"]
    assert error["code"] == "spend_limit" and "gpumarket wallet limit" in error["hint"]
    two.json("receipt", "save", job["job"], str(tmp_path / "receipt.json"))
    proof = shell.json("receipt", "verify", str(tmp_path / "receipt.json"), "--address-book", str(shell.folder / "contracts.json"))
    assert proof["holds"] and proof["amount"] == job["cost"] and proof["client"] == hot["address"]
    assert two.json("wallet", "close-channel")["refunded"] == 3 * 10**18 - job["cost"]


def test_economics_reads_market_and_chain_and_says_what_is_not_promised(shell: Shell) -> None:
    found = shell.json("economics")
    assert {row["model"] for row in found["rows"]} == {"all-MiniLM-L6-v2", "tiny-llama", *TENSOR_MODELS}
    assert found["disputes"] and found["check_probability"] == 0.05 and found["not_promised"]
    assert {row["stake"] for row in found["rows"]} == {200 * 10**18}
    backed = {row["cheat"]: row for row in found["rows"] if row["stake_behind_job"]}
    assert {"another, smaller model", "random rows", "int4 weights sold as bf16"} <= backed.keys(), "gross cheats can be slashed"
    assert not any(row["pays"] for row in backed.values())
    assert all(row["pays"] for row in found["rows"] if row["cheat"].startswith("fp8")), "no panel slashes fp8: it is said to pay"
    tensors = [row for row in found["rows"] if row["model"] in TENSOR_MODELS]
    assert all(row["pays"] and not row["stake_behind_job"] for row in tensors), "no panel slashes for tensors: it is said to pay"
    assert found["check_probability_source"].startswith("p is your own setting")
    assert "Not promised" in shell.call("economics").stdout


def test_secrets_and_prompts_are_in_no_log_argument_or_environment_of_the_roles(shell: Shell) -> None:
    prompt = "canary zebra quilt 7731 xylophone"
    shell.json("run", "all-MiniLM-L6-v2", prompt)
    told = shell.call("run", "all-MiniLM-L6-v2", prompt, "-v", "--max-cost", "0.000000000000000001")
    assert told.returncode == 5
    with closing(sqlite3.connect(f"file:{shell.folder}/client/journal.db?mode=ro", uri=True)) as journal:
        requests = [row[0] for row in journal.execute("SELECT request FROM client_jobs ORDER BY created_at DESC LIMIT 2")]
    hunted = [prompt.encode(), *requests]  # as text, and as the tokens that are sent for it
    for file in sorted((shell.folder / "keys").glob("*.password")):
        key = keystore.load(file.with_suffix(".json"), keystore.read_password(file)).secret
        hunted += [file.read_bytes().strip(), key, key.hex().encode(), key.hex().upper().encode(), base64.b64encode(key)]
        hunted += [str(int.from_bytes(key, "big")).encode()]
    marks = json.loads((shell.folder / "processes.json").read_text())
    pids = [p.pid for mark in marks if psutil.pid_exists(mark["pid"]) for p in _family(mark["pid"])]
    places = {Path(f"/proc/{pid}/{what}") for pid in pids for what in ("cmdline", "environ")}
    places |= {file for file in shell.folder.rglob("*") if file.is_file() and file.parent.name != "keys" and "models" not in file.parts}
    journals = {file for file in places if file.name.startswith("journal.db")}
    own = {file for file in journals if file.parent == shell.folder / "client"}  # which resumes jobs from it
    places -= own
    found = [(str(place), index) for place in sorted(places) for index, secret in enumerate(hunted) if secret in place.read_bytes()]
    found += [("command line", index) for index, secret in enumerate(hunted) if secret in (told.stdout + told.stderr).encode()]
    reliability.record("F56", len(places) * len(hunted), f"{len(found)} hits", "0")
    reliability.record("I9", len(places) * len(hunted), f"{len(found)} hits", "0")
    assert found == []
    assert {str(file.relative_to(shell.folder).parent) for file in journals - own} == {"provider-1", "gateway/client"}
    assert requests and any(requests[0] in file.read_bytes() for file in own), "where it is kept, this hunt finds it"
    assert len(pids) >= 3 and len(places) > 12
    assert {mark["name"]: _leaves_no_core(mark["pid"]) for mark in marks if mark["name"] in ("scheduler", "provider-1")} == {
        "scheduler": True,
        "provider-1": True,
    }


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _leaves_no_core(pid: int) -> bool:
    return re.search(r"Max core file size\s+0\s", Path(f"/proc/{pid}/limits").read_text()) is not None


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


def test_errand_buys_both_kinds_of_work_and_closes_the_channel_at_the_cost(shell: Shell) -> None:
    done = shell.json("testnet", "errand")
    assert done["settled"] is True
    assert [job["model"] for job in done["jobs"]] == ["all-MiniLM-L6-v2", "tiny-llama"]
    assert float(done["paid"]) > 0 and done["text"]
    assert shell.json("wallet", "balance")["deposit"] == 0
