"""What keeps one peer from killing the process: guards around the places where py-libp2p 0.8.1 lets a peer's bytes raise.

Measured on 0.8.1, each with one message and any peer that can connect: (1) garbage protobuf on the gossipsub stream and (2) a pubsub
message whose `key` does not decode both escape into libp2p's nursery and end the process. Besides, every message of an RPC becomes a
task, and starting one walks all tasks, so that one RPC of small messages stalls the loop. Hence the read loop is our own: bounded, in
line, total. Invariant: no exception made from a peer's bytes leaves this module; each is counted and logged without its content.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost, INetStream
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import IOException, MessageTooLarge
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.utils import maybe_consume_signed_record
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from gpumarket.p2p.limits import PeerLimiter, Rate
from gpumarket.p2p.wire import OFFER_BYTES_MAX

_log = logging.getLogger(__name__)

MESSAGES_PER_RPC_MAX = 64
SUBSCRIPTIONS_PER_RPC_MAX = 16
CONTROL_ENTRIES_PER_RPC_MAX = 64
CONTROL_IDS_PER_RPC_MAX = 4096
STREAMS_PER_PEER_MAX = 32

MESSAGE_RATE = Rate(per_second=50, burst=200)
"""Offers that one neighbour may forward. The whole network's budget is a few messages per second (measured: 20 nodes on 2 cores
collapse at 66 per second)."""
RPC_RATE = Rate(per_second=100, burst=400)
"""RPCs read from one neighbour; above it we read more slowly."""

_THROTTLE_SECONDS = 0.05


class Misconduct(Exception):
    """A peer sent what no honest one sends. Its connection is closed."""


class SafePubsub(Pubsub):
    """Pubsub for one topic whose read loop survives every peer."""

    def __init__(self, host: IHost, router: GossipSub, topic: str, counters: Counter[str], punish: Callable[[ID], None]) -> None:
        """`punish` is told of a peer that broke the protocol; it must not block or raise."""
        super().__init__(
            host,
            router,
            strict_signing=True,
            max_subscriptions_per_rpc=SUBSCRIPTIONS_PER_RPC_MAX,
            max_subscriptions_per_peer=SUBSCRIPTIONS_PER_RPC_MAX,
            allowed_topics={topic},
        )
        self._topic, self._counters, self._punish = topic, counters, punish
        self._messages, self._rpcs = PeerLimiter(MESSAGE_RATE), PeerLimiter(RPC_RATE)

    async def stream_handler(self, stream: INetStream) -> None:
        """Reads one peer's RPCs until its stream ends; misconduct or a surprise ends the stream and is counted."""
        peer = stream.muxed_conn.peer_id
        try:
            await self.continuously_read_stream(stream)
        except (Misconduct, DecodeError, ParseError, MessageTooLarge) as error:
            self._counters["misconduct"] += 1
            _log.info("peer %s broke the pubsub protocol (%s: %s): disconnected", peer, type(error).__name__, error)
            await self._end(stream, peer)
            self._punish(peer)
        except IOException:
            return  # the stream ended: what connections do
        except Exception:
            self._counters["pubsub_errors"] += 1
            _log.exception("reading pubsub from peer %s failed", peer)
            await self._end(stream, peer)

    async def continuously_read_stream(self, stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id
        while self.manager.is_running:
            raw = await read_varint_prefixed_bytes_limited(stream, self.max_inbound_rpc_size)
            if not self._rpcs.allow(peer.to_bytes(), trio.current_time()):
                await trio.sleep(_THROTTLE_SECONDS)  # 20 RPCs a second from here on: its own connection waits, nobody else's
            await self._handle_rpc(peer, parse_rpc(raw))

    async def _handle_rpc(self, peer: ID, rpc: rpc_pb2.RPC) -> None:
        if not maybe_consume_signed_record(rpc, self.host, peer):
            self._counters["bad_sender_record"] += 1
            return
        for message in rpc.publish:
            await self._take(peer, message)
        for subscription in rpc.subscriptions:
            self.handle_subscription(peer, subscription)
        if rpc.HasField("control"):
            await self.router.handle_rpc(rpc, peer)

    async def _take(self, peer: ID, message: rpc_pb2.Message) -> None:
        """Cheap refusals first: the two signatures cost a hundred times more."""
        if list(message.topicIDs) != [self._topic]:
            self._counters["other_topic"] += 1
        elif len(message.data) > OFFER_BYTES_MAX:
            self._counters["gossip_oversize"] += 1
        elif not self._messages.allow(peer.to_bytes(), trio.current_time()):
            self._counters["rate_limited"] += 1
        else:
            try:
                await self.push_msg(peer, message)
            except Exception as error:  # e.g. a key that does not decode: validators.signature_validator re-raises
                self._counters["bad_message"] += 1
                _log.debug("a pubsub message by way of peer %s is malformed (%s)", peer, type(error).__name__)

    async def _end(self, stream: INetStream, peer: ID) -> None:
        await _reset(stream, self._counters)
        self._handle_dead_peer(peer)


def guard_streams(host: IHost, counters: Counter[str]) -> None:
    """Puts one guard around negotiation and every protocol handler, present and future: errors contained, streams per peer capped."""
    inner: Callable[[INetStream], Awaitable[None]] = host._swarm_stream_handler  # type: ignore[attr-defined]
    open_streams: defaultdict[ID, int] = defaultdict(int)

    async def guarded(stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id
        if open_streams[peer] >= STREAMS_PER_PEER_MAX:
            counters["streams_refused"] += 1
            await _reset(stream, counters)
            return
        open_streams[peer] += 1
        try:
            await inner(stream)
        except IOException:
            counters["streams_broken"] += 1
        except Exception as error:
            counters["handler_errors"] += 1
            _log.debug("a stream of peer %s failed (%s)", peer, type(error).__name__)
            await _reset(stream, counters)
        finally:
            open_streams[peer] -= 1
            if not open_streams[peer]:
                del open_streams[peer]

    host.get_network().set_stream_handler(guarded)


def total_validator(accept: Callable[[bytes], bool], own: ID) -> Callable[[ID, Any], bool]:
    """A topic validator over `accept`, which must never raise. What we publish ourselves was verified when it was announced."""

    def validator(forwarder: ID, message: rpc_pb2.Message) -> bool:
        return forwarder == own or accept(message.data)

    return validator


def parse_rpc(raw: bytes) -> rpc_pb2.RPC:
    """One RPC of a peer. Raises DecodeError, or Misconduct when it holds more than any honest one."""
    rpc = rpc_pb2.RPC()
    rpc.ParseFromString(raw)
    if len(rpc.publish) > MESSAGES_PER_RPC_MAX or len(rpc.subscriptions) > SUBSCRIPTIONS_PER_RPC_MAX:
        raise Misconduct(f"{len(rpc.publish)} messages and {len(rpc.subscriptions)} subscriptions in one RPC")
    control = rpc.control
    entries = [*control.ihave, *control.iwant, *control.graft, *control.prune, *control.idontwant]
    ids = sum(len(entry.messageIDs) for entry in entries if hasattr(entry, "messageIDs"))
    if len(entries) > CONTROL_ENTRIES_PER_RPC_MAX or ids > CONTROL_IDS_PER_RPC_MAX:
        raise Misconduct(f"{len(entries)} control entries with {ids} message ids in one RPC")
    return rpc


async def _reset(stream: INetStream, counters: Counter[str]) -> None:
    try:
        await stream.reset()
    except Exception as error:  # the connection went first; there is nothing left to reset
        counters["resets_failed"] += 1
        _log.debug("resetting a stream failed: %s", type(error).__name__)
