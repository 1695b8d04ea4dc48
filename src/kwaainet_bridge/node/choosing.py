"""Which blocks a node serves that was told how many and not which: those that its networks lack most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.engine import ModelOutline
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.hivemind.client.block_choice import reason, suggest, throughputs
from kwaainet_bridge.hivemind.client.directory import Span

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ReadableNetwork(Protocol):
    """A network that tells who serves a model."""

    name: str

    async def spans(self, config: ModelConfig, model: ModelOutline) -> list[Span]:
        """The blocks of all other nodes that serve this model there, or are about to. They lie within the model.

        Raises ConfigError for a name that the blocks cannot have there, NetworkError if none of the network's
        bootstrap peers is in touch, and what the DHT raises.
        """
        ...


async def choose_blocks(
    config: ModelConfig, networks: Sequence[ReadableNetwork], model: ModelOutline, num_blocks: int
) -> range:
    """The ``num_blocks`` blocks (all, if the model has fewer) of ``model`` that would help most in ``networks``.

    All are read at once, each for at most ``defaults.DIRECTORY_READ_SECONDS``; one that cannot be read is told in the
    log and counts as empty. Raises ConfigError for a name that the blocks cannot have.
    """
    coverages: dict[str, tuple[float, ...]] = {}

    async def read(network: ReadableNetwork) -> None:
        try:
            with trio.fail_after(defaults.DIRECTORY_READ_SECONDS):
                spans = await network.spans(config, model)
        except (NetworkError, RemoteError, trio.TooSlowError) as e:
            log.warning(
                "blocks are chosen without a network", network=network.name, reason=str(e) or "no answer"
            )
        else:
            coverages[network.name] = throughputs(spans, model.num_blocks)

    async with trio.open_nursery() as nursery:
        for network in networks:
            nursery.start_soon(read, network)
    # in one order, whoever answered first: sums of floating-point numbers depend on it
    seen = [coverages[network.name] for network in networks if network.name in coverages]
    blocks = suggest(seen, num_blocks, model.num_blocks)
    log.info(
        "blocks chosen",
        blocks=f"{blocks.start}:{blocks.stop}",
        model_blocks=model.num_blocks,
        networks=sorted(coverages),
        reason=reason(seen, blocks, model.num_blocks),
    )
    return blocks
