"""A node's state as Prometheus reads it. Counts are kept where things happen, and only read here, when asked.

Every label has few values that the node or its configuration decides; none holds a peer or what a peer said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kwaainet_bridge import __version__
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.hivemind.averaging import FailureKind, Outcome
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node.admin.engine_metrics import engine_metrics
from kwaainet_bridge.node.admin.samples import PREFIX, counter, gauge, histogram
from kwaainet_bridge.node.admin.status import host_counts
from kwaainet_bridge.node.phase import Phase
from kwaainet_bridge.node.readiness import conditions, is_ready
from kwaainet_bridge.node.state import NodeState

if TYPE_CHECKING:
    from kwaainet_bridge.node.served import BlockServer

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST


def exposition(state: NodeState) -> bytes:
    """All metrics in the text format."""
    registry = CollectorRegistry()
    registry.register(_StateCollector(state))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _StateCollector(Collector):
    def __init__(self, state: NodeState) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        yield from _node(self._state)
        yield from _host(self._state)
        yield from _networks(self._state)
        yield from _models(self._state)
        yield from _averaging(self._state)


def _node(state: NodeState) -> Iterator[Metric]:
    yield InfoMetricFamily(f"{PREFIX}build", "The program.", value={"version": __version__})
    yield gauge("uptime_seconds", "Since the start.", [((), state.now - state.began)])
    phases = [((phase.value,), float(phase is state.phase)) for phase in Phase]
    yield gauge("phase", "1 for the phase that the node is in.", phases, ("phase",))
    judged = conditions(state)
    yield gauge("ready", "1 while all conditions are met.", [((), float(is_ready(judged)))])
    met = [((c.name, c.model or ""), float(c.met)) for c in judged]
    of_model = ("condition", "model")
    yield gauge("condition", "1 for each condition of readiness that is met.", met, of_model)
    degraded = [((name, "" if model is None else model.key), 1.0) for model, name, _ in state.degradations()]
    yield gauge("degraded", "1 for each condition that degrades the node.", degraded, of_model)
    verdicts = [((verdict.value,), float(verdict is state.reachability[0])) for verdict in Verdict]
    yield gauge("reachability", "1 for the verdict on whether others can dial it.", verdicts, ("verdict",))
    yield histogram(
        "event_loop_lag_seconds", "How late the event loop wakes a task that slept.", [((), state.lag)]
    )


def _host(state: NodeState) -> Iterator[Metric]:
    if state.host is None:
        return
    counts = host_counts(state.host)
    connections, streams = counts["connections"], counts["streams"]
    directions = [((direction,), connections[direction]) for direction in ("inbound", "outbound")]
    yield gauge("connections", "Open connections.", directions, ("direction",))
    yield gauge("connections_limit", "Most connections at one time.", [((), connections["limit"])])
    yield gauge("streams", "Streams of peers that are served.", [((), streams["open"])])
    yield gauge("streams_limit", "Most such streams at one time.", [((), streams["limit"])])
    yield counter(
        "refusals",
        "Connections and streams turned away, by whose limit it was.",
        [((scope,), count) for scope, count in counts["refused"].items()],
        ("scope",),
    )


def _networks(state: NodeState) -> Iterator[Metric]:
    watches = state.bootstrap
    reached = [((name,), len(watch.reached)) for name, watch in watches.items()]
    yield gauge("bootstrap_peers_reached", "Bootstrap peers in touch.", reached, ("network",))
    total = [((name,), watch.total) for name, watch in watches.items()]
    yield gauge("bootstrap_peers", "Bootstrap peers there should be.", total, ("network",))
    announced = {
        (model.key, name): known for model in state.models.values() for name, known in model.announced.items()
    }
    where = ("model", "network")
    yield counter(
        "announce_rounds",
        "Rounds in which records were written.",
        [(of, known.rounds) for of, known in announced.items()],
        where,
    )
    kept = [
        row
        for of, known in announced.items()
        for row in (
            ((*of, "sent"), known.records),
            ((*of, "acknowledged"), known.acknowledged),
            ((*of, "by_others"), known.by_others),
        )
    ]
    yield counter(
        "dht_records", "Records written, kept by some node, and by another one.", kept, (*where, "outcome")
    )
    age = [(of, state.now - known.at) for of, known in announced.items()]
    yield gauge("announce_age_seconds", "Since the latest round of announcements ended.", age, where)
    by_others = [(of, known.last.by_others) for of, known in announced.items()]
    yield gauge("announced_records", "Records of the latest round that others keep.", by_others, where)


def _models(state: NodeState) -> Iterator[Metric]:
    phases = [
        ((m.key, phase.value), float(phase is m.phase)) for m in state.models.values() for phase in Phase
    ]
    if phases:
        yield gauge("model_phase", "1 for the phase that a model is in.", phases, ("model", "phase"))
    served = {model.key: model.served for model in state.models.values() if model.served is not None}
    if served:
        yield from engine_metrics({key: blocks.engine for key, blocks in served.items()})
        rooms = {key: blocks.cache_tokens for key, blocks in served.items()}
        yield gauge(
            "cache_tokens",
            "Room of the KV cache in tokens of one sequence through all served blocks.",
            [
                row
                for key, (total, left) in rooms.items()
                for row in (((key, "used"), total - left), ((key, "left"), left))
            ],
            ("model", "state"),
        )
        yield from _serving(
            {
                (key, name): server
                for key, blocks in served.items()
                for name, server in blocks.by_network.items()
            }
        )


def _serving(servers: Mapping[tuple[str, str], BlockServer]) -> Iterator[Metric]:
    """By model and network."""
    where = ("model", "network")
    sessions = [(of, server.open_sessions) for of, server in servers.items()]
    yield gauge("sessions", "Open inference sessions.", sessions, where)
    counts = {of: server.counts for of, server in servers.items()}
    steps = [(of, count.steps) for of, count in counts.items()]
    yield counter("steps", "Steps of sessions that were computed.", steps, where)
    tokens = [
        row
        for of, count in counts.items()
        for row in (((*of, "step"), count.step_tokens), ((*of, "pass"), count.pass_tokens))
    ]
    yield counter("tokens", "Tokens that were computed.", tokens, (*where, "kind"))
    yield histogram(
        "step_seconds",
        "How long a step took, to read it, in the engine, and to reply.",
        [
            ((*of, phase), histogram)
            for of, count in counts.items()
            for phase, histogram in count.step_seconds.items()
        ],
        (*where, "phase"),
    )
    passes = [(of, count.passes) for of, count in counts.items()]
    yield counter("passes", "Forward and backward requests that were computed.", passes, where)
    refused = [(of, count.refused) for of, count in counts.items()]
    yield counter("requests_refused", "Sessions and requests that were refused.", refused, where)
    yield counter(
        "tensor_bytes",
        "Bytes of tensors as they travelled.",
        [row for of, count in counts.items() for row in _tensor_bytes(of, count)],
        (*where, "direction", "compression"),
    )


def _tensor_bytes(of: tuple[str, str], counts: ServingCounts) -> Iterator[tuple[tuple[str, ...], float]]:
    for compression, count in counts.received_bytes.items():
        yield (*of, "received", compression), count
    for compression, count in counts.sent_bytes.items():
        yield (*of, "sent", compression), count


def _averaging(state: NodeState) -> Iterator[Metric]:
    runs = {name: status() for name, status in state.averaging.items()}
    steps = [((name, o.value), run.counts.steps[o]) for name, run in runs.items() for o in Outcome]
    yield counter("averaging_steps", "Steps of averaging by how they ended.", steps, ("run", "outcome"))
    moved = [
        row
        for name, run in runs.items()
        for row in (((name, "sent"), run.sent_bytes), ((name, "received"), run.received_bytes))
    ]
    yield counter("averaging_bytes", "Bytes of tensors that were averaged.", moved, ("run", "direction"))
    sizes = [((name,), len(run.members)) for name, run in runs.items()]
    yield gauge("averaging_group_size", "Members of the group that averages now, 0 without.", sizes, ("run",))
    bans = [((name, k.value), run.counts.failures[k]) for name, run in runs.items() for k in FailureKind]
    yield counter(
        "averaging_bans", "Members that were left out, or lost their share.", bans, ("run", "reason")
    )
    yield histogram(
        "averaging_allreduce_seconds",
        "How long groups averaged.",
        [((name,), run.counts.allreduce_seconds) for name, run in runs.items()],
        ("run",),
    )
