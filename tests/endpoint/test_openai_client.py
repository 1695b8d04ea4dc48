"""The endpoint of real nodes, asked by the official ``openai`` package."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
import trio
from node_support import RunningNode, node_config, running_node

AUSTEN = Path(__file__).parents[2] / "src" / "kwaainet_bridge" / "models" / "austen"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
PROMPT = "It is a truth universally acknowledged"
TURNS = [{"role": "system", "content": "You are Jane."}, {"role": "user", "content": "Who is he?"}]


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(AUSTEN, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="session")
def expected(chatty: Path) -> Any:
    """Greedy text of the whole model: (prompt, tokens) -> (text, ids)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(chatty)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatty)

    def greedy(prompt: str, count: int) -> str:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            new = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[
                0, ids.shape[1] :
            ]
        return str(tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return greedy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Endpoint:
    url: str
    model: str
    nodes: list[RunningNode]
    client: openai.OpenAI

    async def ask(self, call: Any, **arguments: Any) -> Any:
        return await trio.to_thread.run_sync(partial(call, model=self.model, **arguments))

    async def complete(self, **arguments: Any) -> Any:
        return await self.ask(self.client.completions.create, prompt=PROMPT, **arguments)

    async def chat(self, **arguments: Any) -> Any:
        return await self.ask(self.client.chat.completions.create, messages=TURNS, **arguments)


@asynccontextmanager
async def endpoint(folder: Path, model: Path, **settings: Any) -> AsyncIterator[Endpoint]:
    """Two nodes with half of the model each; the second one has the endpoint, and uses its own blocks, too."""
    section = {"name": str(model), "dht_prefix": "chatty", "throughput": 1.0, "threads": 1}
    port = free_port()
    first = node_config(folder, "first", model=section | {"blocks": "0:4"})
    async with running_node(first) as one:
        await one.serving()
        second = node_config(
            folder,
            "second",
            bootstrap=[one.address],
            model=section | {"blocks": "4:8"},
            openai={"listen": f"127.0.0.1:{port}"} | settings,
        )
        async with running_node(second) as two:
            await two.serving()
            url = f"http://127.0.0.1:{port}/v1"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                yield Endpoint(url, str(model), [one, two], client)


async def test_text_of_a_swarm(tmp_path: Path, chatty: Path, expected: Any) -> None:
    """Models, completions and conversations, whole and in pieces, with stop words and counts."""
    async with endpoint(tmp_path, chatty) as served:
        models = await trio.to_thread.run_sync(lambda: served.client.models.list().data)
        assert [model.id for model in models] == [served.model]
        one = await trio.to_thread.run_sync(served.client.models.retrieve, served.model)
        assert one.object == "model"

        whole = await served.complete(max_tokens=12, temperature=0)
        text = expected(PROMPT, 12)
        assert whole.choices[0].text == text
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 12
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12

        said = expected("system: You are Jane.\nuser: Who is he?\nassistant:", 10)
        chat = await served.chat(max_tokens=10, temperature=0)
        assert chat.choices[0].message.content == said
        assert chat.choices[0].message.role == "assistant"

        def read_stream() -> tuple[str, list[Any], Any]:
            stream = served.client.chat.completions.create(
                model=served.model,
                messages=TURNS,
                max_completion_tokens=10,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
            told = [chunk for chunk in chunks if chunk.choices]
            pieces = "".join(chunk.choices[0].delta.content or "" for chunk in told)
            return pieces, [chunk.choices[0].finish_reason for chunk in told], chunks[-1].usage

        pieces, reasons, usage = await trio.to_thread.run_sync(read_stream)
        assert pieces == said
        assert reasons[-1] == "length"
        assert set(reasons[:-1]) == {None}
        assert usage.completion_tokens == 10

        word = text.split()[3]
        stopped = await served.complete(max_tokens=12, temperature=0, stop=[word, "never said"])
        assert stopped.choices[0].text == text[: text.index(word)]
        assert stopped.choices[0].finish_reason == "stop"

        seeded = [await served.complete(max_tokens=8, temperature=1.5, seed=5) for _ in range(2)]
        assert seeded[0].choices[0].text == seeded[1].choices[0].text
        assert (
            await trio.to_thread.run_sync(
                lambda: (
                    served.client.completions.create(
                        model=served.model, prompt=[5, 6, 7], max_tokens=1, temperature=0
                    ).usage.prompt_tokens
                )
            )
            == 3
        )


async def test_what_is_refused_names_the_key(tmp_path: Path, chatty: Path) -> None:
    async with endpoint(tmp_path, chatty) as served:
        with pytest.raises(openai.NotFoundError, match="no model 'gpt' here"):
            await trio.to_thread.run_sync(lambda: served.client.completions.create(model="gpt", prompt="a"))
        with pytest.raises(openai.NotFoundError, match="no model 'gpt' here"):
            await trio.to_thread.run_sync(served.client.models.retrieve, "gpt")
        for wrong, message in (
            ({"n": 2}, "^.*n: Input should be 1"),
            ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
            ({"logprobs": 3}, "logprobs is not supported here"),
            ({"presence_penalty": 0.5}, "presence_penalty is not supported here"),
            ({"max_tokens": 10**6}, "the model takes 2048 together"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"stop": [""]}, "stop.0"),
        ):
            with pytest.raises(openai.BadRequestError, match=message):
                await served.complete(**wrong)
        with pytest.raises(openai.BadRequestError, match="tools is not supported here"):
            await served.chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
        async with httpx.AsyncClient() as client:
            for body, status in (
                (b"{", 400),
                (b"[1]", 400),
                (b'{"model": "x"}', 400),
                (b"x" * (1 << 20) + b"x", 413),
            ):
                answer = await client.post(f"{served.url}/completions", content=body)
                assert answer.status_code == status
                assert answer.json()["error"]["message"]
            assert (await client.get(f"{served.url}/else")).json()["error"]["message"] == "Not Found"
            foreign = {"host": "evil.example"}
            assert (await client.get(f"{served.url}/models", headers=foreign)).status_code == 421


async def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    async with endpoint(tmp_path, AUSTEN) as served:
        with pytest.raises(openai.BadRequestError, match="has no chat template: ask /v1/completions"):
            await served.chat(max_tokens=4)
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            await served.chat(max_tokens=4, stream=True)


async def test_a_swarm_that_cannot_answer(tmp_path: Path, chatty: Path) -> None:
    """Blocks that nobody serves, and a server that goes in the middle: told as an error, in a stream, too."""
    section = {"name": str(chatty), "dht_prefix": "chatty", "throughput": 1.0, "threads": 1, "blocks": "4:8"}
    port = free_port()
    config = node_config(tmp_path, "half", model=section, openai={"listen": f"127.0.0.1:{port}"})
    async with running_node(config) as node:
        await node.serving()
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as client:
            for stream in (False, True):
                ask = partial(
                    client.completions.create, model=str(chatty), prompt="a", max_tokens=2, stream=stream
                )
                with pytest.raises(openai.InternalServerError, match="the swarm cannot answer now") as caught:
                    await trio.to_thread.run_sync(ask)
                assert caught.value.status_code == 503


async def test_who_leaves_frees_the_servers(tmp_path: Path, chatty: Path) -> None:
    """Within a stream and while waiting for a whole answer: the sessions end."""
    async with endpoint(tmp_path, chatty) as served:
        petals = served.nodes[0].served
        assert petals is not None
        for stream in (True, False):
            body = {"model": served.model, "prompt": PROMPT, "max_tokens": 1500, "stream": stream}
            data = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
            connection = await trio.open_tcp_stream("127.0.0.1", int(served.url.split(":")[2].split("/")[0]))
            async with connection:
                await connection.send_all(head.encode() + data)
                if stream:
                    assert (await connection.receive_some(12)) == b"HTTP/1.1 200"
                await until(lambda: petals.open_sessions == 1)
            await until(lambda: petals.open_sessions == 0)


async def test_token_and_limits(tmp_path: Path, chatty: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123")
    token.chmod(0o600)
    async with endpoint(tmp_path, chatty, token_file=str(token), requests_per_minute=2, at_once=1) as served:
        with pytest.raises(openai.AuthenticationError):
            await served.complete(max_tokens=1)
        with openai.OpenAI(base_url=served.url, api_key=token.read_text(), max_retries=0) as client:
            ask = partial(client.completions.create, model=served.model, prompt="a", max_tokens=1)
            for _ in range(2):
                await trio.to_thread.run_sync(ask)
            with pytest.raises(openai.RateLimitError, match="more than 2 requests a minute"):
                await trio.to_thread.run_sync(ask)


async def until(condition: Any) -> None:
    """Wait for what no event tells."""
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110  # counts of a node that serves others
            await trio.sleep(0.02)
