"""F38: one voucher, bent in every field of its EIP-712 message and every byte of its signature, before everybody who takes vouchers.

`verify_voucher` (what every role runs), `redeem` and `redeemMany` (the contract) must refuse each of them and take only the one as signed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from contracts_fixtures import ONE, Chain, compact, contracts_chain
from eth_account import Account
from eth_account.signers.local import LocalAccount
from reliability import record
from web3.exceptions import ContractCustomError, Web3RPCError

from gpumarket.core.errors import BadSignature
from gpumarket.core.signing import channels_domain
from gpumarket.core.units import Address, Hash
from gpumarket.settlement.vouchers import verify_voucher

__all__ = ["contracts_chain"]

AMOUNT = ONE // 2
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
REFUSALS = ("NotSigner", "UnknownChannel", "AboveDeposit", "NothingToRedeem")
OPENZEPPELIN = {"0xd78bce0c", "0xfce698f7", "0xf645eedf"}
"""ECDSAInvalidSignatureS, ECDSAInvalidSignatureLength, ECDSAInvalidSignature."""


class Bent(NamedTuple):
    """A voucher as somebody shows it."""

    what: str
    channel: bytes
    cumulative: int
    signature: bytes


class Case(NamedTuple):
    """A channel whose signer signed for AMOUNT, another one of the same signer, and one whose signer is a contract."""

    chain: Chain
    signer: LocalAccount
    channel: bytes
    other: bytes
    good: bytes


@pytest.fixture
def case(contracts_chain: Chain) -> Case:
    signer, payee = Account.create(), contracts_chain.stranger()
    channel, other = (contracts_chain.open(contracts_chain.accounts[1], payee.address, ONE, signer=signer) for _ in range(2))
    return Case(contracts_chain, signer, channel, other, contracts_chain.voucher(signer, channel, AMOUNT))


def flipped(data: bytes, bit: int) -> bytes:
    return (int.from_bytes(data, "big") ^ 1 << bit).to_bytes(len(data), "big")


def of_another_message(case: Case) -> Iterator[Bent]:
    """The signer signed something else than what is shown."""
    chain, (channel, amount) = case.chain, (case.channel, AMOUNT)
    domains: list[dict[str, Any]] = [{"chainId": chain.book.chain_id + 1}, {"chainId": 0}, {"version": "2"}, {"name": "gpumarket"}]
    domains += [{"verifyingContract": at} for at in (chain.registry.address, chain.token.address, "0x" + "00" * 20)]
    for domain in domains:
        yield Bent(f"domain {domain}", channel, amount, chain.voucher(case.signer, channel, amount, **domain))
    yield Bent("a close", channel, amount, chain.voucher(case.signer, channel, amount, kind="Close"))
    yield Bent("another channel", case.other, amount, case.good)
    yield Bent("another signer", channel, amount, chain.voucher(chain.accounts[1], channel, amount))  # the payer, who is not the signer
    for bit in range(0, 256, 8):
        yield Bent(f"bit {bit} of the channel", flipped(channel, bit), amount, case.good)
    for bit in range(96):
        yield Bent(f"bit {bit} of the amount", channel, amount ^ 1 << bit, case.good)


def of_another_signature(case: Case) -> Iterator[Bent]:
    """The message as signed, under bytes that are not its signature."""
    r, s, v = case.good[:32], int.from_bytes(case.good[32:64], "big"), case.good[64]
    for bit in range(8, 8 * 65):
        yield Bent(f"bit {bit} of r and s", case.channel, AMOUNT, flipped(case.good, bit))
    for other in set(range(256)) - {v}:
        yield Bent(f"v {other}", case.channel, AMOUNT, case.good[:64] + bytes([other]))
    high = (ORDER - s).to_bytes(32, "big")
    zero = bytes(32)
    for what, bent in (
        ("high s", r + high + bytes([55 - v])),
        ("high s, same v", r + high + bytes([v])),
        ("s above the order", r + (s + ORDER).to_bytes(33, "big")[-32:] + bytes([v])),
        ("r of zero", zero + case.good[32:]),
        ("s of zero", r + zero + bytes([v])),
        ("r and s of zero, which name the zero signer", zero + zero + bytes([v])),
        ("all zero", bytes(65)),
        ("nothing", b""),
        ("one byte short", case.good[:64]),
        ("one byte long", case.good + b"\0"),
        ("the compact form", b"".join(compact(case.good))),
        ("twice", case.good * 2),
    ):
        yield Bent(what, case.channel, AMOUNT, bent)


def bent_vouchers(case: Case) -> list[Bent]:
    return [*of_another_message(case), *of_another_signature(case)]


def taken_by_us(case: Case, bent: Bent) -> bool:
    domain = channels_domain(case.chain.book.chain_id, Address(bytes.fromhex(case.chain.channels.address[2:])))
    try:
        verify_voucher(domain, Hash(bent.channel), bent.cumulative, bent.signature, Address(bytes.fromhex(case.signer.address[2:])))
    except BadSignature:
        return False
    return True


def taken_alone(case: Case, bent: Bent) -> bool:
    """Whether `redeem` would pay. Fails for a refusal that is not one of the contract's own."""
    chain = case.chain
    try:
        chain.channels.functions.redeem(bent.channel, bent.cumulative, bent.signature).call({"from": chain.accounts[5].address})
    except (ContractCustomError, Web3RPCError) as error:
        if not any(known in str(error) for known in OPENZEPPELIN):
            assert chain.decode_error(error)[0] in REFUSALS, bent.what
        return False
    return True


def tried_in_batches(case: Case, bent: list[Bent]) -> int:
    """How many of these `redeemMany` was shown, and skipped every one; it takes compact signatures, so only what these can say."""
    chain = case.chain
    fits = [b for b in bent if len(b.signature) == 65 and b.signature[64] in (27, 28) and not b.signature[32] >> 7]
    for start in range(0, len(fits), 100):
        claims = [(b.channel, b.cumulative, *compact(b.signature)) for b in fits[start : start + 100]]
        receipt = chain.send(chain.channels.functions.redeemMany(claims), chain.accounts[5])
        assert len(chain.events(chain.channels, "ClaimSkipped", receipt)) == len(receipt["logs"]) == len(claims)
    return len(fits)


def test_bent_voucher_is_taken_by_nobody_and_the_straight_one_by_all(case: Case) -> None:
    bent, straight = bent_vouchers(case), Bent("as signed", case.channel, AMOUNT, case.good)
    ours = [b.what for b in bent if taken_by_us(case, b)]
    theirs = [b.what for b in bent if taken_alone(case, b)]
    assert (ours, theirs) == ([], [])
    batched = tried_in_batches(case, bent)
    assert batched > 600
    assert taken_by_us(case, straight) and taken_alone(case, straight), "it was the bending that was refused"
    straight_claim = (case.channel, AMOUNT, *compact(case.good))
    case.chain.send(case.chain.channels.functions.redeemMany([straight_claim]), case.chain.accounts[5])
    assert case.chain.channels.functions.channel(case.channel).call()[3] == AMOUNT
    assert not taken_alone(case, straight), "and it pays once"
    record("F38", 2 * len(bent) + batched, "0 bent vouchers taken by verify_voucher, redeem and redeemMany", "0")


def test_bent_voucher_of_a_channel_whose_signer_is_a_contract_pays_nobody(case: Case) -> None:
    """EIP-1271 is not spoken: a contract's word, whatever it answers, is no signature here."""
    chain = case.chain
    channel = chain.open(chain.accounts[1], chain.stranger().address, ONE, signer=_named(chain.token.address))
    shown = [chain.voucher(case.signer, channel, AMOUNT), chain.voucher(chain.accounts[1], channel, AMOUNT), b"", bytes(65), b"\1" * 96]
    assert not [s for s in shown if taken_alone(case, Bent("a contract's", channel, AMOUNT, s))]
    record("F38", len(shown), "signer is a contract (EIP-1271): 0 taken", "0")


class _Named(NamedTuple):
    address: str


def _named(address: str) -> LocalAccount:
    """Whoever lies at this address, as a signer that is only named."""
    return _Named(address)  # type: ignore[return-value]
