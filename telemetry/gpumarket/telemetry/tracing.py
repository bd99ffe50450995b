"""Whether this process traces: off, and no package of OpenTelemetry imported, unless the standard OTEL_* variables ask for it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from gpumarket.core.errors import ConfigError, MissingExtra
from gpumarket.telemetry.spans import OFF, Tracing


def from_environment(role: str, env: Mapping[str, str] = os.environ) -> Tracing:
    """Tracing as OTEL_TRACES_EXPORTER and OTEL_EXPORTER_OTLP_(TRACES_)ENDPOINT ask for it; off when neither is set.

    Raises ConfigError for an exporter or protocol that is not here, MissingExtra when its packages are not.
    """
    if not _wanted(env):
        return OFF
    protocol = env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or env.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol != "http/protobuf":
        raise ConfigError(f"traces are sent as http/protobuf, not as {protocol!r}", hint="unset OTEL_EXPORTER_OTLP_PROTOCOL")
    try:
        from gpumarket.telemetry.otlp import OtlpTracing
    except ModuleNotFoundError as error:
        raise MissingExtra("tracing", "tracing, which OTEL_* variables ask for,") from error
    return OtlpTracing(env.get("OTEL_SERVICE_NAME") or f"gpumarket-{role}")


def _wanted(env: Mapping[str, str]) -> bool:
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = env.get("OTEL_TRACES_EXPORTER", "").strip()
    if exporter not in ("", "none", "otlp"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER is {exporter!r}; there is only otlp", hint="set it to otlp, or to none")
    asked = env.get("OTEL_EXPORTER_OTLP_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return exporter == "otlp" or (not exporter and bool(asked))
