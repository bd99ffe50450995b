"""What one caller's questions may cost: rows walked are charged to its address, and come back with time."""

from __future__ import annotations

import pytest
from scheduler_world import HandClock

from gpumarket.core.errors import Busy
from gpumarket.scheduler.allowance import CALLERS_MAX, Allowance, caller_of
from gpumarket.scheduler.book import Book
from gpumarket.scheduler.score import Weights


class Callers:
    """An allowance of 100 rows a second and 1,000 at once, on a clock moved by hand."""

    def __init__(self) -> None:
        self.book, self.clock = Book(Weights()), HandClock(mono=0.0)
        self.allowance = Allowance(self.book, self.clock, rows_per_second=100, rows_at_once=1_000)

    def walk(self, caller: str, rows: int) -> None:
        before = self.allowance.meter
        self.book.walked += rows
        self.allowance.charge(caller, before)

    def wait_of(self, caller: str) -> float:
        try:
            self.allowance.require(caller)
        except Busy as error:
            return error.retry_after_seconds
        return 0.0


def test_allowance_is_used_up_by_one_caller_alone_and_comes_back() -> None:
    here = Callers()
    here.walk("a", 900)
    assert here.wait_of("a") == 0.0
    here.walk("a", 400)
    assert here.wait_of("a") == pytest.approx(3.0, abs=0.15)
    assert here.wait_of("b") == 0.0
    here.clock.mono = 2.0
    assert here.wait_of("a") == pytest.approx(1.0, abs=0.15)
    here.clock.mono = 3.0
    assert here.wait_of("a") == 0.0
    here.clock.mono = 1_000.0
    here.walk("a", 1_100)
    assert here.wait_of("a") == pytest.approx(1.0, abs=0.15), "what was not used is not saved beyond the burst"


def test_allowance_questions_that_walk_nothing_are_free() -> None:
    here = Callers()
    for _ in range(10_000):
        here.walk("a", 0)
    assert len(here.allowance) == 0
    assert here.wait_of("a") == 0.0


def test_allowance_walks_never_pass_the_rate_whatever_the_rhythm() -> None:
    here, walked = Callers(), 0
    for step in range(2_000):
        here.clock.mono += 0.1 * (step % 3)
        if not here.wait_of("a"):
            here.walk("a", 50)
            walked += 50
    seconds = here.clock.mono
    assert 100 * seconds <= walked <= 1_000 + 50 + 100 * seconds


def test_allowance_remembers_a_bounded_number_of_callers() -> None:
    here = Callers()
    for number in range(CALLERS_MAX + 100):
        here.walk(str(number), 2_000)
    assert len(here.allowance) == CALLERS_MAX
    assert here.wait_of("0") == 0.0
    assert here.wait_of(str(CALLERS_MAX)) == pytest.approx(10.0, abs=0.15)


@pytest.mark.parametrize(
    ("peer", "caller"),
    [
        ("ipv4:10.0.0.1:5000", "10.0.0.1"),
        ("ipv6:[2001:db8:1:2:aaaa::5]:5000", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2::7%5D:80", "2001:db8:1:2::/64"),
        ("ipv6:%5B::1%5D:80", "::/64"),
        ("ipv6:[fe80::1%25eth0]:80", "fe80::/64"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
        ("", ""),
    ],
)
def test_caller_is_the_address_without_its_port(peer: str, caller: str) -> None:
    assert caller_of(peer) == caller
