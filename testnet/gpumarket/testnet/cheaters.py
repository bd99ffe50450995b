"""Dishonest providers for tests, the demo and chaos: the real daemon, bent at one place each.

    python -m gpumarket.testnet.cheaters KIND --config FILE

The product has no switch for this: a cheater brings its own engine, or its own provider, as one in the field would. What each does and who
finds it: docs/cheats.md. Each marks its state folder, so that an audit does not take its books for evidence.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.codec import from_proto, signed_receipt
from gpumarket.core.errors import GpumarketError
from gpumarket.core.settings import ChainSettings, load
from gpumarket.core.signing import Domain, LocalKey, Signer
from gpumarket.core.tensor_requests import TensorRequest
from gpumarket.core.terms import ModelManifest, Receipt, Task
from gpumarket.core.units import Hash
from gpumarket.node.accounts import Accounts
from gpumarket.node.daemon import default_engine_factory
from gpumarket.node.daemon import main as serve
from gpumarket.node.engine.base import Chunk, EmbedRequest, Engine, GenerateRequest
from gpumarket.node.engine.process import EngineProcess
from gpumarket.node.engines import EngineFactory
from gpumarket.node.provider import Provider
from gpumarket.node.serving import Desk
from gpumarket.node.settings import ProviderSettings
from gpumarket.node.stock import ENGINES
from gpumarket.settlement.journal import Journal
from gpumarket.testnet.audit import CHEAT_MARK
from gpumarket.testnet.plan import COPIED_OFFER
from gpumarket.v1 import terms_pb2 as pb

CONFIG = "config.json"
LAYERS = "num_hidden_layers"

# --- engines that do not do what was sold --------------------------------------------------------------------------------------


def lower_precision(_: Path) -> EngineFactory:
    """Computes in bfloat16 what it sells as float32: half the memory, twice the speed (measured on a CPU), other numbers."""
    return partial(default_engine_factory, compute_dtype="bfloat16")


def cheaper_model(state: Path) -> EngineFactory:
    """Serves a model of half the layers, made in its state folder: half the work."""

    def make(manifest: ModelManifest, folder: Path, slots: int) -> Engine:
        cheaper = state / f"half of {manifest.name}"
        shutil.copytree(folder, cheaper, dirs_exist_ok=True)
        described = json.loads((cheaper / CONFIG).read_text())
        described[LAYERS] = max(1, described[LAYERS] // 2)
        (cheaper / CONFIG).unlink()  # it may be read-only, as the store's files are
        (cheaper / CONFIG).write_text(json.dumps(described))
        return default_engine_factory(manifest, cheaper, slots)

    return make


class CutPrompt(EngineProcess):
    """Reads the first half of every input, and bills all of it."""

    async def embed(self, request: EmbedRequest) -> AsyncGenerator[NDArray[np.float32], None]:
        async for rows in super().embed(EmbedRequest(tuple(_half(ids) for ids in request.inputs))):
            yield rows

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        async for chunk in super().generate(replace(request, prompt=_half(request.prompt))):
            yield chunk

    async def infer(self, request: TensorRequest) -> AsyncGenerator[tuple[NDArray[Any], ...], None]:
        """The first half of the rows, and once more in the place of the others."""
        half = request if request.rows < 2 else request.take(range(request.rows // 2))
        async for arrays in super().infer(half):
            yield arrays
        if half is not request:
            async for arrays in super().infer(request.take([row % half.rows for row in range(half.rows, request.rows)])):
                yield arrays


class Silent(EngineProcess):
    """Takes every job and never answers: a job costs it nothing, and keeps others from it."""

    async def embed(self, request: EmbedRequest) -> AsyncGenerator[NDArray[np.float32], None]:
        await asyncio.Event().wait()
        yield np.empty((0, 0), np.float32)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        await asyncio.Event().wait()
        yield Chunk(())

    async def infer(self, request: TensorRequest) -> AsyncGenerator[tuple[NDArray[Any], ...], None]:
        await asyncio.Event().wait()
        yield ()


def _engine_of(kind: type[EngineProcess]) -> Callable[[Path], EngineFactory]:
    def make(manifest: ModelManifest, folder: Path, slots: int) -> Engine:
        options = {"rows_max": slots} if manifest.task is Task.GENERATE else {}
        return kind(ENGINES[manifest.task], folder, compute_dtype=manifest.dtype, options=options)

    return lambda _: make


def _half(ids: tuple[int, ...]) -> tuple[int, ...]:
    return ids[: max(1, len(ids) // 2)]


# --- providers that lie about what they did, or about who they are --------------------------------------------------------------


class Inflating(Accounts):
    """States twice the tokens in every receipt that it keeps and shows, and signs that."""

    def __init__(self, journal: Journal, signer: Signer, domain: Domain) -> None:
        super().__init__(journal)
        self._signer, self._domain = signer, domain

    async def keep_receipt(self, lease: Hash, receipt: pb.SignedReceipt) -> None:
        told = from_proto(Receipt, receipt.receipt)
        more = replace(told, prompt_units=2 * told.prompt_units, output_units=2 * told.output_units)
        receipt.CopyFrom(signed_receipt(self._signer, self._domain, more))
        await super().keep_receipt(lease, receipt)


class InflatedCount(Provider):
    """Claims more tokens than it delivered."""

    def _make_accounts(self) -> Accounts:
        return Inflating(self._given.journal, self._given.signer, self._given.domain)


class ForgedReceipt(Provider):
    """Signs its receipts with a key that is not its own: whoever holds one could prove nothing against it."""

    def _make_desk(self) -> Desk:
        return replace(super()._make_desk(), signer=LocalKey(self._given.random.token(32)))


class CopiedOffer(Provider):
    """Advertises the endpoint and the TLS key of another registered provider as its own, to be paid for that one's work."""

    async def _body(self) -> pb.OfferBody:
        body = await super()._body()
        victim = self._victim()
        if victim is not None:
            body.endpoint, body.tls_key_hash = victim.endpoint, victim.tls_key_hash
        return body

    def _victim(self) -> Any:
        others = [node for address, node in self._given.view.nodes.items() if address != self._given.signer.address]
        sellers = [node for node in others if node.roles & 1 and node.endpoint]
        return sellers[0] if sellers else None


@dataclass(frozen=True, slots=True)
class Cheat:
    """The parts that a cheater brings; the others are the daemon's own. `engines` makes its factory, given its state folder."""

    engines: Callable[[Path], EngineFactory] = lambda _: default_engine_factory
    provider_class: type[Provider] = Provider


KINDS: Final[dict[str, Cheat]] = {
    "lower-precision": Cheat(lower_precision),
    "cheaper-model": Cheat(cheaper_model),
    "cut-prompt": Cheat(_engine_of(CutPrompt)),
    "inflated-count": Cheat(provider_class=InflatedCount),
    "forged-receipt": Cheat(provider_class=ForgedReceipt),
    "silence": Cheat(_engine_of(Silent)),
    COPIED_OFFER: Cheat(provider_class=CopiedOffer),
}
"""Kind → parts; in words: `plan.CHEATS`."""


def main(argv: Sequence[str]) -> int:
    """Run a cheating provider until it is told to stop; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpumarket.testnet.cheaters", description="Run a dishonest provider.")
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--config", type=Path, required=True)
    given = parser.parse_args(argv)
    cheat = KINDS[given.kind]
    try:
        settings = load(ProviderSettings, file=given.config)
        settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        (settings.state / CHEAT_MARK).write_text(f"{given.kind}\n")
        chain = load(ChainSettings, file=given.config)
        serve(settings, chain, engine_factory=cheat.engines(settings.state), provider_class=cheat.provider_class)
    except GpumarketError as error:
        print(f"error: {error.message}\n  next: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
