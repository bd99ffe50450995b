"""PaymentChannels on a chain: what pays, what is refused and with which error, and what a follower sees."""

from __future__ import annotations

from typing import Any

import pytest
from contracts_fixtures import CLOSE_WINDOW_SECONDS, FAR, ONE, Chain, compact, contracts_chain, selector
from eth_account import Account
from eth_account.messages import _hash_eip191_message
from eth_account.signers.local import LocalAccount

from gpumarket.contracts.artifacts import artifact

__all__ = ["contracts_chain"]

ZERO = "0x" + "00" * 20
NOWHERE = b"\x07" * 32
HALF_ORDER_SUM = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


@pytest.fixture
def chain(contracts_chain: Chain) -> Chain:
    return contracts_chain


@pytest.fixture
def payer(chain: Chain) -> LocalAccount:
    return chain.accounts[1]


@pytest.fixture
def payee(chain: Chain) -> LocalAccount:
    """A payee that has never been paid."""
    return chain.stranger()


@pytest.fixture
def signer() -> LocalAccount:
    account: LocalAccount = Account.create()
    return account


@pytest.fixture
def channel(chain: Chain, payer: LocalAccount, payee: LocalAccount, signer: LocalAccount) -> bytes:
    return chain.open(payer, payee.address, ONE, signer=signer)


def claim(chain: Chain, signer: LocalAccount, channel: bytes, cumulative: int) -> tuple[Any, ...]:
    return (channel, cumulative, *compact(chain.voucher(signer, channel, cumulative)))


def reason(name: str) -> bytes:
    entry = next(e for e in artifact("PaymentChannels").abi if e["type"] == "error" and e["name"] == name)
    return bytes.fromhex(selector(entry)[2:])


def skipped(chain: Chain, receipt: Any) -> list[tuple[bytes, bytes]]:
    return [(bytes(e["id"]), bytes(e["reason"])) for e in chain.events(chain.channels, "ClaimSkipped", receipt)]


# ---------------------------------------------------------------- digests and layout


def test_digests_equal_those_of_an_independent_signer(chain: Chain) -> None:
    for kind, call in (("Voucher", chain.channels.functions.voucherDigest), ("Close", chain.channels.functions.closeDigest)):
        for amount in (0, 1, ONE, 2**96 - 1):
            assert bytes(call(NOWHERE, amount).call()) == bytes(_hash_eip191_message(chain.typed(kind, NOWHERE, amount)))


def test_digests_equal_those_of_core_signing(chain: Chain) -> None:
    from gpumarket.core.signing import channels_domain
    from gpumarket.core.terms import Close, Voucher
    from gpumarket.core.units import Address, Hash, Money

    domain = channels_domain(chain.book.chain_id, Address(bytes.fromhex(chain.channels.address[2:])))
    voucher, closing = Voucher(Hash(NOWHERE), Money(ONE)), Close(Hash(NOWHERE), Money(ONE))
    assert bytes(chain.channels.functions.voucherDigest(NOWHERE, ONE).call()) == domain.digest(voucher.struct_hash)
    assert bytes(chain.channels.functions.closeDigest(NOWHERE, ONE).call()) == domain.digest(closing.struct_hash)


def test_channel_lies_in_three_slots_of_which_redemption_touches_two() -> None:
    members = artifact("PaymentChannels").storage_layout["structs"]["PaymentChannels.Channel"]
    assert [(m["label"], m["slot"]) for m in members] == [
        ("signer", "0"),
        ("deposit", "0"),
        ("payee", "1"),
        ("claimed", "1"),
        ("payer", "2"),
        ("expiresAt", "2"),
        ("closesAt", "2"),
    ]


# ---------------------------------------------------------------- open and top up


def test_open_takes_the_deposit_and_says_all_of_it(chain: Chain, payer: LocalAccount, payee: LocalAccount, signer: LocalAccount) -> None:
    nonce = chain.channels.functions.openNonce(payer.address).call()
    expected = bytes(chain.channels.functions.channelId(payer.address, payee.address, nonce).call())
    before = chain.balance(chain.channels.address)
    receipt = chain.send(chain.channels.functions.open(payee.address, signer.address, ONE, FAR), payer)
    assert chain.balance(chain.channels.address) == before + ONE
    (event,) = chain.events(chain.channels, "Opened", receipt)
    assert event == {
        "id": expected,
        "payer": payer.address,
        "payee": payee.address,
        "signer": signer.address,
        "amount": ONE,
        "expiresAt": FAR,
    }
    assert chain.channels.functions.channel(expected).call() == (signer.address, ONE, payee.address, 0, payer.address, FAR, 0)


def test_open_twice_between_the_same_two_gives_two_ids(chain: Chain, payer: LocalAccount, payee: LocalAccount) -> None:
    assert chain.open(payer, payee.address, 1) != chain.open(payer, payee.address, 1)


@pytest.mark.parametrize(
    ("payee_", "signer_", "amount", "expires", "error"),
    [
        (ZERO, "signer", 1, FAR, "InvalidPayee"),
        ("channels", "signer", 1, FAR, "InvalidPayee"),
        ("token", "signer", 1, FAR, "InvalidPayee"),
        ("payee", ZERO, 1, FAR, "InvalidSigner"),
        ("payee", "signer", 0, FAR, "ZeroAmount"),
        ("payee", "signer", 1, 1, "InvalidExpiry"),
    ],
)
def test_open_with_a_bad_argument_is_refused(
    chain: Chain,
    payer: LocalAccount,
    payee: LocalAccount,
    signer: LocalAccount,
    payee_: str,
    signer_: str,
    amount: int,
    expires: int,
    error: str,
) -> None:
    named = {"payee": payee, "signer": signer, "channels": chain.channels, "token": chain.token}
    first, second = (named[name].address if name in named else name for name in (payee_, signer_))
    assert chain.refused(chain.channels.functions.open(first, second, amount, expires), payer)[0] == error


def test_topup_adds_and_extends_and_says_so(chain: Chain, payer: LocalAccount, payee: LocalAccount) -> None:
    expires = chain.now() + 1000
    channel = chain.open(payer, payee.address, 5, expires=expires)
    receipt = chain.send(chain.channels.functions.topUp(channel, 7, expires + 10), payer)
    assert chain.events(chain.channels, "ToppedUp", receipt) == [{"id": channel, "amount": 7, "deposit": 12, "expiresAt": expires + 10}]
    chain.send(chain.channels.functions.topUp(channel, 0, expires + 11), payer)
    assert chain.channels.functions.channel(channel).call()[5] == expires + 11


def test_topup_is_refused_to_strangers_when_shrinking_empty_closing_or_unknown(
    chain: Chain, payer: LocalAccount, payee: LocalAccount, channel: bytes
) -> None:
    top_up = chain.channels.functions.topUp
    assert chain.refused(top_up(channel, 1, FAR), chain.accounts[2])[0] == "NotPayer"
    assert chain.refused(top_up(channel, 1, FAR - 1), payer) == ("InvalidExpiry", (FAR - 1, FAR))
    assert chain.refused(top_up(channel, 0, FAR), payer)[0] == "ZeroAmount"
    assert chain.refused(top_up(NOWHERE, 1, FAR), payer)[0] == "UnknownChannel"
    chain.send(chain.channels.functions.requestClose(channel), payer)
    assert chain.refused(top_up(channel, 1, FAR), payer)[0] == "AlreadyClosing"


# ---------------------------------------------------------------- redeem


def test_redeem_by_anyone_pays_the_payee_the_difference(chain: Chain, payee: LocalAccount, signer: LocalAccount, channel: bytes) -> None:
    for cumulative, amount in ((30, 30), (100, 70)):
        call = chain.channels.functions.redeem(channel, cumulative, chain.voucher(signer, channel, cumulative))
        receipt = chain.send(call, chain.accounts[5])
        expected = {"id": channel, "payee": payee.address, "amount": amount, "cumulative": cumulative}
        assert chain.events(chain.channels, "Redeemed", receipt) == [expected]
        assert chain.balance(payee.address) == cumulative


def test_redeem_of_what_was_redeemed_or_less_is_refused(chain: Chain, signer: LocalAccount, channel: bytes) -> None:
    redeem = chain.channels.functions.redeem
    chain.send(redeem(channel, 50, chain.voucher(signer, channel, 50)), chain.accounts[5])
    for cumulative in (0, 49, 50):
        call = redeem(channel, cumulative, chain.voucher(signer, channel, cumulative))
        assert chain.refused(call, chain.accounts[5]) == ("NothingToRedeem", (channel, cumulative, 50))


def test_redeem_above_the_deposit_or_of_no_channel_is_refused(chain: Chain, signer: LocalAccount, channel: bytes) -> None:
    redeem = chain.channels.functions.redeem
    call = redeem(channel, ONE + 1, chain.voucher(signer, channel, ONE + 1))
    assert chain.refused(call, chain.accounts[5]) == ("AboveDeposit", (channel, ONE + 1, ONE))
    assert chain.refused(redeem(NOWHERE, 1, chain.voucher(signer, NOWHERE, 1)), chain.accounts[5])[0] == "UnknownChannel"


def test_redeem_with_another_signature_amount_channel_or_domain_is_refused(
    chain: Chain, payer: LocalAccount, payee: LocalAccount, signer: LocalAccount, channel: bytes
) -> None:
    other = chain.open(payer, payee.address, ONE, signer=signer)
    forgeries = [
        chain.voucher(payer, channel, 10),  # the payer, which is not the signer here
        chain.voucher(signer, channel, 11),
        chain.voucher(signer, other, 10),
        chain.voucher(signer, channel, 10, kind="Close"),
        chain.voucher(signer, channel, 10, chainId=1),
        chain.voucher(signer, channel, 10, verifyingContract=chain.registry.address),
        chain.voucher(signer, channel, 10, name="gpumarket"),
    ]
    for forged in forgeries:
        assert chain.refused(chain.channels.functions.redeem(channel, 10, forged), chain.accounts[5])[0] == "NotSigner"


def test_redeem_with_a_malleable_or_short_signature_is_refused(chain: Chain, signer: LocalAccount, channel: bytes) -> None:
    good = chain.voucher(signer, channel, 10)
    high_s = good[:32] + (HALF_ORDER_SUM - int.from_bytes(good[32:64], "big")).to_bytes(32, "big") + bytes([55 - good[64]])
    for bad in (high_s, good[:64], b"", bytes(65)):
        with pytest.raises(Exception, match=r"0x(d78bce0c|fce698f7|f645eedf)"):  # ECDSAInvalidSignatureS, …Length, …Signature
            chain.channels.functions.redeem(channel, 10, bad).call({"from": chain.accounts[5].address})


# ---------------------------------------------------------------- redeem many, push, withdraw


def test_redeem_many_credits_good_items_and_skips_bad_ones_with_their_reason(
    chain: Chain, payer: LocalAccount, payee: LocalAccount, signer: LocalAccount, channel: bytes
) -> None:
    second_payee = chain.stranger()
    second = chain.open(payer, second_payee.address, 100, signer=signer)
    claims = [
        claim(chain, signer, channel, 40),
        claim(chain, signer, channel, 40),
        claim(chain, payer, channel, 60),
        claim(chain, signer, second, 101),
        claim(chain, signer, NOWHERE, 1),
        claim(chain, signer, second, 30),
        claim(chain, signer, channel, 45),
        (channel, 50, bytes(32), bytes(32)),
    ]
    receipt = chain.send(chain.channels.functions.redeemMany(claims), chain.accounts[5])
    assert skipped(chain, receipt) == [
        (channel, reason("NothingToRedeem")),
        (channel, reason("NotSigner")),
        (second, reason("AboveDeposit")),
        (NOWHERE, reason("UnknownChannel")),
        (channel, reason("NotSigner")),
    ]
    assert chain.channels.functions.credited(payee.address).call() == 45
    assert chain.channels.functions.credited(second_payee.address).call() == 30


def test_redeem_many_of_nothing_changes_nothing(chain: Chain) -> None:
    assert not chain.send(chain.channels.functions.redeemMany([]), chain.accounts[5])["logs"]


def test_push_advances_the_cumulative_amount_so_that_the_voucher_pays_no_second_time(
    chain: Chain, payee: LocalAccount, signer: LocalAccount, channel: bytes
) -> None:
    hot = chain.adopt(signer)
    chain.send(chain.channels.functions.push([channel], [70]), hot)
    assert chain.channels.functions.credited(payee.address).call() == 70
    call = chain.channels.functions.redeem(channel, 70, chain.voucher(signer, channel, 70))
    assert chain.refused(call, chain.accounts[5])[0] == "NothingToRedeem"


def test_push_skips_what_others_can_bring_about(
    chain: Chain, payer: LocalAccount, payee: LocalAccount, signer: LocalAccount, channel: bytes
) -> None:
    hot, second = chain.adopt(signer), chain.open(payer, payee.address, 100, signer=signer)
    chain.send(chain.channels.functions.redeem(channel, 50, chain.voucher(signer, channel, 50)), chain.accounts[5])
    receipt = chain.send(chain.channels.functions.push([channel, NOWHERE, second], [50, 10, 10]), hot)
    assert skipped(chain, receipt) == [(channel, reason("NothingToRedeem")), (NOWHERE, reason("UnknownChannel"))]
    assert chain.channels.functions.credited(payee.address).call() == 10


def test_push_reverts_on_the_callers_own_mistakes(chain: Chain, payer: LocalAccount, signer: LocalAccount, channel: bytes) -> None:
    push = chain.channels.functions.push
    assert chain.refused(push([channel], [1]), payer)[0] == "NotSigner"
    assert chain.refused(push([channel], [ONE + 1]), signer)[0] == "AboveDeposit"
    assert chain.refused(push([channel, channel], [1]), signer) == ("LengthMismatch", (2, 1))


def test_withdraw_pays_the_credited_balance_once_to_anywhere(
    chain: Chain, payee: LocalAccount, signer: LocalAccount, channel: bytes
) -> None:
    chain.send(chain.channels.functions.redeemMany([claim(chain, signer, channel, 33)]), chain.accounts[5])
    elsewhere = Account.create().address
    receipt = chain.send(chain.channels.functions.withdraw(elsewhere), payee)
    assert chain.events(chain.channels, "Withdrawn", receipt) == [{"payee": payee.address, "to": elsewhere, "amount": 33}]
    assert chain.balance(elsewhere) == 33
    assert chain.refused(chain.channels.functions.withdraw(elsewhere), payee)[0] == "NothingCredited"
    for nowhere in (ZERO, chain.channels.address):
        assert chain.refused(chain.channels.functions.withdraw(nowhere), payee)[0] == "InvalidRecipient"


# ---------------------------------------------------------------- closing


def test_cooperative_close_splits_the_deposit_at_once(
    chain: Chain, payer: LocalAccount, payee: LocalAccount, signer: LocalAccount, channel: bytes
) -> None:
    chain.send(chain.channels.functions.redeem(channel, 10, chain.voucher(signer, channel, 10)), chain.accounts[5])
    before = chain.balance(payer.address)
    consent = chain.voucher(payee, channel, 25, kind="Close")
    receipt = chain.send(chain.channels.functions.cooperativeClose(channel, 25, consent), payer)
    assert chain.events(chain.channels, "Closed", receipt) == [{"id": channel, "refunded": ONE - 25}]
    assert chain.balance(payer.address) == before + ONE - 25
    assert chain.channels.functions.credited(payee.address).call() == 15
    assert chain.channels.functions.channel(channel).call() == (ZERO, 0, ZERO, 0, ZERO, 0, 0)


def test_cooperative_close_below_what_was_redeemed_takes_nothing_back(
    chain: Chain, payer: LocalAccount, payee: LocalAccount, signer: LocalAccount, channel: bytes
) -> None:
    chain.send(chain.channels.functions.redeem(channel, 10, chain.voucher(signer, channel, 10)), chain.accounts[5])
    consent = chain.voucher(payee, channel, 5, kind="Close")
    receipt = chain.send(chain.channels.functions.cooperativeClose(channel, 5, consent), payer)
    assert chain.events(chain.channels, "Closed", receipt) == [{"id": channel, "refunded": ONE - 10}]
    assert chain.balance(payee.address) == 10


def test_cooperative_close_without_consent_by_a_stranger_or_above_the_deposit_is_refused(
    chain: Chain, payer: LocalAccount, payee: LocalAccount, channel: bytes
) -> None:
    close = chain.channels.functions.cooperativeClose
    consent = chain.voucher(payee, channel, 25, kind="Close")
    assert chain.refused(close(channel, 25, consent), payee)[0] == "NotPayer"
    assert chain.refused(close(channel, 24, consent), payer)[0] == "NotPayee"
    assert chain.refused(close(channel, 25, chain.voucher(payer, channel, 25, kind="Close")), payer)[0] == "NotPayee"
    assert chain.refused(close(channel, 25, chain.voucher(payee, channel, 25)), payer)[0] == "NotPayee"
    over = chain.voucher(payee, channel, ONE + 1, kind="Close")
    assert chain.refused(close(channel, ONE + 1, over), payer)[0] == "AboveDeposit"
    assert chain.refused(close(NOWHERE, 1, consent), payer)[0] == "UnknownChannel"


def test_close_waits_for_the_window_in_which_the_payee_still_redeems(
    chain: Chain, payer: LocalAccount, payee: LocalAccount, signer: LocalAccount, channel: bytes
) -> None:
    close, redeem = chain.channels.functions.close, chain.channels.functions.redeem
    assert chain.refused(close(channel), payer) == ("TooEarly", (channel, 0, FAR))
    receipt = chain.send(chain.channels.functions.requestClose(channel), payer)
    (event,) = chain.events(chain.channels, "CloseRequested", receipt)
    assert event["closesAt"] == chain.w3.eth.get_block(receipt["blockNumber"])["timestamp"] + CLOSE_WINDOW_SECONDS
    assert chain.refused(close(channel), payer)[0] == "TooEarly"
    chain.pass_time(CLOSE_WINDOW_SECONDS)
    chain.send(redeem(channel, 20, chain.voucher(signer, channel, 20)), chain.accounts[5])  # until it is closed, even now
    receipt = chain.send(close(channel), payer)
    assert chain.events(chain.channels, "Closed", receipt) == [{"id": channel, "refunded": ONE - 20}]
    assert chain.balance(payee.address) == 20
    late = redeem(channel, 30, chain.voucher(signer, channel, 30))
    assert chain.refused(late, chain.accounts[5])[0] == "UnknownChannel"


def test_close_after_expiry_needs_no_request(chain: Chain, payer: LocalAccount, payee: LocalAccount) -> None:
    channel = chain.open(payer, payee.address, 9, expires=chain.now() + 50)
    chain.pass_time(60)
    receipt = chain.send(chain.channels.functions.close(channel), payer)
    assert chain.events(chain.channels, "Closed", receipt) == [{"id": channel, "refunded": 9}]


def test_close_and_its_request_are_refused_to_others_twice_or_of_no_channel(chain: Chain, payer: LocalAccount, channel: bytes) -> None:
    request, close = chain.channels.functions.requestClose, chain.channels.functions.close
    for call in (request, close):
        assert chain.refused(call(channel), chain.accounts[2])[0] == "NotPayer"
        assert chain.refused(call(NOWHERE), payer)[0] == "UnknownChannel"
    chain.send(request(channel), payer)
    assert chain.refused(request(channel), payer)[0] == "AlreadyClosing"


def test_constructor_refuses_a_token_without_code_and_a_bad_window(chain: Chain) -> None:
    compiled = artifact("PaymentChannels")
    make = chain.w3.eth.contract(abi=compiled.abi, bytecode=compiled.bytecode).constructor
    money = chain.token.address
    refused = ((ZERO, 600, "InvalidToken"), (money, 0, "InvalidCloseWindow"), (money, 2**39, "InvalidCloseWindow"))
    for token, window, error in refused:
        with pytest.raises(Exception, match="0x") as caught:
            make(token, window, ZERO, 0, 0).estimate_gas({"from": chain.accounts[0].address})
        assert chain.decode_error(caught.value)[0] == error
