"""`gpumarket guard`: take along what a key has signed, so that it never signs it twice from another machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumarket.cli import buyer, daemons, settings
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb
from gpumarket.core.errors import ConfigError
from gpumarket.core.units import hex0x

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from gpumarket.core.signing import LocalKey
    from gpumarket.settlement.guard_file import Guarded, Scope
    from gpumarket.settlement.journal import Journal

app = noun("What your payment key has signed: export it, import it.")


class Role(StrEnum):
    """Whose key: both sign vouchers; a provider signs none."""

    CLIENT = "client"
    SCHEDULER = "scheduler"


RoleOption = Annotated[Role, typer.Option(help="Whose key and journal.")]


@dataclass(frozen=True, slots=True)
class _Desk:
    """A role's key, what it signs for, and its journal while nothing else uses it."""

    key: LocalKey
    scope: Scope
    journal: Journal
    guarded: Callable[[Connection], Guarded]
    take_over: Callable[[Connection, Guarded], Any]


@verb(app, "export")
async def export(
    file: Annotated[Path, typer.Argument(help="New file.")], role: RoleOption = Role.CLIENT, config: ConfigOption = None
) -> None:
    """Write, per channel, the highest amount ever signed, and what the day's cap counts; signed by the key itself. Stop using the key here
    before it is used elsewhere."""
    from gpumarket.core import private_files
    from gpumarket.core.ports import SystemClock
    from gpumarket.settlement import guard_file

    async with _open(role, config) as desk:
        guarded = desk.journal.read(desk.guarded)
    text = guard_file.export(desk.scope, guarded, SystemClock().now(), desk.key)
    private_files.create(file, text.encode(), anywhere=True)
    current().emit({"key": hex0x(desk.scope.signer), "channels": len(guarded.channels), "file": str(file)})


@verb(app, "import")
async def import_(
    file: Annotated[Path, typer.Argument(help="A file of `gpumarket guard export`.")],
    role: RoleOption = Role.CLIENT,
    config: ConfigOption = None,
) -> None:
    """Raise this journal's guard to what the file says; nothing is ever lowered. Refuses another key, role, chain or contract."""
    from gpumarket.settlement import guard_file

    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", hint="gpumarket guard export FILE writes one") from error
    async with _open(role, config) as desk:
        guarded = guard_file.read(raw, desk.scope)
        done = await desk.journal.transact(lambda c: desk.take_over(c, guarded))
    current().emit({"key": hex0x(desk.scope.signer), "added": done.added, "raised": done.raised, "unchanged": done.unchanged})


@asynccontextmanager
async def _open(role: Role, config: Path | None) -> AsyncIterator[_Desk]:
    """A role's desk by the address book; asks no chain. Raises StateLocked while the role runs."""
    from gpumarket.contracts.deploy import AddressBook
    from gpumarket.core.units import parse_address
    from gpumarket.settlement.guard_file import Scope

    book = AddressBook.load(settings.chain(config).address_book)
    opened = _client(config) if role is Role.CLIENT else _scheduler(config)
    key, journal_of, guarded, take_over = opened
    scope = Scope(book.chain_id, parse_address(book.channels), key.address, str(role))
    async with journal_of() as journal:
        yield _Desk(key, scope, journal, guarded, take_over)


def _client(config: Path | None) -> tuple[LocalKey, Callable[[], Any], Callable[..., Guarded], Callable[..., Any]]:
    from gpumarket.core import keystore
    from gpumarket.core.ports import SystemClock
    from gpumarket.sdk import guarding
    from gpumarket.sdk.offline import journal_of
    from gpumarket.sdk.settings import ClientSettings

    client = settings.role(ClientSettings, config)
    key = keystore.unlock(client.key_file, client.password_file, buyer.asked_password(client.key_file, client.password_file))
    return key, lambda: journal_of(client), guarding.guarded, lambda c, theirs: guarding.take_over(c, theirs, SystemClock().now())


def _scheduler(config: Path | None) -> tuple[LocalKey, Callable[[], Any], Callable[..., Guarded], Callable[..., Any]]:
    from gpumarket.core import keystore
    from gpumarket.scheduler import guarding
    from gpumarket.scheduler.settings import SchedulerSettings

    scheduler = settings.role(SchedulerSettings, config)
    password = daemons.asked_password(scheduler.key_file, scheduler.password_file)
    key = keystore.unlock(scheduler.key_file, scheduler.password_file, password)
    return key, lambda: guarding.journal_of(scheduler), guarding.guarded, guarding.take_over
