"""The figures as Prometheus asks for them. Seconds, bytes and ratios, as its habits want; unknown is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from testbed.errors import ConfigError
from testbed.watch.board_metrics import of_boards
from testbed.watch.figures import RECENT_ROUNDS, Figures, LastRequests, LastRound

OUTCOMES = ("answered", "late", "lost", "rejected", "invalid")
LAST = f"over the last {RECENT_ROUNDS} rounds"


class RunCollector(Collector):
    """Answers a scrape with the figures that it was shown last; with none before the first."""

    def __init__(self) -> None:
        self.figures: Figures | None = None

    def collect(self) -> Iterator[Metric]:
        if self.figures is None:
            return
        yield from _of_run(self.figures)
        yield from _of_policies(self.figures)
        yield from _of_requests(self.figures)
        yield from _of_nodes(self.figures)
        yield from of_boards(self.figures.nodes)
        yield from _of_links(self.figures)
        if self.figures.last is not None:
            yield from _of_rounds(self.figures.last)


@contextmanager
def metrics_endpoint(host: str, port: int) -> Iterator[tuple[str, Callable[[Figures], None]]]:
    """Serve until the block ends; gives the address, and what shows new figures to whoever asks there.

    Port 0 is any free one. Raises ConfigError where the address cannot be had.
    """
    collector, registry = RunCollector(), CollectorRegistry(auto_describe=False)
    registry.register(collector)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"--prometheus {port}: cannot listen on {host}:{port} ({reason}); choose another port or --prometheus-host"
        ) from error

    def show(figures: Figures) -> None:
        collector.figures = figures

    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/metrics", show
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _of_run(figures: Figures) -> Iterator[Metric]:
    about = {"run": figures.run, "model": figures.model, "links": figures.links, "compute": figures.compute}
    yield InfoMetricFamily("wdmoe_run", "The run that is watched.", {k: v for k, v in about.items() if v is not None})
    yield _gauge("wdmoe_run_active", "1 while the run is recorded.", float(figures.state == "running"))


def _of_rounds(last: LastRound) -> Iterator[Metric]:
    current = GaugeMetricFamily("wdmoe_policy_active", "1 for the policy of the newest round.", labels=["policy"])
    current.add_metric([last.policy], 1)
    yield current
    yield _gauge("wdmoe_dilation_ratio", "By how much emulated time is stretched.", last.dilation)
    yield _gauge("wdmoe_last_round_timestamp_seconds", "When the newest round was, since 1970.", last.at_realtime_s)
    yield _gauge("wdmoe_round_median_seconds", f"A round's emulated time, median {LAST}.", last.median_s)
    yield _gauge("wdmoe_round_p95_seconds", f"A round's emulated time, 95th percentile {LAST}.", last.p95_s)
    yield _gauge("wdmoe_rounds_per_second", f"By the wall clock, {LAST}.", last.rounds_per_s)
    yield _gauge("wdmoe_tokens_per_second", f"Through the model by the wall clock, {LAST}.", last.tokens_per_s)


def _of_policies(figures: Figures) -> Iterator[Metric]:
    counters = {
        "wdmoe_rounds": ("Expert rounds.", "rounds"),
        "wdmoe_tokens": ("Tokens that passed the first MoE block.", "tokens"),
        "wdmoe_prompts": ("Prompts that are done.", "prompts_done"),
        "wdmoe_pairs": ("Pairs (token, expert) that the gate chose.", "pairs"),
        "wdmoe_pairs_kept": ("... that were computed and arrived.", "kept_pairs"),
        "wdmoe_gate_mass": ("Weight of the pairs that the gate chose.", "gate_mass"),
        "wdmoe_gate_mass_dropped": ("... of those whose own expert's output is missing.", "dropped_mass"),
        "wdmoe_orphaned_tokens": ("Tokens of a block without any expert's output.", "orphaned_tokens"),
    }
    for name, (meaning, attribute) in counters.items():
        counter = CounterMetricFamily(name, meaning, labels=["policy"])
        for policy in figures.policies:
            counter.add_metric([policy.policy], getattr(policy, attribute))
        yield counter
    expected = GaugeMetricFamily("wdmoe_prompts_expected", "Prompts of the workload.", labels=["policy"])
    for policy in figures.policies:
        if policy.prompts is not None:
            expected.add_metric([policy.policy], policy.prompts)
    yield expected


def _of_requests(figures: Figures) -> Iterator[Metric]:
    labels = ["policy", "device"]
    counter = CounterMetricFamily("wdmoe_requests", "Requests by what became of them.", labels=[*labels, "outcome"])
    traffic = CounterMetricFamily("wdmoe_link_bytes", "Carried, headers included.", labels=[*labels, "direction"])
    for node in figures.nodes:
        for requests in node.requests:
            for outcome in OUTCOMES:
                counter.add_metric([requests.policy, node.device, outcome], getattr(requests, outcome))
            traffic.add_metric([requests.policy, node.device, "down"], requests.bytes_down)
            traffic.add_metric([requests.policy, node.device, "up"], requests.bytes_up)
    yield counter
    yield traffic


def _of_nodes(figures: Figures) -> Iterator[Metric]:
    joins = CounterMetricFamily("wdmoe_node_joins", "How often the node joined.", labels=["device"])
    for node in figures.nodes:
        joins.add_metric([node.device], node.joins)
    yield joins
    present = {node.device: node.present for node in figures.nodes}
    yield _by_device("wdmoe_node_present", "1 while the node is connected and heard.", present)
    last = {node.device: node.last for node in figures.nodes if node.last is not None}
    gauges: dict[str, tuple[str, Callable[[LastRequests], float | None]]] = {
        "wdmoe_node_waited_for_ratio": ("Share of rounds that waited for it last", lambda of: of.waited_for),
        "wdmoe_request_expected_seconds": ("Emulated time expected of a request, median", lambda of: of.expected_s),
        "wdmoe_request_measured_seconds": ("Emulated time it took, median", lambda of: of.measured_s),
    }
    for name, (meaning, value) in gauges.items():
        yield _by_device(name, f"{meaning} {LAST}.", {device: value(of) for device, of in last.items()})


def _of_links(figures: Figures) -> Iterator[Metric]:
    gauges = {
        "wdmoe_link_asked_bits_per_second": ("Rate asked for, median", "asked_bits_per_s"),
        "wdmoe_link_measured_bits_per_second": ("Bytes over one-way time, median", "measured_bits_per_s"),
        "wdmoe_link_one_way_seconds": (
            "Emulated; wrong by wdmoe_link_one_way_bound_seconds at most; median",
            "one_way_s",
        ),
        "wdmoe_link_one_way_bound_seconds": ("By how much the one-way time can be wrong, median", "bound_s"),
    }
    for name, (meaning, attribute) in gauges.items():
        gauge = GaugeMetricFamily(name, f"{meaning} {LAST}.", labels=["device", "direction"])
        for node in figures.nodes:
            for direction, way in () if node.last is None else (("down", node.last.down), ("up", node.last.up)):
                value = getattr(way, attribute)
                if value is not None:
                    gauge.add_metric([node.device, direction], value)
        yield gauge


def _by_device(name: str, meaning: str, value_by_device: Mapping[str, float | None]) -> Metric:
    gauge = GaugeMetricFamily(name, meaning, labels=["device"])
    for device, value in value_by_device.items():
        if value is not None:
            gauge.add_metric([device], value)
    return gauge


def _gauge(name: str, meaning: str, value: float | None) -> Metric:
    gauge = GaugeMetricFamily(name, meaning)
    if value is not None:
        gauge.add_metric([], value)
    return gauge
