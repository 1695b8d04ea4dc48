"""Steps through KwaaiNet servers of the tiny model: what comes out, and what is refused in which words."""

from __future__ import annotations

import pytest
import torch
import trio
from kwaai_world import BLOCKS, HIDDEN, MODEL, WholeModel, generate, peer, round_half, through, tiny_world

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.errors import CheckpointError, ConfigError, HandlerError, WarmingUp
from kwaainet_bridge.kwaai import methods, sessions
from kwaainet_bridge.kwaai.model import ServedModel
from kwaainet_bridge.kwaai.server import KwaaiProtocols
from kwaainet_bridge.rpc import RpcClient
from kwaainet_bridge.wire.kwaai_inference import InferenceRequest, PayloadType, ResponseType

PROMPT = [1, 17, 300, 42, 99, 8]
LAST = range(4, BLOCKS)


@pytest.fixture(scope="module")
def whole():
    return WholeModel()


@pytest.fixture
async def world():
    """Two servers, each with half of the model."""
    async with tiny_world(range(4), LAST, max_length=256, cache_tokens=1024) as world:
        yield world


def hidden(tokens=3, width=HIDDEN, seed=0):
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("spans", "rounded"),
    [
        ((range(8),), ()),
        ((range(4), range(4, 8)), (3,)),
        ((range(2), range(2, 4), range(4, 8)), (1, 3)),
    ],
    ids=str,
)
async def test_text_is_that_of_the_whole_model_with_the_same_rounding(spans, rounded, whole):
    async with tiny_world(*spans) as world:
        assert await generate(world, PROMPT, 12) == whole.generate(PROMPT, 12, rounded)
        scores = await through(world, 8, 0, PROMPT)
        difference = (scores - whole.logits(PROMPT, rounded)).abs().max().item()
        assert difference <= 2**-10 * scores.abs().max().item()


async def test_a_prompt_in_several_requests_gives_the_same_as_in_one(world, whole):
    ids = [(7 * i) % 384 for i in range(100)]
    for start in range(0, 100, 40):
        scores = await through(world, 3, start, ids[start : start + 40])
    assert int(scores.argmax()) == int(whole.logits(ids, (3,)).argmax())
    assert torch.allclose(scores, await through(world, 4, 0, ids), atol=4e-3)


async def test_what_leaves_is_float16_and_what_is_beyond_it_is_clamped(world):
    values = await world.client().step_ids(world.nodes[0].peer, 1, 0, PROMPT)
    assert torch.equal(values, round_half(values))
    engine = world.nodes[0].model.engine
    real = engine.open_session

    class Huge:
        position = 0

        async def step(self, given):
            return torch.full((1, given.shape[1], HIDDEN), 1e6)

    class Opened:
        async def __aenter__(self):
            self.inner = real(range(4), 1, 8)
            await self.inner.__aenter__()
            return Huge()

        async def __aexit__(self, *details):
            return await self.inner.__aexit__(*details)

    engine.open_session = lambda *_, **__: Opened()
    values = await world.client().step_ids(world.nodes[0].peer, 2, 0, [5])
    assert values.unique().tolist() == [65504.0]


async def test_each_kind_of_engine_widens_what_comes():
    async with tiny_world(range(2), range(2, 8), dtype=torch.bfloat16) as world:
        scores = await through(world, 1, 0, PROMPT)
        wide = WholeModel(torch.bfloat16).logits(PROMPT, (1,))
        assert torch.nn.functional.cosine_similarity(scores, wide, dim=0) > 0.999


# --- what is refused


async def refused(world, node, *step):
    """The error text of one step, which leaves no session behind."""
    before = world.nodes[node].server.open_sessions
    client = world.client()
    session_id, position, inputs = step
    call = client.step_hidden if isinstance(inputs, torch.Tensor) else client.step_ids
    with pytest.raises(HandlerError) as e:
        await call(world.nodes[node].peer, session_id, position, inputs)
    assert world.nodes[node].server.open_sessions == before
    return e.value.text


async def test_what_does_not_fit_the_span(world):
    assert (
        await refused(world, 0, 1, 0, hidden())
        == "blocks 0:4 are served here, which take token_ids, not hidden_states"
    )
    assert (
        await refused(world, 1, 1, 0, PROMPT)
        == "blocks 4:8 are served here, which take hidden_states, not token_ids"
    )
    assert (
        await refused(world, 1, 1, 0, hidden(width=63))
        == "hidden states here are [1, tokens, 64], not [1, 3, 63]"
    )
    assert await refused(world, 0, 1, 0, [5, 384]) == "token ids must lie in 0..383, these go up to 384"
    assert await refused(world, 0, 1, 0, [2**32 - 1]) == (
        "token ids must lie in 0..383, these go up to 4294967295"
    )


async def test_a_position_where_the_session_is_not(world):
    text = "you have no session 5 here: begin one with seq_pos 0, not 6"
    assert await refused(world, 0, 5, 6, [1]) == text
    await world.client().step_ids(world.nodes[0].peer, 5, 0, PROMPT)
    for wrong in (1, 5, 7, 2**31):
        text = f"session 5 is at position 6: seq_pos {wrong} is not there"
        assert await refused(world, 0, 5, wrong, [1]) == text
    await world.client().step_ids(world.nodes[0].peer, 5, 6, [1])


async def test_lengths_beyond_the_maximum(world):
    text = await refused(world, 0, 1, 0, [1] * 257)
    assert text == "a session may have 256 tokens here, 257 are more"
    await world.client().step_ids(world.nodes[0].peer, 1, 0, [1] * 250)
    text = await refused(world, 0, 1, 250, [1] * 7)
    assert text == "session 1 has room for 256 tokens, 250 + 7 are more: none may be longer"
    await world.client().step_ids(world.nodes[0].peer, 1, 250, [1] * 6)


async def test_one_request_has_no_more_tokens_than_a_batch_may_have_or_an_answer_can_hold(monkeypatch):
    async with tiny_world(range(4), max_batch_tokens=50) as world:
        text = "one request may have 50 tokens here, this one has 51: send them in several"
        assert await refused(world, 0, 1, 0, [1] * 51) == text
        monkeypatch.setattr("kwaainet_bridge.kwaai.inference.most_tokens", lambda _width: 20)
        text = "one request may have 20 tokens here, this one has 21: send them in several"
        assert await refused(world, 0, 1, 0, [1] * 21) == text


def test_that_many_tokens_fit_into_a_message():
    for width in (64, 4096, 16384):
        most = methods.most_tokens(width)
        for fits, tokens in ((True, most), (False, most + 2048 // width + 1)):
            request = InferenceRequest(
                session_id=2**64 - 1,
                seq_pos=2**31,
                payload_type=PayloadType.HIDDEN_STATES,
                shape=(1, tokens, width),
                data=memoryview(bytes(2 * tokens * width)),
            )
            # the envelope adds call id, two peer ids' worth of bytes and the protocol's name
            assert (request.length() + 200 <= defaults.MAX_UNARY_BYTES) == fits


async def test_no_room_in_the_kv_cache():
    async with tiny_world(range(4), max_length=128, cache_tokens=200) as world:
        await world.client(1 + 100).step_ids(world.nodes[0].peer, 1, 0, PROMPT)
        text = await refused(world, 0, 1, 0, PROMPT)
        assert (
            text
            == "the KV cache has no room for a session of 128 tokens: try again in 5 s, or another server"
        )


async def test_the_cache_that_other_protocols_use_is_not_there_for_sessions():
    async with tiny_world(range(4), max_length=128, cache_tokens=300) as world:
        async with world.nodes[0].model.engine.open_session(range(4), 2, 128):
            assert "has no room" in await refused(world, 0, 1, 0, PROMPT)
        await world.client().step_ids(world.nodes[0].peer, 1, 0, PROMPT)


async def test_one_peer_leaves_room_for_others():
    async with tiny_world(range(4), max_length=64, cache_tokens=256) as world:
        server = world.nodes[0].peer
        for session in (1, 2):
            await world.client().step_ids(server, session, 0, PROMPT)
        text = await refused(world, 0, 3, 0, PROMPT)
        assert text.startswith("your sessions hold 128 tokens of the KV cache, the rest is for others")
        await world.client(101).step_ids(server, 1, 0, PROMPT)


async def test_a_peer_has_a_bounded_number_of_sessions(monkeypatch):
    monkeypatch.setattr(sessions.defaults, "KWAAI_SESSIONS_PER_PEER", 2)
    async with tiny_world(range(4), max_length=8) as world:
        for session in (1, 2):
            await world.client().step_ids(world.nodes[0].peer, session, 0, PROMPT)
        text = await refused(world, 0, 3, 0, PROMPT)
        assert text.startswith("one peer may have 2 sessions here, and you have: try again in ")


# --- whose session


async def test_the_same_number_is_another_session_for_each_peer(world):
    server = world.nodes[0].peer
    one, two = world.client(100), world.client(101)
    ours = await one.step_ids(server, 1, 0, PROMPT)
    await two.step_ids(server, 1, 0, [9, 9])
    again = await one.step_ids(server, 1, 6, [3])
    assert world.nodes[0].server.open_sessions == 2
    assert torch.equal(ours, await one.step_ids(server, 2, 0, PROMPT))
    assert torch.equal(again, await one.step_ids(server, 2, 6, [3]))


async def test_position_0_begins_anew(world):
    server, client = world.nodes[0].peer, world.client()
    first = await client.step_ids(server, 1, 0, PROMPT)
    await client.step_ids(server, 1, 6, [3])
    assert torch.equal(await client.step_ids(server, 1, 0, PROMPT), first)
    assert world.nodes[0].server.open_sessions == 1


async def test_the_session_is_echoed_and_rust_bytes_are_read(world):
    request = InferenceRequest.of_token_ids(2**64 - 1, 0, PROMPT)
    rpc = RpcClient(world.host())
    answer = await rpc.call(world.nodes[0].peer, methods.INFERENCE, request, timeout=10)
    assert (answer.session_id, answer.response_type) == (2**64 - 1, ResponseType.HIDDEN_STATES)
    assert answer.shape == (1, 6, HIDDEN)


# --- embeddings and head


async def test_the_ends_are_read_at_their_first_use():
    async with tiny_world(range(4), range(4, 6), LAST) as world:
        first, middle, last = (node.model for node in world.nodes)
        assert not first.ready
        assert middle.ready
        assert not last.ready
        await world.client().step_ids(world.nodes[0].peer, 1, 0, PROMPT)
        assert first.ready
        assert not last.ready


async def test_they_are_read_once_however_many_ask():
    reads = []

    def load(name, **settings):
        from kwaainet_bridge.engine import load_client_weights

        reads.append(settings)
        return load_client_weights(name, **settings)

    async with tiny_world(range(4)) as world:
        model = world.nodes[0].model
        model._read = lambda: load(str(MODEL), dtype=torch.float32, revision=None)
        async with trio.open_nursery() as nursery:
            for session in range(4):
                nursery.start_soon(world.client().step_ids, world.nodes[0].peer, session, 0, PROMPT)
        assert len(reads) == 1


async def test_reading_that_takes_long_is_warming_up_and_goes_on(monkeypatch):
    import threading

    monkeypatch.setattr(defaults, "KWAAI_EMBEDDINGS_SECONDS", 0.05)
    allowed = threading.Event()
    async with tiny_world(range(4)) as world:
        model = world.nodes[0].model
        read = model._read
        model._read = lambda: (allowed.wait(), read())[1]
        for _ in range(2):
            with pytest.raises(WarmingUp, match="node warming up"):
                await world.client().step_ids(world.nodes[0].peer, 1, 0, PROMPT)
        assert world.nodes[0].server.open_sessions == 0
        reading = model._reading
        allowed.set()
        await reading.wait()
        await world.client().step_ids(world.nodes[0].peer, 1, 0, PROMPT)


async def test_reading_that_fails_is_tried_again(caplog):
    async with tiny_world(range(4)) as world:
        model = world.nodes[0].model
        read = model._read

        def fail():
            raise CheckpointError("the file is gone")

        model._read = fail
        text = await refused(world, 0, 1, 0, PROMPT)
        assert text == "this server cannot read its model's embeddings and head"
        assert "the file is gone" in caplog.text
        model._read = read
        await world.client().step_ids(world.nodes[0].peer, 1, 0, PROMPT)


async def test_ends_that_cannot_be_computed_are_refused_at_once(llama_engine):
    from dataclasses import replace

    llama_engine.model = replace(llama_engine.model, no_ends="it has two norms")
    with pytest.raises(ConfigError, match="serve blocks 1:7"):
        ServedModel(llama_engine)
    llama_engine.blocks = range(1, 7)
    assert ServedModel(llama_engine).ready


@pytest.fixture
async def llama_engine():
    engine = await Engine.load(EngineConfig(str(MODEL), blocks=range(1), threads=1))
    yield engine
    await engine.aclose()


async def test_names_of_the_model(llama_engine):
    model = ServedModel(llama_engine, names=("meta-llama/Llama-3.1-8B-Instruct", "Llama-3-1-8B-Instruct-hf"))
    for name in (
        "meta-llama/Llama-3.1-8B-Instruct",
        "Llama-3-1-8B-Instruct",
        "llama-3.1-8b-instruct",
        "Llama-3-1-8B-Instruct-hf",
    ):
        assert model.answers_to(name)
    for name in ("other/Llama-3.1-8B-Instruct", "Llama-3.1-8B", ""):
        assert not model.answers_to(name)


# --- engines that fail


async def test_an_engine_that_fails_ends_the_session_and_tells_nothing_of_itself(world, caplog):
    server, client = world.nodes[0].peer, world.client()
    await client.step_ids(server, 1, 0, PROMPT)
    engine = world.nodes[0].model.engine

    def broken(*_args, **_more):
        raise RuntimeError("secret trouble")

    run, engine._span.run = engine._span.run, broken
    with pytest.raises(HandlerError) as e:
        await client.step_ids(server, 1, 6, [1])
    assert e.value.text == "this server failed to compute the step"
    assert "secret trouble" in caplog.text
    assert world.nodes[0].server.open_sessions == 0
    assert engine.cache_bytes_left == engine.cache_bytes_total
    engine._span.run = run
    text = "you have no session 1 here: begin one with seq_pos 0, not 7"
    assert await refused(world, 0, 1, 7, [1]) == text


async def test_inference_switched_off():
    async with tiny_world(range(4), protocols=KwaaiProtocols(inference=False)) as world:
        from kwaainet_bridge.errors import ProtocolNotSupported

        with pytest.raises(ProtocolNotSupported):
            await world.client().step_ids(peer(1), 1, 0, PROMPT)
