"""A swarm of toy servers on a network in memory: their blocks depend on every earlier token, as real ones do."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import trio

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import Refusal
from kwaainet_bridge.hivemind.client import Directory, Swarm
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState, block_uid
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc import CallContext, RpcClient, RpcServer, ServerStream
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.msgpack import TensorDescriptor
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertInfo, ExpertUID
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import TensorJoiner, decode_tensor, encode_tensor, split_tensor

PREFIX = "tiny-llama-hf"


def peer(number: int) -> PeerId:
    return PeerId(b"\x12\x20" + number.to_bytes(32, "big"))


def run_block(block: int, inputs: torch.Tensor) -> torch.Tensor:
    """Outputs for the whole sequence ``inputs`` [B, T, H]: each token sees all before it."""
    return inputs * 0.5 + 0.1 * inputs.cumsum(dim=1) + (block + 1)


def run_blocks(
    blocks: range, hidden: torch.Tensor, prompts: torch.Tensor | None = None, first: int = 0
) -> torch.Tensor:
    """What a chain of servers must answer for a whole sequence at once."""
    for block in blocks:
        if prompts is not None:
            prefix = prompts.shape[2]
            own = prompts[block - first]
            hidden = torch.cat([hidden[:, :prefix] + own, hidden[:, prefix:]], dim=1)
        hidden = run_block(block, hidden)
    return hidden


class Cache:
    """The inputs of every block so far: what a toy server keeps instead of keys and values."""

    def __init__(self, blocks: range) -> None:
        self.blocks = blocks
        self.inputs: dict[int, torch.Tensor] = {}
        self.position = 0

    def step(
        self, hidden: torch.Tensor, prompts: torch.Tensor, hypo_ids: torch.Tensor, start: int
    ) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            past = self.inputs.get(block, hidden[:, :0])[:, :start]
            if hypo_ids.numel():
                past = past[hypo_ids]
            if prompts.numel():
                prefix = prompts.shape[2]
                hidden = torch.cat([hidden[:, :prefix] + prompts[index], hidden[:, prefix:]], dim=1)
            self.inputs[block] = torch.cat([past, hidden], dim=1)
            hidden = run_block(block, self.inputs[block])[:, start:]
        self.position = start + hidden.shape[1]
        return hidden


@dataclass
class ToyServer:
    """One server.

    ``before_answer(server, step, answer)`` may be async, raise, or return another answer.
    """

    peer: PeerId
    blocks: range
    compression: CompressionType = CompressionType.NONE
    version: str = "2.3.0.dev2"
    heeds_position: bool = True
    before_answer: Callable[[ToyServer, int, torch.Tensor], Any] | None = None
    throughput: float = 1.0
    requests: list[ExpertRequest] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    sessions: int = 0
    ended_in_order: int = 0

    def mount(self, rpc: RpcServer) -> None:
        rpc.mount(methods.RPC_INFO, self.info)
        rpc.mount(methods.RPC_FORWARD, self.forward)
        rpc.mount(methods.RPC_BACKWARD, self.backward)
        rpc.mount_stream(methods.RPC_FORWARD_STREAM, self.forward_stream)
        rpc.mount_stream(methods.RPC_BACKWARD_STREAM, self.backward_stream)
        rpc.mount_stream(methods.RPC_INFERENCE, self.inference)

    async def info(self, request: ExpertUID, _: CallContext) -> ExpertInfo:
        self.calls["info"] += 1
        self._serves(request.uid)
        float_like = TensorDescriptor(
            size=(None, 1, 2048, 4), dtype="torch.float32", compression=int(self.compression)
        )
        answer = {
            "version": self.version,
            "forward_schema": ((float_like,), {}),
            "inference_schema": ((float_like, float_like, float_like), {}),
        }
        return ExpertInfo(serialized_info=msgpack.pack(answer))

    async def _answer(self, step: int, hidden: torch.Tensor) -> torch.Tensor:
        if self.before_answer is None:
            return hidden
        changed = self.before_answer(self, step, hidden)
        if hasattr(changed, "__await__"):
            changed = await changed
        return hidden if changed is None else changed

    def _serves(self, uid: str) -> range:
        served = {block_uid(PREFIX, block): block for block in self.blocks}
        names = uid.split(" ")
        if not set(names) <= served.keys():
            raise Refusal(f"Remote peer does not serve {uid}")
        return range(served[names[0]], served[names[-1]] + 1)

    async def inference(self, call: ServerStream[ExpertRequest, ExpertResponse]) -> None:
        cache: Cache | None = None
        self.sessions += 1
        step = 0
        try:
            async for request in call:
                self.requests.append(request)
                if not request.tensors:
                    self.ended_in_order += 1
                    return
                metadata = msgpack.unpack(request.metadata)
                if cache is None:
                    cache = Cache(self._serves(request.uid))
                hidden, prompts, hypo_ids = map(decode_tensor, request.tensors)
                self.tokens.append(hidden.shape[1])
                start = metadata["start_from_position"] if self.heeds_position else cache.position
                answer = await self._answer(step, cache.step(hidden, prompts, hypo_ids, start))
                await call.send(ExpertResponse(tensors=[encode_tensor(answer, self.compression)]))
                step += 1
        finally:
            self.sessions -= 1

    def _forward(self, uid: str, tensors: list[torch.Tensor]) -> torch.Tensor:
        blocks = self._serves(uid)
        hidden, prompts = tensors
        return run_blocks(blocks, hidden, prompts if prompts.numel() else None, blocks.start)

    def _backward(self, uid: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        blocks = self._serves(uid)
        hidden, grad, prompts = tensors
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            if not prompts.numel():
                out = run_blocks(blocks, hidden)
                return list(torch.autograd.grad(out, [hidden], grad))
            wide = prompts.expand(-1, hidden.shape[0], -1, -1).clone().requires_grad_()
            out = run_blocks(blocks, hidden, wide, blocks.start)
            return list(torch.autograd.grad(out, [hidden, wide], grad))

    async def forward(self, request: ExpertRequest, _: CallContext) -> ExpertResponse:
        self.calls["forward"] += 1
        self.requests.append(request)
        out = self._forward(request.uid, [decode_tensor(t) for t in request.tensors])
        return ExpertResponse(tensors=[encode_tensor(await self._answer(0, out), self.compression)])

    async def backward(self, request: ExpertRequest, _: CallContext) -> ExpertResponse:
        self.calls["backward"] += 1
        self.requests.append(request)
        grads = self._backward(request.uid, [decode_tensor(t) for t in request.tensors])
        grads[0] = await self._answer(0, grads[0])
        return ExpertResponse(tensors=[encode_tensor(g, self.compression) for g in grads])

    async def forward_stream(self, call: ServerStream[ExpertRequest, ExpertResponse]) -> None:
        self.calls["forward_stream"] += 1
        uid, tensors = await self._receive(call)
        await self._send(call, [self._forward(uid, tensors)])

    async def backward_stream(self, call: ServerStream[ExpertRequest, ExpertResponse]) -> None:
        self.calls["backward_stream"] += 1
        uid, tensors = await self._receive(call)
        await self._send(call, self._backward(uid, tensors))

    async def _receive(
        self, call: ServerStream[ExpertRequest, ExpertResponse]
    ) -> tuple[str, list[torch.Tensor]]:
        joiner = TensorJoiner(1 << 30)
        whole, uid = [], ""
        async for request in call:
            self.requests.append(request)
            uid = request.uid
            for part in request.tensors:
                whole += joiner.feed(part)
        return uid, [decode_tensor(t) for t in whole + joiner.finish()]

    async def _send(
        self, call: ServerStream[ExpertRequest, ExpertResponse], tensors: list[torch.Tensor]
    ) -> None:
        for tensor in tensors:
            for part in split_tensor(encode_tensor(tensor, self.compression)):
                await call.send(ExpertResponse(tensors=[part]))


@dataclass
class FakeRecord:
    value: Any
    is_dictionary: bool = True


@dataclass
class FakeDht:
    """Records as a DHT node returns them."""

    records: dict[str, FakeRecord] = field(default_factory=dict)
    reads: int = 0

    async def get_many(self, keys: Any, *, latest: bool = True) -> dict[Any, Any]:
        await trio.lowlevel.checkpoint()
        assert latest
        self.reads += 1
        return {key: self.records.get(key) for key in keys}

    def announce(self, server: PeerId, info: ServerInfo, blocks: range, *, expiration: float = 1.0) -> None:
        for block in blocks:
            record = self.records.setdefault(block_uid(PREFIX, block), FakeRecord({}))
            record.value[str(server)] = (info.to_value(), expiration)

    def withdraw(self, server: PeerId) -> None:
        for record in self.records.values():
            record.value.pop(str(server), None)


class ToySwarm:
    """Toy servers, their records, and the client's view of them."""

    def __init__(self, nursery: trio.Nursery, num_blocks: int) -> None:
        self.network = MemoryNetwork(nursery)
        self.dht = FakeDht()
        self.num_blocks = num_blocks
        self.servers: list[ToyServer] = []
        client = self.network.host(peer(999))
        self.directory = Directory(self.dht, PREFIX, num_blocks)
        self.swarm = Swarm(RpcClient(client), self.directory, rng=random.Random(1))

    def add(self, start: int, end: int, *, rps: float | None = None, **options: Any) -> ToyServer:
        server = ToyServer(peer(len(self.servers) + 1), range(start, end), **options)
        self.servers.append(server)
        server.mount(RpcServer(self.network.host(server.peer)))
        info = ServerInfo(
            ServerState.ONLINE,
            server.throughput,
            start_block=start,
            end_block=end,
            inference_rps=rps,
        )
        self.dht.announce(server.peer, info, server.blocks)
        return server

    def kill(self, server: ToyServer) -> None:
        """Gone from the network; its records stay, as they do for minutes."""
        self.network.down.add(server.peer)

    def revive(self, server: ToyServer) -> None:
        self.network.down.discard(server.peer)

    def reference(self, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        return run_blocks(range(self.num_blocks), hidden, prompts)


@asynccontextmanager
async def toy_swarm(num_blocks: int = 4) -> AsyncIterator[ToySwarm]:
    async with trio.open_nursery() as nursery:
        yield ToySwarm(nursery, num_blocks)
        nursery.cancel_scope.cancel()


def random_hidden(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
