"""All ten invariants of the market, at the end of a run on this machine: the auditor's six, and four that need more than books.

I7 billed as promised, I8 bounded resources, I9 no secret or prompt outside, I10 fail closed: logs, processes and probes are looked at too.
Each check returns what it saw; one that fails raises Broken with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpumarket.core.units import format_money
from gpumarket.scheduler.jobs import AttemptState
from gpumarket.testnet import audit_checks
from gpumarket.testnet.evidence import Evidence


class Broken(Exception):
    """An invariant does not hold; the text has the numbers."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that the checks look at: the auditor's evidence, and what else is to be seen on this machine."""

    books: Evidence
    secrets: Sequence[bytes]
    """What must appear nowhere: prompts, passwords, keys."""
    places: Sequence[tuple[str, Callable[[], bytes]]]
    """(name, read) of every log, command line and environment."""
    processes: int
    """How many run, children included."""
    refusals: Mapping[str, bool]
    """Probe → whether it was refused."""


def check_all(scene: Scene) -> dict[str, tuple[bool, str]]:
    """Invariant → (holds, what was seen)."""
    audited = audit_checks.check(scene.books)
    found = {name: (one.holds, one.seen if one.holds else "; ".join(one.problems)) for name, one in audited.items()}
    for name, check in CHECKS.items():
        try:
            found[name] = (True, check(scene))
        except Broken as broken:
            found[name] = (False, str(broken))
    return found


def billed_as_promised(e: Scene) -> str:
    """I7. Every statement verifies and is of what was ordered, and what clients are charged is what their attempts and fees cost."""
    for attempt in e.books.attempts:
        _need(not attempt.flaws, f"{attempt.name}: {'; '.join(attempt.flaws)}")
    spent = sum(attempt.cost for attempt in e.books.attempts if attempt.row.state == AttemptState.OWED)
    hubs = [row for books in e.books.schedulers.values() for row in books.client_channels]
    used = sum(row.used for row in hubs)
    _need(used == spent, f"clients were charged {used}, their jobs cost {spent}")
    receipts = sum(attempt.receipt is not None for attempt in e.books.attempts)
    return f"{receipts} receipts verify; {format_money(used)} was charged, attempt by attempt as leased"


def bounded_resources(e: Scene) -> str:
    """I8. Channels grow with clients plus providers, processes with roles; neither with jobs."""
    books = e.books
    payers = {row.payer for each in books.schedulers.values() for row in each.client_channels}
    parties = len(books.providers) + len(payers)
    _need(len(books.chain.channels) <= parties, f"{len(books.chain.channels)} channels for {parties} parties")
    most = 6 * (len(books.providers) + 2)
    _need(e.processes <= most, f"{e.processes} processes, expected at most {most}")
    jobs = sum(len(each.jobs) for each in books.schedulers.values())
    return f"{len(books.chain.channels)} channels and {e.processes} processes for {jobs} jobs"


def no_leak(e: Scene) -> str:
    """I9. No prompt, password or key in a log, a command line or an environment."""
    for name, read in e.places:
        content = read()
        _need(not any(secret in content for secret in e.secrets), f"a secret or prompt stands in {name}")
    return f"{len(e.secrets)} secrets and prompts searched in {len(e.places)} logs, command lines and environments"


def fails_closed(e: Scene) -> str:
    """I10. What must be refused was refused, each with its typed error."""
    taken = [name for name, refused in e.refusals.items() if not refused]
    _need(bool(e.refusals) and not taken, f"accepted: {', '.join(taken) or 'nothing was probed'}")
    return f"refused: {', '.join(e.refusals)}"


CHECKS: dict[str, Callable[[Scene], str]] = {
    "I7": billed_as_promised,
    "I8": bounded_resources,
    "I9": no_leak,
    "I10": fails_closed,
}


def process_places(pids: Iterable[int]) -> list[tuple[str, Callable[[], bytes]]]:
    """Command lines and environments of processes, where the system shows them (Linux)."""
    proc = Path("/proc")
    if not proc.is_dir():
        return []
    return [(f"process {pid} {kind}", _reader(proc / str(pid) / kind)) for pid in pids for kind in ("cmdline", "environ")]


def log_places(folder: Path) -> list[tuple[str, Callable[[], bytes]]]:
    """Every log of a testnet."""
    return [(f"log {file.name}", _reader(file)) for file in sorted(folder.glob("*.log"))]


def _reader(file: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return file.read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # the process ended meanwhile, and what it showed with it
            return b""

    return read


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)
