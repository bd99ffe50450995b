"""What a gateway shows of itself. Labels are closed sets: endpoints, classes of status, codes of errors, and the aliases that its lock file
had at the start; no key, caller, prompt or peer's word is one of their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from gpumarket.gateway.call import Room
from gpumarket.gateway.endpoints import ENDPOINTS
from gpumarket.gateway.inference_protocol import service
from gpumarket.gateway.problems import codes
from gpumarket.telemetry.metrics import Exposition, Metric, Reading, counter, gauge, histogram, tokens

STATUSES = ("2xx", "4xx", "5xx", "left")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def metrics_of(models: Sequence[str]) -> tuple[Metric, ...]:
    """Every metric of a gateway that offers these models."""
    names = (*(endpoint.name for endpoint in ENDPOINTS), service.ENDPOINT)
    return (
        gauge("build_info", "1, for the version that runs.", "version", (version("gpumarket"),)),
        counter("gateway_requests_total", "Requests, by endpoint.", "endpoint", names),
        counter("gateway_answers_total", "Answers by class of status; left: the caller went away before.", "status", STATUSES),
        counter("gateway_problems_total", "Errors told, by code.", "code", codes()),
        counter(
            "gateway_results_total", "Results, by model; a job that requests shared gave each of them one.", "model", models or ("none",)
        ),
        counter("gateway_shared_results_total", "Embedding results whose job gave other requests theirs, too."),
        counter("gateway_prompt_tokens_total", "Tokens read, as billed."),
        counter("gateway_output_tokens_total", "Tokens delivered, as billed."),
        counter("gateway_spent_tokens_total", "Money booked to keys, checks and reruns included."),
        counter("gateway_turned_away_total", "Requests that came while as many jobs ran as may."),
        gauge("gateway_jobs", "Jobs under way."),
        gauge("gateway_draining", "1 while no requests are taken."),
        histogram("gateway_first_event_seconds", "From a streamed request to the first event of its answer.", SECONDS),
        histogram("gateway_answer_seconds", "From a request to the end of its answer, where that is no error.", SECONDS),
    )


class GatewayMetrics:
    """`text` is what Prometheus reads."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.exposition = Exposition(metrics_of([entry.name for entry in room.catalog.models()]), self._read)
        room.tally.observe_first = self.exposition.observer("gateway_first_event_seconds")
        room.tally.observe_whole = self.exposition.observer("gateway_answer_seconds")

    async def text(self) -> bytes:
        """All of it, now."""
        return self.exposition.text()

    async def close(self) -> None: ...

    def _read(self) -> Mapping[str, Reading]:
        tally, counting = self._room.tally, self._room.counter
        return {
            "build_info": {version("gpumarket"): 1},
            "gateway_requests_total": dict(tally.requests),
            "gateway_answers_total": dict(tally.answers),
            "gateway_problems_total": dict(tally.problems),
            "gateway_results_total": dict(tally.jobs),
            "gateway_shared_results_total": self._room.sharing.shared,
            "gateway_prompt_tokens_total": tally.prompt_tokens,
            "gateway_output_tokens_total": tally.output_tokens,
            "gateway_spent_tokens_total": tokens(counting.ledger.spent),
            "gateway_turned_away_total": counting.turned_away,
            "gateway_jobs": counting.running,
            "gateway_draining": float(counting.draining),
        }
