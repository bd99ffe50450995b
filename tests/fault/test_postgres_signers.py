"""Two processes on one database: whoever holds it signs, whoever has lost it cannot, and no amount is ever signed twice (I3)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from postgres_server import Server
from reliability import record
from sqlalchemy.engine import make_url

TESTS = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 60.0


class Signer:
    """One such process, and what it has said."""

    def __init__(self, url: str, mode: str, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "postgres_signer", url, mode]
        self.process = subprocess.Popen(command, cwd=TESTS, stdin=subprocess.PIPE, stdout=log.open("wb"))

    def said(self, event: str) -> list[dict[str, Any]]:
        whole, _, _ = self._log.read_text().rpartition("\n")
        return [fact for fact in map(json.loads, whole.splitlines()) if fact["event"] == event]

    def end(self) -> None:
        """Its input ends, and with it the process, also when the tests are killed."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(PATIENCE_SECONDS) == 0


@contextmanager
def two(url: str, mode: str, folder: Path) -> Iterator[list[Signer]]:
    signers = [Signer(url, mode, folder / f"signer-{n}") for n in range(2)]
    try:
        yield signers
        for signer in signers:
            signer.end()
    finally:
        for signer in signers:
            if signer.process.poll() is None:
                signer.process.kill()
                signer.process.wait()


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def wait_for_more(signers: list[Signer], event: str, count: int) -> None:
    """Until both together have said so `count` times more."""
    enough = sum(len(signer.said(event)) for signer in signers) + count
    wait_for(f"nobody says {event!r}", lambda: sum(len(signer.said(event)) for signer in signers) >= enough)


def end_holder(server: Server, name: str) -> bool:
    """End the session that holds a database. False when none does just now."""
    held = f"locktype = 'advisory' AND granted AND database = (SELECT oid FROM pg_database WHERE datname = '{name}')"
    holders = server.sql(f"SELECT pid FROM pg_locks WHERE {held}")
    assert len(holders) <= 1, "two sessions hold one database"
    return [server.sql(f"SELECT pg_terminate_backend({pid})") for (pid,) in holders] == [[(True,)]]


def amounts(signer: Signer) -> list[int]:
    return [fact["cumulative"] for fact in signer.said("signed")]


def require_one_message_each(signers: list[Signer], guarded: int) -> int:
    """No amount twice, none below an earlier one of the same process, none above the guard. Returns how many there are."""
    said = [amounts(signer) for signer in signers]
    assert all(own == sorted(set(own)) for own in said), "a process signed below itself"
    both = [amount for own in said for amount in own]
    assert len(both) == len(set(both)), "two processes signed for one amount"
    assert max(both) <= guarded
    return len(both)


def guarded(server: Server, name: str) -> int:
    ((amount,),) = server.sql("SELECT cumulative FROM voucher_guard", name)
    return int(str(amount))


@pytest.mark.parametrize("losses", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_two_processes_on_one_database_hand_it_on_and_sign_each_amount_once(postgres: Server, tmp_path: Path, losses: int) -> None:
    """The holder's session is ended again and again: the lock goes to whoever asks first."""
    with postgres.database() as url:
        name = str(make_url(url).database)
        with two(url, "lock", tmp_path) as signers:
            for _ in range(losses):
                wait_for_more(signers, "signed", 20)
                wait_for("nobody holds it", lambda: end_holder(postgres, name))
            wait_for_more(signers, "signed", 20)
        signed = require_one_message_each(signers, guarded(postgres, name))
        assert all(signer.said("locked") for signer in signers), "they never met"
    figure = f"two schedulers on one PostgreSQL database, the holder's session ended {losses} times: {signed} signed, twice 0, lower 0"
    record("F05", losses, figure, "double signatures 0")


def test_guard_alone_holds_where_two_processes_write_to_one_database(postgres: Server, tmp_path: Path) -> None:
    """Were the lock not to hold (a pooler that mixes sessions), the guard's row in the same transaction still lets one of them only."""
    with postgres.database() as url:
        name = str(make_url(url).database)
        with two(url, "no-lock", tmp_path) as signers:
            wait_for("they do not both sign", lambda: all(len(amounts(signer)) > 50 for signer in signers))
        signed = require_one_message_each(signers, guarded(postgres, name))
    record("F05", signed, "two processes write to one database without its lock: amounts signed twice 0, lower 0", "double signatures 0")
