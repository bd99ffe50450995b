"""The market between real hosts: containers that are killed, cut off, starved and restarted, and what everybody's books say afterwards.

In order, on one network. Every figure is recorded; none of them decides a test: what decides is that jobs end and that the auditor, who
reads chain and databases alone, finds I1 to I6 to hold.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from compose.containers import PROVIDERS, SCHEDULERS, Containers, engine_missing
from reliability import record

from gpumarket.scheduler.jobs import AttemptState
from gpumarket.testnet.plan import CHEATS, COPIED_OFFER
from gpumarket.testnet.provision import DATABASE_URL

WHY_NOT = engine_missing()
pytestmark = [
    pytest.mark.compose,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(WHY_NOT), reason=f"NO CONTAINER ENGINE, nothing of the composed network was tested: {WHY_NOT}"),
]
KEEP = "GPUMARKET_COMPOSE_KEEP"
"""Set while working on a test here: the network that is there is used, and stays."""
BAR = "audit I1-I6 holds"
CUT_SECONDS = 20.0
IDLE_SECONDS = 30.0
FIND = ("-name", "key.json", "-o", "-name", "*.password", "-o", "-name", "pgpass")


def told(row: str, injected: int, figure: str, bound: str = BAR) -> None:
    """A figure, for the page and for whoever watches."""
    record(row, injected, f"containers: {figure}", bound)
    print(f"\n    {row}: {figure}", flush=True)


@pytest.fixture(scope="module")
def net() -> Iterator[Containers]:
    net, keep = Containers(), KEEP in os.environ
    if not keep:
        net.down("-v")
    told("images", 1, f"all built in {net.build():.0f} s with the layers that were there", "")
    try:
        yield net
    finally:
        if not keep:
            net.down("-v")


@pytest.fixture(scope="module")
def addresses(net: Containers) -> dict[str, str]:
    return {name: net.wallet(name) for name in PROVIDERS}


def test_network_comes_up_and_the_demo_job_is_settled(net: Containers) -> None:
    started = time.monotonic()
    up = net.up()
    assert len(errand(net)["jobs"]) == 2
    told("containers up", 1, f"up in {up:.0f} s, demo job settled {time.monotonic() - started:.0f} s after `up`", "120 s on 2 cores")


def test_network_that_is_idle_uses_little(net: Containers) -> None:
    before = net.cpu_seconds()
    time.sleep(IDLE_SECONDS)
    used = {name: (after - before[name]) / IDLE_SECONDS for name, after in net.cpu_seconds().items()}
    assert all(share >= 0 for share in used.values())
    parts = ", ".join(f"{name} {share:.1%}" for name, share in used.items())
    told("idle CPU", 1, f"{sum(used.values()):.1%} of one core ({parts})", "15 % of one core")


def test_nothing_secret_is_in_a_log_or_an_image(net: Containers) -> None:
    password = net.compose("exec", "-T", "scheduler", "cat", "/var/lib/gpumarket/keys/key.password").strip()
    pgpass = net.compose("exec", "-T", "scheduler", "cat", "/var/lib/gpumarket/pgpass").strip().rpartition(":")[2]
    assert len(password) > 20 and len(pgpass) > 20
    logs = "".join(net.logs(name) for name in ("scheduler", "database", "chain", "provision", *PROVIDERS))
    inspected = net.docker("inspect", *(net.id(name) for name in ("scheduler", "database", "provision", *PROVIDERS)))
    assert not any(secret in logs + inspected for secret in (password, pgpass))
    for image in ("client", "scheduler", "provider"):
        found = net.docker("run", "--rm", "--user", "0", "--entrypoint", "find", f"gpumarket-{image}", "/", "-xdev", *FIND)
        assert found.strip() == ""
    told("I9", 8, "no key or password in a log, an environment or an image", "0 found")


def test_every_role_shows_its_metrics_to_the_network(net: Containers) -> None:
    script = "import urllib.request as u; print(u.urlopen('http://{}:9100/metrics', timeout=10).read().decode())"
    told_by = {name: net.compose("exec", "-T", "provider-3", "python", "-c", script.format(name)) for name in ("scheduler", *PROVIDERS)}
    for name, text in told_by.items():
        own = "gpumarket_leases_total" if name == "scheduler" else "gpumarket_canaries_total"
        assert own in text and "gpumarket_chain_lag_blocks" in text, (name, text[:500])


def test_role_runs_unprivileged_on_a_root_that_it_cannot_write(net: Containers) -> None:
    for name in ("scheduler", "chain", *PROVIDERS):
        status = net.compose("exec", "-T", name, "sh", "-c", "id -u; grep -E 'CapEff|NoNewPrivs' /proc/1/status; touch /etc/x 2>&1 || true")
        assert "10001" in status and "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status
        assert "Read-only file system" in status


def test_provider_killed_in_mid_stream_the_stream_goes_on_elsewhere(net: Containers, addresses: dict[str, str]) -> None:
    kills = 0
    with net.load() as load:
        while kills < 6 and not load.failovers():
            victim = serving(net, addresses)
            net.kill(victim)
            kills += 1
            load.until_done(2)
            net.start(victim)
        seen = len(load.failovers())
    assert seen
    told("F01", kills, load.came_through())


def test_provider_told_to_stop_finishes_what_it_has(net: Containers, addresses: dict[str, str]) -> None:
    with net.load() as load:
        victim = serving(net, addresses)
        started = time.monotonic()
        net.docker("stop", "-t", "40", net.id(victim))
        took = time.monotonic() - started
        assert net.docker("inspect", "--format", "{{.State.ExitCode}}", net.id(victim)).strip() == "0"
        load.until_done(2)
        net.start(victim)
    told("F14", 1, f"drained in {took:.1f} s, exit 0; {load.came_through()}", "0 dropped streams")


def test_scheduler_cut_off_from_providers_heals(net: Containers) -> None:
    with net.load() as load:
        with net.cut("scheduler", *PROVIDERS):
            time.sleep(CUT_SECONDS)
        healed = load.until_done(3)
    told("F18", 1, f"cut for {CUT_SECONDS:.0f} s, 3 jobs more {healed:.0f} s after it healed; {load.came_through()}", "0 paid twice")


def test_silent_provider_is_left_by_its_client(net: Containers, addresses: dict[str, str]) -> None:
    with net.load() as load:
        victim = serving(net, addresses)
        with net.cut(victim, "load", "scheduler"):
            found = load.until_done(4)
        load.until_done(2)
    told("F17", 1, f"{victim} fell silent in mid-job: 4 jobs more within {found:.0f} s; {load.came_through()}")


def test_provider_cut_off_from_the_chain_only_works_on_and_catches_up(net: Containers) -> None:
    with net.load() as load:
        with net.cut("provider-1", "chain"):
            load.until_done(4)
            time.sleep(CUT_SECONDS)
        took = net.until(lambda: net.healthy("provider-1"), "provider-1 to be healthy")
        load.until_done(2)
    told("F31", 1, f"provider-1 without a chain for more than {CUT_SECONDS:.0f} s, healthy {took:.0f} s after; {load.came_through()}")


def test_link_that_loses_packets_evicts_nobody(net: Containers) -> None:
    lossy = [f"{chain} -m statistic --mode random --probability 0.1 -j DROP" for chain in ("INPUT", "OUTPUT")]
    before = net.sql("select sum(rejections) from reputations")
    with net.load() as load, net.rules("scheduler", lossy):
        load.until_done(6)
    assert net.sql("select sum(rejections) from reputations") == before
    assert all(net.healthy(name) for name in PROVIDERS)
    told("F16", 1, f"10 % loss both ways at the scheduler; {load.came_through()}", "0 false evictions")


def test_chain_killed_and_back_loses_no_money(net: Containers) -> None:
    with net.load() as load:
        net.kill("chain")
        load.until_done(2)
        net.start("chain")
        load.until_done(2)
    net.until(lambda: all(net.healthy(name) for name in ("scheduler", *PROVIDERS)), "everybody to be healthy")
    told("F31", 1, f"chain SIGKILLed, jobs done without it; {load.came_through()}", "0 transactions lost")


def test_database_restarted_under_load_loses_nothing_acknowledged(net: Containers) -> None:
    with net.load() as load:
        net.docker("restart", "-t", "0", net.id("database"))
        took = net.until(lambda: net.healthy("database") and net.healthy("scheduler"), "the scheduler to be back")
        load.until_done(3)
    told(
        "F31",
        1,
        f"PostgreSQL killed and restarted, the scheduler healthy {took:.0f} s later; {load.came_through()}",
        "acknowledged and lost 0",
    )


def test_container_out_of_memory_is_killed_and_comes_back(net: Containers) -> None:
    victim = "provider-2"
    before = net.state(victim)["StartedAt"]
    with net.load() as load:
        fill = "while true; do dd if=/dev/zero bs=1M count=256 of=/tmp/fill.$((n=n+1)) 2>/dev/null || exit; done"
        net.docker("exec", "-d", net.id(victim), "sh", "-c", fill)
        took = net.until(lambda: net.state(victim)["StartedAt"] != before and net.healthy(victim), f"{victim} to be back")
        load.until_done(2)
    told("F13", 1, f"{victim} killed for memory, healthy again {took:.0f} s after its memory was filled; {load.came_through()}")


def test_engine_that_hangs_turns_its_provider_unhealthy(net: Containers) -> None:
    every = "for p in /proc/[0-9]*; do grep -q [e]ngine.worker $p/cmdline 2>/dev/null && kill -{} ${{p#/proc/}}; done; true"
    net.compose("exec", "-T", "provider-3", "sh", "-c", every.format("STOP"))
    try:
        refused = net.until(lambda: not ready(net, "provider-3"), "provider-3 to say that it cannot work")
        took = refused + net.until(lambda: not net.healthy("provider-3"), "provider-3 to be unhealthy")
    finally:
        net.compose("exec", "-T", "provider-3", "sh", "-c", every.format("CONT"))
    net.until(lambda: net.healthy("provider-3"), "provider-3 to be healthy")
    told("F60", 1, f"engines stopped: /readyz refuses after {refused:.0f} s, the container is unhealthy after {took:.0f} s", "not green")


def test_network_taken_down_and_up_keeps_all_money(net: Containers) -> None:
    before = net.audit()
    net.down()
    seconds = net.up()
    after = net.audit()
    assert money(before) == money(after)
    errand(net)
    told("down and up", 1, f"up again in {seconds:.0f} s, ledgers and escrow the same", "the same money")


def test_client_goes_on_with_the_second_scheduler(net: Containers) -> None:
    net.up("replicas")
    names = {f"0x{net.wallet(name)}": name for name in SCHEDULERS}
    first = errand(net)["scheduler"]
    net.kill(names[first])
    second = errand(net)["scheduler"]
    assert second != first and second in names
    net.start(names[first])
    told("one of two schedulers dies", 1, f"{names[first]} killed, the next job bought and settled through {names[second]}", "jobs go on")


def test_every_cheater_is_caught_or_unpaid(net: Containers) -> None:
    net.up("cheaters")
    names = {kind: f"cheater-{kind}" for kind in CHEATS}
    script = "import json;print(json.load(open('/var/lib/gpumarket/keys/key.json'))['address'])"
    wallets = {
        kind: net.compose("--profile", "cheaters", "exec", "-T", name, "python", "-c", script).strip() for kind, name in names.items()
    }
    kinds = sorted(wallets, key=lambda kind: kind != "silence")  # first: its job stays open until its claim grace is over
    matched = [f"0x{wallets[kind]}" for kind in kinds if kind != COPIED_OFFER]
    met = json.loads(net.run("meet", *matched, seconds=900).splitlines()[-1])
    for kind, address in wallets.items():
        (paid,) = net.sql(f"select coalesce(sum(vouchered::numeric), 0) from spokes where encode(provider, 'hex') = '{address}'")
        assert paid == ["0"], (kind, paid)
        found = met.get(f"0x{address}", {"met": "refused", "how": "its offer is never listed"})
        assert found["met"] == "refused", (kind, found)
        told("I7", 1, f"cheater {kind}: {found['how']}; paid 0", "caught or unpaid")


def test_market_holds_every_invariant_at_the_end(net: Containers) -> None:
    report = net.audit(f"--scheduler-db={DATABASE_URL}scheduler_2")
    figures = {name: value for found in report["invariants"].values() for name, value in found["figures"].items()}
    assert figures["overpaid"] == 0
    for name, found in report["invariants"].items():
        told(name, 1, found["seen"])


def errand(net: Containers) -> dict[str, Any]:
    """The demo job, settled."""
    done: dict[str, Any] = json.loads(net.run("client", "testnet", "errand", "-o", "json"))
    assert done["settled"]
    return done


def ready(net: Containers, service: str) -> bool:
    """Whether /readyz says so, asked now."""
    return '"ready": true' in net.compose("exec", "-T", service, "python", "-I", "/usr/local/bin/healthy", "9100", check=False)


def serving(net: Containers, addresses: dict[str, str]) -> str:
    """A provider that has a job now."""
    by_address = {address: name for name, address in addresses.items()}
    found: list[str] = []

    def look() -> bool:
        rows = net.sql(f"select encode(provider, 'hex') from attempts where state = {AttemptState.OPEN.value}")
        found[:] = [by_address[row[0]] for row in rows if row[0] in by_address]
        return bool(found)

    net.until(look, "a provider with a job")
    return found[0]


def money(report: dict[str, object]) -> str:
    invariants = report["invariants"]
    assert isinstance(invariants, dict)
    return str(invariants["I1"]["seen"])
