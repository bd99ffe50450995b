"""`gpumarket testnet`: a whole market on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumarket.cli import testnet_audit, testnet_chaos, testnet_errand
from gpumarket.cli.output import current
from gpumarket.cli.verbs import noun, verb
from gpumarket.core.errors import ConfigError, GpumarketError

if TYPE_CHECKING:
    from gpumarket.testnet.network import Network

app = noun("A whole market on this machine.")
DirOption = Annotated[Path, typer.Option("--dir", help="The testnet's folder.")]
_CHEATS = (
    "And a provider that cheats so: lower-precision, cheaper-model, cut-prompt, inflated-count, forged-receipt, silence, copied-offer."
)
_DEFAULT = Path(".testnet")
_DETACH_SECONDS = 180.0


@verb(app, "up")
def up(
    folder: DirOption = _DEFAULT,
    providers: Annotated[int, typer.Option(min=1, max=16, help="Honest providers.")] = 3,
    cheater: Annotated[list[str] | None, typer.Option("--cheater", help=_CHEATS, metavar="KIND")] = None,
    gateway: Annotated[bool, typer.Option("--gateway/--no-gateway", help="An OpenAI endpoint on it, with a key for you.")] = True,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Come back when it is up; `gpumarket testnet down` ends it.")] = False,
) -> Any:
    """Start chain, contracts, scheduler, providers and gateway; runs until Ctrl-C, or in the background with --detach."""
    from gpumarket.testnet.plan import CHEATS

    if unknown := [kind for kind in cheater or [] if kind not in CHEATS]:
        raise ConfigError(f"there is no cheat {unknown[0]!r}", hint=f"one of {', '.join(CHEATS)}")
    if detach:
        return _detached(folder, providers, cheater or [], gateway)
    return _foreground(folder, providers, cheater or [], gateway)


@verb(app, "status")
def status(folder: DirOption = _DEFAULT) -> None:
    """What runs, where, and since when it does not."""
    from gpumarket.testnet.folder import Folder

    place = Folder.at(folder)
    document = place.describe()
    alive = {mark.pid: mark.alive() for mark in place.marks()}
    for role in document["roles"]:
        role["running"] = alive.get(role["pid"], False)
    current().emit(document, lambda _: _table(document, ("name", "role", "running", "pid", "address", "endpoint"), str(place.root)))


@verb(app, "env")
def env(folder: DirOption = _DEFAULT) -> None:
    """Lines to evaluate in a shell, so that the SDK, this command and OpenAI's clients use the testnet."""
    from gpumarket.core import private_files
    from gpumarket.testnet.folder import Folder

    document = Folder.at(folder).describe()
    variables = {"GPUMARKET_CONFIG": document["client"]["config"]}
    if (gateway := document.get("gateway")) is not None:
        variables["OPENAI_BASE_URL"] = gateway["base_url"]
        variables["OPENAI_API_KEY"] = private_files.read(Path(gateway["api_key_file"])).decode().strip()
    lines = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    current().emit(variables, lambda _: current().text(lines))  # as it is: a shell reads it, and a console would break long lines


@verb(app, "logs")
def logs(
    role: Annotated[str, typer.Argument(help="scheduler, provider-1, ..., or supervisor of one in the background.")],
    folder: DirOption = _DEFAULT,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they come.")] = False,
) -> None:
    """The last lines of a role's log."""
    from gpumarket.testnet.folder import Folder
    from gpumarket.testnet.processes import last_lines

    log = Folder.at(folder).log(role)
    found = last_lines(log, lines)
    if current().machine:
        current().emit({"role": role, "log": str(log), "lines": found})
        return
    current().text("".join(f"{line}\n" for line in found))
    with log.open() as file:
        file.seek(0, 2)
        while follow:
            current().text(file.read())
            time.sleep(0.2)


@verb(app, "provision")
async def provision(
    roles: Annotated[list[str], typer.Argument(metavar="ROLE...", help="scheduler, client, provider-1, ..., cheater-<kind>.")],
    rpc: Annotated[str, typer.Option("--rpc", help="The chain, an anvil.")],
    network: Annotated[Path, typer.Option("--network", help="Folder that all roles will read.")] = Path("/network"),
    folders: Annotated[Path, typer.Option("--roles", help="Folder of the roles' own folders.")] = Path("/roles"),
    database_password: Annotated[
        Path | None, typer.Option("--database-password", help="File to make for the ledgers' PostgreSQL; SQLite without.")
    ] = None,
) -> None:
    """Prepare a network of hosts or containers: contracts, models, wallets, money, settings. Safe to run again."""
    from gpumarket.testnet import provision as hosts

    what = hosts.Provision(network, folders, rpc, tuple(roles), database_password)
    done = await hosts.provision(what, current().progress)
    current().emit(done, lambda _: current().table([{"role": r, "address": a} for r, a in done["roles"].items()], title="Prepared"))


@verb(app, "down")
def down(folder: DirOption = _DEFAULT) -> None:
    """End a testnet: its supervisor, then whatever of it is left. Its folder stays and can come up again."""
    from gpumarket.testnet.folder import Folder
    from gpumarket.testnet.processes import end

    place = Folder.at(folder)
    marks = place.marks()
    ended = end([mark for mark in marks if mark.name == "supervisor"])
    ended += end([mark for mark in marks if mark.name != "supervisor"])
    if not ended:
        raise ConfigError(f"no testnet runs in {place.root}", hint="gpumarket testnet up")
    place.manifest.unlink(missing_ok=True)
    place.write_marks([])
    current().emit({"ended": ended})


verb(app, "audit")(testnet_audit.command)
verb(app, "chaos")(testnet_chaos.command)
verb(app, "errand")(testnet_errand.command)


async def _foreground(folder: Path, providers: int, cheats: list[str], gateway: bool) -> None:
    from gpumarket.testnet import plan
    from gpumarket.testnet.network import Network

    sellers = (*plan.honest(providers, tensors=True), *plan.cheaters(cheats))
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    network = Network(
        folder, plan.Plan(sellers, gateway={"listen": "127.0.0.1:0", "grpc_listen": "127.0.0.1:0"} if gateway else None), current().progress
    )
    started = asyncio.create_task(network.__aenter__())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({started, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            return
        await started
        current().emit(network.folder.describe(), lambda _: _welcome(network))
        await _watch(network, stop)
    finally:
        started.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # a failed start was raised above
            await started
        await network.down()


async def _watch(network: Network, stop: asyncio.Event) -> None:
    """Until told to stop. Raises when a role ends by itself."""
    while not stop.is_set():
        for name, role in network.processes.roles.items():
            if (code := role.process.poll()) is not None:
                raise GpumarketError(f"{name} ended by itself with exit code {code}", hint=f"its log is {role.log}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.5)


def _welcome(network: Network) -> None:
    document = network.folder.describe()
    _table(document, ("name", "address", "endpoint"), f"A market runs in {document['folder']}")
    where = "" if network.folder.root == _DEFAULT.resolve() else f" --dir {shlex.quote(str(network.folder.root))}"
    current().text(
        f'In another shell:\n  eval "$(gpumarket testnet env{where})"\n  gpumarket run tiny-llama "Say hello"\nCtrl-C ends it.\n'
    )


def _detached(folder: Path, providers: int, cheats: list[str], gateway: bool) -> None:
    from gpumarket.testnet.folder import Folder
    from gpumarket.testnet.processes import last_lines

    place = Folder.at(folder)
    place.create()
    place.logs.mkdir(exist_ok=True, mode=0o700)
    log = place.logs / "supervisor.log"
    argv = [sys.executable, "-m", "gpumarket.cli.main", "testnet", "up", "-v", "--dir", str(place.root), "--providers", str(providers)]
    argv += [word for kind in cheats for word in ("--cheater", kind)]
    argv += [] if gateway else ["--no-gateway"]
    with log.open("wb") as sink:
        supervisor = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True)
    deadline = time.monotonic() + _DETACH_SECONDS
    while not place.manifest.exists():
        if supervisor.poll() is not None or time.monotonic() > deadline:
            supervisor.terminate()
            raise GpumarketError("the testnet did not come up:\n" + "\n".join(last_lines(log)), hint=f"the whole log is {log}")
        time.sleep(0.1)
    document = place.describe()
    current().emit(document, lambda _: _table(document, ("name", "address", "endpoint", "pid"), f"A market runs in {place.root}"))


def _table(document: dict[str, Any], columns: tuple[str, ...], title: str) -> None:
    current().table([{key: role[key] for key in columns} for role in document["roles"]], title=title)
