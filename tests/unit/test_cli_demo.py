"""What `gpumarket demo` prints, and when it ends with exit code 8, from a report made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gpumarket.cli import main
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.testnet import demo
from gpumarket.testnet.chain_facts import Settlement
from gpumarket.testnet.demo_report import DemoReport, JobLine, ReceiptLine, Seconds, VerificationLine, WalletLine

Run = Callable[..., tuple[int, str, str]]
TOKEN = 10**18


def address(name: str) -> Address:
    return Address(keccak256(name.encode())[:20])


def a_hash(name: str) -> Hash:
    return Hash(keccak256(name.encode()))


HONEST, CHEAT, CLIENT, SCHEDULER = (address(name) for name in ("provider-1", "cheater", "client", "scheduler"))
JOBS = (
    JobLine(a_hash("1"), "embed", "mini", CHEAT, "rejected", Money(0), 1, "user", "4 considered; score 0.91"),
    JobLine(a_hash("2"), "embed", "mini", HONEST, "done", Money(TOKEN // 2), 2, "rerun"),
)
REPORT = DemoReport(
    jobs=JOBS,
    receipts=tuple(ReceiptLine(job.id, True) for job in JOBS),
    verifications=(
        VerificationLine(a_hash("1"), CHEAT, "rejected", "2 checks agree: off by 0.002"),
        VerificationLine(a_hash("2"), HONEST, "accepted", "equal"),
    ),
    settlements=(
        Settlement(CLIENT, SCHEDULER, Money(TOKEN // 2), a_hash("first tx"), 61_500),
        Settlement(SCHEDULER, HONEST, Money(TOKEN // 4), a_hash("second tx"), 38_500),
    ),
    cheater=CHEAT,
    caught=True,
    paid_to_cheater=Money(0),
    question="Of what is the lighthouse built?",
    answer=("The lighthouse was built of granite.", "A second passage."),
    text="zip zap",
    invariants={"I1": (True, "2 tokens in escrow"), "I2": (True, "3 receipts")},
    seconds=Seconds(20.5, 25.25, 55.75),
    wallets=(WalletLine("client", CLIENT, Money(100 * TOKEN), Money(99 * TOKEN + TOKEN // 2)),),
    gas=100_000,
    names={HONEST: "provider-1", CHEAT: "cheater", CLIENT: "client", SCHEDULER: "scheduler"},
)
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "invariant": ({"invariants": {"I1": (False, "short by 7")}}, "I1 does not hold: short by 7"),
    "receipt": ({"receipts": (ReceiptLine(a_hash("2"), False),)}, f"the receipt of job {hex0x(a_hash('2'))} does not verify"),
    "caught": ({"caught": False}, "the cheater was not caught"),
    "paid": ({"paid_to_cheater": Money(7)}, "the cheater was paid 7"),
    "not redone": ({"jobs": JOBS[:1]}, "was not done again elsewhere"),
    "redone by the cheater": ({"jobs": (JOBS[0], replace(JOBS[1], provider=CHEAT))}, "was not done again elsewhere"),
    "redone in vain": ({"jobs": (JOBS[0], replace(JOBS[1], state="failed"))}, "was not done again elsewhere"),
    "no answer": ({"answer": ()}, "there is no answer"),
    "no text": ({"text": ""}, "no text was generated"),
    "no settlement": ({"settlements": ()}, "nothing was settled"),
    "no receipt": ({"receipts": ()}, "no receipt was given"),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(report: DemoReport, *argv: str) -> tuple[int, str, str]:
        async def done(options: demo.DemoOptions, say: Callable[[str], None]) -> DemoReport:
            return report

        monkeypatch.setattr(demo, "run", done)
        code = main.run(["demo", *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_demo_prints_matches_receipts_verdicts_and_costs_of_every_job(run: Run) -> None:
    code, out, _ = run(REPORT)
    assert code == 0
    lines = out.splitlines()
    for job, verdict, cost in zip(JOBS, ("rejected", "accepted"), ("0", "0.5"), strict=True):
        (line,) = [line for line in lines if hex0x(job.id)[:10] in line and f" {job.purpose} " in line]
        assert line.split()[-3:] == [cost, "valid", verdict]
    assert "4 considered; score 0.91" in out
    assert "2 checks agree: off by 0.002" in out
    assert "The lighthouse was built of granite." in out and "Of what is the lighthouse built?" in out and "zip zap" in out


def test_demo_prints_transactions_gas_gas_per_job_and_balances_before_and_after(run: Run) -> None:
    _, out, _ = run(REPORT)
    assert "Settlements: 100000 gas for 2 jobs, 50,000 each" in out
    lines = out.splitlines()
    for settlement, payer, payee, amount in zip(
        REPORT.settlements, ("client", "scheduler"), ("scheduler", "provider-1"), ("0.5", "0.25"), strict=True
    ):
        (line,) = [line for line in lines if hex0x(settlement.tx) in line]
        assert line.split() == [payer, payee, amount, hex0x(settlement.tx), str(settlement.gas)]
    (wallet,) = [line for line in lines if hex0x(CLIENT) in line]
    assert wallet.split() == ["client", hex0x(CLIENT), "100", "99.5"]
    assert "up after 20.5 s, first result after 25.2 s, all settled after 55.8 s" in out


def test_demo_gas_per_job_counts_checks_and_survives_no_job() -> None:
    assert REPORT.gas_per_job == 50_000
    assert replace(REPORT, jobs=()).gas_per_job == 100_000


def test_demo_receipt_that_does_not_verify_is_marked_in_the_table(run: Run) -> None:
    assert "INVALID" in run(replace(REPORT, receipts=(ReceiptLine(a_hash("1"), False),)))[1]


@pytest.mark.parametrize(("changes", "told"), BROKEN.values(), ids=list(BROKEN))
def test_demo_that_does_not_hold_shows_all_and_ends_with_exit_code_8(run: Run, changes: dict[str, Any], told: str) -> None:
    report = replace(REPORT, **changes)
    assert any(told in problem for problem in report.problems())
    code, out, err = run(report)
    assert code == 8
    assert "Wallets" in out
    assert "the demo does not hold" in err and told in err and "--keep" in err


def test_demo_that_does_not_hold_keeps_stdout_one_document_in_json(run: Run) -> None:
    report = replace(REPORT, caught=False)
    code, out, err = run(report, "-o", "json")
    assert code == 8
    assert json.loads(out) == report.as_json()
    assert "the cheater was not caught" in err


def test_demo_that_holds_has_no_problems_and_says_nothing_on_stderr(run: Run) -> None:
    assert REPORT.problems() == []
    assert run(REPORT, "-o", "json") == (0, json.dumps(REPORT.as_json(), indent=2, ensure_ascii=False) + "\n", "")
