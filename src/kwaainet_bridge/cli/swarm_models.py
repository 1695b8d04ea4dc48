"""Which models ``kwaainet-bridge swarm`` looks at, in one network or several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from kwaainet_bridge import defaults
from kwaainet_bridge.bridge.kwaai_directory import KWAAINET
from kwaainet_bridge.bridge.shared_models import shared_models
from kwaainet_bridge.cli.printing import printable
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import ConfigError, NetworkError
from kwaainet_bridge.hivemind.client import RecordSource, SurveyedModel, SwarmModel, registered_models
from kwaainet_bridge.hivemind.client.directory import PETALS
from kwaainet_bridge.hivemind.experts.records import check_prefix
from kwaainet_bridge.node.models import kwaainet_prefix, swarm_prefix

_NAMING_FAMILIES: Final = ("llama", "mixtral", "bloom", "")
"""Families whose names Petals makes differently; the last stands for all others."""

_NAMED_IN_ERRORS: Final = 20


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

    def selects(self, model: SwarmModel) -> bool:
        """Whether a registered model is asked for."""
        if self.prefix is not None:
            return model.prefix == self.prefix
        return self.model is None or model.is_called(self.model)


@dataclass(frozen=True, slots=True)
class FoundModels:
    """The models to look at, by network; how many more are registered; what the configuration says of their names.

    ``known`` is what the configured model is called in each network, empty unless it is known for several.
    """

    models: Mapping[str, list[SwarmModel]]
    left_out: Mapping[str, int]
    known: Mapping[str, str]


async def find_models(sources: Mapping[str, RecordSource], wanted: Wanted, config: NodeConfig) -> FoundModels:
    """The models that ``wanted`` stands for. One that is in several networks is found by any of its names.

    Raises NetworkError if one is named that is registered nowhere, and what the record sources raise.
    """
    if wanted.prefix is not None and wanted.num_blocks is not None:
        known = _known_names(config, [wanted.prefix])
        names = {PETALS: wanted.prefix, KWAAINET: known.get(KWAAINET, wanted.prefix.removesuffix("-hf"))}
        unregistered = {network: [SwarmModel(names[network], wanted.num_blocks)] for network in sources}
        return FoundModels(unregistered, dict.fromkeys(sources, 0), names)
    registered = {network: await registered_models(source) for network, source in sources.items()}
    known = _known_names(config, [model.prefix for model in registered.get(PETALS, ())])
    groups = shared_models(
        {network: map(SurveyedModel, models) for network, models in registered.items()}, known=known
    )
    chosen: dict[str, list[SwarmModel]] = {network: [] for network in sources}
    left_out = dict.fromkeys(sources, 0)
    for group in groups:
        if not any(wanted.selects(seen.model) for seen in group.by_network.values()):
            continue
        # whole or not at all: one that is looked at in one of its networks only would seem to be missing in the other
        has_room = all(len(chosen[network]) < defaults.MAX_SURVEYED_MODELS for network in group.by_network)
        for network, seen in group.by_network.items():
            if has_room:
                chosen[network].append(seen.model)
            else:
                left_out[network] += 1
    if not any(chosen.values()) and (wanted.model is not None or wanted.prefix is not None):
        raise NetworkError(_not_registered(wanted, registered))
    return FoundModels(chosen, left_out, known)


def _not_registered(wanted: Wanted, registered: Mapping[str, Iterable[SwarmModel]]) -> str:
    name = printable(wanted.prefix or wanted.model or "")
    prefixes = dict.fromkeys(model.prefix for models in registered.values() for model in models)
    others = ", ".join(printable(prefix, limit=80) for prefix in list(prefixes)[:_NAMED_IN_ERRORS]) or "none"
    remedy = (
        "give --blocks-total to see its blocks nevertheless"
        if wanted.prefix is not None
        else "a private model is asked for with --prefix and --blocks-total"
    )
    return f"model {name} is not registered in this swarm (models that are: {others}); {remedy}"


def _known_names(config: NodeConfig, in_petals: Iterable[str]) -> dict[str, str]:
    """What a configured model is called in Petals, if that is one of ``in_petals``, and in KwaaiNet."""
    network = config.networks.kwaainet
    if network is None:
        return {}
    there = set(in_petals)
    for model in config.served_models:
        try:
            # its family is in the checkpoint, which nobody wants to fetch for this
            candidates = [swarm_prefix(model.name, family, model.dht_prefix) for family in _NAMING_FAMILIES]
            names = {KWAAINET: kwaainet_prefix(model.name, network.dht_prefix)}
        except (
            ConfigError
        ):  # what it is called gives no prefix: then it is served nowhere under a derived one
            continue
        own = next((prefix for prefix in candidates if prefix in there), None)
        if own is not None:
            return {PETALS: own, **names}
    return {}
