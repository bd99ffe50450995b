"""What a panel member must not forget: its number and salt in each dispute, and the keys that evidence may be sealed to.

Invariant: a number is written once and never changes (I3 of disputes: one commitment, and a reveal that fits it). Never: evidence.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, delete, insert, select

from gpumarket.core.sealing import public_key
from gpumarket.core.units import Hash
from gpumarket.node.tables import panel_numbers, sealing_keys
from gpumarket.settlement.journal import Journal


class Written(NamedTuple):
    """A member's number in one dispute, and the salt that hides it until it is revealed."""

    number: int
    salt: Hash


class PanelRecords:
    """The panel's tables of the provider's journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def number(self, dispute: Hash) -> Written | None:
        """What was written for a dispute."""
        return self._journal.read(lambda c: _number(c, dispute))

    async def write_number(self, dispute: Hash, number: int, salt: Hash, now: int) -> Written:
        """Write a number, unless there is one; what is written now."""

        def work(connection: Connection) -> Written:
            known = _number(connection, dispute)
            if known is None:
                row = {"dispute": dispute, "number": number.to_bytes(8, "big"), "salt": salt, "written_at": now}
                connection.execute(insert(panel_numbers), row)
            return known or Written(number, salt)

        return await self._journal.transact(work)

    def secrets(self) -> list[bytes]:
        """Secret keys that something may be sealed to."""
        return self._journal.read(lambda c: [bytes(row) for row in c.execute(select(sealing_keys.c.secret)).scalars()])

    async def add_key(self, secret: bytes) -> bytes:
        """Keep a fresh secret key; its public key, which may go out now."""
        public = public_key(secret)
        await self._journal.transact(lambda c: c.execute(insert(sealing_keys), {"public": public, "secret": secret}))
        return public

    async def forget_keys(self) -> None:
        """Erase every key: nothing is sealed to this member any more, and what was is never to be opened again."""
        await self._journal.transact(lambda c: c.execute(delete(sealing_keys)))


def _number(connection: Connection, dispute: Hash) -> Written | None:
    row = connection.execute(select(panel_numbers).where(panel_numbers.c.dispute == dispute)).mappings().one_or_none()
    return None if row is None else Written(int.from_bytes(row["number"], "big"), Hash(bytes(row["salt"])))
