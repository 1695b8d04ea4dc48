"""Which blocks a node serves that was told how many and not which: those that its networks lack most."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.engine import ModelOutline
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.hivemind.client.block_choice import Advice, advise, reason, suggest, throughputs
from kwaainet_bridge.hivemind.client.directory import Span
from kwaainet_bridge.node.models import shown

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
    found, silent = await _read(config, networks, model)
    for name, why in silent.items():
        log.warning("blocks are chosen without a network", network=name, reason=why)
    seen = [throughputs(spans, model.num_blocks) for spans in found.values()]
    blocks = suggest(seen, num_blocks, model.num_blocks)
    log.info(
        "blocks chosen",
        blocks=shown(blocks),
        model_blocks=model.num_blocks,
        networks=sorted(found),
        reason=reason(seen, blocks, model.num_blocks),
    )
    return blocks


async def reconsider_blocks(
    config: ModelConfig,
    networks: Sequence[ReadableNetwork],
    model: ModelOutline,
    own: Span,
    *,
    rng: random.Random,
) -> Advice | None:
    """Whether the node of ``own``, which is listed with it in all of ``networks``, should serve other blocks by now.

    The networks are read as by :func:`choose_blocks`. While one of them cannot be, nobody can tell: None, and the log
    says so. ``rng`` draws who of the others would move first.
    """
    found, silent = await _read(config, networks, model)
    if silent:
        log.info("whether other blocks are needed more is not known", reason=silent)
        return None
    judge = partial(
        advise,
        list(found.values()),
        own,
        model.num_blocks,
        balance_quality=config.balance_quality,
        shuffle=rng.shuffle,
    )
    if sum(map(len, found.values())) <= defaults.REBALANCE_SERVERS_ON_LOOP:
        return judge()
    return await trio.to_thread.run_sync(judge)


async def _read(
    config: ModelConfig, networks: Sequence[ReadableNetwork], model: ModelOutline
) -> tuple[dict[str, list[Span]], dict[str, str]]:
    """Who serves the model, by network, and why the others could not be read. Raises ConfigError."""
    found: dict[str, list[Span]] = {}
    silent: dict[str, str] = {}

    async def read(network: ReadableNetwork) -> None:
        try:
            with trio.fail_after(defaults.DIRECTORY_READ_SECONDS):
                found[network.name] = await network.spans(config, model)
        except (NetworkError, RemoteError, trio.TooSlowError) as e:
            silent[network.name] = str(e) or "no answer"

    async with trio.open_nursery() as nursery:
        for network in networks:
            nursery.start_soon(read, network)
    # in one order, whoever answered first: sums of floating-point numbers depend on it
    return {network.name: found[network.name] for network in networks if network.name in found}, silent
