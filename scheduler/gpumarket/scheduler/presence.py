"""Who is here: one session per provider's heartbeat stream, its load, its proof, its reservations, and what it is told.

This is the only writer of standings in the book. A provider is matchable when its offer is listed, its GPU proof holds, it has a spoke,
and its last beat is recent; `notice` says which of these is missing, so that no owner wonders why no jobs come.
"""

from __future__ import annotations

import asyncio
import heapq
from dataclasses import dataclass, field

from gpumarket.core.errors import Busy
from gpumarket.core.ports import Clock
from gpumarket.core.units import Address, Hash, format_money, hex0x
from gpumarket.scheduler.book import NEVER, Book
from gpumarket.scheduler.channels import Channels
from gpumarket.scheduler.ledger import Ledger, Spoke
from gpumarket.scheduler.listings import Listings
from gpumarket.scheduler.reputation import Reputation
from gpumarket.scheduler.round_trip import RoundTrip
from gpumarket.settlement.chain.view import ChainView, NodeOnChain
from gpumarket.settlement.verification.profiles import PROFILES
from gpumarket.v1 import market_pb2 as pb

ALIVE_SECONDS = 5.0
"""A provider beats every second: one heard within this time is there, and a second daemon with its key is another."""
RATING_STEP_PPM = 10_000
"""Watchers hear of a reputation that moved by more than this."""
RATE_STEP = 0.25
"""And of a proven rate that moved by more than this share: every proof measures it a little differently."""
OBSTACLES = ("unlisted", "gpu_proof", "no_channel", "jail", "stake", "deposit", "profile", "draining")
_NOBODY = (Address(b""), Hash(b""), Hash(b""))


@dataclass(slots=True)
class Session:
    """One heartbeat stream. `wake` is set when there is something new to tell."""

    provider: Address
    peer: str = ""
    """The connection that it came on, as gRPC names it."""
    heard: float = 0.0
    """When it last said something, monotonic seconds."""
    load: pb.Load = field(default_factory=pb.Load)
    settled: list[Hash] = field(default_factory=list)
    holdings_told: bool = False
    obstacle: str = ""
    """Why it gets no jobs, as it was last told; one of OBSTACLES."""
    round_trip: RoundTrip = field(default_factory=RoundTrip)
    wake: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Proof:
    """State of a provider's GPU proof. `key` is what was proven: its GPUs; another set needs another proof."""

    key: bytes
    holds: bool = False
    mflops: int = 0
    reason: str = "GPU proof pending"


class Presence:
    """Sessions, proofs and reservations."""

    def __init__(
        self,
        book: Book,
        listings: Listings,
        ledger: Ledger,
        channels: Channels,
        view: ChainView,
        clock: Clock,
        *,
        stake_factor: int,
        reservation_seconds: float,
    ) -> None:
        self._book, self._listings, self._ledger, self._channels, self._view = book, listings, ledger, channels, view
        self._clock, self._stake_factor, self._reservation_seconds = clock, stake_factor, reservation_seconds
        self.sessions: dict[Address, Session] = {}
        self.proofs: dict[Address, Proof] = {}
        self._reserved: dict[Hash, tuple[Address, Hash, Hash]] = {}
        self._pending: dict[Address, dict[Hash, int]] = {}
        self._by_channel: dict[Hash, int] = {}
        self._lapse: list[tuple[float, Hash]] = []
        self._told_ppm: dict[Address, int] = {}
        self._told_mflops: dict[Address, int] = {}
        ledger.on_judged = self._judged
        ledger.on_spoke = self._spoke_moved

    # --- sessions ------------------------------------------------------------------------------------------------------------

    def require_alone(self, provider: Address, peer: str) -> None:
        """Raises Busy while another daemon with this key is alive on another connection.

        Two of them would take turns at throwing each other out, and jobs leased to one would be sought at the other. One that was
        restarted, or whose link broke, is let in at once when its old stream ended, else as soon as that has been silent for a moment.
        """
        held = self.sessions.get(provider)
        if held is None or held.peer == peer:
            return
        silent = self._clock.monotonic() - held.heard
        if silent < ALIVE_SECONDS:
            raise Busy(
                f"another provider daemon with the key {hex0x(provider)} is connected (from {held.peer}), and said something "
                f"{silent:.1f} s ago",
                retry_after_seconds=ALIVE_SECONDS,
                hint="run one daemon per key: stop one of the two, or give this one a key of its own. After a restart this passes in "
                f"{ALIVE_SECONDS:.0f} s",
            )

    def begin(self, provider: Address, peer: str = "") -> Session:
        """A new stream; an older one of the same provider is told nothing more."""
        session = self.sessions[provider] = Session(provider, peer, self._clock.monotonic())
        return session

    def end(self, session: Session) -> None:
        """The stream is over: not matchable from now on."""
        if self.sessions.get(session.provider) is not session:
            return
        del self.sessions[session.provider]
        entry = self._book.entries.get(session.provider)
        if entry is not None:
            entry.standing.heartbeat = NEVER
            self._book.refresh(session.provider)

    def beat(self, session: Session, load: pb.Load) -> None:
        """The provider's load, now."""
        session.load = load
        session.round_trip.hear(load.probe, self._clock.monotonic())
        for lease in load.leases:  # the load's `free` knows of them: keeping their places too would count each job twice
            if self._reserved.get(Hash(lease), _NOBODY)[0] == session.provider:
                self.release(Hash(lease))
        entry = self._book.entries.get(session.provider)
        if entry is not None:
            entry.standing.heartbeat = self._clock.monotonic()
            self.restand(session.provider)

    def restand(self, provider: Address) -> None:
        """Compute a provider's standing anew and write it to the book."""
        entry = self._book.entries.get(provider)
        if entry is None:
            return
        standing, now = entry.standing, self._clock.now()
        session = self.sessions.get(provider)
        if session is not None:
            load = session.load
            pending = self._pending.get(provider, {})
            standing.free = 0 if load.draining else load.free - sum(pending.values())
            standing.places = {} if load.draining else _places(load, pending)
            standing.queued = load.queued
            standing.round_trip_seconds = session.round_trip.seconds
            standing.warm = frozenset(Hash(m) for m in load.warm)
        node = self._view.nodes.get(provider)
        standing.stake = _backing(node)
        proof = self.proofs.get(provider)
        standing.proven = proof is not None and proof.holds
        reputation = self._ledger.reputations.get(provider, Reputation())
        standing.jailed_until = reputation.jailed_until
        standing.reputation_ppm = reputation.mean_ppm(now)
        standing.reputation_low = reputation.low(now)
        standing.observations = reputation.observations(now)
        spoke = self._channels.spoke(provider)
        standing.spoke_expires = spoke.state.expires_at if spoke else 0
        standing.spoke_free, standing.stake_room = self._room(provider, spoke)
        self._book.refresh(provider)

    # --- reservations --------------------------------------------------------------------------------------------------------

    def reserve(self, lease: Hash, provider: Address, model: Hash, channel: Hash) -> None:
        """Hold a place of a model for a lease until the provider shows the job, or the reservation lapses."""
        self._reserved[lease] = (provider, model, channel)
        pending = self._pending.setdefault(provider, {})
        pending[model] = pending.get(model, 0) + 1
        self._by_channel[channel] = self._by_channel.get(channel, 0) + 1
        heapq.heappush(self._lapse, (self._clock.monotonic() + self._reservation_seconds, lease))
        self._book.move_places(provider, model, -1)

    def release(self, lease: Hash) -> None:
        """The job showed itself, or never will."""
        held = self._reserved.pop(lease, None)
        if held is None:
            return
        provider, model, channel = held
        _decrement(self._pending[provider], model)
        if not self._pending[provider]:
            del self._pending[provider]
        _decrement(self._by_channel, channel)
        self._book.move_places(provider, model, 1)

    @property
    def reserved(self) -> int:
        """Places that are held for leases now."""
        return len(self._reserved)

    def reserved_on(self, channel: Hash) -> int:
        """Places that one client's channel holds now."""
        return self._by_channel.get(channel, 0)

    def lapse(self) -> None:
        """Free the places whose time is over."""
        now = self._clock.monotonic()
        while self._lapse and self._lapse[0][0] <= now:
            self.release(heapq.heappop(self._lapse)[1])

    # --- what providers are told ---------------------------------------------------------------------------------------------

    def settled(self, provider: Address, lease: Hash) -> None:
        """A claim became owed, rejected or closed."""
        session = self.sessions.get(provider)
        if session is not None:
            session.settled.append(lease)
            session.wake.set()

    def wake(self, provider: Address) -> None:
        """There is something new to tell."""
        session = self.sessions.get(provider)
        if session is not None:
            session.wake.set()

    def notice(self, provider: Address) -> tuple[str, str]:
        """Why the provider gets no jobs: one of OBSTACLES, and the words for it; both empty when nothing stands in the way."""
        unlisted = self._listings.why_unlisted(provider)
        if unlisted:
            return "unlisted", f"not listed: {unlisted}"
        entry = self._book.entries[provider]
        standing, now = entry.standing, self._clock.now()
        proof = self.proofs.get(provider)
        if proof is None or not proof.holds:
            return "gpu_proof", proof.reason if proof is not None else "GPU proof pending"
        spoke = self._channels.spoke(provider)
        if spoke is None:
            return "no_channel", "the channel that pays you is being opened on chain"
        if standing.jailed_until > now:
            return "jail", f"jailed for {standing.jailed_until - now} s more: work of yours was checked and rejected"
        if standing.stake_room <= 0:
            exposure = spoke.state.reserved
            told = f"stake {format_money(standing.stake)} is below {self._stake_factor} times the exposure of {format_money(exposure)}"
            return "stake", told
        if standing.spoke_free <= 0:
            return "deposit", "your channel's deposit is reserved or paid out; it is being topped up"
        if not any(sale.profile in PROFILES for sale in entry.advert.models):
            return "profile", "none of your models names a verification profile that this scheduler can judge"
        session = self.sessions.get(provider)
        if session is not None and session.load.draining:
            return "draining", "you are draining"
        return "", ""

    def rating_ppm(self, provider: Address) -> int:
        """A provider's reputation now."""
        return self._ledger.reputations.get(provider, Reputation()).mean_ppm(self._clock.now())

    def proven_mflops(self, provider: Address) -> int:
        """What the last GPU proof measured, of the slowest GPU; 0 while none holds."""
        proof = self.proofs.get(provider)
        return proof.mflops if proof is not None and proof.holds else 0

    def note_proof(self, provider: Address) -> None:
        """A GPU proof was made, failed, or is no longer that of the GPUs on offer: the standing, the provider and the watchers follow."""
        self.restand(provider)
        self.wake(provider)
        told, mflops = self._told_mflops.get(provider, 0), self.proven_mflops(provider)
        if (told > 0) != (mflops > 0) or abs(mflops - told) > RATE_STEP * told:
            self._told_mflops[provider] = mflops
            self._listings.touch(provider)

    # --- inside --------------------------------------------------------------------------------------------------------------

    def _room(self, provider: Address, spoke: Spoke | None) -> tuple[int, int]:
        if spoke is None:
            return 0, 0
        return spoke.state.free, _backing(self._view.nodes.get(provider)) // self._stake_factor - spoke.state.reserved

    def _spoke_moved(self, spoke: Spoke) -> None:
        active = self._channels.spoke(spoke.provider)
        self._book.set_money(spoke.provider, *self._room(spoke.provider, active))

    def _judged(self, provider: Address, reputation: Reputation) -> None:
        self.restand(provider)
        ppm = reputation.mean_ppm(self._clock.now())
        if abs(ppm - self._told_ppm.get(provider, 0)) >= RATING_STEP_PPM:
            self._told_ppm[provider] = ppm
            self._listings.touch(provider)


def _backing(node: NodeOnChain | None) -> int:
    """Stake that stands behind new leases: bonded, and not held by a dispute already (which takes bonded stake first)."""
    return max(0, node.stake - node.locked) if node is not None else 0


def _places(load: pb.Load, pending: dict[Hash, int]) -> dict[Hash, int]:
    """Free places by model, net of the reservations that the load does not know of."""
    places = {Hash(entry.model): entry.free for entry in load.places}
    if places:
        for model, count in pending.items():
            places[model] = places.get(model, 0) - count
    return places


def _decrement(counts: dict[Hash, int], key: Hash) -> None:
    left = counts.get(key, 0) - 1
    if left > 0:
        counts[key] = left
    else:
        counts.pop(key, None)
