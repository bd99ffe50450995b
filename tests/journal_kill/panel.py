"""What else a provider's journal must not forget: numbers of panels, keys that evidence is sealed to, and transactions that went out.

A panel member that comes back with another number, or another salt, would contradict its own commitment; one whose sealing key is gone
cannot open what was sealed to it; a sender that forgot a transaction sends it again under another nonce.
"""

from __future__ import annotations

from collections.abc import Sequence

from journal_kill.facts import NOW, Fact, Lost, Say, SeededRandom, WrongBalance, of_kind

from gpumarket.core.sealing import public_key
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Hash
from gpumarket.node.panel.records import PanelRecords
from gpumarket.settlement.chain import outbox
from gpumarket.settlement.chain.outbox import Outgoing
from gpumarket.settlement.journal import Journal

DISPUTES = 2
LABELS = ("register", "withdraw")


async def panel_turn(journal: Journal, say: Say, turn: int) -> None:
    """Numbers of this turn's disputes and, anew, of all before; a key for a report; the commitments as transactions."""
    records, chance = PanelRecords(journal), SeededRandom(f"panel {turn}")
    for number in range((turn + 1) * DISPUTES):
        dispute = Hash(keccak256(b"dispute %d" % number))
        written = await records.write_number(dispute, 1_000 * turn + number, Hash(chance.token(32)), NOW)
        commitment = keccak256(written.number.to_bytes(8, "big") + written.salt)
        say({"kind": "signed", "what": "commitment", "at": dispute.hex(), "signature": commitment.hex()})
        if number == turn * DISPUTES:
            say({"kind": "going home"})
            await records.forget_keys()
            say({"kind": "went home"})
        public = await records.add_key(chance.token(32))
        say({"kind": "reported", "public": public.hex()})
    for label in LABELS:
        await send_once(journal, say, label)


async def send_once(journal: Journal, say: Say, label: str) -> None:
    """As the sender does: what a label sent is sent again as it is; written down before it goes out, and settled when it is mined."""
    known = journal.read(lambda c: outbox.labelled(c, label))
    if known is None:
        nonce = journal.read(outbox.next_nonce)
        raw = label.encode() + nonce.to_bytes(4, "big")
        fresh = Outgoing(0, nonce, label, Hash(keccak256(raw)), raw, bytes(20), b"", 21_000, 10**9, 1)
        known = await journal.transact(lambda c: outbox.add(c, fresh))
    say({"kind": "signed", "what": "transaction", "at": label, "signature": known.raw.hex()})
    say({"kind": "broadcast", "nonce": known.nonce, "raw": known.raw.hex()})
    if known.state == outbox.PENDING:
        sent = known
        await journal.transact(lambda c: outbox.settle(c, sent, outbox.MINED, 1, 21_000))
    say({"kind": "mined", "label": label})


def require_panel_kept(said: Sequence[Fact], journal: Journal) -> None:
    """Every number, key and transaction that was acted upon is there."""
    records = PanelRecords(journal)
    for fact in of_kind(said, "signed"):
        if fact["what"] == "commitment":
            written = records.number(Hash(bytes.fromhex(fact["at"])))
            if written is None or keccak256(written.number.to_bytes(8, "big") + written.salt).hex() != fact["signature"]:
                raise Lost(f"a number that was committed to: {fact}")
    require_keys_kept(said, {public_key(secret).hex() for secret in records.secrets()})
    require_transactions_kept(said, journal)


def require_keys_kept(said: Sequence[Fact], there: set[str]) -> None:
    """Keys that something may be sealed to are there, and those that were erased stay so."""
    leaving = gone = 0
    for at, fact in enumerate(said):
        leaving = at if fact["kind"] == "going home" else leaving
        gone = at if fact["kind"] == "went home" else gone
    if any(fact["public"] not in there for fact in of_kind(said[leaving:], "reported")):
        raise Lost("a key that evidence may be sealed to")
    if any(fact["public"] in there for fact in of_kind(said[:gone], "reported")):
        raise WrongBalance("a key that was erased is there again")


def require_transactions_kept(said: Sequence[Fact], journal: Journal) -> None:
    """What was broadcast is at its nonce, what was mined is settled."""
    for fact in of_kind(said, "broadcast"):
        if fact["raw"] not in {sent.raw.hex() for sent in journal.read(lambda c, n=fact["nonce"]: outbox.ever_at_nonce(c, n))}:  # type: ignore[misc]
            raise Lost(f"a transaction that was broadcast: {fact}")
    for fact in of_kind(said, "mined"):
        found = journal.read(lambda c, name=fact["label"]: outbox.labelled(c, name))  # type: ignore[misc]
        if found is None or found.state != outbox.MINED:
            raise Lost(f"what became of a transaction: {fact}")
