"""Which models of a network a node looks at for its operator."""

from __future__ import annotations

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.client import RecordSource, SwarmModel, registered_models
from kwaainet_bridge.node.state import NodeState


async def models_to_show(network: str, source: RecordSource, state: NodeState) -> list[SwarmModel]:
    """The models that the node serves there, private ones too, then registered ones.

    There are ``defaults.DASHBOARD_MODELS`` in all.

    Raises what the record source raises.
    """
    models = {model.prefix: model for model in await registered_models(source)}
    own: list[SwarmModel] = []
    for model in state.models.values():
        served = model.served
        prefix = None if served is None else served.prefixes.get(network)
        if served is not None and prefix is not None:
            registered = models.pop(prefix, None)
            repository = None if registered is None else registered.repository
            # how many blocks it has is known here; what others registered may be wrong
            own.append(SwarmModel(prefix, served.engine.model.num_blocks, repository))
    return [*own, *models.values()][: defaults.DASHBOARD_MODELS]
