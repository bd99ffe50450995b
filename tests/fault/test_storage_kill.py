"""SIGKILL at every change that a role makes to its database's files: nothing acknowledged is lost, nothing is signed twice (F06).

The roles' own code runs over real files; a process that never saw the first one then opens them, compares, and goes on trading. A kill
keeps the page cache: what a power failure does to unsynced writes is test_storage_power.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator

import pytest
from reliability import record
from vfs.disk import Victim, victim

ROLES = ("provider", "scheduler", "client", "migration")
SEED = 20_240_607
SAMPLES = 10


@pytest.fixture(scope="module", params=ROLES)
def dying(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with victim(request.param, tmp_path_factory.mktemp(request.param)) as process:
        yield process


async def sweep(dying: Victim, sites: list[int], changes: int) -> int:
    """Kill at each site, look into what is left; how many were killed in the middle of the work."""
    scenario = importlib.import_module(f"journal_kill.{dying.role}")
    kills = midway = 0
    for site in sites:
        folder, ran = dying.run("k", site)
        kills += ran.killed
        midway += ran.killed and bool(ran.said)
        try:
            await scenario.verify(folder, ran.said)
        except Exception as error:
            error.add_note(f"{dying.role}, killed at change {site} of {changes}, files in {folder}")
            raise
    assert kills >= len(sites) - 2 - len(sites) // 20, "the number of changes wobbles only by how submissions fall into commits"
    return midway


async def test_database_killed_at_sampled_changes_keeps_what_was_acknowledged(dying: Victim) -> None:
    _, whole = dying.run()
    assert whole.changes > 50 and not whole.failed
    chance = random.Random(SEED)
    print(f"seed {SEED}: {SAMPLES} of {whole.changes} changes")
    assert await sweep(dying, sorted(chance.sample(range(1, whole.changes + 1), SAMPLES)), whole.changes) > SAMPLES // 4


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_database_killed_at_every_change_keeps_what_was_acknowledged(dying: Victim) -> None:
    _, whole = dying.run()
    midway = await sweep(dying, list(range(1, whole.changes + 1)), whole.changes)
    assert midway > whole.changes // 4
    if dying.role == "migration":
        record("F12", whole.changes, "ledger of version 1, killed at every change while it is migrated: halfway 0, lost 0", "0 of each")
    figure = "corrupt 0, acknowledged-then-lost 0, double signatures 0, silent wrong balances 0"
    record("F06", whole.changes, f"{dying.role}, SIGKILL at every change of its database's files: {figure}", "0 of each")
