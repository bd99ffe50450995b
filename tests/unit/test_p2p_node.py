"""The libp2p host is locked down, and says so when it is not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from libp2p.pubsub.pb import rpc_pb2
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE

from gpumarket.core.errors import P2PUnavailable
from gpumarket.p2p.guards import (
    CONTROL_ENTRIES_PER_RPC_MAX,
    CONTROL_IDS_PER_RPC_MAX,
    MESSAGES_PER_RPC_MAX,
    SUBSCRIPTIONS_PER_RPC_MAX,
    Misconduct,
    parse_rpc,
    total_validator,
)
from gpumarket.p2p.node import Node, assert_locked_down, build_node


def node() -> Node:
    return build_node(b"\x07" * 32, Counter(), lambda peer: None)


def test_node_as_built_is_locked_down() -> None:
    assert_locked_down(node())


def test_node_same_seed_has_the_same_peer_id() -> None:
    assert node().peer_id == node().peer_id


def _without_limits(built: Node) -> None:
    swarm: Any = built.host.get_network()
    swarm._resource_manager = None


def _with_plaintext(built: Node) -> None:
    swarm: Any = built.host.get_network()
    swarm.upgrader.security_multistream.transports["/plaintext/2.0.0"] = None


def _with_another_muxer(built: Node) -> None:
    swarm: Any = built.host.get_network()
    swarm.upgrader.muxer_multistream.transports["/mplex/6.7.0"] = None


def _without_signing(built: Node) -> None:
    built.pubsub.strict_signing = False


def _without_connection_tracking(built: Node) -> None:
    built.limits.connection_lifecycle = None


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_without_limits, "resource manager is ours"),
        (_with_plaintext, "security is noise only"),
        (_with_another_muxer, "muxer is yamux only"),
        (_without_signing, "pubsub signs strictly"),
        (_without_connection_tracking, "connection tracking is on"),
    ],
)
def test_node_that_lost_a_limit_refuses_to_serve_and_names_it(spoil: Any, named: str) -> None:
    built = node()
    spoil(built)
    with pytest.raises(P2PUnavailable, match=named) as caught:
        assert_locked_down(built)
    assert not caught.value.retryable


def test_node_speaks_noise_and_yamux_only() -> None:
    swarm: Any = node().host.get_network()
    assert list(swarm.upgrader.security_multistream.transports) == [NOISE]
    assert [str(name) for name in swarm.upgrader.muxer_multistream.transports] == ["/yamux/1.0.0"]


def _published(count: int) -> rpc_pb2.RPC:
    return rpc_pb2.RPC(publish=[rpc_pb2.Message(data=b"x")] * count)


def _subscribed(count: int) -> rpc_pb2.RPC:
    return rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid="t")] * count)


def _grafted(count: int) -> rpc_pb2.RPC:
    grafts = [rpc_pb2.ControlGraft(topicID="t")] * count
    return rpc_pb2.RPC(control=rpc_pb2.ControlMessage(graft=grafts))


def _wanted(count: int) -> rpc_pb2.RPC:
    want = rpc_pb2.ControlIWant(messageIDs=[b"m"] * count)
    return rpc_pb2.RPC(control=rpc_pb2.ControlMessage(iwant=[want]))


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (_published, MESSAGES_PER_RPC_MAX),
        (_subscribed, SUBSCRIPTIONS_PER_RPC_MAX),
        (_grafted, CONTROL_ENTRIES_PER_RPC_MAX),
        (_wanted, CONTROL_IDS_PER_RPC_MAX),
    ],
)
def test_rpc_at_its_limit_is_read_and_above_it_is_misconduct(make: Any, most: int) -> None:
    assert parse_rpc(make(most).SerializeToString()) == make(most)
    with pytest.raises(Misconduct):
        parse_rpc(make(most + 1).SerializeToString())


def test_validator_own_message_needs_no_second_look_and_others_do() -> None:
    asked: list[bytes] = []

    def refuse(payload: bytes) -> bool:
        asked.append(payload)
        return False

    own, other = node().peer_id, build_node(b"\x08" * 32, Counter(), lambda peer: None).peer_id
    validator = total_validator(refuse, own)
    assert validator(own, rpc_pb2.Message(data=b"mine"))
    assert not validator(other, rpc_pb2.Message(data=b"theirs"))
    assert asked == [b"theirs"]
