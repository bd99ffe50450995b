"""The profiles that this program knows and proposes. Content-addressed: whoever wants others names them; both sides agreed before the run.

Measured (real MiniLM, 64 texts; random Llamas, 200 honest jobs of 129 tokens, bf16):
    fp32 embeddings   honest differ by at most 1.3e-7 a coordinate, every cheat by at least 1.5e-4            -> 1e-5
    bf16 embeddings   honest runs stay within 1 - cos = 3.7e-5 of each other, int8 starts at 3.1e-4; at 384
                      coordinates 1 - cos = 1e-4 is a largest difference of about 3e-3                        -> 3e-3
    text              mean clipped gap of an honest job at most 6.1e-4 (one token's largest gap 0.071); fp8
                      starts at 2.3e-3; int8 (median 6.9e-4) is left to the pooled test                       -> 9.2e-4 / 2e-3
                      gross: more than 15 % of tokens with a gap above 0.1, which no honest job came near
    below 64 tokens one honest near-tie (0.071) could pass the rejection mean: such answers are only pooled
    tensors           numbers count absolutely up to 1 and relatively above; integers and booleans are compared exactly.
                      fp32, the testnet's convnet and anomaly score: equal in any batch, 1.5e-6 apart with other kernels;
                      fp16 weights differ by more than the bound in half of the convnet's rows (2e-3 in the worst of 600)
                      and in nearly all of the score's; room is left for deeper models and GPUs, not measured yet -> 3e-5
                      fp16: not measured; a rounding of 5e-4 in each of some tens of layers                        -> 2e-2
Text of float32 models was measured only against bf16 checkers, so it keeps the same bands.
"""

from __future__ import annotations

from gpumarket.core.errors import ConfigError
from gpumarket.core.terms import Task, VerificationProfile
from gpumarket.core.units import Hash, hex0x


def _text(dtype: str) -> VerificationProfile:
    return VerificationProfile(
        Task.GENERATE,
        dtype,
        accept_mean_gap_micro=920,
        reject_mean_gap_micro=2_000,
        gross_gap_milli=100,
        gross_share_ppm=150_000,
        min_units=64,
    )


EMBED_FP32 = VerificationProfile(Task.EMBED, "float32", max_abs_diff_nano=10_000)
EMBED_BF16 = VerificationProfile(Task.EMBED, "bfloat16", max_abs_diff_nano=3_000_000)
TEXT_FP32 = _text("float32")
TEXT_BF16 = _text("bfloat16")

INFER_FP32 = VerificationProfile(Task.INFER, "float32", runtime="onnxruntime", max_abs_diff_nano=30_000)
INFER_FP16 = VerificationProfile(Task.INFER, "float16", runtime="onnxruntime", max_abs_diff_nano=20_000_000)

PROFILES: dict[Hash, VerificationProfile] = {p.digest: p for p in (EMBED_FP32, EMBED_BF16, TEXT_FP32, TEXT_BF16, INFER_FP32, INFER_FP16)}
"""Every known profile by its digest."""


def profile_for(task: Task, dtype: str) -> VerificationProfile:
    """The profile to propose for a model of this task and dtype. Raises ConfigError for a pair that has none."""
    for profile in PROFILES.values():
        if (profile.task, profile.dtype) == (task, dtype):
            return profile
    raise ConfigError(
        f"no verification profile for {task.name} in {dtype}",
        hint="known: " + ", ".join(sorted(f"{p.task.name} in {p.dtype}" for p in PROFILES.values())),
    )


def profile_by_digest(digest: Hash) -> VerificationProfile:
    """The known profile with this digest. Raises ConfigError."""
    profile = PROFILES.get(digest)
    if profile is None:
        raise ConfigError(f"verification profile {hex0x(digest)} is not known here", hint="take an offer that names a known profile")
    return profile
