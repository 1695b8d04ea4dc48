"""What would hold the endpoint, or the node: requests that never end, models that do not come, texts that take long."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio
import trio.testing

from kwaainet_bridge import defaults
from kwaainet_bridge.config import OpenAIConfig
from kwaainet_bridge.node.generating import TextModels
from kwaainet_bridge.node.openai import server
from kwaainet_bridge.node.openai.app import _Endpoint
from kwaainet_bridge.node.openai.bodies import ApiError, CompletionRequest, read_body
from kwaainet_bridge.node.openai.limits import Limits
from kwaainet_bridge.node.openai.server import open_openai
from kwaainet_bridge.node.state import NodeState


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def endpoint() -> AsyncIterator[int]:
    port = free_port()
    config = OpenAIConfig(listen=f"127.0.0.1:{port}", models=("one",))
    async with open_openai(config, ["one"], [], lambda _name: None, NodeState()):  # type: ignore[arg-type, return-value]
        yield port


def request(body: bytes, *, length: int | None = None) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


async def test_a_request_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "WEB_IDLE_SECONDS", 0.3)
    async with endpoint() as port, await trio.open_tcp_stream("127.0.0.1", port) as client:
        await client.send_all(request(b"{", length=99))
        told = b""
        with trio.fail_after(10):
            while more := await client.receive_some():
                told += more
        assert b" 408 " in told


class Slow:
    """A model that does not come until it is let."""

    def __init__(self) -> None:
        self.asked, self.comes = threading.Event(), threading.Event()
        self.loads = 0

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.loads += 1
        self.asked.set()
        self.comes.wait(30)
        raise OSError("it never came")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = Slow()
    monkeypatch.setattr(server, "load_text_model", model)
    yield model
    model.comes.set()


async def test_a_node_can_end_while_a_model_is_fetched(slow: Slow) -> None:
    with trio.fail_after(15):
        async with endpoint() as port:
            client = await trio.open_tcp_stream("127.0.0.1", port)
            await client.send_all(request(json.dumps({"model": "one", "prompt": "a"}).encode()))
            await trio.to_thread.run_sync(slow.asked.wait)
        await client.aclose()
    assert not slow.comes.is_set()


async def test_who_leaves_while_a_model_is_fetched_frees_its_place_and_the_fetched_is_kept() -> None:
    asked, comes, loads = threading.Event(), threading.Event(), []

    def load(name: str) -> Any:
        loads.append(name)
        asked.set()
        comes.wait(30)
        return "weights", "tokenizer"

    class Network:
        name = "petals"

        def text_swarm(self, *_: Any) -> str:
            return "swarm"

    models = TextModels(["one"], [Network()], load=load)  # type: ignore[arg-type, list-item]
    with trio.fail_after(15):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(models.get, "one")
            await trio.to_thread.run_sync(asked.wait)
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(models.get, "one")
            await trio.testing.wait_all_tasks_blocked()
            assert loads == ["one"]  # nobody loads it a second time beside the first
            comes.set()
    assert loads == ["one"]
    assert list(models.swarms().values()) == ["swarm"]


async def test_prompts_become_tokens_beside_the_event_loop() -> None:
    """A prompt of a MiB takes most of a second."""
    threads: list[int] = []

    def tokenizer(_text: str) -> dict[str, list[int]]:
        threads.append(threading.get_ident())
        return {"input_ids": [1, 2]}

    class Models:
        async def get(self, _name: str) -> Any:
            await trio.lowlevel.checkpoint()
            weights = SimpleNamespace(config={}, vocab_size=10)
            return SimpleNamespace(name="one", weights=weights, tokenizer=tokenizer)

    app = _Endpoint(Models(), Limits(at_once=1, per_minute=None), lambda: 0.0)  # type: ignore[arg-type]
    answer = await app._answer(CompletionRequest.model_validate({"model": "one", "prompt": "a"}))
    assert answer.prompt_tokens == 2
    assert threads
    assert threading.get_ident() not in threads
    with pytest.raises(ApiError, match="holds no token"):
        await app._answer(CompletionRequest.model_validate({"model": "one", "prompt": []}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", float("nan")),
    ],
)
def test_numbers_with_which_nothing_can_be_computed_are_refused_by_their_key(key: str, value: float) -> None:
    """Else they would be a traceback in the node's log, and an answer of 500."""
    body = json.dumps({"model": "one", "prompt": "a", key: value}).encode()
    with pytest.raises(ApiError, match=f"^{key}") as caught:
        read_body(CompletionRequest, body)
    assert caught.value.status == 400


@pytest.mark.parametrize(("temperature", "samples"), [(0, False), (1e-320, False), (0.001, True)])
def test_a_temperature_of_next_to_nothing_is_none(temperature: float, *, samples: bool) -> None:
    asked = CompletionRequest.model_validate({"model": "one", "prompt": "a", "temperature": temperature})
    assert asked.sampling.do_sample is samples


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63), 0])
def test_seeds_that_torch_takes(seed: int) -> None:
    asked = CompletionRequest.model_validate({"model": "one", "prompt": "a", "seed": seed})
    assert asked.seed is not None
    torch.Generator().manual_seed(asked.seed)
