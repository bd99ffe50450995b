"""Signed calls under random histories: each is taken once at most, by whom it was made for, for what it says, while it is fresh."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from node_fixtures import FixedClock
from simulation.profiles import EXAMPLES, EXAMPLES_ALL, run

from gpumarket.core.codec import CALL_SKEW_SECONDS, CallGuard, signed_call
from gpumarket.core.errors import BadSignature, Busy
from gpumarket.core.signing import LocalKey, market_domain
from gpumarket.core.units import Address, Hash
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1 import terms_pb2 as pb

DOMAIN = market_domain(31_337, Address(b"\x11" * 20))
ME, ANOTHER = Address(b"\x05" * 20), Address(b"\x06" * 20)
CALLERS = [LocalKey(bytes([1 + i]) * 32) for i in range(3)]
METHOD = "Provider/TakeEvidence"
LIMIT = 4


class CallMachine(RuleBasedStateMachine):
    """One receiver, and everything that was ever sent to it."""

    @initialize()
    def begin(self) -> None:
        self.clock = FixedClock()
        self.known: set[Address] = set()
        self.guard = CallGuard(DOMAIN, ME, self.clock, limit=LIMIT, known=self.known.__contains__)
        self.sent: list[pb.SignedCall] = []
        self.taken: Counter[bytes] = Counter()

    @rule(who=st.integers(0, 2), skew=st.sampled_from([-CALL_SKEW_SECONDS - 1, -CALL_SKEW_SECONDS, 0, CALL_SKEW_SECONDS]))
    def call(self, who: int, skew: int) -> None:
        """A clock that is off by `skew`."""
        nonce = Hash(len(self.sent).to_bytes(32, "big"))
        body = ppb.PanelEvidence(dispute=nonce, evidence=b"x")
        self.sent.append(signed_call(CALLERS[who], DOMAIN, METHOD, body, ME, int(self.clock.now()) + skew, nonce))
        self._arrives(self.sent[-1])

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def old_copy_arrives(self, data: st.DataObject) -> None:
        self._arrives(data.draw(st.sampled_from(self.sent)))

    @precondition(lambda self: self.sent)
    @rule()
    def all_come_again(self) -> None:
        for call in self.sent:
            self._arrives(call)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), what=st.sampled_from(["body", "nonce", "issued_at", "signature"]))
    def forged_copy_is_refused(self, data: st.DataObject, what: str) -> None:
        forged = pb.SignedCall()
        forged.CopyFrom(data.draw(st.sampled_from(self.sent)))
        if what == "issued_at":
            forged.issued_at = int(self.clock.now()) + 1 if forged.issued_at == int(self.clock.now()) else int(self.clock.now())
        else:
            setattr(forged, what, bytes(reversed(getattr(forged, what)))[:-1] + b"\x01")
        with pytest.raises(BadSignature):
            self.guard.open(METHOD, forged, ppb.PanelEvidence)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def call_for_another_is_refused(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.sent))
        with pytest.raises(BadSignature):
            self.guard.open("Provider/GetReceipt", call, ppb.PanelEvidence)
        with pytest.raises(BadSignature):
            CallGuard(DOMAIN, ANOTHER, self.clock).open(METHOD, call, ppb.PanelEvidence)

    @rule(who=st.integers(0, 2))
    def caller_becomes_known(self, who: int) -> None:
        self.known.add(CALLERS[who].address)

    @rule(who=st.integers(0, 2))
    def caller_is_forgotten(self, who: int) -> None:
        self.known.discard(CALLERS[who].address)

    @rule(seconds=st.sampled_from([1, CALL_SKEW_SECONDS, CALL_SKEW_SECONDS + 1, 2 * CALL_SKEW_SECONDS + 1]))
    def time_passes(self, seconds: int) -> None:
        self.clock.at += seconds

    def _arrives(self, call: pb.SignedCall) -> None:
        fresh = abs(int(self.clock.now()) - call.issued_at) <= CALL_SKEW_SECONDS
        try:
            caller, body = self.guard.open(METHOD, call, ppb.PanelEvidence)
        except BadSignature:
            assert not fresh or self.taken[call.nonce], "a fresh call was refused as old or repeated"
            return
        except Busy:
            assert fresh and not self.taken[call.nonce]
            return
        self.taken[call.nonce] += 1
        assert self.taken[call.nonce] == 1, "I5: a call was taken twice"
        assert (fresh, caller, body.dispute) == (True, call.caller, call.nonce)


@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(EXAMPLES_ALL, marks=[pytest.mark.slow, pytest.mark.timeout(3_600)])])
def test_calls_random_histories_are_taken_once(examples: int) -> None:
    run(CallMachine, examples)
