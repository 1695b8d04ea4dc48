"""A node's whole life: identity, host, networks, blocks, and the way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import trio

from kwaainet_bridge import __version__
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.experts.reachability import ReachabilityService
from kwaainet_bridge.net import Host, HostConfig, open_host
from kwaainet_bridge.net.identity import load_identity
from kwaainet_bridge.node.bootstrap import BootstrapWatch
from kwaainet_bridge.node.petals import ModelService
from kwaainet_bridge.node.probe import dial_back
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

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
    config: NodeConfig, state: NodeState, stop: trio.Event, *, on_started: Callable[[Contact], None]
) -> None:
    """Run a node until ``stop`` is set, then drain it.

    ``on_started`` is called once the node listens. Raises ConfigError and its kin for what the operator must
    mend: an identity in use, a port taken, a model that cannot be served. Unreachable peers are never fatal.
    Cancelled: everything ends at once, nothing is withdrawn from the swarm.
    """
    log.info("starting", version=__version__)
    with load_identity(config.identity.path, kind=config.identity.kind) as identity:
        host_config = HostConfig(identity=identity, listen=config.listen, announce=config.announce)
        async with open_host(host_config) as host, trio.open_nursery() as services:
            contact = Contact(host.peer_id, host.addresses())
            log.info("listening", peer_id=str(host.peer_id), addresses=list(contact.addresses))
            on_started(contact)
            if config.networks.kwaainet is not None:
                watch = BootstrapWatch("kwaainet", host, config.networks.kwaainet.bootstrap, state)
                services.start_soon(watch.run)
            if config.networks.petals is not None:
                await _take_part_in_petals(config, host, state, stop)
            else:
                state.enter(Phase.SERVING)
                await stop.wait()
                state.enter(Phase.DRAINING)
            services.cancel_scope.cancel()
    state.enter(Phase.STOPPED)


async def _take_part_in_petals(config: NodeConfig, host: Host, state: NodeState, stop: trio.Event) -> None:
    network = config.networks.petals
    assert network is not None
    server, client = RpcServer(host), RpcClient(host)
    dht = DhtNode(host, server, client, client_mode=network.dht == "client")
    async with dht.running(), trio.open_nursery() as nursery:
        if not dht.client_mode:
            ReachabilityService(host.peer_id, lambda peer: dial_back(host, peer)).mount(server)
        watch = BootstrapWatch("petals", host, network.bootstrap, state, join=dht.bootstrap)
        nursery.start_soon(watch.run)
        state.enter(Phase.BOOTSTRAPPING, peers=watch.total)
        await watch.first_round()
        if config.model is None:
            state.enter(Phase.SERVING)
            await stop.wait()
            state.enter(Phase.DRAINING)
        else:
            model = ModelService(config.model, dht, server, client, state)
            with trio.CancelScope() as loading:
                nursery.start_soon(_cancel_while_loading, stop, loading, state)
                async with model.running() as served:
                    blocks = served.span.engine.blocks
                    state.enter(
                        Phase.SERVING, blocks=f"{blocks.start}:{blocks.stop}", prefix=served.span.prefix
                    )
                    await stop.wait()
                    state.enter(Phase.DRAINING, sessions=served.server.open_sessions)
                    await served.drain(config.drain_seconds)
        nursery.cancel_scope.cancel()


async def _cancel_while_loading(stop: trio.Event, loading: trio.CancelScope, state: NodeState) -> None:
    """A node told to stop before it serves has nothing to drain."""
    await stop.wait()
    if state.phase is Phase.LOADING:
        loading.cancel()
