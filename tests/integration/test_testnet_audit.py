"""The auditor against the books that the demo left behind: as they are, and each falsified in one way that it must name."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from integration.conftest import DemoRun
from reliability import record

from gpumarket.cli.main import run
from gpumarket.core.errors import ConfigError, JournalError
from gpumarket.settlement.chain import connect
from gpumarket.testnet import audit, audit_checks
from gpumarket.testnet.audit import AuditReport, Sources
from gpumarket.testnet.evidence import Evidence

SCHEDULER, HONEST, CLIENT = "scheduler/ledger.db", "provider-?/journal.db", "client/journal.db"
OWED = "lease = (SELECT lease FROM attempts WHERE state = 3 AND amount > '0' LIMIT 1)"
"""An attempt that was paid."""
ANOTHERS = "SELECT receipt FROM attempts AS other WHERE other.provider <> attempts.provider AND other.receipt <> x'' LIMIT 1"
TOKEN = 10**18


def money(amount: int) -> str:
    """An amount as the databases keep it (settlement.journal.MoneyType)."""
    return f"'{amount:029d}'"


def more(column: str, by: int) -> str:
    """The column's amount and some more."""
    return f"printf('%029d', CAST({column} AS INTEGER) + {by})"


def bent(column: str) -> str:
    """A signed message with another byte near its end: in the signature."""
    return f"CAST(substr({column}, 1, length({column}) - 9) || x'00' || substr({column}, -8) AS BLOB)"


pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def sources(demo_run: DemoRun) -> Iterator[Sources]:
    """The demo's books, with its chain up again from a copy of its state."""
    with audit.chain_up(audit.of_folder(demo_run.folder), demo_run.folder) as found:
        yield found


class Copy:
    """A copy of everybody's databases."""

    def __init__(self, original: Sources, root: Path, folder: Path) -> None:
        self.folder = folder
        for file in root.glob("*/*.db*"):
            (folder / file.parent.name).mkdir(exist_ok=True)
            shutil.copy(file, folder / file.parent.name / file.name)
        schedulers = {name: f"sqlite:///{folder / name / 'ledger.db'}" for name in original.schedulers}
        providers = {name: folder / name for name in original.providers}
        clients = {name: folder / name for name in original.clients}
        self.sources = Sources(original.chain, schedulers, providers, clients, original.exposure)

    def falsify(self, pattern: str, statement: str) -> int:
        """Run SQL in every matching database; how many rows it changed."""
        changed = 0
        for file in sorted(self.folder.glob(pattern)):
            with closing(sqlite3.connect(file)) as connection, connection:
                changed += connection.execute(statement).rowcount
        return changed

    def audit(self) -> AuditReport:
        return asyncio.run(audit.audit(self.sources, wait_seconds=0))


@pytest.fixture
def copy(sources: Sources, demo_run: DemoRun, tmp_path: Path) -> Copy:
    return Copy(sources, demo_run.folder, tmp_path)


def test_audit_of_an_honest_run_holds_and_counts_what_the_demo_told(copy: Copy, demo_run: DemoRun) -> None:
    report = copy.audit()
    assert report.holds, report.as_json()
    assert report.figures["jobs"] == len(demo_run.report["jobs"])
    assert report.figures["overpaid"] == report.figures["lost"] == 0
    assert report.figures["paid_on_chain"] == sum(line["amount"] for line in demo_run.report["settlements"])
    record("I5", report.figures["attempts"], "attempts of the demo recomputed from signed statements: overpaid 0", "0")


SCHEDULERS_LIES = {
    # what the scheduler's ledger was made to say: the invariant that must break, the statement, words of the problem
    "a spoke credited twice": ("I5", f"UPDATE spokes SET vouchered = {more('vouchered', 9)} WHERE vouchered > '0'", "its attempts earned"),
    "an inflated amount": ("I5", f"UPDATE attempts SET amount = {more('amount', 7)} WHERE {OWED}", "acked units are worth"),
    "more units than were acked": ("I5", f"UPDATE attempts SET units = units + 1 WHERE {OWED}", "units acked"),
    "an ack that its client did not sign": ("I5", f"UPDATE attempts SET ack = {bent('ack')} WHERE {OWED}", "ack"),
    "a receipt of somebody else": ("I5", f"UPDATE attempts SET receipt = ({ANOTHERS}) WHERE {OWED}", "receipt"),
    "a lease changed after it was signed": ("I5", f"UPDATE attempts SET number = number + 1 WHERE {OWED}", "lease's number"),
    "a client charged too much": ("I1", f"UPDATE client_channels SET used = {more('used', 1)}", "its jobs add up to"),
    "money left open by no job": ("I1", f"UPDATE client_channels SET open = {money(5)}", "its jobs add up to"),
    "a spoke beyond its deposit": ("I1", f"UPDATE spokes SET vouchered = {money(99 * TOKEN)}", "the chain a deposit"),
    "a lease that is gone": ("I2", f"DELETE FROM attempts WHERE {OWED}", "in no scheduler's ledger"),
    "a guard lost by the scheduler": ("I3", "DELETE FROM voucher_guard", "guard is missing"),
    "a lower voucher in place of the last": ("I3", f"UPDATE client_channels SET voucher = {money(1)}", "do not rise"),
    "a client exposed beyond its limit": ("I4", f"UPDATE client_channels SET voucher = {more('used', 2 * TOKEN)}", "its limit is"),
    "money reserved for nothing": ("I4", f"UPDATE spokes SET reserved = {money(3)}", "is reserved on spoke"),
    "a job that never ended": ("I6", "UPDATE jobs SET state = 1 WHERE key = (SELECT key FROM jobs WHERE state = 4 LIMIT 1)", "is leased"),
    "an attempt that is still held": ("I6", f"UPDATE attempts SET state = 2 WHERE {OWED}", "is held"),
    "a job that is gone": ("I6", "DELETE FROM jobs WHERE state = 4", "no scheduler does"),
}
PROVIDERS_LIES = {
    "a deleted receipt": ("I2", "UPDATE attempts SET signed_receipt = NULL", "has no receipt of it"),
    "a voucher that its payer did not sign": ("I3", f"UPDATE vouchers SET signature = {bent('signature')}", "voucher"),
    "a claim that was never answered": ("I6", "UPDATE attempts SET state = 'due'", "is due"),
}
CLIENTS_LIES = {
    "another receipt than was shown": ("I2", f"UPDATE client_attempts SET receipt = {bent('receipt')}", "receipt"),
    "an ack never written down": ("I2", "UPDATE client_attempts SET ack = NULL", "its client wrote down 0"),
    "a guard lost by the client": ("I3", "DELETE FROM voucher_guard", "guard is missing"),
    "a guard set back": ("I3", f"UPDATE voucher_guard SET cumulative = {money(1)}", "the guard stands at 1"),
    "a job that its client still waits for": ("I6", "UPDATE client_jobs SET state = 'leased'", "is leased"),
}
CASES = [
    pytest.param(database, *lie, id=what.replace(" ", "-"))
    for database, lies in ((SCHEDULER, SCHEDULERS_LIES), (HONEST, PROVIDERS_LIES), (CLIENT, CLIENTS_LIES))
    for what, lie in lies.items()
]


@pytest.mark.parametrize(("database", "invariant", "statement", "words"), CASES)
def test_audit_of_falsified_books_names_what_is_wrong(database: str, invariant: str, statement: str, words: str, copy: Copy) -> None:
    assert copy.falsify(database, statement) > 0, "nothing was falsified"
    report = copy.audit()
    assert invariant in report.broken, report.as_json()
    assert any(words in problem for problem in report.findings[invariant].problems), report.findings[invariant].problems
    record(invariant, 1, "books falsified in one place: found by the auditor, by name", "found")


def test_audit_of_an_attempt_paid_in_two_rows_names_both(copy: Copy) -> None:
    copy.falsify(SCHEDULER, "DROP INDEX attempts_job")
    columns = "job, number, provider, signed_lease, offer, state, amount, units, complete, accepted"
    columns += ", hold_until, receipt, ack, outcome, reason"
    copied = f"INSERT INTO attempts SELECT x'{'77' * 32}', {columns} FROM attempts WHERE {OWED}"
    assert copy.falsify(SCHEDULER, copied) == 1
    problems = copy.audit().findings["I5"].problems
    assert any("is in the ledger 2 times" in problem for problem in problems), problems


def evidence_of(copy: Copy) -> Evidence:
    async def read() -> Evidence:
        chain = await connect(copy.sources.chain)
        try:
            return await audit.gather(copy.sources, chain)
        finally:
            await chain.close()

    return asyncio.run(read())


def test_audit_against_another_chain_than_the_books_are_of_names_what_differs(copy: Copy) -> None:
    evidence = evidence_of(copy)
    chain = evidence.chain
    swapped = {key: replace(channel, payer=channel.payee, payee=channel.payer) for key, channel in chain.channels.items()}
    bent = {key: replace(channel, claimed=channel.claimed + 1) for key, channel in chain.channels.items()}
    lies = [
        ("I1", {"escrow": chain.escrow - 1}, "it owes"),
        ("I1", {"channels": bent}, "its events add up to"),
        ("I2", {"channels": bent}, "journaled is"),
        ("I3", {"channels": {}}, "is not on the chain"),
        ("I5", {"channels": swapped}, "is not between its scheduler and its provider"),
        ("I5", {"channels": bent}, "was paid on spoke"),
    ]
    for invariant, changes, words in lies:
        finding = audit_checks.check(replace(evidence, chain=replace(chain, **changes)))[invariant]  # type: ignore[arg-type]
        assert any(words in problem for problem in finding.problems), (invariant, words, finding.problems)


def test_audit_leaves_a_marked_cheaters_books_out(copy: Copy, sources: Sources) -> None:
    assert sources.left_out == {"cheater": "a cheater (lower-precision)"}
    assert copy.falsify("cheater/journal.db", "UPDATE attempts SET signed_receipt = NULL, state = 'due'") > 0
    assert copy.audit().holds
    copy.sources = replace(copy.sources, providers={**copy.sources.providers, "cheater": copy.folder / "cheater"})
    assert copy.audit().broken == ["I2", "I6"]


def test_audit_of_a_folder_without_a_testnet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no testnet"):
        audit.of_folder(tmp_path)


def test_audit_of_a_ledger_that_is_not_there_is_refused(copy: Copy) -> None:
    copy.sources.schedulers["scheduler"] = "sqlite:////nowhere/ledger.db"  # type: ignore[index]
    with pytest.raises(JournalError, match="no journal"):
        copy.audit()


def test_audit_command_tells_every_invariant_and_its_exit_code(copy: Copy, demo_run: DemoRun) -> None:
    states = [word for name in copy.sources.providers for word in ("--provider-state", str(copy.folder / name))]
    chain = copy.sources.chain
    named = ["--rpc", chain.rpc_url, "--book", str(chain.address_book), "--client-state", str(copy.folder / "client"), *states]
    named += ["--scheduler-db", copy.sources.schedulers["scheduler"], "--wait", "0"]
    honest = cli(*named)
    assert honest.returncode == 0, honest.stderr
    document = json.loads(honest.stdout)
    assert document["holds"] is True
    assert {name: one["holds"] for name, one in document["invariants"].items()} == {f"I{n}": True for n in range(1, 7)}
    assert document["read"]["clients"] == [f"{copy.folder.name}/client"]
    assert copy.falsify(SCHEDULER, "UPDATE client_channels SET used = printf('%029d', 1)") > 0
    broken = cli(*named)
    assert broken.returncode == 8
    assert json.loads(broken.stdout)["invariants"]["I1"]["holds"] is False
    assert "I1 does not hold" in broken.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scheduler-db", "sqlite:////x/ledger.db"], "the chain is not named"),
        (["--rpc", "http://127.0.0.1:1", "--book", "b.json"], "no scheduler's"),
        (["--scheduler-db", "postgresql://market:secret@127.0.0.1/market"], "PGPASSFILE"),
        (["--dir", "/nowhere"], "no testnet"),
    ],
)
def test_audit_command_without_all_it_needs_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["testnet", "audit", "-o", "json", *words]) == 3
    out, err = capsys.readouterr()
    assert said in out
    assert "secret" not in out + err


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpumarket.cli.main", "testnet", "audit", "-o", "json", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
