"""Every signed term against eth-account: golden vectors on file, and eth-account asked again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data
from vectors.make_typed_data import document

from gpumarket.core import terms
from gpumarket.core.errors import BadSignature
from gpumarket.core.signing import Domain, LocalKey, channels_domain, compact, market_domain, recover, sign, verify
from gpumarket.core.units import Address, Hash, Money, parse_address

VECTORS = Path(__file__).parents[1] / "vectors" / "typed_data.json"
DOCUMENT = json.loads(VECTORS.read_text())
KEY = LocalKey(bytes.fromhex(DOCUMENT["secret"][2:]))
MARKET = market_domain(31337, Address(b"\x11" * 20))
PLAIN = [pytest.param(v, id=v["term"]) for v in DOCUMENT["vectors"] if v["case"] == "plain"]
CASES = [pytest.param(v, id=f"{v['term']}-{v['case']}") for v in DOCUMENT["vectors"]]


def raw(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def build(vector: dict[str, Any]) -> terms.Term:
    """Our term from a vector's message."""
    cls: type[terms.Term] = getattr(terms, vector["term"])
    enums = dict(cls.ENUMS)
    values: list[Any] = []
    for (name, word), text in zip(cls.WORDS, vector["message"].values(), strict=True):
        if word.solidity in ("bytes32", "address"):
            values.append(raw(text))
        elif word.solidity == "bool":
            values.append(text)
        else:
            values.append(enums[name](int(text)) if name in enums else int(text))
    return cls(*values)


def domain_of(vector: dict[str, Any]) -> Domain:
    given = vector["domain"]
    return Domain(given["name"], given["version"], given["chainId"], parse_address(given["verifyingContract"]))


@pytest.mark.parametrize("vector", CASES)
def test_term_golden_vector_is_reproduced_byte_for_byte(vector: dict[str, Any]) -> None:
    term, domain = build(vector), domain_of(vector)
    assert vector["type"] == term.TYPE
    assert raw(vector["typeHash"]) == term.TYPE_HASH
    assert domain.separator == raw(vector["domainSeparator"])
    assert term.struct_hash == raw(vector["structHash"])
    assert domain.digest(term.struct_hash) == raw(vector["digest"])
    assert sign(KEY, domain, term) == raw(vector["signature"])
    verify(domain, term, raw(vector["signature"]), parse_address(DOCUMENT["signer"]), "the vector")


def test_vectors_on_file_are_what_eth_account_makes_today() -> None:
    assert document() == DOCUMENT


def test_vectors_cover_every_term_there_is() -> None:
    signed = {cls.__name__ for cls in terms.Term.__subclasses__() if cls.__dict__.get("TYPE")}
    assert {v["term"] for v in DOCUMENT["vectors"]} == signed


@pytest.mark.parametrize("vector", CASES)
def test_term_typed_message_given_to_eth_account_signs_alike(vector: dict[str, Any]) -> None:
    term = build(vector)
    signable = encode_typed_data(vector["domain"], {type(term).__name__: term.typed_fields()}, term.typed_message())
    assert bytes(Account.sign_message(signable, DOCUMENT["secret"]).signature) == raw(vector["signature"])


def test_domains_of_market_and_channels_differ_even_at_one_address() -> None:
    assert market_domain(1, Address(b"\x11" * 20)).separator != channels_domain(1, Address(b"\x11" * 20)).separator
    assert market_domain(1, Address(b"\x11" * 20)).separator != market_domain(2, Address(b"\x11" * 20)).separator


# --- what a term refuses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", PLAIN)
def test_term_field_of_wrong_size_is_refused_with_its_name(vector: dict[str, Any]) -> None:
    term = build(vector)
    wrong = {"bytes32": b"\0" * 31, "address": b"\0" * 21, "bool": 1}
    for name, word in term.WORDS:
        bad: Any = wrong.get(word.solidity, 2 ** int(word.solidity[4:]) if word.solidity.startswith("uint") else None)
        with pytest.raises(ValueError, match=f"{type(term).__name__}.{name}"):
            dataclasses.replace(term, **{name: bad})  # type: ignore[type-var]
        if word.solidity.startswith("uint"):
            with pytest.raises(ValueError, match=name):
                dataclasses.replace(term, **{name: -1})  # type: ignore[type-var]


@pytest.mark.parametrize("vector", PLAIN)
def test_term_any_changed_field_changes_the_struct_hash(vector: dict[str, Any]) -> None:
    term = build(vector)
    seen = {term.struct_hash}
    for name, word in term.WORDS:
        old = getattr(term, name)
        if word.solidity == "bool":
            new: Any = not old
            if name == "complete":  # an ack that will be checked is complete
                term_base: Any = dataclasses.replace(term, will_check=False)  # type: ignore[type-var]
                seen.add(term_base.struct_hash)
                seen.add(dataclasses.replace(term_base, complete=new).struct_hash)
                continue
        elif isinstance(old, bytes):
            new = bytes([old[0] ^ 1]) + old[1:]
        elif isinstance(old, (terms.Task, terms.Outcome)):
            new = next(member for member in type(old) if member != old)
        else:
            new = old + 1
        seen.add(dataclasses.replace(term, **{name: new}).struct_hash)  # type: ignore[type-var]
    expected = len(term.WORDS) + 1
    assert len(seen) == expected


def test_ack_will_check_without_complete_is_refused() -> None:
    with pytest.raises(ValueError, match="will_check"):
        terms.Ack(Hash(b"\1" * 32), 1, Hash(b"\2" * 32), False, True)


def test_term_is_frozen() -> None:
    voucher = terms.Voucher(Hash(b"\1" * 32), Money(1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        voucher.cumulative = Money(2)  # type: ignore[misc]


def test_term_money_hint_is_uint96() -> None:
    assert get_type_hints(terms.Voucher)["cumulative"] is Money
    terms.Voucher(Hash(b"\1" * 32), Money(2**96 - 1))
    with pytest.raises(ValueError, match="uint96"):
        terms.Voucher(Hash(b"\1" * 32), Money(2**96))


# --- signatures ----------------------------------------------------------------------------------------------------------------


def test_signature_of_another_domain_is_refused() -> None:
    voucher = terms.Voucher(Hash(b"\1" * 32), Money(1))
    signature = sign(KEY, MARKET, voucher)
    with pytest.raises(BadSignature):
        verify(channels_domain(31337, Address(b"\x11" * 20)), voucher, signature, KEY.address, "the voucher")


def test_signature_with_high_s_is_refused() -> None:
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    digest = terms.keccak256(b"x")
    good = KEY.sign_digest(digest)
    high = good[:32] + (order - int.from_bytes(good[32:64], "big")).to_bytes(32, "big") + bytes([55 - good[64]])
    assert recover(digest, good) == KEY.address
    with pytest.raises(BadSignature, match="low s"):
        recover(digest, high)


@pytest.mark.parametrize("signature", [b"", b"\0" * 64, b"\0" * 65, b"\xff" * 65, b"\0" * 64 + b"\x1b", b"\1" * 64 + b"\0"])
def test_signature_that_is_none_is_refused(signature: bytes) -> None:
    with pytest.raises(BadSignature):
        recover(terms.keccak256(b"x"), signature)


def test_signature_flipped_bit_never_recovers_the_signer() -> None:
    digest = terms.keccak256(b"x")
    good = KEY.sign_digest(digest)
    for position in range(0, 512, 7):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        try:
            assert recover(digest, bytes(bad)) != KEY.address
        except BadSignature:
            continue


def test_compact_signature_keeps_r_s_and_parity() -> None:
    for text in (b"a", b"b", b"c", b"d"):
        signature = KEY.sign_digest(terms.keccak256(text))
        r, vs = compact(signature)
        s = int.from_bytes(vs, "big")
        assert (r, s & (2**255 - 1), (s >> 255) + 27) == (signature[:32], int.from_bytes(signature[32:64], "big"), signature[64])


def test_key_repr_shows_no_secret() -> None:
    assert KEY.secret.hex() not in repr(KEY)


# --- hashes of a job -----------------------------------------------------------------------------------------------------------


def test_output_chain_continues_from_any_prefix() -> None:
    items = [terms.token_item(t) for t in (5, 1, 2**32 - 1, 0)]
    whole = terms.output_chain(items)
    for cut in range(len(items) + 1):
        assert terms.output_chain(items[cut:], terms.output_chain(items[:cut])) == whole
    assert terms.output_chain(items[::-1]) != whole


def test_merkle_root_differs_by_order_count_and_content() -> None:
    leaves = [bytes([i]) for i in range(5)]
    roots = {terms.merkle_root(leaves[:n]) for n in range(1, 6)} | {terms.merkle_root(leaves[::-1])}
    assert len(roots) == 6
    with pytest.raises(ValueError, match="leaf"):
        terms.merkle_root([])


def test_merkle_root_of_rfc6962_vector_is_reproduced() -> None:
    leaves = [b"", b"\0", b"\x10", b" !", b"01", b"@ABC", b"PQRSTUVW", b"`abcdefghijklmno"]
    expected = "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
    assert terms.merkle_root(leaves).hex() == expected


@pytest.mark.parametrize("path", ["", "/etc/passwd", "a/../b", "a//b", "..", "a\\b", "a\0b", "./a"])
def test_manifest_path_that_leaves_the_model_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        terms.ManifestFile(path, Hash(b"\1" * 32), 1)
