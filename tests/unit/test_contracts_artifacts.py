"""Committed artifacts are what the sources compile to, and an address book tells its own contracts from others."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from contracts_fixtures import Chain, contracts_chain
from contracts_tools import CONTRACTS, tools
from web3 import AsyncHTTPProvider, AsyncWeb3

from gpumarket.contracts.artifacts import CONTRACT_NAMES, artifact
from gpumarket.contracts.deploy import NO_LIMITS, ZERO_ADDRESS, AddressBook, EntryLimits, deploy
from gpumarket.contracts.dispute_terms import DisputeTerms
from gpumarket.core.errors import ConfigError, TransactionFailed, WrongChain
from gpumarket.testnet.anvil import Anvil

__all__ = ["contracts_chain"]

COMMITTED = CONTRACTS / "gpumarket" / "contracts" / "artifacts"


@pytest.fixture
async def w3(contracts_chain: Chain) -> AsyncIterator[AsyncWeb3[Any]]:
    connection: AsyncWeb3[Any] = AsyncWeb3(AsyncHTTPProvider(contracts_chain.anvil.url))
    yield connection
    await connection.provider.disconnect()


@pytest.mark.timeout(600)
def test_artifacts_recompiled_from_source_are_byte_equal(tmp_path: Path) -> None:
    done = subprocess.run(["node", "compile.cjs", str(tmp_path)], cwd=CONTRACTS, env=tools(), capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    for name in CONTRACT_NAMES:
        made, committed = ((folder / f"{name}.json").read_bytes() for folder in (tmp_path, COMMITTED))
        assert made == committed, f"{name} differs from its source: run make contracts"


def test_artifacts_are_those_of_the_sources_and_nothing_else() -> None:
    assert sorted(file.stem for file in COMMITTED.glob("*.json")) == sorted(CONTRACT_NAMES)
    assert sorted(file.stem for file in (CONTRACTS / "src").glob("*.sol")) == sorted(CONTRACT_NAMES)


def test_artifacts_fit_the_code_size_limit() -> None:
    assert all(len(artifact(name).deployed_bytecode) <= 24_576 for name in CONTRACT_NAMES)  # EIP-170


def test_artifact_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="Disputs"):
        artifact("Disputs")


def test_artifacts_every_custom_error_is_explained_in_its_source() -> None:
    """NatSpec on each error: what it means stands above it in the source."""
    for source in (CONTRACTS / "src").rglob("*.sol"):
        lines = source.read_text().splitlines()
        bare = [line for before, line in itertools.pairwise(lines) if line.startswith("    error ") and "///" not in before]
        assert not bare


def test_lock_files_name_no_host() -> None:
    root = CONTRACTS.parent
    for lock in (CONTRACTS / "package-lock.json", root / "testnet/gpumarket/testnet/anvil_npm/package-lock.json"):
        packages = json.loads(lock.read_text())["packages"]
        assert "://" not in lock.read_text().replace("https://github.com", "")
        assert all(entry.get("integrity", "").startswith("sha512-") for path, entry in packages.items() if path)


async def test_verify_of_what_was_deployed_passes(contracts_chain: Chain, w3: AsyncWeb3[Any]) -> None:
    await contracts_chain.book.verify(w3)


async def test_verify_on_another_chain_id_is_refused(contracts_chain: Chain, w3: AsyncWeb3[Any]) -> None:
    with pytest.raises(WrongChain, match=r"on chain 31337.* of chain 1\b"):
        await replace(contracts_chain.book, chain_id=1).verify(w3)


async def test_verify_of_an_empty_address_is_refused(contracts_chain: Chain, w3: AsyncWeb3[Any]) -> None:
    with pytest.raises(WrongChain, match="no contract at channels"):
        await replace(contracts_chain.book, channels="0x" + "77" * 20).verify(w3)


async def test_verify_of_a_strangers_contract_is_refused(contracts_chain: Chain, w3: AsyncWeb3[Any]) -> None:
    book = contracts_chain.book
    with pytest.raises(WrongChain, match="not the code that was deployed"):
        await replace(book, channels=book.registry).verify(w3)


async def test_verify_of_the_same_code_with_other_arguments_is_refused(contracts_chain: Chain, w3: AsyncWeb3[Any]) -> None:
    book = contracts_chain.book
    other = await deploy(w3, contracts_chain.accounts[7], unbonding_delay_s=12, close_window_s=1, token=book.token)
    with pytest.raises(WrongChain, match="registry"):
        await replace(book, registry=other.registry).verify(w3)


async def test_verify_of_a_book_whose_code_is_not_this_versions_is_refused(contracts_chain: Chain, w3: AsyncWeb3[Any]) -> None:
    book = contracts_chain.book
    hashes = {**book.code_hashes, "channels": book.code_hashes["registry"]}
    with pytest.raises(WrongChain, match="not this version's PaymentChannels"):
        await replace(book, channels=book.registry, code_hashes=hashes).verify(w3)


async def test_deploy_on_an_existing_token_uses_it(contracts_chain: Chain, w3: AsyncWeb3[Any]) -> None:
    book = contracts_chain.book
    other = await deploy(w3, contracts_chain.accounts[7], unbonding_delay_s=90, close_window_s=8, token=book.token)
    assert other.token == book.token
    assert other.channels != book.channels
    contract = w3.eth.contract(address=w3.to_checksum_address(other.channels), abi=artifact("PaymentChannels").abi)
    assert await contract.functions.closeWindow().call() == 8


async def test_deploy_makes_registry_and_disputes_name_each_other(contracts_chain: Chain, w3: AsyncWeb3[Any]) -> None:
    book = contracts_chain.book
    terms = replace(DisputeTerms.for_test_network(7_200), slash_multiple=77)
    other = await deploy(w3, contracts_chain.accounts[7], unbonding_delay_s=7_200, close_window_s=8, token=book.token, disputes=terms)
    registry = w3.eth.contract(address=w3.to_checksum_address(other.registry), abi=artifact("StakeRegistry").abi)
    disputes = w3.eth.contract(address=w3.to_checksum_address(other.disputes), abi=artifact("Disputes").abi)
    assert await registry.functions.disputes().call() == other.disputes
    assert await disputes.functions.registry().call() == other.registry
    assert tuple(await disputes.functions.terms().call()) == terms.words()
    with pytest.raises(WrongChain, match="disputes"):
        await replace(book, disputes=other.disputes).verify(w3)


async def test_deploy_without_disputes_makes_a_registry_in_which_nobody_slashes(contracts_chain: Chain, w3: AsyncWeb3[Any]) -> None:
    book, account = contracts_chain.book, contracts_chain.accounts[7]
    other = await deploy(w3, account, unbonding_delay_s=90, close_window_s=8, token=book.token, without_disputes=True)
    registry = w3.eth.contract(address=w3.to_checksum_address(other.registry), abi=artifact("StakeRegistry").abi)
    assert other.disputes == await registry.functions.disputes().call() == ZERO_ADDRESS
    await other.verify(w3)


async def test_deploy_with_terms_that_outlast_the_stake_is_refused(contracts_chain: Chain, w3: AsyncWeb3[Any]) -> None:
    with pytest.raises(TransactionFailed, match="Disputes"):
        await deploy(w3, contracts_chain.accounts[8], unbonding_delay_s=3_600, close_window_s=1, disputes=DisputeTerms())


@pytest.mark.parametrize("unbonding_s", [12, 60, 900, 86_400, 14 * 86_400, 21 * 86_400, 365 * 86_400])
def test_terms_scaled_to_a_delay_fit_it_and_are_never_longer_than_the_defaults(unbonding_s: int) -> None:
    longest = DisputeTerms()
    for terms in (DisputeTerms.scaled(unbonding_s), DisputeTerms.for_test_network(unbonding_s)):
        assert terms.dispute_seconds + terms.challenge_seconds < unbonding_s
        assert terms.challenge_seconds // terms.epoch_seconds + terms.seasoning_epochs + 2 <= 96
        assert all(0 < value <= most for value, most in zip(terms.words(), longest.words(), strict=True))


async def test_deploy_with_a_refused_argument_says_which_constructor(contracts_chain: Chain, w3: AsyncWeb3[Any]) -> None:
    with pytest.raises(TransactionFailed, match="StakeRegistry"):
        await deploy(w3, contracts_chain.accounts[8], unbonding_delay_s=0, close_window_s=1)


async def test_deploy_of_play_money_elsewhere_is_refused(contracts_chain: Chain) -> None:
    with Anvil.start(block_time=None, chain_id=8453) as elsewhere:
        connection: AsyncWeb3[Any] = AsyncWeb3(AsyncHTTPProvider(elsewhere.url))
        with pytest.raises(ConfigError, match="8453"):
            await deploy(connection, contracts_chain.accounts[0], unbonding_delay_s=1, close_window_s=1)
        await connection.provider.disconnect()


async def test_deploy_elsewhere_without_limits_that_were_asked_for_is_refused(contracts_chain: Chain) -> None:
    with Anvil.start(block_time=None, chain_id=8453) as elsewhere:
        connection: AsyncWeb3[Any] = AsyncWeb3(AsyncHTTPProvider(elsewhere.url))
        account, token = contracts_chain.accounts[7], contracts_chain.book.token  # not its deployer: addresses would collide
        elsewhere.rpc("anvil_setCode", token, contracts_chain.anvil.rpc("eth_getCode", token, "latest"))
        before = await connection.eth.get_transaction_count(account.address)
        with pytest.raises(ConfigError, match="how much may come in") as caught:
            await deploy(connection, account, unbonding_delay_s=90, close_window_s=8, token=token)
        assert "EntryLimits" in caught.value.hint
        assert await connection.eth.get_transaction_count(account.address) == before, "nothing was sent"
        limits = EntryLimits(guardian=account.address, channel_max=100, channels_total_max=250, stake_max=100, stakes_total_max=150)
        for asked, most in ((limits, 100), (NO_LIMITS, 2**96 - 1)):
            book = await deploy(connection, account, unbonding_delay_s=90, close_window_s=8, token=token, limits=asked)
            contract = connection.eth.contract(address=connection.to_checksum_address(book.channels), abi=artifact("PaymentChannels").abi)
            assert await contract.functions.positionMax().call() == most
        await connection.provider.disconnect()


def test_book_saved_and_loaded_is_the_same_and_leaves_no_other_file(contracts_chain: Chain, tmp_path: Path) -> None:
    path = tmp_path / "new" / "contracts.json"
    contracts_chain.book.save(path)
    contracts_chain.book.save(path)
    assert AddressBook.load(path) == contracts_chain.book
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"token": "0x12"}, "addresses"),
        ({"chain_id": "1"}, "integers"),
        ({"deployed_block": -1}, "integers"),
        ({"code_hashes": {}}, "code_hashes"),
        ({"extra": 1}, "extra"),
    ],
)
def test_book_that_is_damaged_is_refused(contracts_chain: Chain, tmp_path: Path, change: dict[str, Any], what: str) -> None:
    path = tmp_path / "contracts.json"
    contracts_chain.book.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=what):
        AddressBook.load(path)


def test_book_that_is_missing_or_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "contracts.json"
    with pytest.raises(ConfigError, match="no address book"):
        AddressBook.load(path)
    path.write_text("{half")
    with pytest.raises(ConfigError, match="cannot read"):
        AddressBook.load(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="not an address book"):
        AddressBook.load(path)
