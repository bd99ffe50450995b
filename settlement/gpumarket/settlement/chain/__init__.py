"""The chain: a checked connection, a view that follows it through reorganisations, a sender that owns its nonces, and the market's actions.

web3 is imported when something connects, not before.
"""

from gpumarket.settlement.chain.actions import Actions
from gpumarket.settlement.chain.connection import Chain, connect
from gpumarket.settlement.chain.follower import Follower
from gpumarket.settlement.chain.sender import Sender, TransactionReceipt, sender_tables
from gpumarket.settlement.chain.view import (
    PROVIDER,
    SCHEDULER,
    VERIFIER,
    ChainEvent,
    ChainView,
    ChannelChanged,
    ChannelOnChain,
    NewWork,
    NodeChanged,
    NodeOnChain,
)
from gpumarket.settlement.chain.view_file import NAME as VIEW_FILE
from gpumarket.settlement.chain.view_file import ViewFile

__all__ = [
    "PROVIDER",
    "SCHEDULER",
    "VERIFIER",
    "VIEW_FILE",
    "Actions",
    "Chain",
    "ChainEvent",
    "ChainView",
    "ChannelChanged",
    "ChannelOnChain",
    "Follower",
    "NewWork",
    "NodeChanged",
    "NodeOnChain",
    "Sender",
    "TransactionReceipt",
    "ViewFile",
    "connect",
    "sender_tables",
]
