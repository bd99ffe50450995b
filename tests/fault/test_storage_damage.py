"""Databases that somebody or something damaged: refused with the reason and what to run, or right; never silently wrong (F10).

Each damage is done to the files of a role that was closed in good order, of one that was killed while its log held the newest commits,
and of one that was killed while it closed, when the log was in the file and its seal was not renewed.
A journal that opens all the same must still hold everything that was acknowledged, with books that add up.
"""

from __future__ import annotations

import importlib
import random
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from reliability import record
from vfs.disk import Ran, Victim, victim

from gpumarket.core.errors import JournalError

ROLES = ("provider", "scheduler", "client")
SEED = 90_125
LATE = 0.8
TRIES_MAX = 100
EARLIER = {"closed": -1}
"""Where to kill next when a process had closed already; else later."""


@dataclass
class Left:
    """What a process left behind: its folder, and what it had acknowledged."""

    role: str
    scenario: Any
    folder: Path
    ran: Ran

    def copy(self, name: str) -> Path:
        target = self.folder.with_name(f"{self.folder.name}-{name}")
        shutil.copytree(self.folder, target)
        return target

    async def consequence(self, folder: Path) -> str:
        """Either "refused" or "right". Raises for anything else: what was acknowledged is lost, or books that do not add up."""
        try:
            await self.scenario.verify(folder, self.ran.said)
        except JournalError as error:
            assert str(folder) in error.message or "damaged" in error.message, error.message
            assert error.hint, "a refusal says what to do"
            return "refused"
        return "right"


@pytest.fixture(scope="module", params=ROLES)
def role(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with victim(request.param, tmp_path_factory.mktemp(request.param)) as process:
        yield process


def left_by(role: Victim, how: str) -> Left:
    """A role's folder: "closed" in good order, "killed" late in its life, or "closing": killed when its log had just gone into the file."""
    scenario = importlib.import_module(f"journal_kill.{role.role}")
    folder, ran = role.run()
    site, steps = (int(LATE * ran.changes), {}) if how == "killed" else (ran.changes, EARLIER)
    for _ in range(TRIES_MAX if how != "closed" else 0):
        folder, ran = role.run("k", site)
        found = killed_in(folder / scenario.FILE)
        if ran.killed and found == how:
            break
        site += steps.get(found, 1)  # how many changes a life has wobbles
    assert ran.killed == (how != "closed") and (not ran.killed or found == how)
    return Left(role.role, scenario, folder, ran)


def killed_in(database: Path) -> str:
    """What a killed process was at, by what it left."""
    state = database.with_name(database.name + ".seal").read_bytes()[25:26]
    if state != b"O":
        return "closed" if state == b"C" else "half closed" if database.with_name(database.name + "-wal").exists() else "closing"
    # right after a checkpoint the log begins anew, and what stands in it nobody needs any more
    return "killed" if frames_committed(database) > 1 else "checkpointed"


def frames_committed(database: Path) -> int:
    """How many of the log's frames a reader needs, by the shared memory that the process left (sqlite.org/walformat.html, mxFrame)."""
    return int(struct.unpack_from("=I", database.with_name(database.name + "-shm").read_bytes(), 16)[0])


def flip(folder: Path, file: str, chance: random.Random) -> str:
    """Turn one bit of a database's files; says which."""
    files = sorted(f for f in folder.iterdir() if f.name.startswith(file) and f.stat().st_size)
    chosen = chance.choices(files, [f.stat().st_size for f in files])[0]
    data = bytearray(chosen.read_bytes())
    bit = chance.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    chosen.write_bytes(data)
    return f"{chosen.name}, bit {bit}"


async def flip_bits(left: Left, count: int, seed: int) -> dict[str, int]:
    """Consequences of `count` flipped bits, one at a time."""
    found = {"refused": 0, "right": 0}
    for number in range(count):
        folder = left.copy(str(number))
        where = flip(folder, left.scenario.FILE, random.Random(seed + number))
        try:
            found[await left.consequence(folder)] += 1
        except Exception as error:
            error.add_note(f"{left.role}, seed {seed + number}: {where}")
            raise
        shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("how", ["closed", "killed", "closing"])
async def test_flipped_bit_is_refused_or_harmless(role: Victim, how: str) -> None:
    print(f"seed {SEED}")
    found = await flip_bits(left_by(role, how), 5, SEED)
    assert found["refused"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("how", ["closed", "killed", "closing"])
async def test_flipped_bits_are_refused_or_harmless(role: Victim, how: str) -> None:
    print(f"seed {SEED}")
    found = await flip_bits(left_by(role, how), 500, SEED)
    assert found["refused"] > 100
    figure = f"{role.role}, {how}, one bit of its files flipped: silently wrong 0, refused {found['refused']}, harmless {found['right']}"
    record("F10", 500, figure, "silently wrong 0")
    told = f"{role.role}, {how}, one bit of its files flipped: {found['refused']} refusals, each with a reason and what to do"
    record("I10", found["refused"], told, "all")


def cut(file: Path, size: int) -> None:
    with file.open("r+b") as handle:
        handle.truncate(size)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut to half": lambda db: cut(db, db.stat().st_size // 2),
    "cut by one page": lambda db: cut(db, db.stat().st_size - 4096),
    "emptied": lambda db: cut(db, 0),
    "deleted": lambda db: db.unlink(),
    "a text": lambda db: db.write_bytes(b"hello" * 1_000),
    "zeros in the middle": lambda db: db.write_bytes(db.read_bytes()[:8192] + bytes(4096) + db.read_bytes()[12288:]),
    "its seal cut": lambda db: cut(db.with_name(db.name + ".seal"), 30),
}
LOG_DAMAGES: dict[str, Callable[[Path], object]] = {
    "log deleted": lambda db: db.with_name(db.name + "-wal").unlink(),
    "log emptied": lambda db: cut(db.with_name(db.name + "-wal"), 0),
    "log cut": lambda db: cut(db.with_name(db.name + "-wal"), 32 + (frames_committed(db) - 1) * (4096 + 24)),
    "log's header overwritten": lambda db: db.with_name(db.name + "-wal").write_bytes(
        bytes(32) + db.with_name(db.name + "-wal").read_bytes()[32:]
    ),
}


IN_THE_LOG = {("killed", name) for name in ("cut to half", "cut by one page", "zeros in the middle")}
"""Here the log of a killed process may hold every page that is missing: then nothing is lost."""


async def test_damaged_file_is_refused_and_left_as_it_is(role: Victim) -> None:
    injected = refused = 0
    for how, damages in (("closed", DAMAGES), ("closing", DAMAGES), ("killed", DAMAGES | LOG_DAMAGES)):
        left = left_by(role, how)
        for name, damage in damages.items():
            folder = left.copy(name.replace(" ", "-"))
            database = folder / left.scenario.FILE
            damage(database)
            before = database.read_bytes() if database.exists() else None
            found = await left.consequence(folder)
            assert found == "refused" or (how, name) in IN_THE_LOG, f"{how}, {name}"
            refused += found == "refused"
            injected += 1
            if found == "right":
                continue
            assert (database.read_bytes() if database.exists() else None) == before, f"{how}, {name}: the original was changed"
    figure = f"{role.role}, file or log cut, emptied, deleted, overwritten: refused {refused}, right {injected - refused}, silently wrong 0"
    record("F10", injected, figure, "silently wrong 0")
    record("I10", refused, f"{role.role}, file or log damaged: {refused} refusals, each with a reason and what to do", "all")


async def test_older_copy_of_the_file_is_refused(role: Victim, tmp_path: Path) -> None:
    scenario = importlib.import_module(f"journal_kill.{role.role}")
    folder, first = role.run()
    backup = tmp_path / "backup.db"
    shutil.copy2(folder / scenario.FILE, backup)
    await scenario.verify(folder, first.said)  # the role goes on trading
    shutil.copyfile(backup, folder / scenario.FILE)
    with pytest.raises(JournalError, match="older copy") as caught:
        await scenario.verify(folder, first.said)
    assert "doctor rescue" in caught.value.hint and ".seal" in caught.value.hint
    (folder / f"{scenario.FILE}.seal").unlink()
    await scenario.verify(folder, first.said)  # accepted by hand


async def test_files_are_for_their_owner_only(role: Victim) -> None:
    _, whole = role.run()
    folder, _ = role.run("k", whole.changes // 2)
    files = [f for f in folder.iterdir() if f.name.endswith(("-wal", "-shm", ".db", ".seal"))]
    assert len(files) == 4
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}
