"""Channels under random histories: the invariants hold after each step, and no event that is refused changes anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulation.profiles import EXAMPLES, EXAMPLES_ALL, run

from gpumarket.core.errors import ChannelExpiring, FundsError, JournalError, OutOfFunds
from gpumarket.core.units import Address, Hash
from gpumarket.settlement.channel import (
    ChainClosed,
    ChainClosing,
    ChainRedeemed,
    ChainToppedUp,
    HoldAmount,
    OweHeld,
    PaidChannel,
    Pay,
    ReceivedChannel,
    ReceiveVoucher,
    Release,
    ReleaseOpen,
    Reserve,
    ReserveOpen,
    ReturnHeld,
    check,
    handle,
)

ID, SIGNER, PAYEE = Hash(b"\1" * 32), Address(b"\2" * 20), Address(b"\3" * 20)
amounts = st.integers(0, 120)
EXPIRY = 1_000
STEPS = 40
"""A channel's rules are cheap, and it takes many of them to meet its limits."""


class PayeeMachine(RuleBasedStateMachine):
    """A ledger of our own beside the channel: every attempt's maximum, every held claim."""

    @initialize(deposit=st.integers(1, 400))
    def begin(self, deposit: int) -> None:
        self.state = ReceivedChannel(ID, SIGNER, deposit, EXPIRY)
        self.open: list[int] = []
        self.held: list[int] = []
        self.earned = 0
        self.chain_paid = 0

    @rule(more=amounts, signature=st.binary(min_size=65, max_size=65))
    def voucher(self, more: int, signature: bytes) -> None:
        before, cumulative = self.state, self.state.voucher + more - 20  # also old copies
        event = ReceiveVoucher(max(0, cumulative), signature)
        if event.cumulative <= before.voucher:
            assert handle(before, event) == before
        elif before.closing or before.closed:
            with pytest.raises(ChannelExpiring):
                handle(before, event)
        elif event.cumulative > before.deposit:
            with pytest.raises(OutOfFunds):
                handle(before, event)
        else:
            self.state = handle(before, event)
            assert (self.state.voucher, self.state.signature) == (event.cumulative, signature)

    @rule(amount=amounts, until=st.integers(0, 2 * EXPIRY))
    def reserve(self, amount: int, until: int) -> None:
        before = self.state
        allowed = not before.closing and not before.closed and until <= before.expires_at and amount <= before.free
        if not allowed:
            with pytest.raises(FundsError):
                handle(before, ReserveOpen(amount, until))
            return
        self.state = handle(before, ReserveOpen(amount, until))
        self.open.append(amount)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """An attempt ends: part of its maximum is held, the rest is free again."""
        maximum = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        amount = data.draw(st.integers(0, maximum))
        self.state = handle(handle(self.state, HoldAmount(amount)), ReleaseOpen(maximum - amount))
        self.held.append(amount)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), accepted=st.booleans())
    def decide(self, data: st.DataObject, accepted: bool) -> None:
        amount = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        free = self.state.free
        self.state = handle(self.state, OweHeld(amount) if accepted else ReturnHeld(amount))
        self.earned += amount if accepted else 0
        assert self.state.free == free + (0 if accepted else amount)

    @rule(amount=amounts)
    def redeem_on_chain(self, amount: int) -> None:
        self.chain_paid = max(self.chain_paid, min(amount, self.state.deposit))
        self.state = handle(self.state, ChainRedeemed(self.chain_paid))

    @rule(more=amounts)
    def top_up(self, more: int) -> None:
        self.state = handle(self.state, ChainToppedUp(self.state.deposit + more, self.state.expires_at))

    @rule()
    def old_top_up_comes_again(self) -> None:
        assert handle(self.state, ChainToppedUp(0, 0)) == self.state

    @rule(closed=st.booleans())
    def close(self, closed: bool) -> None:
        self.state = handle(self.state, ChainClosed() if closed else ChainClosing(500))

    @invariant()
    def i1_solvency(self) -> None:
        if hasattr(self, "state"):
            check(self.state)
            assert self.state.open == sum(self.open)
            assert self.state.held == sum(self.held)
            assert self.state.used == self.earned
            assert self.state.free >= 0
            assert 0 <= self.state.redeemable <= self.state.deposit
            assert self.state.redeemed == self.chain_paid

    @invariant()
    def releasing_more_than_there_is_never_passes(self) -> None:
        if hasattr(self, "state"):
            for event in (ReleaseOpen(self.state.open + 1), HoldAmount(self.state.open + 1), OweHeld(self.state.held + 1)):
                with pytest.raises(AssertionError):
                    handle(self.state, event)


class PayerMachine(RuleBasedStateMachine):
    """The other end, with a guard of its own: what was signed never falls and never repeats."""

    @initialize(deposit=st.integers(1, 400))
    def begin(self, deposit: int) -> None:
        self.state = PaidChannel(ID, PAYEE, deposit, EXPIRY)
        self.reserved: list[int] = []
        self.signed = [0]

    @rule(amount=amounts, until=st.integers(0, 2 * EXPIRY))
    def reserve(self, amount: int, until: int) -> None:
        before = self.state
        if before.closing or before.closed or until > before.expires_at or amount > before.free:
            with pytest.raises(FundsError):
                handle(before, Reserve(amount, until))
            return
        self.state = handle(before, Reserve(amount, until))
        self.reserved.append(amount)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def pay_reserved(self, data: st.DataObject) -> None:
        maximum = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        amount = data.draw(st.integers(0, maximum))
        self.state = handle(self.state, Pay(amount, maximum))
        self.note(amount)

    @rule(amount=amounts)
    def pay_free(self, amount: int) -> None:
        if amount > self.state.free:  # all of it, on a closed channel
            with pytest.raises(ChannelExpiring if self.state.closed else OutOfFunds):
                handle(self.state, Pay(amount, reserved=0))
            return
        self.state = handle(self.state, Pay(amount, reserved=0))
        self.note(amount)

    def note(self, amount: int) -> None:
        assert self.state.vouchered == self.signed[-1] + amount
        self.signed.append(self.state.vouchered)

    @precondition(lambda self: self.reserved)
    @rule()
    def release(self) -> None:
        self.state = handle(self.state, Release(self.reserved.pop()))

    @rule(amount=amounts)
    def redeemed_on_chain(self, amount: int) -> None:
        if amount > self.state.vouchered:
            with pytest.raises(JournalError, match="this ledger has signed"):
                handle(self.state, ChainRedeemed(amount))
        else:
            self.state = handle(self.state, ChainRedeemed(amount))

    @rule(more=amounts)
    def top_up(self, more: int) -> None:
        self.state = handle(self.state, ChainToppedUp(self.state.deposit + more, self.state.expires_at + 1))

    @rule(closed=st.booleans())
    def close(self, closed: bool) -> None:
        self.state = handle(self.state, ChainClosed() if closed else ChainClosing(500))

    @invariant()
    def never_promises_more_than_the_deposit(self) -> None:
        if hasattr(self, "state"):
            check(self.state)
            assert self.state.reserved == sum(self.reserved)
            assert self.signed == sorted(self.signed)
            assert self.state.closed or self.state.free == self.state.deposit - self.state.vouchered - self.state.reserved

    @invariant()
    def a_broken_state_is_noticed(self) -> None:
        if hasattr(self, "state"):
            with pytest.raises(AssertionError):
                check(replace(self.state, reserved=self.state.deposit + 1))


@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(EXAMPLES_ALL, marks=[pytest.mark.slow, pytest.mark.timeout(3_600)])])
@pytest.mark.parametrize("machine", [PayeeMachine, PayerMachine])
def test_channel_random_histories_stay_solvent_and_never_sign_less(machine: type[RuleBasedStateMachine], examples: int) -> None:
    run(machine, examples, steps=STEPS)
