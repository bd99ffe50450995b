"""`gpumarket receipt`: a job's signed statements in a file, and what they prove; `verify` asks nobody."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumarket.cli import settings
from gpumarket.cli.jobs import JobArgument
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb
from gpumarket.core.errors import BadReceipt, ConfigError
from gpumarket.core.units import format_money, hex0x

if TYPE_CHECKING:
    from gpumarket.settlement.receipts import Document, Proof

app = noun("Receipts: save one, prove one.")


@verb(app, "save")
async def save(
    job: JobArgument,
    file: Annotated[Path, typer.Argument(help="New file; an existing one is never overwritten.")],
    content: Annotated[bool, typer.Option("--content", help="Also request and output: whoever has the file can read them.")] = False,
    config: ConfigOption = None,
) -> None:
    """Write a job's order, leases, acks and receipts to a file that anybody can verify; needs neither network nor key."""
    from gpumarket.core.signing import market_domain
    from gpumarket.sdk import receipt_files
    from gpumarket.sdk.offline import journal_of
    from gpumarket.sdk.settings import ClientSettings

    domain = market_domain(*_market(settings.chain(config).address_book))
    async with journal_of(settings.role(ClientSettings, config)) as journal:
        found = receipt_files.find(journal, job)
        receipt_files.save(journal, domain, found, file, content=content)
    current().emit({"job": hex0x(found), "file": str(file), "content": content})


@verb(app, "verify")
def verify(
    file: Annotated[Path, typer.Argument(help="A file of `gpumarket receipt save`.")],
    address_book: Annotated[
        Path | None, typer.Option(help="contracts.json of the market that you mean; compared, not connected to.")
    ] = None,
) -> None:
    """Check signatures, hashes and amounts of a receipt file, and say what they prove and what not. Exit code 8 when any does not hold."""
    from gpumarket.settlement.receipts import from_json
    from gpumarket.settlement.receipts import verify as prove

    document = from_json(_read(file))
    chain_id, registry = _market(address_book) if address_book is not None else (None, None)
    proof = prove(document, chain_id=chain_id, registry=registry)
    current().emit(_proof_document(document, proof), lambda _: _show(proof))
    if not proof.holds:
        raise typer.Exit(BadReceipt.exit_code)


def _read(file: Path) -> bytes:
    from gpumarket.settlement.receipts.document import FILE_BYTES_MAX

    try:
        with file.open("rb") as stream:
            return stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", hint="gpumarket receipt save JOB FILE writes one") from error


def _market(address_book: Path) -> tuple[int, Any]:
    from gpumarket.contracts.deploy import AddressBook
    from gpumarket.core.units import parse_address

    book = AddressBook.load(address_book)
    return book.chain_id, parse_address(book.registry)


def _proof_document(document: Document, proof: Proof) -> dict[str, Any]:
    return {
        "holds": proof.holds,
        "job": hex0x(document.spec.key),
        "client": hex0x(document.spec.client),
        "chain_id": document.chain_id,
        "registry": hex0x(document.registry),
        "amount": proof.amount,
        "findings": [{"name": f.name, "holds": f.holds, "detail": f.detail} for f in proof.findings],
        "proven": list(proof.proven),
        "not_proven": list(proof.not_proven),
    }


def _show(proof: Proof) -> None:
    out = current()
    failed = [{"finding": f.name, "detail": f.detail} for f in proof.findings if not f.holds]
    if failed:
        out.table(failed, title=f"does not hold: {len(failed)} of {len(proof.findings)} findings")
    else:
        out.text(f"holds: {len(proof.findings)} findings, {format_money(proof.amount)} owed\n\nproven\n")
        for line in proof.proven:
            out.text(f"  + {line}\n")
    out.text("\nnot proven by this file\n")
    for line in proof.not_proven:
        out.text(f"  - {line}\n")
