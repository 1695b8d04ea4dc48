"""Tree steps over the wire: what is announced, what the metadata's bytes are, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_calls import hidden, output, request, step
from expert_world import World, tiny_world

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import HandlerError, Refusal, RemoteError
from kwaainet_bridge.hivemind.experts import trees
from kwaainet_bridge.hivemind.experts.methods import RPC_INFERENCE, RPC_INFO
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertUID

GOLDEN = bytes.fromhex(
    "81b46b776161696e65745f6272696467655f74726565"  # {"kwaainet_bridge_tree":
    "82a7706172656e747394ff000001"  # {"parents": [-1, 0, 0, 1],
    "a6616363657074920003"  # "accept": [0, 3]}}
)
FIELDS = trees.TreeFields((-1, 0, 0, 1), (0, 3))


@pytest.fixture
async def world() -> Any:
    async with tiny_world(range(4)) as world:
        yield world


def test_the_bytes_of_the_metadata() -> None:
    assert msgpack.pack(trees.to_metadata(FIELDS)) == GOLDEN
    assert trees.from_metadata(msgpack.unpack(GOLDEN)) == FIELDS
    assert trees.to_metadata(trees.TreeFields()) == {}
    assert trees.from_metadata({"session_id": "1"}) == trees.TreeFields()
    assert trees.from_metadata({trees.KEY: {}}) == trees.TreeFields()
    only = trees.TreeFields(None, (2,))
    assert trees.from_metadata(trees.to_metadata(only)) == only


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "has type NoneType, expected a map"),
        ([-1], "has type list, expected a map"),
        ({"parents": [-1], "mask": [1]}, "the unknown key 'mask'"),
        ({1: []}, "the unknown key 1"),
        ({"parents": None}, "parents has type NoneType, expected a list"),
        ({"parents": "aa"}, "parents has type str"),
        ({"parents": b"aa"}, "parents has type bytes"),
        ({"accept": {0: 1}}, "accept has type dict"),
        ({"parents": [-1] * 65}, "parents has 65 entries, at most 64"),
        ({"accept": list(range(10**5))}, "accept has 100000 entries"),
        ({"parents": [0.0]}, "parents holds 0.0, expected integers"),
        ({"accept": [True]}, "accept holds True"),
        ({"accept": [[0]]}, r"accept holds \[0\]"),
    ],
)
def test_metadata_that_is_no_tree(value: Any, text: str) -> None:
    with pytest.raises(Refusal, match=f"{trees.KEY}.*{text}"):
        trees.from_metadata({trees.KEY: value})


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        ({"version": 1, "max_tokens": 64}, 64),
        ({"version": 1, "max_tokens": 8, "more": 1}, 8),
        ({"version": 1, "max_tokens": 10**9}, defaults.MAX_TREE_TOKENS),
        ({"version": 2, "max_tokens": 64}, 0),
        ({"version": 1, "max_tokens": 0}, 0),
        ({"version": 1, "max_tokens": True}, 0),
        ({"version": 1, "max_tokens": "64"}, 0),
        ({"version": 1}, 0),
        (True, 0),
        (None, 0),
    ],
)
def test_what_a_server_takes(value: Any, tokens: int) -> None:
    assert trees.announced({trees.KEY: value}) == tokens
    assert trees.announced({}) == 0


async def test_a_server_announces_and_serves_them(world: World) -> None:
    uid = "tiny-llama-hf.0"
    info = await world.client.call(world.holder(0), RPC_INFO, ExpertUID(uid=uid), timeout=5)
    assert trees.announced(msgpack.unpack(info.serialized_info)) == defaults.MAX_TREE_TOKENS
    inputs = hidden(1, 6)
    async with world.client.stream(world.holder(0), RPC_INFERENCE, open_timeout=5) as call:
        await call.send(step(range(4), inputs[:, :2], max_length=32))
        await call.receive(timeout=5)
        await call.send(
            step(range(4), inputs[:, 2:5], start_from_position=2, **{trees.KEY: {"parents": [-1, 0, 0]}})
        )
        candidates = output(await call.receive(timeout=5))
        await call.send(
            step(range(4), inputs[:, 5:], start_from_position=4, **{trees.KEY: {"accept": [0, 2]}})
        )
        after = output(await call.receive(timeout=5))
        await call.send(request(range(4)))
    engine = world.servers[world.holder(0)].span.engine
    alone = await engine.forward(inputs[:, [0, 1, 2, 4, 5]], range(4))
    torch.testing.assert_close(candidates[:, 2], alone[:, 3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[:, 0], alone[:, 4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"parents": [-1, 0]}, "a parent for each of the 3 tokens, got 2"),
        ({"parents": [-1, 5, 0]}, "the parent of token 1 must be -1 or an earlier token"),
        ({"accept": [0]}, "the last step of this session had no tree"),
        ({"parents": 3}, "expected a list"),
    ],
)
async def test_a_server_says_what_is_wrong(world: World, fields: Any, text: str) -> None:
    async with world.client.stream(world.holder(0), RPC_INFERENCE, open_timeout=5) as call:
        await call.send(step(range(4), hidden(1, 2), max_length=32))
        await call.receive(timeout=5)
        await call.send(step(range(4), hidden(1, 3), **{trees.KEY: fields}))
        with pytest.raises((HandlerError, RemoteError), match=text):
            await call.receive(timeout=5)
