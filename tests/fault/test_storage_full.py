"""A full disk and a disk that fails: nothing more is acknowledged, the reason names the file, and a restart goes on (F08, F09)."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator

import pytest
from reliability import record
from vfs.disk import Victim, victim

ROLES = ("provider", "scheduler", "client")
SEED = 4_004
SAMPLES = 6


@pytest.fixture(scope="module", params=ROLES)
def role(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with victim(request.param, tmp_path_factory.mktemp(request.param)) as process:
        yield process


async def fail_at(role: Victim, mode: str, sites: list[int]) -> int:
    """Runs whose disk fails from a site on, each looked into by a later process with a good disk; how many said so."""
    scenario = importlib.import_module(f"journal_kill.{role.role}")
    told = 0
    for site in sites:
        folder, ran = role.run(mode, site)
        assert not ran.killed
        if ran.failed:
            told += 1
            assert ran.failed.startswith("journal: "), ran.failed
            assert str(folder) in ran.failed, "the message names the file"
            assert ran.failed.rpartition("|")[2].strip(), "and what to do"
        try:
            await scenario.verify(folder, ran.said)
        except Exception as error:
            error.add_note(f"{role.role}, mode {mode} from change {site} on: {ran.failed}, files in {folder}")
            raise
    return told


@pytest.mark.parametrize("mode", ["s", "e"])
async def test_failing_disk_stops_the_role_and_a_restart_goes_on(role: Victim, mode: str) -> None:
    reached = min(role.run()[1].changes for _ in range(3))  # what is committed together varies, and with it how many changes a life has
    sites = random.Random(SEED).sample(range(1, int(0.8 * reached)), SAMPLES)
    print(f"seed {SEED}: {sites}")
    assert await fail_at(role, mode, sites) == SAMPLES
    what = "disk full" if mode == "s" else "fsync fails"
    record("I10", SAMPLES, f"{role.role}, {what}: stopped {SAMPLES} times with the file, the reason and what to do", "all")


async def test_full_disk_is_told_with_its_free_bytes(role: Victim) -> None:
    _, whole = role.run()
    _, ran = role.run("s", whole.changes // 2)
    assert "disk is full" in ran.failed
    assert "bytes are free" in ran.failed
    assert "start again" in ran.failed


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("mode", "row", "what"), [("s", "F08", "every write fails with ENOSPC"), ("e", "F09", "every sync fails with EIO")]
)
async def test_disk_failing_at_any_change_stops_the_role_and_a_restart_goes_on(role: Victim, mode: str, row: str, what: str) -> None:
    _, whole = role.run()
    told = await fail_at(role, mode, list(range(1, whole.changes + 1, 2)))
    figure = f"{role.role}, {what} from one change on: refused with file and reason {told}, acknowledged-then-lost 0, corrupt 0"
    record(row, len(range(1, whole.changes + 1, 2)), figure, "lost 0")
    record("I10", told, f"{role.role}, {what}: stopped {told} times with the file, the reason and what to do", "all")
