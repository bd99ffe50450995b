"""Power failure at any moment: what the disk was not told to keep may be gone, torn or out of order (F07).

A role runs once over a traced disk; then, for moments of that trace, states that a power failure might leave are written out, and a process
that never saw the first one opens them, compares with what had been acknowledged by then, and goes on. The same sweep with `synchronous`
turned down must lose something, or it would prove nothing.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from reliability import record
from vfs.disk import Change, Disk, Victim, read_trace, victim

ROLES = ("provider", "scheduler", "client", "migration")
SEED = 7_311


@pytest.fixture(scope="module", params=ROLES)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with victim(request.param, tmp_path_factory.mktemp(request.param)) as process:
        yield process


def trace_of(traced: Victim, tmp_path: Path, synchronous: str) -> tuple[Path, list[Change]]:
    trace = tmp_path / f"{synchronous}.trace"
    source, ran = traced.run(synchronous=synchronous, trace=str(trace))
    assert not ran.failed and not ran.killed
    changes = read_trace(trace)
    assert sum(c.kind == "M" for c in changes) == len(ran.said)
    return source, changes


def require_choice(traced: Victim) -> None:
    if traced.role == "migration":
        pytest.skip("migrations run on SQLite's own setting, FULL: there is nothing to turn down")


async def lose_power(traced: Victim, tmp_path: Path, synchronous: str, *, moments: int, states: int) -> tuple[int, list[str]]:
    """(states looked into, what was wrong with them), over `moments` moments with `states` outcomes each."""
    scenario = importlib.import_module(f"journal_kill.{traced.role}")
    source, changes = trace_of(traced, tmp_path, synchronous)
    chance, disk, wrong, looked = random.Random(SEED), Disk(), list[str](), 0
    chosen = set(chance.sample(range(len(changes)), min(moments, len(changes))))
    for moment, change in enumerate(changes):
        disk.take(change)
        for state in range(states if moment in chosen else 0):
            target = tmp_path / f"{synchronous}-{moment}-{state}"
            target.mkdir(mode=0o700)
            disk.after_power_loss(chance, source, target)
            looked += 1
            try:
                await scenario.verify(target, disk.said)
            except Exception as error:
                wrong.append(f"{traced.role}, power lost after change {moment}, state {state}: {type(error).__name__}: {error}")
    return looked, wrong


async def test_database_after_power_loss_at_sampled_moments_keeps_what_was_acknowledged(traced: Victim, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    looked, wrong = await lose_power(traced, tmp_path, "FULL", moments=16, states=1)
    assert looked == 16 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("synchronous", ["NORMAL", "OFF"])
async def test_power_loss_with_fewer_syncs_loses_something(traced: Victim, tmp_path: Path, synchronous: str) -> None:
    require_choice(traced)
    print(f"seed {SEED}")
    _, wrong = await lose_power(traced, tmp_path, synchronous, moments=16, states=1)
    assert any("Lost" in one or "WrongBalance" in one or "JournalError" in one for one in wrong), "the sweep would notice nothing"


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_database_after_power_loss_at_any_moment_keeps_what_was_acknowledged(traced: Victim, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    looked, wrong = await lose_power(traced, tmp_path, "FULL", moments=10**6, states=2)
    assert looked > 100 and not wrong, "\n".join(wrong)
    figure = "corrupt 0, acknowledged-then-lost 0, double signatures 0, silent wrong balances 0"
    record("F07", looked, f"{traced.role}, states that a power failure may leave, unsynced writes dropped or torn: {figure}", "0 of each")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("synchronous", ["NORMAL", "OFF"])
async def test_power_loss_with_fewer_syncs_is_noticed_often(traced: Victim, tmp_path: Path, synchronous: str) -> None:
    require_choice(traced)
    looked, wrong = await lose_power(traced, tmp_path, synchronous, moments=10**6, states=1)
    assert wrong
    record("F07", looked, f"{traced.role}, the same with synchronous={synchronous}: {len(wrong)} broken", "> 0 broken")
