"""Alembic migrations of the ledger. `upgrade(url)` brings a database of an older version to this one."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

FOLDER = Path(__file__).parent


def configuration(url: str) -> Config:
    """Alembic's configuration for a ledger at a SQLAlchemy URL; there is no ini file to lose."""
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Create or migrate the tables."""
    command.upgrade(configuration(url), revision)
