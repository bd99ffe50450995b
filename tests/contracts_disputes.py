"""A dispute on a local chain from end to end: parties, verifiers, signed statements, and the moves of each, for the tests of Disputes.

Statements are made by gpumarket.core.terms and signed by gpumarket.core.signing: what the contract accepts is what the market signs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from contracts_fixtures import ONE, Chain
from eth_account.signers.local import LocalAccount
from web3 import Web3

from gpumarket.contracts.artifacts import artifact
from gpumarket.contracts.dispute_terms import DisputeTerms
from gpumarket.core.signing import Domain, LocalKey, market_domain, sign
from gpumarket.core.terms import Delegation, JobSpec, Lease, Outcome, Receipt, Task, VerificationProfile, keccak256
from gpumarket.core.typed_data import Term
from gpumarket.core.units import ZERO_HASH, Hash, parse_address

MODEL = Hash(b"\x4d" * 32)
NONCE = b"\x77" * 32
SALT = b"\x5a" * 32
PROFILE = VerificationProfile(
    Task.GENERATE,
    "float32",
    accept_mean_gap_micro=920,
    reject_mean_gap_micro=2_000,
    gross_gap_milli=100,
    gross_share_ppm=150_000,
    min_units=64,
)
EMBEDDING = VerificationProfile(Task.EMBED, "float32", max_abs_diff_nano=10_000)
WITHIN, BEYOND = PROFILE.gross_share_ppm, PROFILE.gross_share_ppm + 1
FINISHED = 3
OUTCOMES = ("NONE", "SLASHED", "RESTITUTION", "DISMISSED", "INCONCLUSIVE", "WITHHELD", "NOT_DRAWN", "NO_PANEL")
FIELDS = [item["name"] for item in next(e for e in artifact("Disputes").abi if e.get("name") == "dispute")["outputs"][0]["components"]]


@dataclass(frozen=True)
class Case:
    """One attempt, as a challenger shows it; `replace` what a test wants wrong."""

    lease: Lease
    spec: JobSpec
    receipt: Receipt
    profile: VerificationProfile
    lease_signature: bytes
    receipt_signature: bytes
    delegation: bytes = b""
    nonce_commit: bytes = ZERO_HASH
    evidence_hash: bytes = b"\xee" * 32

    @property
    def id(self) -> bytes:
        return self.lease.struct_hash

    def words(self) -> tuple[Any, ...]:
        """The contract's Claim."""
        profile = (
            int(self.profile.task),
            *(keccak256(text.encode()) for text in (self.profile.dtype, self.profile.runtime)),
            *(keccak256(text.encode()) for text in (self.profile.provider_gpu_class, self.profile.checker_gpu_class)),
            self.profile.max_abs_diff_nano,
            self.profile.accept_mean_gap_micro,
            self.profile.reject_mean_gap_micro,
            self.profile.gross_gap_milli,
            self.profile.gross_share_ppm,
            self.profile.min_units,
        )
        signatures = (self.lease_signature, self.receipt_signature)
        lease, receipt, spec = (_values(term) for term in (self.lease, self.receipt, self.spec))
        return (lease, signatures[0], receipt, signatures[1], spec, profile, self.delegation, self.nonce_commit, self.evidence_hash)


@dataclass
class Court:
    """Disputes of one chain, with a provider, a scheduler, a client and verifiers; `terms` are the deployed ones."""

    chain: Chain
    contract: Any
    terms: DisputeTerms
    domain: Domain
    client: LocalAccount
    scheduler: LocalAccount
    verifiers: list[LocalAccount]
    jobs: int = 0
    everyone: list[LocalAccount] = field(default_factory=list)
    """Whoever was a verifier at any time."""
    challenged: list[Case] = field(default_factory=list)

    @classmethod
    def open(cls, chain: Chain, verifiers: int) -> Court:
        """Parties with tokens, and seasoned verifiers of MODEL."""
        contract = chain.w3.eth.contract(address=chain.w3.to_checksum_address(chain.book.disputes), abi=artifact("Disputes").abi)
        terms = DisputeTerms(*contract.functions.terms().call())
        domain = market_domain(chain.book.chain_id, parse_address(chain.book.registry))
        court = cls(chain, contract, terms, domain, chain.rich(chain.stranger()), chain.stranger(), [])
        court.chain.send(chain.token.functions.approve(contract.address, 2**256 - 1), court.client)
        court.verifiers = [court.verifier() for _ in range(verifiers)]
        court.season()
        return court

    # --- parties ---------------------------------------------------------------------------------------------------------------

    def node(self, stake: int, roles: int = 7, owner: LocalAccount | None = None) -> LocalAccount:
        """A registered node with stake."""
        chain, account = self.chain, self.chain.rich(self.chain.stranger())
        if owner is None:
            chain.send(chain.registry.functions.register(roles, "12D3KooW", b"\1" * 32, ""), account)
        else:
            chain.send(chain.registry.functions.approveOperator(account.address, True), owner)
            chain.send(chain.registry.functions.registerWithOwner(owner.address, roles, "12D3KooW", b"\1" * 32, ""), account)
        if stake:
            chain.send(chain.registry.functions.stake(account.address, stake), account)
        return account

    def verifier(self, model: bytes = MODEL, owner: LocalAccount | None = None) -> LocalAccount:
        """An enrolled verifier, not seasoned yet."""
        account = self.node(self.terms.seat_stake, owner=owner)
        self.send(self.contract.functions.enrol(model, b"\x0e" * 32), account)
        self.everyone.append(account)
        return account

    def season(self) -> None:
        """Let everybody who is enrolled become seasoned for leases from now on."""
        self.chain.pass_time((self.terms.seasoning_epochs + 1) * self.terms.epoch_seconds)

    # --- statements ------------------------------------------------------------------------------------------------------------

    def case(
        self,
        provider: LocalAccount,
        *,
        amount: int = ONE,
        profile: VerificationProfile = PROFILE,
        challenger: LocalAccount | None = None,
        lease: dict[str, Any] | None = None,
        receipt: dict[str, Any] | None = None,
        spec: dict[str, Any] | None = None,
    ) -> Case:
        """An attempt whose provider could have earned `amount` (or what the overrides of its terms say), challenged by the client."""
        self.jobs += 1
        client, scheduler = (parse_address(a.address) for a in (self.client, self.scheduler))
        now, request = self.chain.now(), Hash(bytes([7] * 32))
        made = JobSpec(
            client=client,
            scheduler=scheduler,
            job_id=Hash(self.jobs.to_bytes(32, "big")),
            task=profile.task,
            model=MODEL,
            request_hash=request,
            prompt_units=10,
            max_output_units=1_000,
            max_amount=amount,  # type: ignore[arg-type]
            constraints_hash=ZERO_HASH,
            profile=profile.digest,
            deadline=now + 600,
        )
        made = replace(made, **(spec or {}))
        terms = Lease(
            job=made.key,
            spec=made.struct_hash,
            attempt=1,
            client=client,
            scheduler=scheduler,
            provider=parse_address(provider.address),
            model=MODEL,
            task=profile.task,
            prompt_price_per_mtok=amount * 10_000,  # type: ignore[arg-type]  # a hundred units earn the amount
            output_price_per_mtok=amount * 10_000,  # type: ignore[arg-type]
            maximum=amount,  # type: ignore[arg-type]
            fee_ppm=0,
            client_channel=ZERO_HASH,
            provider_channel=ZERO_HASH,
            profile=profile.digest,
            window_units=16,
            prefix_units=0,
            prefix_hash=ZERO_HASH,
            issued_at=now,
            deadline=now + 600,
        )
        terms = replace(terms, **(lease or {}))
        done = Receipt(
            lease=terms.struct_hash,
            nonce=Hash(b"\3" * 32),
            request_hash=request,
            output_hash=Hash(b"\4" * 32),
            prefix_units=terms.prefix_units,
            prefix_hash=terms.prefix_hash,
            prompt_units=10,
            output_units=100,
            outcome=Outcome.COMPLETED,
            finished_at=now,
        )
        done = replace(done, **(receipt or {}))
        case = Case(terms, made, done, profile, self.signed(self.scheduler, terms), self.signed(provider, done))
        return self.committed(case, challenger or self.client)

    def committed(self, case: Case, challenger: LocalAccount, nonce: bytes = NONCE) -> Case:
        """The case with that challenger's nonce committed, and the client's delegation where it is somebody else."""
        commit = _keccak(["bytes32", "address", "bytes32"], [case.id, challenger.address, nonce])
        delegation = b""
        if challenger.address != self.client.address:
            delegation = self.signed(self.client, Delegation(Hash(case.id), parse_address(challenger.address)))
        return replace(case, nonce_commit=commit, delegation=delegation)

    def signed(self, account: LocalAccount, term: Term) -> bytes:
        return sign(LocalKey(bytes(account.key)), self.domain, term)

    # --- moves -----------------------------------------------------------------------------------------------------------------

    def send(self, call: Any, sender: Any) -> Any:
        return self.chain.send(call, sender)

    def challenge(self, case: Case, sender: LocalAccount | None = None) -> Any:
        self.challenged.append(case)
        return self.send(self.contract.functions.challenge(case.words()), sender or self.client)

    def draw(self, case: Case, nonce: bytes = NONCE) -> list[LocalAccount]:
        """The panel, in its order."""
        self.chain.anvil.rpc("anvil_mine", hex(self.terms.draw_delay_blocks))
        self.send(self.contract.functions.draw(case.id, nonce), self.chain.accounts[5])
        return self.panel(case)

    def panel(self, case: Case) -> list[LocalAccount]:
        by_address = {v.address: v for v in self.verifiers}
        return [by_address[member[0]] for member in self.dispute(case)["members"]]

    def opened(self, provider: LocalAccount, **case: Any) -> tuple[Case, list[LocalAccount]]:
        """A case that has its panel."""
        made = self.case(provider, **case)
        self.challenge(made)
        return made, self.draw(made)

    def commit(self, case: Case, member: LocalAccount, number: int, salt: bytes = SALT) -> Any:
        return self.send(self.contract.functions.commit(case.id, self.commitment(case, member, number, salt)), member)

    def commitment(self, case: Case, member: LocalAccount, number: int, salt: bytes = SALT) -> bytes:
        return _keccak(["bytes32", "address", "uint64", "bytes32"], [case.id, member.address, number, salt])

    def reveal(self, case: Case, member: LocalAccount, number: int, salt: bytes = SALT) -> Any:
        return self.send(self.contract.functions.reveal(case.id, number, salt), member)

    def decide(self, case: Case, panel: list[LocalAccount], numbers: list[int | None]) -> Any:
        """Commit and reveal each member's number (None: silent), then finish; the receipt of that."""
        spoken = [(member, number) for member, number in zip(panel, numbers, strict=True) if number is not None]
        for member, number in spoken:
            self.commit(case, member, number)
        if len(spoken) < len(panel):
            self.pass_until(self.dispute(case)["commitUntil"])
        for member, number in spoken:
            self.reveal(case, member, number)
        return self.finish(case)

    def finish(self, case: Case) -> Any:
        return self.send(self.contract.functions.finish(case.id), self.chain.accounts[5])

    def pass_until(self, moment: int) -> None:
        self.chain.pass_time(max(0, moment - self.chain.now()))

    # --- what is known ---------------------------------------------------------------------------------------------------------

    def dispute(self, case: Case) -> dict[str, Any]:
        return dict(zip(FIELDS, self.contract.functions.dispute(case.id).call(), strict=True))

    def outcome(self, case: Case) -> str:
        return OUTCOMES[self.dispute(case)["outcome"]]

    def credited(self, account: LocalAccount) -> int:
        return int(self.contract.functions.credited(account.address).call())

    def stake(self, account: LocalAccount) -> tuple[int, int]:
        """(bonded, locked) of a node."""
        node = self.chain.registry.functions.node(account.address).call()
        return int(node[4]), int(node[6])

    def surplus(self) -> int:
        """Tokens that the contract holds beyond what it owes: nothing, ever."""
        owed = sum(self.credited(a) for a in (self.client, *self.everyone, *self.chain.accounts))
        disputes = [self.dispute(case) for case in self.challenged]
        bonds = sum(int(d["bond"]) for d in disputes if d["state"] != FINISHED)
        return self.chain.balance(self.contract.address) - owed - bonds - int(self.contract.functions.toBurn().call())

    def refused(self, call: Any, sender: Any) -> tuple[str, tuple[Any, ...]]:
        return self.chain.refused(call, sender)


def _values(term: Term) -> tuple[Any, ...]:
    """A term's fields as the ABI takes them."""
    values = (getattr(term, name) for name, _ in term.WORDS)
    return tuple(Web3.to_checksum_address(v) if isinstance(v, bytes) and len(v) == 20 else v for v in values)


def _keccak(types: list[str], values: list[Any]) -> bytes:
    return bytes(keccak256(Web3().codec.encode(types, values)))
