"""Disputes on chain, for one account: every call of the contract, and what a step needs to know besides the watched disputes.

web3 is imported when something is sent. Each method returns when its transaction is mined; a call that would revert is not sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gpumarket.core.codec import from_proto
from gpumarket.core.sealing import KEY_BYTES
from gpumarket.core.terms import JobSpec, Lease, Receipt, Term, VerificationProfile
from gpumarket.core.units import Address, Hash, Money
from gpumarket.settlement.chain.connection import Chain, reachable
from gpumarket.settlement.chain.sender import Sender, TransactionReceipt
from gpumarket.settlement.disputes import Rules, Shares
from gpumarket.v1 import market_pb2 as mpb


class Terms(NamedTuple):
    """The deployment's constants (DisputeTerms.sol)."""

    rules: Rules
    shares: Shares
    seat_stake: int
    slash_verifiers_min: int


class SeatOnChain(NamedTuple):
    """A verifier's seat: stake locked (base units), models it is enrolled for, panels it sits on, its sealing key (zero: never set)."""

    locked: int
    models: int
    panels: int
    evidence_key: bytes


class Head(NamedTuple):
    """The chain's newest block. `time` in unix seconds, by which the contract judges every window."""

    block: int
    time: int


def contract_of(chain: Chain) -> Any:
    """The Disputes contract of the address book, as a web3 object."""
    from gpumarket.contracts.artifacts import artifact

    address = chain.w3.to_checksum_address(chain.book.disputes)
    return chain.w3.eth.contract(address=address, abi=artifact("Disputes").abi)


class DisputeActions:
    """The contract's functions for the sender's account. The address book names a Disputes contract."""

    def __init__(self, chain: Chain, sender: Sender) -> None:
        self.chain, self.sender = chain, sender
        self.contract = contract_of(chain)
        self._terms: Terms | None = None

    # --- reading -----------------------------------------------------------------------------------------------------------

    async def terms(self) -> Terms:
        """The constants; read once."""
        if self._terms is None:
            names = [part["name"] for part in _outputs(self.contract.abi, "terms")]
            said = dict(zip(names, await self._read(self.contract.functions.terms()), strict=True))
            self._terms = _terms(said)
        return self._terms

    async def head(self) -> Head:
        """The newest block."""
        with reachable(self.chain.settings.rpc_url):
            block = await self.chain.w3.eth.get_block("latest")
        return Head(int(block["number"]), int(block["timestamp"]))

    async def quote(self, provider: Address, amount: int) -> tuple[int, int]:
        """(stake that a challenge would lock, bond that it costs). Raises TransactionFailed where the provider has too little stake."""
        locked, bond = await self._read(self.contract.functions.quote(self._hex(provider), amount))
        return int(locked), int(bond)

    async def seat(self, operator: Address) -> SeatOnChain:
        """An operator's seat."""
        locked, models, panels, key = await self._read(self.contract.functions.seat(self._hex(operator)))
        return SeatOnChain(int(locked), int(models), int(panels), bytes(key))

    async def enrolled(self, model: Hash, operator: Address) -> bool:
        """Whether this operator verifies this model."""
        return bool(await self._read(self.contract.functions.joinedEpoch(model, self._hex(operator))))

    async def seasoned(self, model: Hash, issued_at: int) -> int:
        """Verifiers of a model that could judge a lease of that time."""
        return int(await self._read(self.contract.functions.seasonedCount(model, issued_at)))

    async def funds(self) -> Money:
        """Tokens of this account."""
        return Money(await self._read(self.chain.token.functions.balanceOf(self._hex(self.sender.address))))

    async def credited(self) -> Money:
        """What this account may withdraw."""
        return Money(await self._read(self.contract.functions.credited(self._hex(self.sender.address))))

    # --- verifiers ---------------------------------------------------------------------------------------------------------

    async def enrol(self, model: Hash, evidence_key: bytes) -> TransactionReceipt:
        """Verify results of this model from now on; locks the seat's stake once."""
        _require_key(evidence_key)
        return await self.sender.send("enrol verifier", self.contract.functions.enrol(model, evidence_key))

    async def leave(self, model: Hash) -> TransactionReceipt:
        """No longer verify this model; the seat's stake is released with the last one."""
        return await self.sender.send("leave panel list", self.contract.functions.unenrol(model))

    async def top_up_seat(self) -> TransactionReceipt:
        """Lock the seat's stake again after a fee was taken from it."""
        return await self.sender.send("top up seat", self.contract.functions.topUpSeat())

    # --- a panel member ----------------------------------------------------------------------------------------------------

    async def report_missing(self, dispute: Hash, evidence_key: bytes) -> TransactionReceipt:
        """Say that no evidence came, and to which key it is to be sealed: two consecutive transactions."""
        _require_key(evidence_key)
        calls = self.contract.functions.setEvidenceKey(evidence_key), self.contract.functions.reportMissing(dispute)
        return (await self.sender.send_all([("set evidence key", calls[0], None), (f"report missing {dispute.hex()}", calls[1], None)]))[-1]

    async def commit(self, dispute: Hash, commitment: Hash) -> TransactionReceipt:
        """Commit to a number. The number and its salt are in the journal before."""
        return await self.sender.send(f"commit {dispute.hex()}", self.contract.functions.commit(dispute, commitment), once=True)

    async def reveal(self, dispute: Hash, number: int, salt: Hash) -> TransactionReceipt:
        """Reveal the number that was committed to."""
        return await self.sender.send(f"reveal {dispute.hex()}", self.contract.functions.reveal(dispute, number, salt), once=True)

    # --- a challenger ------------------------------------------------------------------------------------------------------

    async def challenge(
        self, opening: mpb.Opening, profile: VerificationProfile, nonce_commitment: Hash, evidence_hash: Hash
    ) -> TransactionReceipt:
        """Let the contract pull the bond, and challenge the opened attempt. The nonce is in the journal before.

        The attempt's lease names the dispute: there is never a second one, and a challenge that a crash interrupted is waited for.
        """
        lease, receipt = from_proto(Lease, opening.lease.lease), from_proto(Receipt, opening.receipt.receipt)
        spec = from_proto(JobSpec, opening.order.spec)
        claim = (
            self._tuple(lease),
            opening.lease.signature,
            self._tuple(receipt),
            opening.receipt.signature,
            self._tuple(spec),
            self._tuple(profile.term),
            b"",
            nonce_commitment,
            evidence_hash,
        )
        await self._approve()
        return await self.sender.send(f"challenge {lease.struct_hash.hex()}", self.contract.functions.challenge(claim), once=True)

    async def draw(self, dispute: Hash, nonce: Hash) -> TransactionReceipt:
        """Show the nonce: the panel is drawn."""
        return await self.sender.send(f"draw panel {dispute.hex()}", self.contract.functions.draw(dispute, nonce), once=True)

    async def post_evidence(self, dispute: Hash, sealed: bytes) -> TransactionReceipt:
        """Put sealed evidence on chain."""
        return await self.sender.send(f"post evidence {dispute.hex()}", self.contract.functions.postEvidence(dispute, sealed))

    # --- anyone ------------------------------------------------------------------------------------------------------------

    async def finish(self, dispute: Hash) -> TransactionReceipt:
        """Have the contract pay out a dispute that is over."""
        return await self.sender.send(f"finish dispute {dispute.hex()}", self.contract.functions.finish(dispute), once=True)

    async def withdraw(self) -> TransactionReceipt:
        """Pay out what this account was credited."""
        return await self.sender.send("withdraw from disputes", self.contract.functions.withdraw(self._hex(self.sender.address)))

    # --- inside ------------------------------------------------------------------------------------------------------------

    async def _approve(self) -> None:
        token, spender = self.chain.token.functions, self.contract.address
        if await self._read(token.allowance(self._hex(self.sender.address), spender)) < 2**255:
            await self.sender.send("approve disputes", token.approve(spender, 2**256 - 1))

    async def _read(self, call: Any) -> Any:
        from web3.exceptions import ContractLogicError

        from gpumarket.core.errors import TransactionFailed
        from gpumarket.settlement.chain.reverts import revert_text

        with reachable(self.chain.settings.rpc_url):
            try:
                return await call.call({"from": self._hex(self.sender.address)})
            except ContractLogicError as error:
                raise TransactionFailed(f"the contract refuses: {revert_text(error.data)}") from error

    def _tuple(self, term: Term) -> tuple[Any, ...]:
        pairs: Sequence[tuple[tuple[str, Any], Any]] = list(zip(term.WORDS, term.VALUES(term), strict=True))
        return tuple(self._hex(value) if word.solidity == "address" else value for (_, word), value in pairs)

    def _hex(self, address: Address) -> Any:
        return self.chain.w3.to_checksum_address(address)


def _require_key(key: bytes) -> None:
    assert len(key) == KEY_BYTES and any(key), "a sealing key is 32 bytes, not all zero"


def _outputs(abi: Any, function: str) -> list[Any]:
    entry = next(e for e in abi if e["type"] == "function" and e["name"] == function)
    output = entry["outputs"]
    return list(output[0]["components"] if len(output) == 1 and "components" in output[0] else output)


def _terms(said: dict[str, int]) -> Terms:
    shares = Shares(
        panel_fee=said["panelFee"],
        no_show_fee=said["noShowFee"],
        bond_minimum=said["bondMinimum"],
        lock_minimum=said["lockMinimum"],
        bond_ppm=said["bondPpm"],
        amount_bond_ppm=said["amountBondPpm"],
        burn_ppm=said["burnPpm"],
        challenger_ppm=said["challengerPpm"],
        slash_multiple=said["slashMultiple"],
        victim_multiple=said["victimMultiple"],
    )
    rules = Rules(said["reportSeconds"], said["revealSeconds"], said["challengeSeconds"])
    return Terms(rules, shares, said["seatStake"], said["slashVerifiersMin"])
