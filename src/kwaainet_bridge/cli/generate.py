"""``kwaainet-bridge generate``: text from a swarm, streamed to the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import trio
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kwaainet_bridge.bridge.kwaai_servers import KwaaiServers
from kwaainet_bridge.cli.visit import Visit, visit_swarm
from kwaainet_bridge.config import ModelConfig, NodeConfig
from kwaainet_bridge.engine import ClientModel, load_client_weights
from kwaainet_bridge.errors import ConfigError, InvalidRequest
from kwaainet_bridge.hivemind.client import (
    GREEDY,
    Directory,
    Sampling,
    Swarm,
    TextStream,
    generate,
    open_session,
)
from kwaainet_bridge.kwaai.client import KwaaiClient
from kwaainet_bridge.node.models import kwaainet_prefix, model_source, swarm_prefix


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What the command line asks for."""

    prompt: str
    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    seed: int | None = None
    show_route: bool = False
    adapter: str | None = None


def sampling_of(temperature: float, *, top_k: int, top_p: float, repetition_penalty: float) -> Sampling:
    """The sampling that options of the command line stand for; temperature 0 is greedy. ConfigError."""
    try:
        return Sampling(
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
    except InvalidRequest as e:
        raise ConfigError(str(e)) from e


async def generate_text(config: NodeConfig, options: GenerateOptions) -> None:
    """Find the swarm, generate, and write the text to standard output as it comes.

    Raises ConfigError without a bootstrap address, NetworkError when nobody answers or blocks are missing.
    """
    models = config.served_models
    if len(models) != 1:
        known = f"several models ({', '.join(model.name for model in models)})" if models else "no model"
        raise ConfigError(f"{known} to generate with: name it with --model")
    model = models[0]
    async with visit_swarm(config, both=True) as visit:
        console = Console(stderr=True)
        with _progress(console) as progress:
            weights, tokenizer = await _load(model, progress)
        prefix = swarm_prefix(model.name, weights.family, model.dht_prefix)
        directory = Directory(visit.dht, prefix, weights.num_blocks, adapter=options.adapter)
        # no request of KwaaiNet can ask for an adapter
        others = _others(config, model, visit, weights) if options.adapter is None else []
        swarm = Swarm(visit.rpc, directory, ping=visit.dht.ping, others=others)
        await _write_text(swarm, weights, tokenizer, options, console)


def _others(config: NodeConfig, model: ModelConfig, visit: Visit, weights: ClientModel) -> list[KwaaiServers]:
    """The model's servers in KwaaiNet, if that network is configured."""
    network = config.networks.kwaainet
    if network is None or visit.kwaainet is None:
        return []
    prefix = kwaainet_prefix(model.name, network.dht_prefix)
    client = KwaaiClient(visit.rpc)
    return [KwaaiServers(visit.kwaainet, client, prefix, weights.num_blocks, vocab_size=weights.vocab_size)]


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


async def _load(model: ModelConfig, progress: Progress) -> tuple[ClientModel, Any]:
    """Embeddings, head and tokenizer, off the event loop."""
    source = model_source(model.name)
    task = progress.add_task(f"loading {model.name}", total=2)
    dtype = torch.float32 if model.dtype == "auto" else getattr(torch, model.dtype)
    weights = await trio.to_thread.run_sync(partial(load_client_weights, source, dtype=dtype))
    progress.advance(task)

    def load_tokenizer() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(weights.folder))

    tokenizer = await trio.to_thread.run_sync(load_tokenizer)
    progress.remove_task(task)
    return weights, tokenizer


async def _write_text(
    swarm: Swarm,
    weights: ClientModel,
    tokenizer: Any,
    options: GenerateOptions,
    console: Console,
) -> None:
    ids = tokenizer(options.prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise ConfigError("the prompt holds no token: give some text to continue")
    text = TextStream(tokenizer, ids[0].tolist())
    typer.echo(options.prompt, nl=False)
    began = trio.current_time()
    count = 0
    async with open_session(swarm, max_length=ids.shape[1] + options.max_new_tokens, ends=True) as session:
        tokens = generate(
            weights,
            session,
            ids,
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            eos_token_ids=weights.eos_token_ids,
            seed=options.seed,
        )
        async for new in tokens:
            count += 1
            typer.echo(text.feed(new), nl=False)
        typer.echo(text.finish())
        routes = session.routes
    seconds = trio.current_time() - began
    if options.show_route:
        for position, route in routes:
            since = f" from token {position} on" if position else ""
            console.print(f"route{since}: {' => '.join(route)}", highlight=False)
    if console.is_terminal:
        console.print(f"{count} tokens, {count / seconds:.1f} per second", style="dim", highlight=False)
