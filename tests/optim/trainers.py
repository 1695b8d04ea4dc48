"""Peers that train a small regression together, on a network in memory, in simulated time."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import torch
import trio
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key

from kwaainet_bridge.hivemind.dht import DhtNode, rsa_keys
from kwaainet_bridge.hivemind.optim import CollaborativeOptimizer, EpochEnd
from kwaainet_bridge.hivemind.peer import Peer
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

RUN = "run"
TARGET = torch.tensor([[2.0, -1.0, 0.5]])
_KEYS: list[rsa.RSAPrivateKey] = []


def clock() -> float:
    return 1.7e9 + trio.current_time()


def peer_id(number: int) -> PeerId:
    return PeerId(b"\x12\x20" + number.to_bytes(32, "big"))


def golden_key() -> rsa.RSAPrivateKey:
    path = Path(__file__).parents[1] / "vectors" / "hivemind-signatures.json"
    key = load_der_private_key(bytes.fromhex(json.loads(path.read_text())["private_key"]), password=None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


def owner_key(number: int) -> rsa.RSAPrivateKey:
    while len(_KEYS) <= number:
        _KEYS.append(rsa_keys.generate_key())
    return _KEYS[number]


def small_model(seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 1)


class Trainer:
    """One peer. ``seconds`` are those of a batch of 8; ``log`` has what ``latest`` was after each epoch."""

    def __init__(
        self, peer: Peer, number: int, *, seconds: float = 0.5, lr: float = 0.1, **options: Any
    ) -> None:
        self.peer = peer
        self.number = number
        self.model = small_model(options.pop("seed", number))
        self.seconds = seconds
        self.log: list[EpochEnd] = []
        self.alive = trio.CancelScope()
        torch_optimizer = torch.optim.SGD(
            self.model.parameters(), lr=lr, momentum=options.pop("momentum", 0.0)
        )
        if "schedule" in options:
            factor = options.pop("schedule")
            options["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(torch_optimizer, factor)
        self.optimizer = CollaborativeOptimizer(
            peer,
            torch_optimizer,
            owner_key=owner_key(number),
            clock=clock,
            rng=random.Random(number),
            **{"run_id": RUN, "target_batch_size": 64, "matchmaking_seconds": 2.0, "averaging_seconds": 10.0}
            | options,
        )
        self._data = torch.Generator().manual_seed(1000 + number)

    def backward(self) -> float:
        inputs = torch.randn(8, 3, generator=self._data)
        loss = torch.nn.functional.mse_loss(self.model(inputs), inputs @ TARGET.T + 1.0)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @property
    def error(self) -> float:
        """How far the parameters are from those sought."""
        wanted = torch.cat([TARGET.flatten(), torch.ones(1)])
        ours = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        return float((ours - wanted).abs().max())

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    async def step(self) -> None:
        """One batch, or one call of an auxiliary peer."""
        await trio.sleep(self.seconds)
        if self.optimizer.auxiliary:
            await self.optimizer.step()
        else:
            self.backward()
            await self.optimizer.step(8)
        if self.optimizer.latest is not None and (not self.log or self.optimizer.latest is not self.log[-1]):
            self.log.append(self.optimizer.latest)

    async def train(self, epochs: int) -> None:
        """Until the peer has seen so many epochs, or ``alive`` is cancelled."""
        self.alive = trio.CancelScope()
        with self.alive:
            while self.optimizer.epoch < epochs:
                await self.step()

    async def train_on(self) -> None:
        """Until it is cancelled."""
        self.alive = trio.CancelScope()
        with self.alive:
            while True:
                await self.step()


class Lives:
    """Contexts that are entered by tasks of their own, so in any order, and left together."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._over = trio.Event()

    async def enter(self, manager: AbstractAsyncContextManager[Any]) -> None:
        async def live(task_status: trio.TaskStatus[None]) -> None:
            async with manager:
                task_status.started()
                await self._over.wait()

        await self._nursery.start(live)

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator[Lives]:
        async with trio.open_nursery() as nursery:
            lives = cls(nursery)
            yield lives
            lives._over.set()


class Training:
    """The peers of one run."""

    def __init__(self, network: MemoryNetwork, nodes: Lives, optimizers: Lives) -> None:
        self.network = network
        self.trainers: list[Trainer] = []
        self._nodes = nodes
        self._optimizers = optimizers
        self._hosts = 0

    async def peer(self, *, client_mode: bool = False) -> Peer:
        host = self.network.host(peer_id(self._hosts))
        self._hosts += 1
        server, client = RpcServer(host), RpcClient(host)
        dht = DhtNode(
            host, server, client, client_mode=client_mode, clock=clock, rng=random.Random(self._hosts)
        )
        await self._nodes.enter(dht.running())
        if self._hosts > 1:
            await dht.bootstrap([peer_id(0)])
        return Peer(host, server, client, dht)

    async def add(self, *, dht_client: bool = False, **options: Any) -> Trainer:
        number = len(self.trainers)
        trainer = Trainer(await self.peer(client_mode=dht_client), number, **options)
        await self._optimizers.enter(trainer.optimizer)
        self.trainers.append(trainer)
        return trainer

    async def train(self, epochs: int, trainers: list[Trainer] | None = None) -> None:
        async with trio.open_nursery() as nursery:
            for trainer in self.trainers if trainers is None else trainers:
                nursery.start_soon(trainer.train, epochs)

    async def settle(self) -> None:
        """Wait for the averaging of parameters that goes on after an epoch, and take its result in.

        A peer that is an epoch ahead may have mixed its parameters into the one before, as among stock peers.
        """
        for trainer in self.trainers:
            await trainer.optimizer._state_rounds.take_in()

    def die(self, trainer: Trainer) -> None:
        """It is gone, without a word."""
        trainer.alive.cancel()
        self.network.down.add(trainer.peer.peer_id)


@asynccontextmanager
async def training(size: int = 0, **options: Any) -> AsyncIterator[Training]:
    async with trio.open_nursery() as nursery:
        async with Lives.open() as nodes, Lives.open() as optimizers:
            run = Training(MemoryNetwork(nursery), nodes, optimizers)
            for _ in range(size):
                await run.add(**options)
            yield run
        nursery.cancel_scope.cancel()
