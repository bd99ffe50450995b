"""What is published for others is what we use, and what other signers sign is what we and the contract accept."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from contracts_fixtures import ONE, Chain, contracts_chain
from contracts_tools import tools
from eth_account import Account
from eth_account.signers.local import LocalAccount

from gpumarket.core.errors import BadSignature
from gpumarket.core.signing import channels_domain
from gpumarket.core.units import Address, Hash
from gpumarket.settlement.vouchers import verify_voucher

__all__ = ["contracts_chain"]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "contracts"
PASSWORD = "not a secret"


@pytest.fixture(scope="module")
def publisher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish_contracts", ROOT / "tools" / "publish_contracts.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalAccount, Path]:
    """A key in a keystore file, as wallets keep it: never in arguments or environment."""
    folder = tmp_path_factory.mktemp("wallet")
    account: LocalAccount = Account.create()
    (folder / "key.json").write_text(json.dumps(Account.encrypt(account.key, PASSWORD, kdf="scrypt", iterations=2)))
    (folder / "password.txt").write_text(PASSWORD)
    return account, folder


def cast_signature(folder: Path, document: Any) -> bytes:
    """The signature of `cast` over a typed-data document, by the very command that the page shows."""
    (folder / "voucher.example.json").write_text(json.dumps(document))
    page = (DOCS / "README.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("cast ")]
    done = subprocess.run(shlex.split(line), cwd=folder, env=tools(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return bytes.fromhex(done.stdout.strip().removeprefix("0x"))


def document(chain: Chain, channel: bytes, cumulative: int, **domain: Any) -> dict[str, Any]:
    """The published example with another domain and message."""
    example: dict[str, Any] = json.loads((DOCS / "voucher.example.json").read_text())
    example["domain"] |= {"chainId": chain.book.chain_id, "verifyingContract": chain.channels.address, **domain}
    example["message"] = {"channel": "0x" + channel.hex(), "cumulative": str(cumulative)}
    return example


def accepted_by_us(chain: Chain, channel: bytes, cumulative: int, signature: bytes, signer: LocalAccount) -> None:
    domain = channels_domain(chain.book.chain_id, Address(bytes.fromhex(chain.channels.address[2:])))
    verify_voucher(domain, Hash(channel), cumulative, signature, Address(bytes.fromhex(signer.address[2:])))


def test_published_files_are_those_of_the_artifacts_and_terms(publisher: ModuleType) -> None:
    expected = publisher.documents()
    for path, text in expected.items():
        assert (DOCS / path).read_text() == text, f"{path} is stale: run python tools/publish_contracts.py"
    published = {str(file.relative_to(DOCS)) for file in DOCS.rglob("*.json")}
    assert published == expected.keys()


def test_published_schema_hashes_to_the_independent_vectors() -> None:
    schema = json.loads((DOCS / "typed-data.json").read_text())
    vectors = json.loads((ROOT / "tests" / "vectors" / "typed_data.json").read_text())["vectors"]
    assert schema["typeHashes"] == {vector["term"]: vector["typeHash"] for vector in vectors}
    for vector in vectors:
        domain = schema["domains"][schema["domainOf"][vector["term"]]]
        assert (domain["name"], domain["version"]) == (vector["domain"]["name"], vector["domain"]["version"])
        fields = ",".join(f"{field['type']} {field['name']}" for field in schema["types"][vector["term"]])
        assert f"{vector['term']}({fields})" == vector["type"]


def test_voucher_signed_by_eth_account_from_the_published_schema_is_accepted(chain: Chain, wallet: tuple[LocalAccount, Path]) -> None:
    signer, _ = wallet
    channel = chain.open(chain.accounts[1], chain.stranger().address, ONE, signer=signer)
    signature = bytes(signer.sign_typed_data(full_message=_integers(document(chain, channel, 7))).signature)
    accepted_by_us(chain, channel, 7, signature, signer)
    chain.send(chain.channels.functions.redeem(channel, 7, signature), chain.accounts[5])


def test_voucher_signed_by_cast_is_accepted_by_us_and_by_the_contract(chain: Chain, wallet: tuple[LocalAccount, Path]) -> None:
    signer, folder = wallet
    payee = chain.stranger()
    channel = chain.open(chain.accounts[1], payee.address, 2**72, signer=signer)
    amount = 2**72 - 1  # beyond what a JSON number holds exactly
    signature = cast_signature(folder, document(chain, channel, amount))
    accepted_by_us(chain, channel, amount, signature, signer)
    chain.send(chain.channels.functions.redeem(channel, amount, signature), chain.accounts[5])
    assert chain.balance(payee.address) == amount


@pytest.mark.parametrize("change", [{"chainId": 1}, {"verifyingContract": "0x" + "44" * 20}, {"version": "2"}])
def test_voucher_signed_by_cast_in_another_domain_is_refused(
    chain: Chain, wallet: tuple[LocalAccount, Path], change: dict[str, Any]
) -> None:
    signer, folder = wallet
    channel = chain.open(chain.accounts[1], chain.stranger().address, ONE, signer=signer)
    signature = cast_signature(folder, document(chain, channel, 7, **change))
    with pytest.raises(BadSignature):
        accepted_by_us(chain, channel, 7, signature, signer)
    assert chain.refused(chain.channels.functions.redeem(channel, 7, signature), chain.accounts[5])[0] == "NotSigner"


def test_voucher_of_ours_is_byte_equal_to_that_of_cast(chain: Chain, wallet: tuple[LocalAccount, Path]) -> None:
    """Both sign deterministically (RFC 6979): one byte of difference would be another digest."""
    from gpumarket.core.signing import LocalKey
    from gpumarket.settlement.vouchers import sign_voucher

    signer, folder = wallet
    domain = channels_domain(chain.book.chain_id, Address(bytes.fromhex(chain.channels.address[2:])))
    ours = sign_voucher(LocalKey(bytes(signer.key)), domain, Hash(b"\x07" * 32), 123)
    assert cast_signature(folder, document(chain, b"\x07" * 32, 123)) == ours


@pytest.fixture
def chain(contracts_chain: Chain) -> Chain:
    return contracts_chain


def _integers(typed: dict[str, Any]) -> dict[str, Any]:
    return {**typed, "message": {**typed["message"], "cumulative": int(typed["message"]["cumulative"])}}
