"""Saying what we sell: the own offer, published on change, again every few minutes, and when we come back among peers.

Invariant: at most one publication per `GAP_SECONDS`, only ever of the newest offer: bursts vanish in libp2p's queues (measured: 16 of
1000 delivered), and an offer that was replaced before its turn need not travel.
"""

from __future__ import annotations

import random
from collections import Counter

import trio
from libp2p.pubsub.pubsub import Pubsub

from gpumarket.p2p.node import OFFERS_TOPIC

GAP_SECONDS = 0.1
_SETTLE_SECONDS = 1.0  # a mesh forms with the next heartbeat


class Announcer:
    """Publishes one offer and keeps it fresh."""

    def __init__(self, pubsub: Pubsub, announce_seconds: float, counters: Counter[str], rng: random.Random) -> None:
        self._pubsub, self._every, self._counters, self._rng = pubsub, announce_seconds, counters, rng
        self._offer = b""
        self._due = trio.Event()

    def set(self, signed_offer: bytes) -> None:
        """Publish this one now, and from now on. It must have passed the gate."""
        self._offer = signed_offer
        self._due.set()

    async def rejoin(self) -> None:
        """Call when the first peer arrives after a time without any: what we said meanwhile was heard by nobody."""
        await trio.sleep(_SETTLE_SECONDS)
        self._due.set()

    async def run(self) -> None:
        while True:
            with trio.move_on_after(self._every * (0.9 + 0.2 * self._rng.random())):
                await self._due.wait()
            self._due = trio.Event()
            if self._offer:
                await self._pubsub.publish(OFFERS_TOPIC, self._offer)
                self._counters["announced"] += 1
            await trio.sleep(GAP_SECONDS)
