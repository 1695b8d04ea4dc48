"""``kwaainet-bridge swarm``: which models a swarm has, who serves which of their blocks, and what is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import typer

from kwaainet_bridge import defaults
from kwaainet_bridge.cli.printing import console, printable, spinner
from kwaainet_bridge.cli.swarm_picture import print_network
from kwaainet_bridge.cli.visit import Visit, visit_swarm
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import ConfigError, NetworkError
from kwaainet_bridge.hivemind.client import (
    Check,
    SurveyedModel,
    SwarmModel,
    check_servers,
    registered_models,
    survey,
)
from kwaainet_bridge.hivemind.client.directory import RecordSource, Span
from kwaainet_bridge.hivemind.experts.records import check_prefix
from kwaainet_bridge.net.ping import ping
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which models are asked for: one by name or by prefix, or all. ``num_blocks`` is for unregistered ones."""

    model: str | None = None
    prefix: str | None = None
    num_blocks: int | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.prefix is not None:
            raise ConfigError("--model and --prefix exclude each other: give one")
        if self.num_blocks is not None and self.prefix is None:
            raise ConfigError(
                "--blocks-total belongs to a model that the registry lacks: give its --prefix, too"
            )
        if self.prefix is not None:
            check_prefix(self.prefix)


@dataclass(frozen=True, slots=True)
class NetworkSurvey:
    """What was seen of one network. ``checks`` is None if nobody was dialled."""

    network: str
    models: tuple[SurveyedModel, ...]
    checks: dict[PeerId, Check] | None = None
    models_left_out: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "models": [self._model(surveyed) for surveyed in self.models],
            "models_left_out": self.models_left_out,
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
            "servers": [self._server(span) for span in surveyed.spans],
        }

    def _server(self, span: Span) -> dict[str, Any]:
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
            "check": None
            if check is None
            else {
                "reachable": check.reachable,
                "round_trip_ms": None if check.seconds is None else round(check.seconds * 1e3, 3),
                "relayed": check.relayed,
                "error": check.error,
            },
        }


async def show_swarm(config: NodeConfig, wanted: Wanted, *, check: bool, as_json: bool) -> None:
    """Look at the Petals network and print it; with ``check`` also dial every server that does not say OFFLINE.

    Raises NetworkError if no bootstrap peer is reached or nobody serves the model that is asked for, ConfigError
    without an address.
    """
    async with visit_swarm(config) as visit:
        with spinner("reading the records"):
            models = await find_models(visit.dht, wanted)
            shown = models[: defaults.MAX_SURVEYED_MODELS]
            surveyed = await survey(visit.dht, shown)
        checks = None
        if check:
            with spinner("dialling the servers"):
                checks = await _check(visit, surveyed)
    petals = NetworkSurvey("petals", tuple(surveyed), checks, len(models) - len(shown))
    if as_json:
        typer.echo(json.dumps({"networks": [petals.as_json()]}))
    else:
        out = console()
        print_network(out, petals.network, petals.models, petals.checks, left_out=petals.models_left_out)


async def find_models(source: RecordSource, wanted: Wanted) -> list[SwarmModel]:
    """The models that ``wanted`` stands for. Raises NetworkError if it names one that is not registered."""
    if wanted.prefix is not None and wanted.num_blocks is not None:
        return [SwarmModel(wanted.prefix, wanted.num_blocks)]
    registered = await registered_models(source)
    if wanted.prefix is not None:
        models = [model for model in registered if model.prefix == wanted.prefix]
        remedy = "give --blocks-total to see its blocks nevertheless"
    elif wanted.model is not None:
        models = [model for model in registered if model.is_called(wanted.model)]
        remedy = "a private model is asked for with --prefix and --blocks-total"
    else:
        return registered
    if not models:
        name = printable(wanted.prefix or wanted.model or "")
        others = ", ".join(printable(model.prefix, limit=80) for model in registered[:20]) or "none"
        raise NetworkError(
            f"model {name} is not registered in this swarm (models that are: {others}); {remedy}"
        )
    return models


async def _check(visit: Visit, surveyed: list[SurveyedModel]) -> dict[PeerId, Check]:
    async def round_trip(peer: PeerId) -> float:
        await ping(visit.host, peer)  # dials, and agrees on the protocol
        return await ping(visit.host, peer)

    def relayed(peer: PeerId) -> bool:
        return not visit.host.traversal.has_direct_connection(peer)

    peers = (span.peer for model in surveyed for span in model.spans)
    return await check_servers(peers, round_trip, relayed=relayed)
