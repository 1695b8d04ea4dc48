"""Text that a node generates through its networks, its own blocks among the others'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import structlog
import trio

from kwaainet_bridge.engine import ClientModel, Storage, load_client_weights
from kwaainet_bridge.hivemind.client.directory import Directory
from kwaainet_bridge.hivemind.client.part import OtherNetwork
from kwaainet_bridge.hivemind.client.swarm import Swarm
from kwaainet_bridge.node.models import model_source

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TextModel:
    """A model of which this process has the ends, and whose blocks the networks serve.

    ``tokenizer`` is transformers'.
    """

    name: str
    weights: ClientModel
    tokenizer: Any
    swarm: Swarm


class TextNetwork(Protocol):
    """A network whose servers can be used to generate text."""

    name: str

    def text_swarm(self, name: str, weights: ClientModel, others: Sequence[OtherNetwork]) -> Swarm:
        """The servers of a model there and in ``others``."""
        ...

    def text_servers(self, name: str, weights: ClientModel) -> OtherNetwork | None:
        """What another network's :meth:`text_swarm` takes, if this one can be used so."""
        ...


class NoRecords:
    """In the place of a DHT's records, where there is none to read."""

    async def get_many(self, keys: Sequence[Any], *, latest: bool = True) -> Mapping[Any, None]:  # noqa: ARG002  # of the protocol
        return dict.fromkeys(keys)


class TextModels:
    """Models by their names; each is loaded when somebody asks for it first, and then kept."""

    def __init__(
        self,
        names: Sequence[str],
        networks: Sequence[TextNetwork],
        *,
        load: Callable[[str], tuple[ClientModel, Any]] | None = None,
    ) -> None:
        self.names = tuple(names)
        self._networks = networks
        self._load = load or load_text_model
        self._ends: dict[str, tuple[ClientModel, Any]] = {}
        self._models: dict[str, TextModel] = {}
        self._loading = trio.CapacityLimiter(1)

    async def get(self, name: str) -> TextModel:
        """One of :attr:`names`. Raises KeyError for another, CheckpointError for one that cannot be used so.

        Cancelled: it is loaded on for whoever asks next.
        """
        if name not in self.names:
            raise KeyError(name)
        if name not in self._models:
            # a download may take hours: neither who leaves nor the end of the node waits for it; it goes on, and keeps
            # the limiter meanwhile, so that there is one at a time
            await trio.to_thread.run_sync(  # type: ignore[call-arg]  # the stubs of trio-typing are older than trio
                partial(self._load_ends, name), abandon_on_cancel=True, limiter=self._loading
            )
        if name not in self._models:
            weights, tokenizer = self._ends[name]
            self._models[name] = TextModel(name, weights, tokenizer, self._swarm(name, weights))
        return self._models[name]

    def _load_ends(self, name: str) -> None:
        if name not in self._ends:
            log.info("loading a model's ends", model=name)
            self._ends[name] = self._load(name)

    def swarms(self) -> Mapping[str, Swarm]:
        """The swarms of those models that were asked for, by their names."""
        return {name: model.swarm for name, model in self._models.items()}

    def _swarm(self, name: str, weights: ClientModel) -> Swarm:
        first, *rest = self._networks
        others = [servers for network in rest if (servers := network.text_servers(name, weights)) is not None]
        return first.text_swarm(name, weights, others)


def load_text_model(name: str, *, storage: Storage | None = None) -> tuple[ClientModel, Any]:
    """Embeddings, head and tokenizer. Blocks; raises CheckpointError."""
    from transformers import AutoTokenizer

    weights = load_client_weights(model_source(name), storage=storage)
    return weights, AutoTokenizer.from_pretrained(str(weights.folder))


def nothing_to_read(prefix: str, num_blocks: int) -> Directory:
    """A directory of a network that this node is not in."""
    return Directory(NoRecords(), prefix, num_blocks)
