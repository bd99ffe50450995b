"""A provider as a simulated process: the product's classes, put together as its daemon does, over the simulated ports.

Left out, because they hold no money: TLS, p2p, GPU proofs, the heartbeat's stream.
"""

from __future__ import annotations

from typing import Any, cast

from simulation.chain_model import Actions
from simulation.medium import Medium, SimJournal
from simulation.shop import (
    CHANNELS,
    DOMAIN,
    MODELS,
    NOWHERE,
    PROVIDER_SETTINGS,
    PROVIDERS,
    Common,
    SimEngine,
    SimRandom,
    keep_redeeming,
    key_hash,
    refusable,
)
from simulation.virtual import SimClock

from gpumarket.core.rpc import ServerIdentity
from gpumarket.core.units import Hash
from gpumarket.node import redeeming
from gpumarket.node.accounts import HeldVoucher
from gpumarket.node.inventory import Gpu, Inventory
from gpumarket.node.provider import Provider, Stock, Surroundings
from gpumarket.settlement.chain.view import ChainView
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import terms_pb2 as pb


class ProviderRole:
    """A provider's process, started anew on the same medium after each crash."""

    def __init__(self, common: Common, index: int, medium: Medium, *, cheats: bool) -> None:
        self.common, self.index, self.medium, self.cheats = common, index, medium, cheats
        self.key, self.name = PROVIDERS[index], f"provider {index}"
        self.endpoint = f"provider-{index}:1"
        self.hello: tuple[pb.SignedOffer, int] | None = None
        self.lives = 0
        self.actions = Actions(common.chain, self.key.address)
        self.start()

    @property
    def alive(self) -> bool:
        return self.process.alive

    def start(self) -> None:
        common = self.common
        self.lives += 1
        self.hello = None
        self.process = common.process(self.name)
        self.journal = SimJournal(self.medium, self.process)
        self.view = ChainView()
        common.chain.follow(self.process, self.view)
        clock = SimClock(common.net.timeline)
        given = Surroundings(
            signer=self.key,
            domain=DOMAIN,
            channels_domain=CHANNELS,
            identity=ServerIdentity(b"", b"", key_hash(self.endpoint)),
            view=self.view,
            journal=cast(Any, self.journal),
            inventory=Inventory((Gpu(-1, "CPU", "", 1 << 30, 0),), ()),
            clock=clock,
            random=SimRandom(common.rng),
            read_blob=lambda sha256, limit: b"",
            announce=_nobody_listens,
            p2p_id="peer",
            on_journal_error=_ignored,
        )
        stock = [Stock(model, NOWHERE, False) for model in MODELS.values()]
        engines = {m.manifest.digest: SimEngine(task, cheats=self.cheats, rng=common.rng) for task, m in MODELS.items()}
        self.process.loop.call_soon(lambda: self._begin(stock, engines, given, clock))

    def _begin(self, stock: list[Stock], engines: dict[Hash, SimEngine], given: Surroundings, clock: SimClock) -> None:
        provider = Provider(PROVIDER_SETTINGS, stock, lambda manifest, path, slots: cast(Any, engines[manifest.digest]), given)
        self.process.live(self._live(provider, given, clock))

    async def _live(self, provider: Provider, given: Surroundings, clock: SimClock) -> None:
        await provider.open()
        self.provider = provider
        provider.endpoint = self.endpoint
        provider._advert = provider._make_advert()
        await provider.advertise()
        self.process.services["gpumarket.v1.Provider"] = provider.service
        self.common.net.listen(self.endpoint, self.process)
        self.hello = provider._advert.current, self.lives
        actions, vouchers = cast(Any, self.actions), provider.accounts.vouchers
        redeemer = redeeming.make_redeemer(PROVIDER_SETTINGS, actions, given.journal, vouchers.values, self.view, clock)
        self.process.live(keep_redeeming(redeemer, PROVIDER_SETTINGS.redeem_seconds))
        await provider.claims.run()

    def hear(self, message: mpb.HeartbeatDown) -> None:
        """What the heartbeat carries of money; runs in this process."""
        provider = getattr(self, "provider", None)
        if provider is None or not provider.endpoint:
            return
        for lease in message.settled:
            provider.claims.poke(Hash(lease))
        if message.HasField("voucher"):
            self.process.spawn(refusable(provider.claims.take_voucher(message.voucher)))

    def vouchers(self) -> dict[Hash, HeldVoucher]:
        """What its journal holds."""
        provider = getattr(self, "provider", None)
        return dict(provider.accounts.vouchers) if self.alive and provider is not None else {}


async def _nobody_listens(_offer: bytes) -> None:
    """No p2p here."""


def _ignored(_error: Exception) -> None:
    """The task's own exception is noted by its process."""
