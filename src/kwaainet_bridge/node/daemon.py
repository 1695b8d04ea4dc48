"""A node's whole life: identity, host, networks, blocks, and the way out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from kwaainet_bridge import __version__, defaults
from kwaainet_bridge.config import LimitsConfig, NodeConfig
from kwaainet_bridge.net import HostConfig, Libp2pHost, open_host
from kwaainet_bridge.net.admission import Admission
from kwaainet_bridge.net.bootstrap import parse_bootstrap_addresses
from kwaainet_bridge.net.identity import Identity, load_identity
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.node.admin.server import open_admin
from kwaainet_bridge.node.control import Control
from kwaainet_bridge.node.descriptors import affordable_connections
from kwaainet_bridge.node.models import storage_of
from kwaainet_bridge.node.networks import network_protocols
from kwaainet_bridge.node.node_models import NodeModels
from kwaainet_bridge.node.openai.server import open_openai
from kwaainet_bridge.node.reachability import ReachabilityWatch
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.node.watching import measure_lag
from kwaainet_bridge.wire.peer_id import PeerId

if TYPE_CHECKING:
    from kwaainet_bridge.engine import Storage
    from kwaainet_bridge.node.kwaainet import KwaaiSide
    from kwaainet_bridge.node.petals import PetalsSide

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Contact:
    """How others reach a node that has started."""

    peer_id: PeerId
    addresses: Sequence[str]

    @property
    def join_address(self) -> str | None:
        """The address to give to another machine: one that is not loopback, if there is any."""
        outside = [a for a in self.addresses if not a.startswith(("/ip4/127.", "/ip6/::1/"))]
        return next(iter([*outside, *self.addresses]), None)


async def run_node(
    config: NodeConfig,
    state: NodeState,
    stop: trio.Event,
    *,
    on_started: Callable[[Contact], None],
    on_models: Callable[[NodeModels], None] = lambda _models: None,
    control: Control | None = None,
) -> None:
    """Run a node until ``stop`` is set, then drain it. ``control`` is of this configuration, state and ``stop``.

    ``on_started`` is called once the node listens, ``on_models`` then, with what adds and removes models. Raises
    ConfigError and its kin for what the operator must mend: an identity in use, a port taken, a model that cannot be
    served, if it is the only one. Unreachable peers are never fatal.
    Cancelled: blocks are withdrawn from the swarm, for at most ``defaults.OFFLINE_STORE_SECONDS``, and everything
    ends; sessions are not waited for.
    """
    log.info("starting", version=__version__)
    control = control or Control(config, state, stop)
    work = trio.CancelScope()
    with load_identity(config.identity.path, kind=config.identity.kind) as identity:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_cancelled, work)
            # the host and the DHTs outlive the work, or the records could not be withdrawn
            with trio.CancelScope(shield=True):
                await _run_host(
                    config, identity, state, control, work, on_started=on_started, on_models=on_models
                )
            nursery.cancel_scope.cancel()
    state.enter(Phase.STOPPED)


def _limits(config: LimitsConfig) -> Limits:
    return Limits(
        connections=affordable_connections(config.connections),
        connections_high=config.connections_high,
        connections_low=config.connections_low,
        connections_per_address=config.connections_per_address,
        connections_per_network=config.connections_per_network.model_dump(exclude_none=True),
        strangers=config.strangers,
        streams=config.streams,
        streams_per_peer=config.streams_per_peer,
        buffer_bytes=config.stream_buffers_mib * defaults.MIB,
    )


def _admission(config: NodeConfig) -> Admission:
    """Whoever this node itself is to dial is let in, too, unless denied."""
    allow, networks = frozenset(map(PeerId.parse, config.peers.allow)), config.networks
    sides = (networks.petals, networks.kwaainet)
    known = [a for side in sides if side is not None for a in side.bootstrap] + [*config.reachability.relays]
    own = {peer for peer, _ in parse_bootstrap_addresses(known)}
    return Admission(allow | own if allow else None, frozenset(map(PeerId.parse, config.peers.deny)))


async def _cancel_when_cancelled(work: trio.CancelScope) -> None:
    try:
        await trio.sleep_forever()
    finally:
        work.cancel()


async def _run_host(
    config: NodeConfig,
    identity: Identity,
    state: NodeState,
    control: Control,
    work: trio.CancelScope,
    *,
    on_started: Callable[[Contact], None],
    on_models: Callable[[NodeModels], None],
) -> None:
    host_config = HostConfig(
        identity=identity,
        listen=config.listen,
        announce=config.announce,
        limits=_limits(config.limits),
        kad_protocol=config.kademlia.protocol,
        kad_mode=config.kademlia.mode,
        networks=network_protocols(config.networks),
        relays=config.reachability.relays,
    )
    async with (
        open_admin(
            config.admin_address,
            config.admin.token_file,
            state,
            openai=config.openai.listen != "off",
            control=control,
        ),
        open_host(host_config) as host,
        trio.open_nursery() as services,
    ):
        state.host = host
        control.bind(host, limits=lambda changed: _limits(changed.limits), admission=_admission)
        contact = Contact(host.peer_id, host.addresses())
        log.info("listening", peer_id=str(host.peer_id), addresses=list(contact.addresses))
        on_started(contact)
        reachability = ReachabilityWatch(host, state, relay_service=config.reachability.relay_service)
        services.start_soon(reachability.run)
        services.start_soon(measure_lag, state.lag)
        services.start_soon(control.idle.run)
        # the networks' DHTs outlive the work, or the records could not be withdrawn
        async with _networks(config, host, state, reachability) as networks:
            state.bootstrap = {network.name: network.watch for network in networks}
            state.surveys = {network.name: network.survey for network in networks}
            models = NodeModels(
                config.served_models,
                [network for network in networks if network.serves_blocks],
                state,
                reachability=reachability,
                drain_seconds=config.drain_seconds,
            )
            control.name(models)
            on_models(models)
            storage = partial(_storage_for, config)
            with work:
                async with open_openai(config.openai, config.openai_models, networks, storage, state):
                    await _work(networks, models, state, control.stop)
        services.cancel_scope.cancel()


def _storage_for(config: NodeConfig, name: str) -> Storage:
    """How the weights of a model that the endpoint is asked for are kept."""
    return storage_of(next((model for model in config.served_models if model.name == name), config.model))


@asynccontextmanager
async def _networks(
    config: NodeConfig, host: Libp2pHost, state: NodeState, reachability: ReachabilityWatch
) -> AsyncIterator[list[PetalsSide | KwaaiSide]]:
    """Those that are on. One that is off costs nothing: what it alone needs is not even imported."""
    async with AsyncExitStack() as stack:
        networks: list[PetalsSide | KwaaiSide] = []
        if config.networks.petals is not None:
            from kwaainet_bridge.node.petals import open_petals

            networks.append(await stack.enter_async_context(open_petals(config, host, state, reachability)))
        if config.networks.kwaainet is not None:
            from kwaainet_bridge.node.kwaainet import open_kwaainet

            networks.append(await stack.enter_async_context(open_kwaainet(config, host, state)))
        yield networks


async def _work(
    networks: Sequence[PetalsSide | KwaaiSide], models: NodeModels, state: NodeState, stop: trio.Event
) -> None:
    async with trio.open_nursery() as nursery:
        for network in networks:
            nursery.start_soon(network.run)
        state.enter(Phase.BOOTSTRAPPING, peers=sum(network.watch.total for network in networks))
        await models.run(stop, join=partial(_join, networks))
        nursery.cancel_scope.cancel()


async def _join(networks: Sequence[PetalsSide | KwaaiSide]) -> None:
    """Return once all bootstrap peers have been tried."""
    async with trio.open_nursery() as trying:
        for network in networks:
            trying.start_soon(network.watch.first_round)
