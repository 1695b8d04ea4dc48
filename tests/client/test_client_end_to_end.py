"""The client, the DHT, the expert server and the engine together, against the whole model in transformers."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import trio
from adapter_files import make_adapter, merged
from client_fakes import peer

from kwaainet_bridge.engine import ClientModel, Engine, EngineConfig, load_client_weights
from kwaainet_bridge.errors import NoRoute
from kwaainet_bridge.hivemind.client import (
    Directory,
    Sampling,
    Swarm,
    backward,
    forward,
    generate,
    open_session,
)
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.experts.records import ServerState, default_prefix
from kwaainet_bridge.hivemind.experts.server import ExpertServer, serve_span
from kwaainet_bridge.hivemind.experts.span import ServedSpan
from kwaainet_bridge.hivemind.experts.throughput import Throughput
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.node.announcing import Announcer, Offer, PetalsPublisher
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

MODEL = Path(__file__).parents[1] / "vectors" / "petals-tiny-llama" / "model"
PREFIX = default_prefix("test/tiny-llama", "llama")
BLOCKS = 8
PROMPT = torch.tensor([[1, 17, 301, 44, 5, 90, 233]])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole() -> transformers.PreTrainedModel:
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def weights() -> ClientModel:
    return load_client_weights(str(MODEL), dtype=torch.float32)


@dataclass
class RealSwarm:
    network: MemoryNetwork
    servers: dict[PeerId, ExpertServer]
    swarm: Swarm

    def session(self, **options):
        return open_session(self.swarm, **options)


@asynccontextmanager
async def real_swarm(
    *spans: range, rps: Sequence[float] = (), adapted: Path | None = None, adapter: str | None = None
) -> AsyncIterator[RealSwarm]:
    """A server with its own DHT node for every span, and a client that knows only the first of them.

    The first server has the adapter ``adapted``; the client asks for ``adapter``.
    """
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        network = MemoryNetwork(nursery)
        servers: dict[PeerId, ExpertServer] = {}
        for number, blocks in enumerate(spans):
            engine = await Engine.load(
                EngineConfig(
                    model=str(MODEL),
                    blocks=blocks,
                    threads=1,
                    dtype=torch.float32,
                    adapters=() if adapted is None or number else (str(adapted),),
                )
            )
            stack.push_async_callback(engine.aclose)
            host = network.host(peer(number + 1))
            server, client = RpcServer(host), RpcClient(host)
            dht = DhtNode(host, server, client, rng=random.Random(number))
            await stack.enter_async_context(dht.running())
            await dht.bootstrap([peer(1)] if number else [])
            servers[host.peer_id] = await stack.enter_async_context(
                serve_span(ServedSpan(PREFIX, engine), server, client)
            )
            offer = Offer(
                blocks,
                model_blocks=BLOCKS,
                repository=None,
                torch_dtype="float32",
                adapters=engine.adapters,
                throughput=Throughput(1.0, inference_rps=rps[number] if rps else None),
            )
            announcer = Announcer(offer, [PetalsPublisher(dht, PREFIX)])
            (report,) = await announcer.announce(ServerState.ONLINE)
            assert report.ok
        host = network.host(peer(0))
        client = RpcClient(host)
        dht = DhtNode(host, RpcServer(host), client, client_mode=True, rng=random.Random(99))
        await stack.enter_async_context(dht.running())
        await dht.bootstrap([peer(1)])
        swarm = Swarm(
            client, Directory(dht, PREFIX, BLOCKS, adapter=adapter), ping=dht.ping, rng=random.Random(5)
        )
        yield RealSwarm(network, servers, swarm)
        nursery.cancel_scope.cancel()


def local_tokens(whole: transformers.PreTrainedModel, ids: torch.Tensor, n: int) -> list[list[int]]:
    out = whole.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False
    )
    return out[:, ids.shape[1] :].tolist()


async def remote_tokens(
    real: RealSwarm, weights: ClientModel, ids: torch.Tensor, n: int, **options
) -> list[list[int]]:
    length = ids.shape[1] + n
    async with real.session(batch_size=ids.shape[0], max_length=length, **options) as session:
        steps = [step async for step in generate(weights, session, ids, max_new_tokens=n)]
    return torch.tensor(steps).T.tolist()


@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
async def test_greedy_tokens_equal_those_of_the_whole_model(whole, weights, batch: int, push: bool) -> None:
    ids = PROMPT if batch == 1 else torch.stack([PROMPT[0], PROMPT[0].flip(0), PROMPT[0] + 7])
    async with real_swarm(range(4), range(4, 8)) as real:
        assert await remote_tokens(real, weights, ids, 24, push=push) == local_tokens(whole, ids, 24)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert [server.open_sessions for server in real.servers.values()] == [0, 0]
        assert len({span.peer for span in real.swarm.spans}) == 2


@pytest.mark.parametrize("adapter", [None, "french"])
async def test_an_adapter_is_computed_by_those_who_have_it(
    whole, weights, adapter: str | None, tmp_path
) -> None:
    """The other server is faster, and good enough without."""
    folder = make_adapter(tmp_path / "french", MODEL, lora_alpha=8)
    model = whole if adapter is None else merged_whole(folder)
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    async with real_swarm(range(8), range(8), rps=[1.0, 1000.0], adapted=folder, adapter=adapter) as real:
        assert await remote_tokens(real, weights, PROMPT, 12) == local_tokens(model, PROMPT, 12)
        run = await forward(real.swarm, hidden)
        grads = await backward(real.swarm, run, torch.ones_like(hidden))
    inputs = hidden.clone().requires_grad_()
    expected = through_blocks(model, inputs)
    (gradient,) = torch.autograd.grad(expected.sum(), inputs)
    torch.testing.assert_close(run.output, expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads.hidden, gradient, rtol=1e-3, atol=1e-3)
    used = {hop.peer for hop, _ in run.inputs}
    assert used == {peer(1 if adapter else 2)}


async def test_nobody_has_the_adapter() -> None:
    async with real_swarm(range(8), adapter="else") as real:
        with pytest.raises(NoRoute):
            await forward(real.swarm, torch.zeros(1, 2, 64))


def merged_whole(adapter: Path) -> transformers.PreTrainedModel:
    reference = merged(MODEL, adapter, 8 / 4)
    changed = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    changed.model.layers.load_state_dict(reference.layers.state_dict())
    return changed


def through_blocks(model: transformers.PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    position_ids = torch.arange(hidden.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, position_ids)
    mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    for layer in model.model.layers:
        output = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


async def test_a_replica_that_dies_in_the_middle_changes_nothing(whole, weights) -> None:
    ids, n = PROMPT, 24
    async with real_swarm(range(4), range(4, 8), range(4, 8), rps=[100.0, 1000.0, 10.0]) as real:
        async with real.session(max_length=ids.shape[1] + n) as session:
            tokens = []
            async for (token,) in generate(weights, session, ids, max_new_tokens=n):
                tokens.append(token)
                if len(tokens) == 10:
                    assert peer(2).short in session.chain[1]
                    # as a killed process: its connections break and nobody can reach it
                    await session._parts[1]._stream._stream.reset()
                    real.network.down.add(peer(2))
            assert peer(3).short in session.chain[1]
        assert [tokens] == local_tokens(whole, ids, n)


async def test_a_replica_that_drains_hands_over(whole, weights) -> None:
    """A server that takes no new sessions and ends a running one: the other replica goes on."""
    ids, n = PROMPT, 16
    async with real_swarm(range(8), range(5), range(5, 8), rps=[1000.0, 10.0, 10.0]) as real:
        async with real.session(max_length=ids.shape[1] + n) as session:
            tokens = []
            async for (token,) in generate(weights, session, ids, max_new_tokens=n):
                tokens.append(token)
                if len(tokens) == 5:
                    await session._parts[0]._stream._stream.reset()
                    await real.servers[peer(1)].drain()
            assert [c.split(" ")[0] for c in session.chain] == ["0:5", "5:8"]
        assert [tokens] == local_tokens(whole, ids, n)


async def test_sampling_with_a_seed_equals_sampling_on_the_whole_model(whole, weights) -> None:
    sampling = Sampling(do_sample=True, temperature=0.8, top_k=20, top_p=0.95, repetition_penalty=1.2)
    async with real_swarm(range(8)) as real, real.session(max_length=32) as session:
        run = generate(weights, session, PROMPT, max_new_tokens=16, sampling=sampling, seed=11)
        tokens = [token async for (token,) in run]
    ids, rng = PROMPT, torch.Generator().manual_seed(11)
    process = sampling.processors()
    for token in tokens:
        with torch.no_grad():
            scores = process(ids, whole(ids).logits[:, -1].float())
        drawn = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=rng)
        assert drawn.item() == token
        ids = torch.cat([ids, drawn], dim=1)


async def test_a_conversation_continues_in_one_session(whole, weights) -> None:
    async with real_swarm(range(4), range(4, 8)) as real, real.session(max_length=64) as session:
        ids = PROMPT
        for more in ([], [8, 9, 10]):
            ids = torch.cat([ids, torch.tensor([more], dtype=torch.int64)], dim=1)
            tokens = [t async for (t,) in generate(weights, session, ids, max_new_tokens=8)]
            assert [tokens] == local_tokens(whole, ids, 8)
            ids = torch.cat([ids, torch.tensor([tokens])], dim=1)


async def test_forward_and_prompt_gradients_equal_those_of_the_whole_model(whole, weights) -> None:
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    hidden = weights.embed(ids).detach()
    with torch.no_grad():
        reference = whole(ids).logits
    async with real_swarm(range(3), range(2, 6), range(6, 8)) as real:
        done = await forward(real.swarm, hidden)
        torch.testing.assert_close(weights.logits(done.output), reference, rtol=1e-4, atol=1e-4)
        soft = torch.randn(1, 3, hidden.shape[2], generator=torch.Generator().manual_seed(0)) * 0.1

        def loss_of(logits: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(logits[:, 3:-1].flatten(0, 1), ids[:, 1:].flatten())

        local_soft = soft.clone().requires_grad_()
        embedded = torch.cat([local_soft.expand(2, -1, -1), hidden], dim=1)
        (wanted,) = torch.autograd.grad(loss_of(whole(inputs_embeds=embedded).logits), local_soft)

        done = await forward(real.swarm, torch.cat([soft.expand(2, -1, -1), hidden], dim=1))
        output = done.output.requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(weights.logits(output)), output)
        result = await backward(real.swarm, done, grad)
        found = result.hidden[:, :3].sum(dim=0, keepdim=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


async def test_deep_prompts_survive_the_loss_of_a_server(weights) -> None:
    hidden = weights.embed(PROMPT)
    prompts = torch.randn(BLOCKS, 1, 3, hidden.shape[2], generator=torch.Generator().manual_seed(0)) * 0.1
    async with real_swarm(range(8), range(3), range(3, 8), rps=[1000.0, 10.0, 10.0]) as real:
        outputs = []
        for lose in (False, True):
            async with real.session(max_length=16) as session:
                first = await session.step(hidden[:, :5], prompts=prompts)
                if lose:
                    await session._parts[0]._stream._stream.reset()
                    real.network.down.add(peer(1))
                outputs.append(torch.cat([first, await session.step(hidden[:, 5:])], dim=1))
                assert len(session.chain) == (2 if lose else 1)
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
        done = await forward(real.swarm, hidden, prompts=prompts)
        torch.testing.assert_close(done.output, outputs[1], rtol=1e-4, atol=1e-5)
