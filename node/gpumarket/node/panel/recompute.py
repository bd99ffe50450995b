"""A result in dispute, computed again with this provider's own engine.

The engine gets request and output, never the number that anybody else found. Invariant: what comes back are this attempt's rows, or one gap
for each token of the text, or an error: never a part.
"""

from __future__ import annotations

from gpumarket.core.errors import EngineFailed, ProtocolError
from gpumarket.core.seeds import drawing_seed, require_disputable
from gpumarket.core.terms import ModelManifest, Task
from gpumarket.node.attempt import Ended
from gpumarket.node.engine.base import EmbedRequest, Engine, GenerateRequest, Sampling, Segment
from gpumarket.node.work import EmbedWork, ReplayWork, Work, run
from gpumarket.settlement.verification import Evidence
from gpumarket.v1 import terms_pb2 as terms


def work_of(evidence: Evidence, manifest: ModelManifest) -> Work:
    """What to compute. Raises ProtocolError for a result that this model cannot have given, NotDisputable."""
    request = evidence.request
    require_disputable(request)
    if isinstance(request, terms.EmbedRequest) and manifest.task is Task.EMBED:
        inputs = tuple(tuple(item.ids) for item in request.inputs[evidence.own_start : len(evidence.output)])
        return EmbedWork(EmbedRequest(_within(inputs, manifest)))
    if isinstance(request, terms.GenerateRequest) and manifest.task is Task.GENERATE:
        return _replay(evidence, request, manifest)
    raise ProtocolError(f"a result of task {evidence.lease.task.name} cannot be disputed")


async def recompute(work: Work, engine: Engine) -> list[bytes]:
    """Rows of float32 little-endian, or one item with the gaps. Raises EngineFailed."""
    items: list[bytes] = []
    async for step in run(work, engine):
        if isinstance(step, Ended):
            return items
        items += [item.data for item in step.items]
    raise EngineFailed("the engine stopped before the end of what is in dispute")


def _replay(evidence: Evidence, request: terms.GenerateRequest, manifest: ModelManifest) -> ReplayWork:
    """The whole text under this attempt's seed: gaps of earlier attempts' tokens mean nothing, and are not counted."""
    seed = drawing_seed(request, evidence.lease.struct_hash, evidence.receipt.nonce)
    output = tuple(int.from_bytes(item, "little") for item in evidence.output)
    prompt = tuple(request.prompt)
    _within((prompt + output,), manifest)
    sampling = Sampling(request.temperature_milli, request.top_p_ppm, seed)
    asked = GenerateRequest(prompt, request.max_tokens, tuple(request.stop_tokens), sampling, ())
    return ReplayWork(asked, output, (Segment(0, seed),))


def _within(inputs: tuple[tuple[int, ...], ...], manifest: ModelManifest) -> tuple[tuple[int, ...], ...]:
    longest = max((len(ids) for ids in inputs), default=0)
    if longest > manifest.max_input_tokens:
        raise ProtocolError(f"the result in dispute has an input of {longest} tokens; {manifest.name} takes {manifest.max_input_tokens}")
    return inputs
