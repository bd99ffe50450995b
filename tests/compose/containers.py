"""The composed network as tests break it: a project of its own, thrown away before and after."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpumarket.testnet.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
FILES = ("docker-compose.yml", "docker/offline.yml", "tests/compose/load.yml")
PROJECT = "gpumarket-test"
SCHEDULERS = ("scheduler", "scheduler-2")
PROVIDERS = ("provider-1", "provider-2", "provider-3")
SETTLE_SECONDS = 240


def engine_missing() -> str:
    """Why nothing can be composed here; empty where it can."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            return f"`{' '.join(command)}` fails: {(done.stderr or done.stdout).strip()[-200:]}"
    return ""


class Containers:
    """The project's containers. Methods raise AssertionError with what the engine said."""

    def __init__(self) -> None:
        self.env = {**os.environ, "GPUMARKET_CHAIN_PORT": str(free_port())}

    def compose(self, *words: str, seconds: float = 600, check: bool = True, root: Path = ROOT) -> str:
        """`docker compose …` of the tree at `root`; what it printed."""
        files = [word for file in FILES for word in ("-f", str(root / file))]
        return self.docker("compose", "-p", PROJECT, "--project-directory", str(root), *files, *words, seconds=seconds, check=check)

    def docker(self, *words: str, seconds: float = 120, check: bool = True) -> str:
        done = subprocess.run(
            ["docker", *words], cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
        assert not check or done.returncode == 0, f"docker {' '.join(words[-6:])}: {(done.stderr + done.stdout)[-3000:]}"
        return done.stdout

    def build(self) -> float:
        """Build every image; seconds. Without the layers' work where nothing changed."""
        started = time.monotonic()
        self.compose("--profile", "*", "build", seconds=1800)
        return time.monotonic() - started

    def up(self, *profiles: str) -> float:
        """Bring up the network; seconds until every health check is green."""
        started = time.monotonic()
        self.compose(*(word for profile in profiles for word in ("--profile", profile)), "up", "-d", "--wait", seconds=900)
        return time.monotonic() - started

    def down(self, *more: str) -> None:
        self.compose("--profile", "*", "down", "-t", "20", "--remove-orphans", *more, seconds=600)

    def id(self, service: str) -> str:
        found = self.compose("--profile", "*", "ps", "-aq", service).split()
        assert found, f"{service} has no container"
        return found[0]

    def state(self, service: str) -> dict[str, Any]:
        """The engine's word on a container: Running, Health, OOMKilled, StartedAt."""
        found: dict[str, Any] = json.loads(self.docker("inspect", "--format", "{{json .State}}", self.id(service)))
        return found

    def address(self, service: str) -> str:
        """Its IP on the market's network."""
        networks = json.loads(self.docker("inspect", "--format", "{{json .NetworkSettings.Networks}}", self.id(service)))
        return str(networks[f"{PROJECT}_market"]["IPAddress"])

    def kill(self, service: str, signal: str = "KILL") -> None:
        self.docker("kill", "--signal", signal, self.id(service))

    def start(self, service: str) -> None:
        """Start a container again and wait until it is healthy."""
        self.docker("start", self.id(service))
        self.until(lambda: self.healthy(service), f"{service} to be healthy")

    def healthy(self, service: str) -> bool:
        state = self.state(service)
        return bool(state["Running"]) and state.get("Health", {}).get("Status") == "healthy"

    def run(self, service: str, *words: str, seconds: float = 300) -> str:
        """One command in a new container of a service, whose dependencies run already; what it printed."""
        return self.compose("run", "--rm", "-T", "--no-deps", service, *words, seconds=seconds)

    def logs(self, service: str) -> str:
        return self.docker("logs", self.id(service), check=False)

    def sql(self, query: str, database: str = "scheduler") -> list[list[str]]:
        """Rows of a query on the ledger, as text."""
        script = f'PGPASSWORD=$(cat "$POSTGRES_PASSWORD_FILE") psql -h 127.0.0.1 -U gpumarket -d {database} -Atc "$1"'
        return [row.split("|") for row in self.compose("exec", "-T", "database", "sh", "-c", script, "sh", query).splitlines()]

    def wallet(self, service: str) -> str:
        """Address of a role's wallet, 40 hex digits."""
        script = "import json; print(json.load(open('/var/lib/gpumarket/keys/key.json'))['address'])"
        said = self.compose("--profile", "*", "exec", "-T", service, "python", "-c", script)
        return said.strip().removeprefix("0x").lower()

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time of every container so far, by the kernel's account of its processes and of those that ended in it."""
        script = "cat /sys/fs/cgroup/cpuacct/cpuacct.usage 2>/dev/null || awk '/usage_usec/{print $2*1000}' /sys/fs/cgroup/cpu.stat"
        names = ("chain", "database", "scheduler", *PROVIDERS)
        return {name: int(self.compose("exec", "-T", name, "sh", "-c", script).split()[0]) / 1e9 for name in names}

    @contextmanager
    def cut(self, service: str, *others: str) -> Iterator[None]:
        """No packet between a container and others, as if a cable were pulled: nobody is told."""
        with self.rules(service, [rule for a in map(self.address, others) for rule in (f"INPUT -s {a} -j DROP", f"OUTPUT -d {a} -j DROP")]):
            yield

    @contextmanager
    def rules(self, service: str, rules: Sequence[str]) -> Iterator[None]:
        """Packet rules in a container's network namespace."""
        namespace = self.id(service)

        def change(what: str) -> None:
            script = " && ".join(f"iptables {what} {rule}" for rule in rules)
            confined = (
                "--rm",
                "--network",
                f"container:{namespace}",
                "--cap-drop",
                "ALL",
                "--cap-add",
                "NET_ADMIN",
                "--cap-add",
                "NET_RAW",
            )
            self.docker("run", *confined, "--entrypoint", "sh", "gpumarket-saboteur", "-c", script)

        change("-I")
        try:
            yield
        finally:
            change("-D")

    @contextmanager
    def load(self) -> Iterator[Load]:
        """The client as a steady load of mixed jobs, which brings everything to its end afterwards."""
        self.compose("--profile", "test", "up", "-d", "--no-deps", "--force-recreate", "load")
        load = Load(self)
        try:
            load.until_done(2)
            yield load
        finally:
            self.compose("--profile", "test", "stop", "-t", "170", "load", seconds=240)
            load.final = load.lines()
            self.compose("--profile", "test", "rm", "-f", "load")

    def until(self, condition: Callable[[], Any], what: str, seconds: float = SETTLE_SECONDS) -> float:
        """Wait for a condition; seconds it took."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < seconds, f"waited {seconds:.0f} s for {what}"
            time.sleep(0.5)
        return time.monotonic() - started

    def audit(self, *more: str) -> dict[str, Any]:
        """The independent checker's report. Raises AssertionError with it when an invariant does not hold."""
        report: dict[str, Any] = json.loads(self.run("audit", "-o", "json", f"--wait={SETTLE_SECONDS}", *more, seconds=600))
        assert report["holds"], json.dumps(report, indent=1)
        return report


class Load:
    """What the load says of itself, a JSON line an event."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers
        self.final: list[dict[str, Any]] = []

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._containers.logs("load").splitlines() if line.startswith("{")]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.final or self.lines() if line["event"] == event]

    def until_done(self, more: int) -> float:
        """Wait for so many more jobs to end well; seconds it took."""
        before = len(self.of("done"))
        return self._containers.until(lambda: len(self.of("done")) >= before + more, f"{more} more jobs")

    def failovers(self) -> list[dict[str, Any]]:
        """Jobs that ended well after an attempt that did not."""
        return [line for line in (*self.of("done"), *self.of("resumed")) if len(line.get("attempts", ())) > 1]

    def came_through(self) -> str:
        """A line for people. Raises AssertionError when a job did not end."""
        assert any(line["event"] == "ended" for line in self.final), self.final[-5:]
        failed = [line["code"] for line in self.of("failed")]
        return f"{len(self.of('done'))} jobs done, {len(self.failovers())} by another provider, {len(failed)} refused or taken up again"
