"""The fast voucher route, byte for byte what eth-account makes."""

from __future__ import annotations

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumarket.core.errors import BadSignature
from gpumarket.core.signing import LocalKey, channels_domain, market_domain, sign
from gpumarket.core.terms import Close, Voucher
from gpumarket.core.units import MONEY_MAX, Address, Hash, Money
from gpumarket.settlement.vouchers import close_digest, sign_close, sign_voucher, verify_close, verify_voucher, voucher_digest

KEY, OTHER = LocalKey(b"\5" * 32), LocalKey(b"\6" * 32)
DOMAIN = channels_domain(31337, Address(b"\x22" * 20))
CHANNEL = Hash(b"\x33" * 32)
EIP712_DOMAIN = {"name": "gpumarket PaymentChannels", "version": "1", "chainId": 31337, "verifyingContract": "0x" + "22" * 20}
FIELDS = [{"name": "channel", "type": "bytes32"}, {"name": "cumulative", "type": "uint96"}]


@given(st.binary(min_size=32, max_size=32), st.integers(0, MONEY_MAX))
@settings(max_examples=60, deadline=None)
def test_voucher_and_close_equal_eth_account_and_the_term(channel: bytes, cumulative: int) -> None:
    at = Hash(channel)
    for name, made, term in (
        ("Voucher", sign_voucher(KEY, DOMAIN, at, cumulative), Voucher(at, Money(cumulative))),
        ("Close", sign_close(KEY, DOMAIN, at, cumulative), Close(at, Money(cumulative))),
    ):
        signable = encode_typed_data(EIP712_DOMAIN, {name: FIELDS}, {"channel": channel, "cumulative": cumulative})
        assert made == bytes(Account.sign_message(signable, KEY.secret).signature) == sign(KEY, DOMAIN, term)
    assert voucher_digest(DOMAIN, at, cumulative) == DOMAIN.digest(Voucher(at, Money(cumulative)).struct_hash)
    assert close_digest(DOMAIN, at, cumulative) != voucher_digest(DOMAIN, at, cumulative)


def test_voucher_of_its_signer_is_accepted_and_no_other() -> None:
    signature = sign_voucher(KEY, DOMAIN, CHANNEL, 5)
    verify_voucher(DOMAIN, CHANNEL, 5, signature, KEY.address)
    with pytest.raises(BadSignature, match="the voucher is signed by"):
        verify_voucher(DOMAIN, CHANNEL, 5, signature, OTHER.address)


@pytest.mark.parametrize(
    ("channel", "cumulative"), [(CHANNEL, 6), (CHANNEL, 4), (Hash(b"\x34" * 32), 5)], ids=["more", "less", "other channel"]
)
def test_voucher_for_another_amount_or_channel_is_refused(channel: Hash, cumulative: int) -> None:
    with pytest.raises(BadSignature):
        verify_voucher(DOMAIN, channel, cumulative, sign_voucher(KEY, DOMAIN, CHANNEL, 5), KEY.address)


def test_voucher_of_another_contract_chain_or_kind_is_refused() -> None:
    signature = sign_voucher(KEY, DOMAIN, CHANNEL, 5)
    for domain in (
        channels_domain(31337, Address(b"\x23" * 20)),
        channels_domain(1, Address(b"\x22" * 20)),
        market_domain(31337, Address(b"\x22" * 20)),
    ):
        with pytest.raises(BadSignature):
            verify_voucher(domain, CHANNEL, 5, signature, KEY.address)
    with pytest.raises(BadSignature):  # a voucher is no consent to a close
        verify_close(DOMAIN, CHANNEL, 5, signature, KEY.address)


@pytest.mark.parametrize(("channel", "cumulative"), [(b"\1" * 31, 1), (b"\1" * 32, -1), (b"\1" * 32, 2**96)])
def test_voucher_that_does_not_fit_is_never_signed(channel: bytes, cumulative: int) -> None:
    with pytest.raises(ValueError, match="not a voucher"):
        sign_voucher(KEY, DOMAIN, Hash(channel), cumulative)
