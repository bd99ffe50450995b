"""Settings of the p2p link, with their defaults and reasons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpumarket.core.units import Address


@dataclass(frozen=True)
class P2PSettings:
    """What a daemon decides about its p2p process."""

    identity_path: Path
    """The peer's ed25519 key file; created with mode 0600 when missing. No wallet key."""
    chain_id: int
    """Domain of the offers' signatures, with `registry`: offers of another network do not verify."""
    registry: Address
    """StakeRegistry, 20 bytes."""
    listen: str = "/ip4/127.0.0.1/tcp/0"
    """TCP multiaddr. Port 0 lets the system choose once; restarts of the process keep the port."""
    bootstrap: tuple[str, ...] = ()
    """Peers dialled for ever, full multiaddrs."""
    announce_seconds: float = 120.0
    """Between announcements of the own offer: the network's budget is a few messages per second in all."""
    resync_seconds: float = 60.0
    """Between snapshots asked from a peer drawn at random: an offer whose gossip was lost arrives within about this time."""
    book_offers_max: int = 10_000
    """Providers remembered; what expires first goes first."""
    book_bytes_max: int = 64 << 20
    """Bytes of offers remembered."""
    start_seconds_max: float = 30.0
    """From starting the process to listening. Importing libp2p alone takes 0.6 s on a quiet machine, several when 15 processes start."""

    def __post_init__(self) -> None:
        positive = ("announce_seconds", "resync_seconds", "book_offers_max", "book_bytes_max", "start_seconds_max", "chain_id")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"P2PSettings.{name} must be positive, got {getattr(self, name)}")
        if len(self.registry) != 20:
            raise ValueError(f"P2PSettings.registry must have 20 bytes, got {len(self.registry)}")
