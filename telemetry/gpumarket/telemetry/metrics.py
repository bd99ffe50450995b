"""Metrics as a table of what there is, and readings of what it is now; Prometheus asks, and only then anything is counted up.

Each metric has one label at most, and the label's values are listed beforehand: a value that is none of them counts as "other", so that
nothing a peer says ever makes a series. Nothing here runs on the path of a job but histograms, which get one number an attempt.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from gpumarket.core.units import TOKEN_DECIMALS

PREFIX = "gpumarket_"
OTHER = "other"
_TOKEN = float(10**TOKEN_DECIMALS)
Reading = float | Mapping[str, float]
"""A number, or numbers by the value of the metric's label."""


disable_created_metrics()  # type: ignore[no-untyped-call]  # else each histogram has a second name, that of a time which nobody asked for


class Kind(enum.Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its name without prefix, what it tells, and the values that its label may have."""

    name: str
    kind: Kind
    help: str
    label: str = ""
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert bool(self.label) == bool(self.values), f"{self.name}: a label has values, listed"
        assert (self.kind is Kind.COUNTER) == self.name.endswith("_total"), f"{self.name}: counters end in _total"
        assert (self.kind is Kind.HISTOGRAM) == bool(self.buckets)

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


def counter(name: str, help: str, label: str = "", values: Sequence[str] = ()) -> Metric:
    """A count since the process started, or since its ledger began."""
    return Metric(name, Kind.COUNTER, help, label, tuple(values))


def gauge(name: str, help: str, label: str = "", values: Sequence[str] = ()) -> Metric:
    """What something is now."""
    return Metric(name, Kind.GAUGE, help, label, tuple(values))


def histogram(name: str, help: str, buckets: Sequence[float], label: str = "", values: Sequence[str] = ()) -> Metric:
    """How observations are spread."""
    return Metric(name, Kind.HISTOGRAM, help, label, tuple(values), tuple(buckets))


def tokens(base_units: int) -> float:
    """Money as a number of tokens. For display only: a float is no amount."""
    return base_units / _TOKEN


class Exposition:
    """All metrics of one process. `read` answers the present readings by name; a metric that it leaves out is not shown."""

    def __init__(self, metrics: Sequence[Metric], read: Callable[[], Mapping[str, Reading]]) -> None:
        self.metrics = {metric.name: metric for metric in metrics}
        assert len(self.metrics) == len(metrics), "a metric is listed twice"
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Table(self.metrics, read))
        ProcessCollector(registry=self._registry)
        self._observe: dict[str, dict[str, Callable[[float], None]]] = {
            m.name: self._histogram(m) for m in metrics if m.kind is Kind.HISTOGRAM
        }

    def observer(self, name: str, value: str = "") -> Callable[[float], None]:
        """What to call with each observation of a histogram; bound beforehand, so that a call costs an addition."""
        return self._observe[name][value]

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self._registry)

    def _histogram(self, metric: Metric) -> dict[str, Callable[[float], None]]:
        labels = [metric.label] if metric.label else []
        made = Histogram(metric.full_name, metric.help, labels, buckets=metric.buckets, registry=self._registry)
        if not labels:
            return {"": made.observe}
        return {value: made.labels(value).observe for value in metric.values}


class _Table(Collector):
    def __init__(self, metrics: Mapping[str, Metric], read: Callable[[], Mapping[str, Reading]]) -> None:
        self._metrics, self._read = metrics, read

    def collect(self) -> Iterator[Family]:
        for name, reading in self._read().items():
            metric = self._metrics[name]
            labels = [metric.label] if metric.label else []
            kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
            family = kind(metric.full_name, metric.help, labels=labels)
            for value, number in bounded(metric, reading).items():
                family.add_metric([value] if labels else [], number)
            yield family


def bounded(metric: Metric, reading: Reading) -> dict[str, float]:
    """A reading by the values that its label may have, all of them; what is under any other is summed up as "other"."""
    if not isinstance(reading, Mapping):
        assert not metric.label, f"{metric.name} has a label"
        return {"": float(reading)}
    found = dict.fromkeys(metric.values, 0.0)
    for value, number in reading.items():
        key = value if value in found else OTHER
        found[key] = found.get(key, 0.0) + number
    return found
