"""The database server goes away under a busy scheduler, orderly and like a crash: what was acknowledged is there when it is back, and
nothing is signed twice. The scheduler ends with it, says so, and goes on from what is committed once somebody starts it again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from journal_kill import scheduler
from journal_kill.facts import Fact
from postgres_server import Server
from reliability import record

TESTS = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 120.0
FACTS = 40
"""Said before the server goes: several commits of every kind."""
SEED = 20_260_301


def facts_in(log: Path) -> list[Fact]:
    whole, _, _ = log.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def busy_until_the_server_goes(server: Server, url: str, life: int, log: Path, how: str, after: float) -> list[Fact]:
    """One life of the scheduler; what it said. Its process must end by itself."""
    command = [sys.executable, "-m", "postgres_scheduler", url, str(life)]
    with log.open("wb") as out, subprocess.Popen(command, cwd=TESTS, stdin=subprocess.PIPE, stdout=out) as process:
        try:
            until = time.monotonic() + PATIENCE_SECONDS
            while len(facts_in(log)) < FACTS:
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.01)
            time.sleep(after)
            server.restart(how)
            assert process.wait(PATIENCE_SECONDS) == 0
        finally:
            process.kill()
    *said, last = facts_in(log)
    assert last["kind"] == "ended" and "nothing more is signed or released" in last["why"] and "start again" in last["why"]
    return said


@pytest.mark.parametrize("lives", [2, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
async def test_server_restarted_under_a_busy_scheduler_loses_nothing_that_was_acknowledged(
    postgres: Server, tmp_path: Path, lives: int
) -> None:
    chance = random.Random(SEED)
    said: list[Fact] = []
    with postgres.database() as url:
        for life in range(lives):
            how = ("immediate", "fast")[life % 2]
            said += busy_until_the_server_goes(postgres, url, life, tmp_path / f"life-{life}", how, chance.uniform(0, 0.2))
            await scheduler.verify(url, said, turn=-1 - life)
    kinds = {fact["kind"] for fact in said}
    assert {"channels", "signed", "answered", "received", "reputation"} <= kinds
    figure = f"{len(said)} answers given, acknowledged-then-lost 0, double signatures 0, silent wrong balances 0"
    record("PostgreSQL restarted under load", lives, f"a busy scheduler, every other time as a crash: {figure}", "0 of each")
