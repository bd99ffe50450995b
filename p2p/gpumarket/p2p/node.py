"""Builds the libp2p host: TCP, noise, yamux and gossipsub, nothing else, with limits that are checked to be in force.

py-libp2p's defaults are not ours: `new_host()` accepts plaintext peers (measured), its gossip heartbeat is 120 s, and when its
resource manager cannot be built it goes on without one. Hence everything is passed in, and `assert_locked_down` refuses to serve
when any of it did not arrive.
"""

from __future__ import annotations

import errno
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, PROTOCOL_ID_V12, GossipSub
from libp2p.rcmgr import ResourceLimits, ResourceManager
from libp2p.rcmgr.connection_limits import ConnectionLimits
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from gpumarket.core.errors import ConfigError, P2PUnavailable, PortInUse
from gpumarket.p2p.guards import STREAMS_PER_PEER_MAX, SafePubsub, guard_streams

OFFERS_TOPIC = "/gpumarket/offers/1"

CONNECTIONS_MAX = 256
CONNECTIONS_PER_PEER_MAX = 3
_STREAMS_MAX = CONNECTIONS_MAX * STREAMS_PER_PEER_MAX + 1024  # no set of peers can use up what the others need
_MEMORY_MIB_MAX = 256


@dataclass(frozen=True)
class Node:
    """A host that is not running yet, and the parts that others need."""

    host: IHost
    pubsub: SafePubsub
    gossip: GossipSub
    limits: ResourceManager
    connections: ConnectionConfig

    @property
    def peer_id(self) -> ID:
        return self.host.get_id()

    def addresses(self) -> list[str]:
        """Full multiaddrs that it listens on, the peer id included."""
        suffix = Multiaddr(f"/p2p/{self.peer_id}")
        listeners = self.host.get_network().listeners.values()
        return [str(address.encapsulate(suffix)) for listener in listeners for address in listener.get_addrs()]


def build_node(seed: bytes, counters: Counter[str], punish: Callable[[ID], None]) -> Node:
    """A locked-down host under the ed25519 identity of `seed` (32 bytes)."""
    keys = create_new_key_pair(seed)
    limits, connections = _resource_manager(), _connection_config()
    host = new_host(
        key_pair=keys,
        sec_opt={NOISE: NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)},
        muxer_opt={TProtocol(YAMUX): Yamux},
        resource_manager=limits,
        connection_config=connections,
        disable_identify_address_discovery=True,
    )
    guard_streams(host, counters)
    gossip = GossipSub(
        protocols=[PROTOCOL_ID_V12, PROTOCOL_ID_V11],
        degree=6,
        degree_low=4,
        degree_high=12,
        heartbeat_interval=1,
        adaptive_gossip_enabled=False,  # it changes the heartbeat
        max_messages_per_topic_per_second=100.0,  # ours is stricter and comes before the signatures
    )
    pubsub = SafePubsub(host, gossip, OFFERS_TOPIC, counters, punish)
    pubsub.counter = time.time_ns()  # seqno; libp2p starts at whole seconds, so a restart would reuse ids and be taken for an echo
    return Node(host, pubsub, gossip, limits, connections)


@asynccontextmanager
async def running(node: Node, listen: str) -> AsyncIterator[None]:
    """Listens and runs the services; leaving, or a service that dies, ends all of it.

    Raises ConfigError for an address that is not TCP, PortInUse, P2PUnavailable when it does not listen or is not locked down.
    """
    address = _tcp_address(listen)
    async with node.host.run(listen_addrs=[address]):
        if not node.addresses():
            raise P2PUnavailable(f"libp2p does not listen on {listen}", hint="choose another p2p listen address")
        assert_locked_down(node)
        async with background_trio_service(node.pubsub), background_trio_service(node.gossip):
            await node.pubsub.wait_until_ready()
            yield


def assert_locked_down(node: Node) -> None:
    """Raises P2PUnavailable (not retryable) unless only noise and yamux are spoken and our limits are the ones in force."""
    swarm = node.host.get_network()
    security = set(swarm.upgrader.security_multistream.transports)  # type: ignore[attr-defined]
    muxers = set(swarm.upgrader.muxer_multistream.transports)  # type: ignore[attr-defined]
    facts = {
        "security is noise only": security == {NOISE},
        "muxer is yamux only": muxers == {YAMUX},
        "resource manager is ours": swarm._resource_manager is node.limits,  # type: ignore[attr-defined]
        "stream limit is in force": node.limits.limits.max_streams == _STREAMS_MAX,
        "connection tracking is on": node.limits.connection_lifecycle is not None,
        "connection limits are ours": swarm.connection_config is node.connections,  # type: ignore[attr-defined]
        "pubsub signs strictly": node.pubsub.strict_signing and node.pubsub.sign_key is not None,
    }
    missing = [fact for fact, holds in facts.items() if not holds]
    if missing:
        raise P2PUnavailable(
            f"libp2p did not take our limits: not true: {', '.join(missing)}",
            hint="install the pinned version: pip install 'gpumarket[p2p]'",
            retryable=False,
        )


def is_healthy(node: Node) -> bool:
    """Whether pubsub, its router and the swarm still run. A service that dies does not end the host by itself."""
    services: tuple[Any, ...] = (node.pubsub, node.gossip, node.host.get_network())
    return all(service.manager.is_running for service in services)


def _resource_manager() -> ResourceManager:
    return ResourceManager(
        limits=ResourceLimits(CONNECTIONS_MAX, _MEMORY_MIB_MAX, _STREAMS_MAX),
        connection_limits=ConnectionLimits(
            max_pending_inbound=64,
            max_established_per_peer=CONNECTIONS_PER_PEER_MAX,
            max_established_total=CONNECTIONS_MAX,
        ),
        enable_circuit_breaker=False,  # one peer's failures would close the door to all for a minute
        enable_graceful_degradation=False,  # it halves the limits under load, which is what an attacker wants
    )


def _connection_config() -> ConnectionConfig:
    return ConnectionConfig(
        max_connections=CONNECTIONS_MAX,
        high_watermark=CONNECTIONS_MAX - 32,
        low_watermark=32,
        min_connections=16,
        max_connections_per_peer=CONNECTIONS_PER_PEER_MAX,
        inbound_upgrade_timeout=5.0,
        outbound_upgrade_timeout=5.0,
        inbound_stream_protocol_negotiation_timeout=5.0,
    )


def _tcp_address(listen: str) -> Multiaddr:
    """The listen address, after a look whether its port is free: libp2p binds with SO_REUSEPORT and would share it without a word."""
    try:
        address = Multiaddr(listen)
        names = [protocol.name for protocol in address.protocols()]
        if len(names) != 2 or names[0] not in ("ip4", "ip6") or names[1] != "tcp":
            raise ValueError("not /ip4/<address>/tcp/<port>")
        host, port = str(address.value_for_protocol(names[0])), int(str(address.value_for_protocol("tcp")))
    except (MultiaddrError, ValueError) as error:
        raise ConfigError(f"cannot listen on {listen!r}: {error}", hint="write it like /ip4/0.0.0.0/tcp/4001") from error
    family = socket.AF_INET6 if names[0] == "ip6" else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(f"p2p port {port} is taken", hint=f"ss -ltnp 'sport = :{port}'") from error
            raise ConfigError(f"cannot listen on {listen}: {error.strerror}", hint="ip addr") from error
    return address
