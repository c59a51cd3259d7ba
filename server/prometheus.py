"""A view of a run as Prometheus metrics, in the plain text format 0.0.4."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from server.snapshot import State

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def exposition(view: Mapping[str, Any]) -> bytes:
    """Returns the metrics of :func:`server.snapshot.view`; None is left out, never 0.

    Nothing of the process is in it, and nothing that another library has registered.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Run(view))
    return generate_latest(registry)


class _Run(Collector):
    def __init__(self, view: Mapping[str, Any]) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        view = self._view
        yield _labelled("run_info", "The run's id.", run={view["run"]: 1})
        states = {state: int(state == view["state"]) for state in get_args(State)}
        yield _labelled("state", "1 for the state that the server is in.", state=states)
        for name, (value, text) in _gauges(view).items():
            if value is not None:
                yield GaugeMetricFamily(f"fedpeft_{name}", text, value=value)
        if view["value"] is not None:
            latest = {view["metric"]: view["value"]}
            yield _labelled("metric", "The metric, as last judged.", name=latest)
        for name, text in _BYTES.items():
            if view[name] is not None:
                yield CounterMetricFamily(f"fedpeft_{name}", text, value=view[name])
        refusals = CounterMetricFamily(
            "fedpeft_refusals", "Refusals and failures by code.", labels=["code"]
        )
        for code, count in view["codes"].items():
            refusals.add_metric([code], count)
        yield refusals


_BYTES = {
    "bytes_up": "Bytes of payload, from clients to the server.",
    "bytes_down": "Bytes of payload, from the server to clients.",
}


def _gauges(view: Mapping[str, Any]) -> dict[str, tuple[float | None, str]]:
    """Returns value and help of every gauge without labels."""
    privacy = view["privacy"] or {}
    last = view["records"][-1] if view["records"] else {}
    return {
        "round": (view["server_round"], "Rounds done."),
        "rounds": (view["rounds"], "Rounds that there will be."),
        "clients_connected": (len(view["connected"]), "Clients connected now."),
        "clients_expected": (view["expected"], "Clients that the run has."),
        "cohort_size": (last.get("cohort_size"), "Clients asked in the last round."),
        "replies": (last.get("replies"), "Clients that answered in the last round."),
        "round_seconds": (last.get("seconds"), "How long the last round took."),
        "epsilon_target": (privacy.get("target_epsilon"), "The most allowed."),
        "epsilon_planned": (privacy.get("planned_epsilon"), "Of the whole run."),
        "epsilon_spent": (privacy.get("spent_epsilon"), "So far, the worst client."),
        "start_time_seconds": (view["started"], "Start of the server, Unix time."),
    }


def _labelled(name: str, text: str, /, **values: Mapping[str, float]) -> Metric:
    """Returns a gauge with one label, which is the name of the last argument."""
    ((label, by_value),) = values.items()
    family = GaugeMetricFamily(f"fedpeft_{name}", text, labels=[label])
    for value, number in by_value.items():
        family.add_metric([value], number)
    return family
