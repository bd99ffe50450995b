"""Alembic migrations of the ledger. `upgrade(url)` brings a database of an older version to this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from sqlite3 import connect

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.exc import SQLAlchemyError

from gpumarket.core.errors import JournalError
from gpumarket.settlement.database import shown
from gpumarket.settlement.journal import MEND_SERVER, seal_of

FOLDER = Path(__file__).parent


def configuration(url: str) -> Config:
    """Alembic's configuration for a ledger at a SQLAlchemy URL; there is no ini file to lose."""
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Create or migrate the tables, all or nothing. Raises JournalError for a file that is not what its seal says and for a server that
    does not answer, StateLocked while another process works on a server's database."""
    try:
        with _sealed(url):
            command.upgrade(configuration(url), revision)
    except CommandError as error:
        raise JournalError(
            f"the ledger is of a version that this program does not know: {error}",
            hint="a newer gpumarket wrote it: install that one again (pip install -U gpumarket)",
        ) from error
    except SQLAlchemyError as error:
        if seal_of(url) is not None:
            raise
        raise JournalError(
            f"the ledger {shown(url)} cannot be opened: {getattr(error, 'orig', None) or error}", hint=MEND_SERVER
        ) from error


@contextmanager
def _sealed(url: str) -> Iterator[None]:
    """Whatever is done to a ledger's file here stays in its log until the seal has been told: a second connection holds it open."""
    seal = seal_of(url)
    if seal is None:
        yield
        return
    seal.examine()
    if not seal.file.exists():
        yield  # a new file, or one that is to be believed as it is
        return
    with closing(connect(seal.database)) as keeper:
        keeper.execute("SELECT count(*) FROM sqlite_master").fetchone()
        try:
            yield
        finally:
            seal.closing()
            keeper.close()
            seal.release()
            seal.close()
