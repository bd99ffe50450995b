"""The independent auditor: I1 to I6 of a whole market, from the chain and the databases alone. It asks no daemon, and writes nothing.

It reads until what it sees is settled and sound, or its time is over: a market that still works has claims on their way, and books that are
read one after the other differ by what happened meanwhile. What is wrong in the rows stays wrong, however often they are read.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumarket.core.errors import ConfigError, Unreachable
from gpumarket.core.settings import ChainSettings, load
from gpumarket.node.settings import ProviderSettings
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.sdk.settings import ClientSettings
from gpumarket.settlement.chain import Chain, connect
from gpumarket.testnet import audit_checks, chain_facts, ledgers
from gpumarket.testnet.anvil import Anvil
from gpumarket.testnet.audit_checks import Finding
from gpumarket.testnet.evidence import Evidence
from gpumarket.testnet.folder import Folder

WAIT_SECONDS = 180.0
"""Until everything is settled: a minute of check time, a job's deadline and the claim grace, as a testnet has them."""
CHEAT_MARK = "cheat"
"""File in the state folder of a dishonest provider: its own books are no evidence."""
PROBLEMS_SHOWN = 50
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the books lie, each by the name of whose they are. `exposure` is W of a client, in base units."""

    chain: ChainSettings
    schedulers: Mapping[str, str]
    """Name → SQLAlchemy URL of the ledger."""
    providers: Mapping[str, Path]
    clients: Mapping[str, Path]
    exposure: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Name → why its books are not read."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What was found. `waited_seconds`: until it was settled, or given up."""

    sources: Sources
    block: int
    findings: Mapping[str, Finding]
    waited_seconds: float

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings.values())

    @property
    def broken(self) -> list[str]:
        """The invariants that do not hold."""
        return [name for name, finding in self.findings.items() if not finding.holds]

    @property
    def figures(self) -> dict[str, int]:
        """All figures together; amounts in base units."""
        return {name: value for finding in self.findings.values() for name, value in finding.figures.items()}

    def as_json(self) -> dict[str, Any]:
        """The documented document."""
        return {
            "holds": self.holds,
            "block": self.block,
            "waited_seconds": round(self.waited_seconds, 1),
            "read": {
                "schedulers": sorted(self.sources.schedulers),
                "providers": sorted(self.sources.providers),
                "clients": sorted(self.sources.clients),
                "left_out": dict(self.sources.left_out),
            },
            "invariants": {
                name: {
                    "holds": finding.holds,
                    "seen": finding.seen,
                    "problems": list(finding.problems[:PROBLEMS_SHOWN]),
                    "problem_count": len(finding.problems),
                    "figures": dict(finding.figures),
                }
                for name, finding in self.findings.items()
            },
        }


async def audit(sources: Sources, *, wait_seconds: float = WAIT_SECONDS, say: Callable[[str], None] = lambda _: None) -> AuditReport:
    """Read and check until it holds or `wait_seconds` are over. Raises JournalError, ChainError or ConfigError for what cannot be read."""
    chain = await connect(sources.chain)
    started, said = time.monotonic(), ""
    try:
        while True:
            evidence = await gather(sources, chain)
            findings = await asyncio.to_thread(audit_checks.check, evidence)
            report = AuditReport(sources, evidence.chain.block, findings, time.monotonic() - started)
            if report.holds or report.waited_seconds >= wait_seconds:
                return report
            waits_for = f"waiting until {', '.join(report.broken)} hold: {findings[report.broken[-1]].problems[0]}"
            if waits_for != said:
                say(waits_for)
                said = waits_for
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        await chain.close()


async def gather(sources: Sources, chain: Chain) -> Evidence:
    """Read everything once. Those who hold another's statement are read before the other, who has written it down earlier."""
    facts = await chain_facts.read_facts(chain)
    schedulers = {name: await asyncio.to_thread(ledgers.scheduler_books_at, url) for name, url in sources.schedulers.items()}
    providers = {name: await asyncio.to_thread(ledgers.provider_books, state) for name, state in sources.providers.items()}
    clients = {name: await asyncio.to_thread(ledgers.client_books, state) for name, state in sources.clients.items()}
    return Evidence(chain.market_domain, chain.channels_domain, facts, schedulers, providers, clients, sources.exposure)


def of_folder(root: Path) -> Sources:
    """The sources of a testnet's folder, by the settings files in it. Raises ConfigError where there is no testnet."""
    files = {file.stem: file for file in sorted(Folder.at(root).root.glob("*.toml"))}
    roles = {name: _section(file) for name, file in files.items()}
    if "scheduler" not in roles.values():
        raise ConfigError(f"there is no testnet in {root}", hint="give its folder with --dir, or name the books one by one")
    schedulers = {n: load(SchedulerSettings, file=files[n], env={}).database_url for n, role in roles.items() if role == "scheduler"}
    providers = {n: load(ProviderSettings, file=files[n], env={}).state for n, role in roles.items() if role == "provider"}
    clients = {n: load(ClientSettings, file=files[n], env={}) for n, role in roles.items() if role == "client"}
    chain = load(ChainSettings, file=files[next(n for n, role in roles.items() if role == "scheduler")], env={})
    exposure = {n: int(settings.exposure_limit) for n, settings in clients.items()}
    return readable(Sources(chain, schedulers, providers, {n: settings.state for n, settings in clients.items()}, exposure))


def readable(sources: Sources) -> Sources:
    """Without the books of whoever never began one, and of marked cheaters, who may write into theirs what they like."""
    why: dict[str, str] = {}
    for name, state in (*sources.providers.items(), *sources.clients.items()):
        if (state / CHEAT_MARK).is_file():
            why[name] = f"a cheater ({(state / CHEAT_MARK).read_text().strip()})"
        elif not (state / ledgers.JOURNAL).is_file():
            why[name] = "has no journal"
    providers = {name: state for name, state in sources.providers.items() if name not in why}
    clients = {name: state for name, state in sources.clients.items() if name not in why}
    return Sources(sources.chain, sources.schedulers, providers, clients, sources.exposure, {**sources.left_out, **why})


@contextmanager
def chain_up(sources: Sources, root: Path) -> Iterator[Sources]:
    """The sources with a chain that answers: the testnet's own, or, while that is down, one from a copy of its state."""
    try:
        asyncio.run(_answers(sources.chain))
    except Unreachable:
        state = Folder.at(root).chain_state
        if not state.is_file():
            raise
    else:
        yield sources
        return
    with tempfile.TemporaryDirectory(prefix="gpumarket-audit-") as folder:
        copy = Path(shutil.copy(state, folder))
        with Anvil.start(state=copy) as anvil:
            settings = sources.chain.model_copy(update={"rpc_url": anvil.url})
            yield Sources(settings, sources.schedulers, sources.providers, sources.clients, sources.exposure, sources.left_out)


async def _answers(settings: ChainSettings) -> None:
    await (await connect(settings)).close()


def _section(file: Path) -> str:
    """Which role a settings file is of: its first table that is not the chain's."""
    document = tomllib.loads(file.read_text())
    return next((name for name in document if name != "chain"), "")
