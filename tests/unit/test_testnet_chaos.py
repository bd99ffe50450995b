"""The schedule of faults, the relay that breaks links, and what a chaos run makes of its own notes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumarket.core.settings import ChainSettings
from gpumarket.testnet import chaos_report
from gpumarket.testnet.audit import AuditReport, Sources
from gpumarket.testnet.audit_checks import Finding
from gpumarket.testnet.chaos_schedule import LENGTH_SECONDS, MARKET, QUIET_SECONDS, ROW_OF, SELLERS, Kind, schedule
from gpumarket.testnet.relay import Relay, State

PROVIDERS, CLIENTS = ("provider-1", "provider-2", "provider-3"), ("client", "client-2")


# --- schedule ------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64), st.floats(18.0, 3_600.0))
@settings(max_examples=50, deadline=None)
def test_schedule_of_the_same_seed_is_the_same_and_keeps_the_ends_quiet(seed: int, seconds: float) -> None:
    faults = schedule(seed, seconds, PROVIDERS, CLIENTS)
    assert faults == schedule(seed, seconds, PROVIDERS, CLIENTS)
    assert all(fault.at_seconds >= QUIET_SECONDS and fault.at_seconds + fault.seconds <= seconds - QUIET_SECONDS + 0.01 for fault in faults)
    assert list(faults) == sorted(faults, key=lambda fault: fault.at_seconds)


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_schedule_has_one_fault_at_a_time_in_each_lane_and_every_kind_in_ten_minutes(seed: int) -> None:
    faults = schedule(seed, 600.0, PROVIDERS, CLIENTS)
    for lane in (SELLERS, MARKET):
        ours = [fault for fault in faults if fault.kind in lane]
        assert {fault.kind for fault in ours} == set(lane)
        assert all(before.at_seconds + before.seconds < after.at_seconds for before, after in pairwise(ours))
        assert all(fault.target in PROVIDERS for fault in ours if fault.kind in (*SELLERS, Kind.P2P_KILLED))


def test_schedule_of_another_seed_is_another() -> None:
    assert schedule(1, 600.0, PROVIDERS, CLIENTS) != schedule(2, 600.0, PROVIDERS, CLIENTS)


def test_schedule_too_short_to_break_anything_is_refused() -> None:
    with pytest.raises(ValueError, match="too short"):
        schedule(1, 10.0, PROVIDERS, CLIENTS)


def test_schedule_knows_length_row_and_lane_of_every_kind() -> None:
    assert set(LENGTH_SECONDS) == set(ROW_OF) == set(Kind) == {*SELLERS, *MARKET}


# --- relay ---------------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def echo_behind_a_relay() -> AsyncIterator[Relay]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4_096):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    relay = Relay(lambda: server.sockets[0].getsockname())
    await relay.open()
    try:
        yield relay
    finally:
        await relay.close()
        server.close()


async def connect(relay: Relay) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = relay.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    return await reader.readexactly(len(data))


async def test_relay_that_is_open_passes_bytes_on_whole_and_in_order() -> None:
    async with echo_behind_a_relay() as relay:
        reader, writer = await connect(relay)
        data = bytes(range(256)) * 1_000
        assert await said(reader, writer, data) == data
        writer.close()


async def test_relay_that_is_cut_resets_what_is_open_and_what_comes_until_it_is_mended() -> None:
    async with echo_behind_a_relay() as relay:
        reader, writer = await connect(relay)
        assert await said(reader, writer, b"before") == b"before"
        await relay.set(State.CUT)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await said(reader, writer, b"after")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await said(*await connect(relay), b"meanwhile")
        await relay.set(State.OPEN)
        assert await said(*await connect(relay), b"again") == b"again"


async def test_relay_that_swallows_says_nothing_and_ends_those_connections_when_it_is_mended() -> None:
    async with echo_behind_a_relay() as relay:
        reader, writer = await connect(relay)
        assert await said(reader, writer, b"before") == b"before"
        await relay.set(State.SWALLOWING)
        writer.write(b"lost")
        waiting = asyncio.create_task(reader.read(4))
        new_reader, new_writer = await connect(relay)
        new_writer.write(b"lost too")
        newer = asyncio.create_task(new_reader.read(4))
        done, _ = await asyncio.wait({waiting, newer}, timeout=0.3)
        assert not done
        await relay.set(State.OPEN)
        for task in (waiting, newer):
            with suppress(ConnectionError):  # reset rather than closed: as good
                assert await task == b""
        assert await said(*await connect(relay), b"again") == b"again"


async def test_relay_that_is_slow_still_passes_everything_on() -> None:
    async with echo_behind_a_relay() as relay:
        await relay.set(State.SLOW)
        assert await said(*await connect(relay), b"slowly") == b"slowly"


async def test_relay_before_a_server_that_is_not_there_ends_the_connection() -> None:
    def nowhere() -> tuple[str, int]:
        raise ConnectionRefusedError

    relay = Relay(nowhere)
    await relay.open()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await said(*await connect(relay), b"hello")
    await relay.close()


# --- report --------------------------------------------------------------------------------------------------------------------


def audited(*, holds: bool = True, **figures: int) -> AuditReport:
    finding = Finding(() if holds else ("a job is open",), "seen", {"overpaid": 0, "lost": 0, **figures})
    return AuditReport(Sources(ChainSettings(), {}, {}, {}), 1, {"I6": finding}, 0.0)


def notes(folder: Path) -> None:
    """A job that went elsewhere, one that failed, a provider killed, and half a line of a client that was killed."""
    lost = [{"provider": "0x1", "outcome": "lost"}, {"provider": "0x2", "outcome": "completed"}]
    jobs = [
        {"at": 1.0, "event": "began"},
        {"at": 9.0, "event": "done", "seconds": 8.0, "attempts": lost},
        {"at": 16.0, "event": "done", "seconds": 1.0, "attempts": lost[1:]},
        {"at": 17.0, "event": "failed", "code": "busy"},
        {"at": 18.0, "event": "resumed", "attempts": lost[1:]},
    ]
    faults = [
        {"at": 2.0, "event": "began", "kind": "provider-killed"},
        {"at": 3.0, "event": "noticed", "kind": "provider-killed", "running": 3, "noticed_seconds": [0.5, 1.5], "reasons": ["lost"] * 2},
        {"at": 14.0, "event": "healed", "kind": "provider-killed"},
    ]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in jobs) + '{"at": 19.0, "ev')
    (folder / "faults.jsonl").write_text("".join(json.dumps(line) + "\n" for line in faults))


def test_report_counts_jobs_faults_failovers_and_how_soon_they_were_noticed(tmp_path: Path) -> None:
    notes(tmp_path)
    report = chaos_report.of_files(tmp_path, 7, 20.0, audited())
    assert report.jobs == {"done": 2, "failed: busy": 1, "resumed": 1}
    assert (report.faults, report.failovers) == ({"provider-killed": 1}, 1)
    document = report.as_json()
    assert document["detection_seconds"] == {"count": 2, "p50": 0.5, "p99": 1.5}
    assert document["running_by_kind"] == {"provider-killed": 3}
    assert document["reasons_by_kind"] == {"provider-killed": {"lost": 2}}
    assert document["recovery_by_kind"] == {"provider-killed": {"count": 1, "p50": 2.0, "p99": 2.0}}
    assert document["problems"] == []


@pytest.mark.parametrize(
    ("found", "said"),
    [(audited(holds=False), "I6 does not hold"), (audited(overpaid=3), "3 overpaid"), (audited(lost=1), "1 lost")],
)
def test_report_of_a_market_that_lost_something_says_what(found: AuditReport, said: str, tmp_path: Path) -> None:
    notes(tmp_path)
    assert any(said in problem for problem in chaos_report.of_files(tmp_path, 7, 20.0, found).problems())


def test_report_of_a_run_in_which_nothing_was_done_is_a_problem(tmp_path: Path) -> None:
    assert chaos_report.of_files(tmp_path, 7, 20.0, audited()).problems() == ["no job ended well"]


def test_percentile_is_one_of_the_values() -> None:
    assert chaos_report.percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert chaos_report.percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert chaos_report.percentile([], 50) is None
