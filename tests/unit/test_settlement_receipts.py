"""Receipt files: what holds is proven without anybody's help, and no changed byte of a file passes."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reliability
from hypothesis import given, settings
from hypothesis import strategies as st
from sdk_terms import CONSTRAINTS, NOW, a_hash, lease, spec

from gpumarket.cli.main import run
from gpumarket.core.errors import BadReceipt
from gpumarket.core.signing import LocalKey, market_domain, sign
from gpumarket.core.terms import Ack, Outcome, Receipt, Term, keccak256, output_chain, request_hash, token_item
from gpumarket.core.units import ZERO_HASH, Address, Hash
from gpumarket.settlement.receipts import Content, Document, SignedAttempt, from_json, to_json, verify

CHAIN, REGISTRY = 31_337, Address(b"\x11" * 20)
DOMAIN = market_domain(CHAIN, REGISTRY)
CLIENT, SCHEDULER = LocalKey(keccak256(b"receipt client")), LocalKey(keccak256(b"receipt scheduler"))
PROVIDERS = [LocalKey(keccak256(b"receipt provider %d" % i)) for i in (1, 2)]
REQUEST, SALT = b"the request", a_hash("salt")
TOKENS = [token_item(t) for t in range(5, 17)]


def a_document(*, failed_over: bool = True, content: bool = True) -> Document:
    """A job of 12 tokens: 5 by a provider that was lost, 7 by the next one; or all by one."""
    order = spec(client=CLIENT.address, scheduler=SCHEDULER.address, request_hash=request_hash(SALT, REQUEST))
    cut = 5 if failed_over else 0
    attempts = []
    if failed_over:
        attempts.append(an_attempt(order, 1, TOKENS[:cut], (0, ZERO_HASH), complete=False))
    attempts.append(an_attempt(order, len(attempts) + 1, TOKENS[cut:], (cut, output_chain(TOKENS[:cut])), complete=True))
    return Document(
        CHAIN,
        REGISTRY,
        order,
        CONSTRAINTS.SerializeToString(deterministic=True),
        sign(CLIENT, DOMAIN, order),
        tuple(attempts),
        Content(SALT, REQUEST, tuple(TOKENS)) if content else None,
    )


def an_attempt(order: Any, number: int, items: list[bytes], prefix: tuple[int, Hash], *, complete: bool) -> SignedAttempt:
    key = PROVIDERS[number - 1]
    term = lease(order, attempt=number, prefix_units=prefix[0], prefix_hash=prefix[1], provider=key.address)
    chain = output_chain(items, prefix[1])
    ack = Ack(term.struct_hash, len(items), chain, complete, False)
    stated = receipt_of(term, order, len(items), chain, Outcome.COMPLETED) if complete else None
    units = len(items) * 2 * 10**12 + (10 * 10**12 if complete else 0)  # prices of sdk_terms: 1 in, 2 out per million
    return SignedAttempt(
        term,
        sign(SCHEDULER, DOMAIN, term),
        ack,
        sign(CLIENT, DOMAIN, ack),
        stated,
        sign(key, DOMAIN, stated) if stated else b"",
        units * 101 // 100,  # type: ignore[arg-type]  # 1 % fee
    )


def receipt_of(term: Any, order: Any, units: int, chain: Hash, outcome: Outcome) -> Receipt:
    return Receipt(
        term.struct_hash,
        a_hash("nonce"),
        order.request_hash,
        chain,
        term.prefix_units,
        term.prefix_hash,
        order.prompt_units,
        units,
        outcome,
        NOW + 5,
    )


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path
        return
    for key, child in items:
        yield from leaves(child, (*path, key))


def changed(document: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any], Any]) -> bytes:
    whole = json.loads(json.dumps(document))
    place = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = change(place[path[-1]])
    return json.dumps(whole).encode()


def bent(value: Any) -> Any:
    """The nearest other value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if value is None:
        return {}
    return value[:-1] + ("0" if value[-1] != "0" else "1")


def accepted(raw: bytes) -> bool:
    try:
        return verify(from_json(raw)).holds
    except BadReceipt:
        return False


@pytest.mark.parametrize("failed_over", [False, True])
@pytest.mark.parametrize("content", [False, True])
def test_receipt_file_of_an_honest_job_holds_and_says_what_it_does_not_show(failed_over: bool, content: bool) -> None:
    document = a_document(failed_over=failed_over, content=content)
    assert from_json(to_json(document).encode()) == document
    proof = verify(document, chain_id=CHAIN, registry=REGISTRY)
    assert proof.holds, [f for f in proof.findings if not f.holds]
    assert proof.amount == (12 * 2 + 10) * 10**12 * 101 // 100
    assert any("answer is right" in line for line in proof.not_proven)
    assert any("hashes only" in line for line in proof.not_proven) != content


def test_receipt_file_with_any_leaf_changed_is_refused() -> None:
    document = json.loads(to_json(a_document()))
    paths = list(leaves(document))
    passed = [path for path in paths if accepted(changed(document, path, bent))]
    reliability.record("F49 (receipt file)", len(paths), f"{len(passed)} accepted", "0")
    assert passed == []
    assert len(paths) > 90


def test_receipt_file_of_another_market_is_refused_where_the_reader_says_which() -> None:
    document = a_document()
    assert not verify(document, chain_id=1).holds
    assert not verify(document, registry=Address(b"\x12" * 20)).holds


def resigned(document: Document, index: int, key: LocalKey, **changes: Any) -> Document:
    """A file whose signer states something else: properly signed, and wrong. Keys are term and field, e.g. ack__units."""
    attempt = document.attempts[index]
    for name, value in changes.items():
        part, field = name.split("__")
        term: Term = replace(getattr(attempt, part), **{field: value})
        values: dict[str, Any] = {part: term, f"{part}_signature": sign(key, DOMAIN, term)}
        attempt = replace(attempt, **values)
    attempts = [*document.attempts]
    attempts[index] = attempt
    return replace(document, attempts=tuple(attempts))


PROPERLY_SIGNED_AND_WRONG: dict[str, tuple[int, LocalKey, dict[str, Any]]] = {
    "receipt of another request": (1, PROVIDERS[1], {"receipt__request_hash": a_hash("other")}),
    "receipt of another output": (1, PROVIDERS[1], {"receipt__output_hash": a_hash("other")}),
    "receipt of another lease": (1, PROVIDERS[1], {"receipt__lease": a_hash("other")}),
    "receipt bills more": (1, PROVIDERS[1], {"receipt__output_units": 8}),
    "receipt with another prompt": (1, PROVIDERS[1], {"receipt__prompt_units": 11}),
    "receipt with another prefix": (1, PROVIDERS[1], {"receipt__prefix_units": 4}),
    "receipt after the deadline": (1, PROVIDERS[1], {"receipt__finished_at": NOW + 301}),
    "receipt of a failure": (1, PROVIDERS[1], {"receipt__outcome": Outcome.FAILED}),
    "receipt by the other provider": (1, PROVIDERS[0], {"receipt__finished_at": NOW + 6}),
    "ack by the provider": (1, PROVIDERS[1], {"ack__will_check": True}),
    "ack of another lease": (0, CLIENT, {"ack__lease": a_hash("other")}),
    "ack beyond the order": (1, CLIENT, {"ack__units": 13}),
    "ack of fewer units, same amount": (0, CLIENT, {"ack__units": 4}),
    "lease by the provider": (0, PROVIDERS[0], {"lease__fee_ppm": 10_001}),
    "lease above the order's maximum": (1, SCHEDULER, {"lease__maximum": 10**18}),
    "lease after the order's deadline": (1, SCHEDULER, {"lease__deadline": NOW + 301}),
    "lease for another model": (1, SCHEDULER, {"lease__model": a_hash("other")}),
    "lease that skips an attempt": (1, SCHEDULER, {"lease__attempt": 3}),
    "lease with a prefix of its own": (1, SCHEDULER, {"lease__prefix_units": 6}),
}


@pytest.mark.parametrize("name", PROPERLY_SIGNED_AND_WRONG)
def test_receipt_file_properly_signed_and_wrong_is_refused(name: str) -> None:
    index, key, changes = PROPERLY_SIGNED_AND_WRONG[name]
    proof = verify(resigned(a_document(), index, key, **changes))
    assert not proof.holds
    assert proof.proven == ()
    assert proof.amount == 0


def test_receipt_file_without_its_first_attempt_is_refused() -> None:
    document = a_document()
    assert not verify(replace(document, attempts=document.attempts[1:])).holds


def test_receipt_file_completed_and_gone_on_is_refused() -> None:
    document = a_document()
    first = document.attempts[0]
    assert first.ack is not None
    stated = receipt_of(first.lease, document.spec, 5, first.ack.output_hash, Outcome.COMPLETED)
    twice = replace(first, receipt=stated, receipt_signature=sign(PROVIDERS[0], DOMAIN, stated))
    assert not verify(replace(document, attempts=(twice, document.attempts[1]))).holds


def test_receipt_file_with_other_content_is_refused() -> None:
    document = a_document()
    for content in (
        Content(a_hash("other"), REQUEST, tuple(TOKENS)),
        Content(SALT, b"another request", tuple(TOKENS)),
        Content(SALT, REQUEST, tuple(TOKENS[:-1])),
        Content(SALT, REQUEST, (b"".join(TOKENS[:2]), *TOKENS[2:])),
    ):
        assert not verify(replace(document, content=content)).holds


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.one_of(st.binary(max_size=200), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists).map(json.dumps)))
def test_receipt_file_that_is_none_is_refused_by_name(raw: bytes | str) -> None:
    with pytest.raises(BadReceipt, match="no receipt file"):
        from_json(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a":' * 5_000 + b"1" + b"}" * 5_000])
def test_receipt_file_nested_deep_is_refused(raw: bytes) -> None:
    with pytest.raises(BadReceipt):
        from_json(raw)


def test_receipt_verify_needs_no_network_and_exits_8_when_a_finding_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    text = to_json(a_document())
    good.write_text(text)
    bad.write_bytes(changed(json.loads(text), ("attempts", 1, "ack", "units"), bent))
    assert run(["receipt", "verify", str(good), "-o", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["holds"]
    assert said["amount"] == (12 * 2 + 10) * 10**12 * 101 // 100
    assert run(["receipt", "verify", str(bad), "-o", "json"]) == 8
    said = json.loads(capsys.readouterr().out)
    assert not said["holds"]
    assert said["proven"] == []
    assert {f["name"] for f in said["findings"] if not f["holds"]} >= {"attempt 2 ack signature"}
    assert run(["receipt", "verify", str(good)]) == 0
    shown = capsys.readouterr().out
    assert "not proven by this file" in shown
    assert run(["receipt", "verify", str(tmp_path / "none.json")]) == 3
    bad.write_text("{}")
    assert run(["receipt", "verify", str(bad)]) == 8
