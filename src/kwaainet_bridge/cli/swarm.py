"""``kwaainet-bridge swarm``: which models a swarm has, who serves which of their blocks, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio
import typer
from rich.console import Console

from kwaainet_bridge.bridge.kwaai_directory import KWAAINET, survey_kwaainet
from kwaainet_bridge.bridge.shared_models import SharedModel, shared_models
from kwaainet_bridge.cli.printing import console, counted, spinner
from kwaainet_bridge.cli.swarm_models import FoundModels, Wanted, find_models
from kwaainet_bridge.cli.swarm_picture import print_header, print_network, print_shared
from kwaainet_bridge.cli.visit import Visit, visit_swarm
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.hivemind.client import Check, SurveyedModel, check_servers, survey
from kwaainet_bridge.hivemind.client.directory import PETALS, Span
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.net.ping import ping
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True, slots=True)
class NetworkSurvey:
    """What was seen of one network. ``checks`` is None if nobody was dialled; ``error`` tells why nothing was seen."""

    network: str
    models: tuple[SurveyedModel, ...]
    checks: dict[PeerId, Check] | None = None
    models_left_out: int = 0
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "models": [self._model(surveyed) for surveyed in self.models],
            "models_left_out": self.models_left_out,
            "error": self.error,
        }

    def _model(self, surveyed: SurveyedModel) -> dict[str, Any]:
        coverage = surveyed.coverage
        return {
            "prefix": surveyed.model.prefix,
            "repository": surveyed.model.repository,
            "num_blocks": surveyed.model.num_blocks,
            "servers_per_block": list(coverage.counts),
            "gaps": [[gap.start, gap.stop] for gap in coverage.gaps],
            "error": surveyed.error,
            "servers": [self._server(span, surveyed.left_out.get(span.peer, "")) for span in surveyed.spans],
        }

    def _server(self, span: Span, left_out: str) -> dict[str, Any]:
        info = span.info
        check = None if self.checks is None else self.checks.get(span.peer)
        return {
            "peer": str(span.peer),
            "public_name": info.public_name,
            "blocks": [span.blocks.start, span.blocks.stop],
            "state": info.state.name.lower(),
            "throughput": info.throughput,
            "inference_rps": info.inference_rps,
            "forward_rps": info.forward_rps,
            "network_rps": info.network_rps,
            "version": info.version,
            "torch_dtype": info.torch_dtype,
            "quant_type": info.quant_type,
            "using_relay": info.using_relay,
            "adapters": list(info.adapters),
            "cache_tokens_left": info.cache_tokens_left,
            "left_out": left_out,
            "check": None
            if check is None
            else {
                "reachable": check.reachable,
                "round_trip_ms": None if check.seconds is None else round(check.seconds * 1e3, 3),
                "relayed": check.relayed,
                "error": check.error,
            },
        }


def shared_as_json(model: SharedModel, num_blocks: int | None) -> dict[str, Any]:
    """One model in all networks that have it: its names, what is missing, what a node should serve."""

    def pairs(runs: Iterable[range]) -> list[list[int]]:
        return [[run.start, run.stop] for run in runs]

    suggestion = model.suggestion(num_blocks)
    return {
        "prefixes": {network: seen.model.prefix for network, seen in model.by_network.items()},
        "num_blocks": model.num_blocks,
        "unknown_in": list(model.unknown_in),
        "networks_per_block": list(model.networks_per_block),
        "gaps": pairs(model.held_in(0)),
        "suggestion": None
        if suggestion is None
        else {"blocks": [suggestion.blocks.start, suggestion.blocks.stop], "reason": suggestion.reason},
    }


_SURVEYS: Final[Mapping[str, Callable[..., Awaitable[list[SurveyedModel]]]]] = {
    PETALS: survey,
    KWAAINET: survey_kwaainet,
}


def _configured(config: NodeConfig, visit: Visit) -> dict[str, DhtNode]:
    """The networks that are asked for, each with its DHT. A Petals swarm without an address is none."""
    networks: dict[str, DhtNode] = {}
    if config.networks.petals is not None and config.networks.petals.bootstrap:
        networks[PETALS] = visit.dht
    if visit.kwaainet is not None:
        networks[KWAAINET] = visit.kwaainet
    return networks


async def show_swarm(
    config: NodeConfig, wanted: Wanted, *, check: bool, as_json: bool, num_blocks: int | None = None
) -> None:
    """Look at all configured networks and print them; with ``check`` also dial every server that has records.

    ``num_blocks`` is how many blocks a node holds for which a place is suggested; see :meth:`SharedModel.suggestion`.
    Raises NetworkError if no bootstrap peer of any is reached or nobody serves the model that is asked for, ConfigError
    without an address.
    """
    async with visit_swarm(config, both=True) as visit:
        sources = {name: dht for name, dht in _configured(config, visit).items() if name in visit.networks}
        with spinner("reading the records"):
            found = await find_models(sources, wanted, config)
            surveyed = await _survey_all(sources, found)
        checks = None
        if check:
            with spinner("dialling the servers"):
                checks = await _check(visit, [model for models in surveyed.values() for model in models])
        networks = [
            NetworkSurvey(name, tuple(surveyed[name]), checks, found.left_out[name])
            if name in sources
            else NetworkSurvey(name, (), error="none of its bootstrap peers is reached")
            for name in _configured(config, visit)
        ]
    not_reached = [network.network for network in networks if network.network not in sources]
    shared = shared_models(surveyed, known=found.known, not_reached=not_reached)
    if as_json:
        told = [network.as_json() for network in networks]
        typer.echo(json.dumps({"networks": told, "models": [shared_as_json(m, num_blocks) for m in shared]}))
    else:
        _print(console(), networks, shared, checks, num_blocks)


async def _survey_all(sources: Mapping[str, DhtNode], found: FoundModels) -> dict[str, list[SurveyedModel]]:
    """All networks at once, in the order of ``sources``."""
    surveyed: dict[str, list[SurveyedModel]] = {name: [] for name in sources}

    async def look(name: str, source: DhtNode) -> None:
        surveyed[name] = await _SURVEYS[name](source, found.models[name])

    async with trio.open_nursery() as nursery:
        for name, source in sources.items():
            nursery.start_soon(look, name, source)
    return surveyed


def _print(
    out: Console,
    networks: Sequence[NetworkSurvey],
    shared: Sequence[SharedModel],
    checks: dict[PeerId, Check] | None,
    num_blocks: int | None,
) -> None:
    def advice(model: SharedModel) -> str:
        suggestion = model.suggestion(num_blocks)
        if suggestion is None:
            return ""
        blocks = suggestion.blocks
        return (
            f"a node of {counted(len(blocks), 'block')} would help most at {blocks.start}:{blocks.stop} "
            f"({suggestion.reason})"
        )

    if len(networks) == 1:
        (network,) = networks
        print_network(
            out,
            network.network,
            network.models,
            checks,
            left_out=network.models_left_out,
            advice=lambda seen: advice(SharedModel({network.network: seen})),
        )
        return
    for network in networks:
        print_header(
            out, network.network, len(network.models), left_out=network.models_left_out, error=network.error
        )
    for model in shared:
        out.print()
        print_shared(out, model, checks, advice(model))


async def _check(visit: Visit, surveyed: list[SurveyedModel]) -> dict[PeerId, Check]:
    async def round_trip(peer: PeerId) -> float:
        await ping(visit.host, peer)  # dials, and agrees on the protocol
        return await ping(visit.host, peer)

    def relayed(peer: PeerId) -> bool:
        return not visit.host.traversal.has_direct_connection(peer)

    peers = (span.peer for model in surveyed for span in model.spans)
    return await check_servers(peers, round_trip, relayed=relayed)
