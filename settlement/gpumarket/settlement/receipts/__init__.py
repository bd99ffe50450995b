"""A job's signed statements in one file, and what they prove to somebody who was not there: no network, no chain, no journal."""

from gpumarket.settlement.receipts.document import Content, Document, SignedAttempt, from_json, to_json
from gpumarket.settlement.receipts.proof import Finding, Proof, verify

__all__ = ["Content", "Document", "Finding", "Proof", "SignedAttempt", "from_json", "to_json", "verify"]
