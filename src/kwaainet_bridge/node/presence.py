"""A model's records in its networks: what they are called, when they are written, and how this node is reached."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence

import trio

from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.engine import Engine, ModelInfo, names_of
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.hivemind.experts.throughput import Throughput
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node.announcing import Announcer, AnnounceReport, Offer, Publisher
from kwaainet_bridge.node.model_state import ModelState
from kwaainet_bridge.node.pausing import Pausing
from kwaainet_bridge.node.reachability import ReachabilityWatch
from kwaainet_bridge.node.readiness import announced_in
from kwaainet_bridge.node.served import ServingNetwork, withdraw

Others = Callable[[], Collection[ModelState]]
"""The other models of the node."""


class Presence:
    """Keeps the records of one model's blocks true in ``networks``. ``others`` may not have the same names there.

    Nothing is written before ``joined`` returns, however often it is called: then the networks can be told. While
    ``pausing`` is asked for, the records say OFFLINE.
    """

    def __init__(
        self,
        config: ModelConfig,
        networks: Sequence[ServingNetwork],
        state: ModelState,
        reachability: ReachabilityWatch,
        *,
        others: Others,
        joined: Callable[[], Awaitable[None]],
        pausing: Pausing,
    ) -> None:
        self.publishers: list[Publisher] = []
        self.announcer: Announcer | None = None
        self.throughput: Throughput | None = None
        """What was measured, once that is done."""
        self._config = config
        self._networks = networks
        self._state = state
        self._reachability = reachability
        self._others = others
        self._joined = joined
        self._pausing = pausing
        self._renamed = trio.Event()

    def join(self, nursery: trio.Nursery, model: ModelInfo, blocks: range) -> None:
        """Announce these as JOINING, by tasks in ``nursery`` that renew the records, too, if they are the first.

        Raises ConfigError for a name that the blocks cannot have.
        """
        offer = self._offer(model, blocks)
        if self.announcer is not None:
            self.announcer.replace(offer)
            nursery.start_soon(self.announcer.announce, ServerState.JOINING)
            return
        self.publishers = [network.publisher(self._config, model) for network in self._networks]
        self._take_names()
        self.announcer = Announcer(
            offer, self.publishers, on_report=self._judge, paused=lambda: self._pausing.asked
        )
        nursery.start_soon(self._keep_announced, self.announcer, nursery)

    def tell_of(self, engine: Engine) -> None:
        """Have the records tell of these blocks, with what only a loaded engine tells, and what was measured."""
        assert self.announcer is not None  # loading has described the model
        if self.announcer.offer.blocks != engine.blocks:
            self.announcer.replace(self._offer(engine.model, engine.blocks))
        if self.throughput is not None:
            self.announcer.offer.throughput = self.throughput
        self.announcer.offer.cache_tokens = lambda: engine.cache_bytes_left // engine.cache_bytes_per_token

    def rename(self, public_name: str | None) -> None:
        """Have the records tell another name for monitors, at once if there are any."""
        self._config = self._config.model_copy(update={"public_name": public_name})
        if self.announcer is not None:
            self.announcer.offer.public_name = public_name
            self._renamed.set()

    async def announce_online(self, *, settle: bool) -> None:
        """Announce ONLINE, after a first verdict on how this node is reached if that is to ``settle``."""
        assert self.announcer is not None
        if settle:
            await self._reachability.settle()
        self._take_verdict(self.announcer)
        await self.announcer.announce(ServerState.ONLINE)

    async def withdraw(self) -> None:
        """Have the records say OFFLINE, if there are any."""
        if self.announcer is not None:
            await withdraw(self.announcer)

    def _take_names(self) -> None:
        names = {publisher.network: publisher.prefix for publisher in self.publishers}
        for other in self._others():
            for network, prefix in names.items():
                if other.prefixes.get(network) == prefix:
                    raise ConfigError(
                        f"the blocks of {self._state.key} and of {other.key} would both be called {prefix} in "
                        f"{network}: give one of them another dht_prefix"
                    )
        self._state.prefixes = names

    def _offer(self, model: ModelInfo, blocks: range) -> Offer:
        offer = Offer(
            blocks=blocks,
            model_blocks=model.num_blocks,
            repository=model.repository,
            torch_dtype=str(model.dtype).removeprefix("torch."),
            public_name=self._config.public_name,
            adapters=names_of(self._config.adapters),
            quantization=self._config.quantization,
        )
        if self.throughput is not None:
            offer.throughput = self.throughput
        elif self._config.throughput != "auto":
            offer.throughput = Throughput(self._config.throughput)
        return offer

    async def _keep_announced(self, announcer: Announcer, nursery: trio.Nursery) -> None:
        """Announce JOINING, unless the blocks are ready by now; renew the records, and follow the verdict."""
        await self._joined()
        await self._reachability.settle()
        self._take_verdict(announcer)
        if announcer.wanted is ServerState.OFFLINE:
            await announcer.announce(ServerState.JOINING)
        nursery.start_soon(announcer.run)
        nursery.start_soon(self._follow_pausing, announcer)
        nursery.start_soon(self._follow_name, announcer)
        while True:
            if self._take_verdict(announcer):
                await announcer.announce(announcer.wanted)
            else:
                await self._reachability.wait_changed()

    async def _follow_pausing(self, announcer: Announcer) -> None:
        told = False
        while True:
            await self._pausing.wait_until(asked=not told)
            told = self._pausing.asked
            await announcer.announce(announcer.wanted)

    async def _follow_name(self, announcer: Announcer) -> None:
        while True:
            await self._renamed.wait()
            self._renamed = trio.Event()
            await announcer.announce(announcer.wanted)

    def _take_verdict(self, announcer: Announcer) -> bool:
        """Have the records say how this node is reached; whether that is new."""
        verdict = self._reachability.verdict
        dialable, relayed = verdict is not Verdict.UNREACHABLE, verdict is Verdict.RELAYED
        if (announcer.dialable, announcer.offer.using_relay) == (dialable, relayed):
            return False
        announcer.dialable = dialable
        announcer.offer.using_relay = relayed
        return True

    def _judge(self, report: AnnounceReport) -> None:
        """A swarm of which no other node keeps the records does not know of these blocks."""
        self._state.note_announced(report)
        condition = announced_in(report.network)
        if not report.peers or report.by_others or report.state is ServerState.OFFLINE:
            self._state.recover(condition)
        else:
            self._state.degrade(
                condition, f"no other node keeps the records of blocks: {report.told_by_peers}"
            )
