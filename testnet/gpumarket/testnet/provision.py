"""Prepares a network whose roles run on hosts of their own, in containers for one: contracts, models, a wallet and settings for each role.

Run again, it keeps what there is and adds what is missing.

    NETWORK/            for all, to read        contracts.json  models.lock  models/
    ROLES/<role>/       for that role alone     keys/  state/  settings.toml

Invariant: a role's secrets are in its own folder and in no other; hosts find each other by the role's name. Never: a key or password in a
setting, an argument or the environment.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpumarket.core import keystore
from gpumarket.core.errors import ConfigError
from gpumarket.core.terms import ModelManifest
from gpumarket.core.units import Address, hex0x
from gpumarket.sdk.lock import LockedModel, write_entry
from gpumarket.testnet import chain as testnet_chain
from gpumarket.testnet import keys, settings_file
from gpumarket.testnet.assignments import Place, Site, is_scheduler, sections_of
from gpumarket.testnet.models import fill_store
from gpumarket.testnet.plan import CHEATS, CLIENT, SCHEDULER, Plan, ProviderPlan, cheater, honest

HOME = Path("/var/lib/gpumarket")
"""Where a role finds its folder, on its own host."""
NETWORK = Path("/network")
"""Where it finds what all share."""
SERVICE_PORT = 7000
P2P_PORT = 4001
OBSERVE_PORT = 9100
POLL_SECONDS = 2.0
"""Between two looks at the chain: most of what an idle daemon does."""
CHEATER_PREFIX = "cheater-"
DATABASE_URL = "postgresql+psycopg://gpumarket@database/"
"""With a database named like its scheduler. Without a password: libpq reads that from the file that PGPASSFILE names."""


@dataclass(frozen=True, slots=True)
class Provision:
    """What to prepare, and where the folders are mounted here."""

    network: Path
    roles: Path
    rpc_url: str
    names: tuple[str, ...]
    """scheduler, scheduler-2, …, client, provider-1, provider-2, …, cheater-<kind>."""
    database_password: Path | None = None
    """Where the ledger's server finds its password. None: the scheduler keeps its ledger in SQLite."""


def plan_of(names: Sequence[str]) -> Plan:
    """The plan that role names stand for. Raises ConfigError for a name that stands for nothing."""
    numbers = [name.removeprefix("provider-") for name in names if name.startswith("provider-")]
    kinds = [name.removeprefix(CHEATER_PREFIX) for name in names if name.startswith(CHEATER_PREFIX)]
    known = {CLIENT, *(f"provider-{n}" for n in numbers if n.isdecimal()), *(CHEATER_PREFIX + k for k in CHEATS)}
    if unknown := sorted(name for name in set(names) - known if not is_scheduler(name)):
        raise ConfigError(
            f"no role is called {', '.join(unknown)}",
            hint=f"scheduler, scheduler-2, …, client, provider-1, provider-2, …, {', '.join(CHEATER_PREFIX + kind for kind in CHEATS)}",
        )
    everybody = {plan.name: plan for plan in honest(max(map(int, numbers), default=0), text=2, warm=True)}
    providers: list[ProviderPlan] = [everybody[f"provider-{number}"] for number in numbers]
    sellers = (*providers, *(cheater(CHEATER_PREFIX + kind, kind) for kind in kinds))
    return Plan(sellers, client={"check_probability": 1.0}, chain={"poll_seconds": POLL_SECONDS})


async def provision(what: Provision, report: Callable[[str], None]) -> dict[str, Any]:
    """Do it; what was prepared, in words for people. Raises ConfigError, ChainError or TransactionFailed."""
    plan = plan_of(what.names)
    report("making wallets")
    addresses = {name: await asyncio.to_thread(_wallet, what.roles / name) for name in what.names}
    _database_secrets(what)
    report("deploying the contracts, filling the model store")
    models, book = await asyncio.gather(
        _models(what.network / "models", frozenset(m.name for p in plan.providers for m in p.models), report),
        testnet_chain.prepare(what.rpc_url, what.network / "contracts.json", list(addresses.values())),
    )
    _link(what, models)
    _write_settings(what, plan, models)
    return {
        "chain_id": book.chain_id,
        "contracts": {"token": book.token, "registry": book.registry, "channels": book.channels},
        "models": {name: hex0x(manifest.digest) for name, manifest in models.items()},
        "roles": {name: hex0x(address) for name, address in addresses.items()},
    }


async def _models(root: Path, names: frozenset[str], report: Callable[[str], None]) -> dict[str, ModelManifest]:
    """Manifests by name; models that the store has already are not made again."""
    from gpumarket.node.models.store import ModelStore

    store = ModelStore(root)
    there = {name: store.manifest(alias.digest) for name, alias in store.aliases().items() if name in names}
    missing = names - there.keys()
    return there | (await fill_store(root, missing, report) if missing else {})


def _wallet(folder: Path) -> Address:
    for part in (folder, folder / "keys", folder / "state"):
        part.mkdir(mode=0o700, exist_ok=True)
    if (folder / "keys" / "key.json").exists():
        return keystore.address_in(folder / "keys" / "key.json")
    key, _, _ = keys.wallet(folder / "keys", "key")
    return key.address


def _database_secrets(what: Provision) -> None:
    """One password for the ledger's server, made once: for the server in a folder of its own, for the scheduler as libpq reads it."""
    server = what.database_password
    if server is None:
        return
    if not server.exists():
        _write_new(server, secrets.token_urlsafe(24), 0o444)  # the server runs as another user; nobody else has the folder
    for pgpass in (what.roles / name / "pgpass" for name in what.names if is_scheduler(name)):
        if not pgpass.exists():
            _write_new(pgpass, f"database:5432:*:gpumarket:{server.read_text().strip()}", 0o600)


def _write_new(path: Path, line: str, mode: int) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        os.fchmod(file.fileno(), mode)
        file.write(line + "\n")
    draft.rename(path)


def _link(what: Provision, models: dict[str, ModelManifest]) -> None:
    """What providers and clients read of models: folders that an engine can load, since theirs is a store that they cannot write to."""
    from gpumarket.node.models.store import ModelStore

    store = ModelStore(what.network / "models")
    for name, manifest in models.items():
        store.materialise(manifest.digest)
        write_entry(what.network / "models.lock", LockedModel.of(name, manifest))


def _write_settings(what: Provision, plan: Plan, models: dict[str, ModelManifest]) -> None:
    meeting = what.network / "meeting_point"  # the scheduler's p2p address, for whoever is added later
    if SCHEDULER in what.names:
        peer = keys.peer_id(what.roles / SCHEDULER / "state" / keys.P2P_IDENTITY)
        meeting.write_text(f"/dns4/{SCHEDULER}/tcp/{P2P_PORT}/p2p/{peer}\n")
    site = Site(
        rpc_url=what.rpc_url,
        book=NETWORK / "contracts.json",
        store=NETWORK / "models",
        lock_file=NETWORK / "models.lock",
        meeting_point=meeting.read_text().strip(),
        places={name: _place(name, what) for name in (*what.names, CLIENT)},
    )
    sections = sections_of(plan, site, {name: manifest.digest for name, manifest in models.items()})
    for name in what.names:
        settings_file.write(what.roles / name / "settings.toml", sections[name])


def _place(name: str, what: Provision) -> Place:
    reached: dict[str, Any] = {}
    if name != CLIENT:
        reached = {
            "listen": f"0.0.0.0:{SERVICE_PORT}",
            "advertise": f"{name}:{SERVICE_PORT}",
            "p2p_listen": f"/ip4/0.0.0.0/tcp/{P2P_PORT}",
            "observe_listen": f"0.0.0.0:{OBSERVE_PORT}",
        }
    if is_scheduler(name) and what.database_password is not None:
        reached["database"] = DATABASE_URL + name.replace("-", "_")
    return Place(HOME / "state", HOME / "keys" / "key.json", HOME / "keys" / "key.password", reached)
