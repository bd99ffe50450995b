"""Asking a daemon to redeem: one that starts is waited for, one that is gone is not asked, what it answers is passed on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumarket.core.daemon import READY, write_json
from gpumarket.core.errors import Unreachable
from gpumarket.settlement.redeem_request import REDEEMED, ask_daemon

DAEMON = """
import json, os, signal, sys, time
from pathlib import Path
state, after, answer = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
def redeem(*_):
    (state / "redeemed.json.new").write_text(answer)
    (state / "redeemed.json.new").replace(state / "redeemed.json")
signal.signal(signal.SIGUSR1, redeem)
print("started", flush=True)
time.sleep(after)
(state / "ready.json.new").write_text(json.dumps({"pid": os.getpid()}))
(state / "ready.json.new").replace(state / "ready.json")
while True:
    time.sleep(0.05)
"""
ANSWER = {"redemptions": [{"amount": "1"}], "error": None}


class Daemons:
    """Processes that behave like a daemon that becomes ready after a while."""

    def __init__(self, state: Path) -> None:
        self.state, self.running = state, list[subprocess.Popen[str]]()

    def start(self, after: float, answer: object = ANSWER) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DAEMON, str(self.state), str(after), json.dumps(answer)]
        daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.running.append(daemon)
        assert daemon.stdout is not None and daemon.stdout.readline() == "started\n"
        return daemon


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    found = Daemons(tmp_path)
    yield found
    for daemon in found.running:
        daemon.kill()
        daemon.wait()
        assert daemon.stdout is not None
        daemon.stdout.close()


def test_daemon_that_is_still_starting_is_waited_for_and_asked(daemons: Daemons) -> None:
    daemons.start(after=0.5)
    assert ask_daemon(daemons.state, seconds=10) == ANSWER["redemptions"]


def test_ready_file_of_a_daemon_that_was_killed_does_not_end_the_wait(daemons: Daemons) -> None:
    gone = daemons.start(after=0)
    while not (daemons.state / READY).exists():
        time.sleep(0.02)
    gone.kill()
    gone.wait()
    daemons.start(after=0.5)
    assert ask_daemon(daemons.state, seconds=10) == ANSWER["redemptions"]


def test_answer_of_an_earlier_request_is_not_taken_for_this_one(daemons: Daemons) -> None:
    write_json(daemons.state / REDEEMED, {"redemptions": [{"amount": "old"}], "error": None})
    daemons.start(after=0.2)
    assert ask_daemon(daemons.state, seconds=10) == ANSWER["redemptions"]


def test_daemon_that_never_becomes_ready_is_unreachable_and_the_hint_leads_on(daemons: Daemons) -> None:
    daemons.start(after=60)
    with pytest.raises(Unreachable, match="was not ready within 0 s") as caught:
        ask_daemon(daemons.state, seconds=0.3)
    assert "log" in caught.value.hint and caught.value.retryable


def test_refusal_of_the_daemon_comes_back_with_its_hint(daemons: Daemons) -> None:
    daemons.start(after=0, answer={"redemptions": [], "error": {"message": "the chain is away", "hint": "start it"}})
    with pytest.raises(Unreachable, match="the chain is away") as caught:
        ask_daemon(daemons.state, seconds=10)
    assert caught.value.hint == "start it"
