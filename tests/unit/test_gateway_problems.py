"""Every error of the market has an answer, in OpenAI's shape, that says nothing of the gateway's insides."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpumarket.core import errors
from gpumarket.core.errors import by_code
from gpumarket.gateway import problems
from gpumarket.gateway.problems import OWN_CODES, TABLE, Problem, codes, problem_of

SECRET = "/home/owner/key.json 0xdeadbeef"


def example(cls: type[errors.GpumarketError]) -> errors.GpumarketError:
    return cls("gateway", SECRET) if cls is errors.MissingExtra else cls(SECRET)


@pytest.mark.parametrize("cls", by_code().values(), ids=lambda cls: cls.__name__)
def test_every_error_is_told_with_a_status_and_a_code(cls: type[errors.GpumarketError]) -> None:
    problem = problem_of(example(cls))
    assert problem.status in (400, 404, 409, 500, 502, 503)
    assert set(problem.document["error"]) == {"message", "type", "param", "code"}
    assert problem.document["error"]["message"]
    assert ("retry-after" in problem.headers) == (problem.status == 503)


@pytest.mark.parametrize("cls", by_code().values(), ids=lambda cls: cls.__name__)
def test_error_that_speaks_to_the_owner_is_not_repeated_to_a_caller(cls: type[errors.GpumarketError]) -> None:
    to_the_caller = (errors.InvalidRequest, errors.OverMaxCost, errors.JobIdReused, errors.VerificationError, errors.MatchError)
    problem = problem_of(example(cls))
    repeated = SECRET in problem.message
    assert repeated <= issubclass(cls, to_the_caller)


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (errors.InvalidRequest("no", param="seed"), 400, "invalid_request", "invalid_request_error"),
        (errors.UnknownModel("x"), 404, "model_not_found", "invalid_request_error"),
        (errors.OverMaxCost("x"), 400, "over_max_cost", "invalid_request_error"),
        (errors.OutOfFunds("x"), 503, "out_of_funds", "server_error"),
        (errors.NoProvider("x"), 503, "no_provider", "server_error"),
        (errors.Busy("x", retry_after_seconds=7), 503, "busy", "server_error"),
        (errors.Unreachable("x"), 503, "unreachable", "server_error"),
        (errors.ResultRejected("x"), 502, "result_rejected", "server_error"),
        (errors.JobFailed("x"), 502, "job_failed", "server_error"),
        (errors.JournalError("x"), 500, "internal_error", "server_error"),
        (errors.ConfigError("x"), 500, "internal_error", "server_error"),
    ],
)
def test_error_has_the_status_of_whoever_can_mend_it(error: errors.GpumarketError, status: int, code: str, kind: str) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.code, problem.kind) == (status, code, kind)


def test_busy_market_tells_when_to_come_back() -> None:
    assert problem_of(errors.Busy("x", retry_after_seconds=6.2)).headers["retry-after"] == "7"


def test_exhausted_budget_is_not_tried_again_by_official_clients() -> None:
    problem = Problem(429, "insufficient_quota", "spent", again_seconds=60, retry=False)
    assert problem.headers == {"retry-after": "60", "x-should-retry": "false"}
    assert problem.kind == "insufficient_quota"


def test_codes_are_all_that_the_gateway_says() -> None:
    room = Path(problems.__file__).parent
    text = "".join(file.read_text("utf-8") for file in room.rglob("*.py") if file.name != "problems.py")
    said = set(re.findall(r'(?:Problem\(\d+, |code=)"(\w+)"', text))
    assert len(said) > 10
    assert said | OWN_CODES <= set(codes())
    assert len(codes()) <= 64


def test_table_covers_the_root_so_that_nothing_falls_through() -> None:
    class Fresh(errors.GpumarketError):
        pass

    assert errors.GpumarketError in TABLE
    assert problem_of(Fresh(SECRET)).status == 500
