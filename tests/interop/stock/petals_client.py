"""A stock Petals client; driven over stdin and stdout (lines.py), one command after the other.

It compares what the swarm computes with the same model, run here by the stock transformers, in float32. All commands
but ``load`` and ``vanish`` name a loaded model by the key that ``load`` gave it.

Event: ``ready {petals, transformers, torch}``. Commands: see the methods of ``Commands``.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import petals
import psutil
import torch
import transformers
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import PeerID
from hivemind.proto.runtime_pb2 import ExpertUID
from hivemind.utils.serializer import MSGPackSerializer
from lines import Lines
from petals.server.handler import TransformerConnectionHandler
from petals.utils.dht import get_remote_module_infos

lines = Lines()


@dataclass(frozen=True)
class Loaded:
    remote: Any
    local: Any

    @property
    def blocks(self) -> Any:
        return self.remote.transformer.h


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what was expected."""
    return float((got - expected).norm() / expected.norm())


def token_ids(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


class Commands:
    def __init__(self) -> None:
        self._models: dict[str, Loaded] = {}
        self._held: dict[str, list[tuple[Any, Any]]] = {}

    def load(
        self,
        key: str,
        model: str,
        prefix: str,
        peers: list[str],
        *,
        dtype: str = "float32",
        reference: bool = True,
        adapter: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Open the model of a folder, and without ``reference=False`` load it here too, with the adapter of a folder.

        ``options`` go to the Petals configuration (tuning_mode, pre_seq_len, ...).
        """
        start = time.perf_counter()
        torch.manual_seed(
            0
        )  # prompts begin with random numbers: how well eight bits hold them depends on those
        remote = petals.AutoDistributedModelForCausalLM.from_pretrained(
            model,
            dht_prefix=prefix,
            initial_peers=peers,
            torch_dtype=getattr(torch, dtype),
            **{"max_retries": 3, "show_route": False, **options},
        )
        local = None
        if reference:
            local = transformers.AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
            if adapter is not None:
                local = peft.PeftModel.from_pretrained(local, adapter).merge_and_unload()
            local.requires_grad_(False)
        self._models[key] = Loaded(remote, local)
        return {
            "seconds": time.perf_counter() - start,
            "blocks": remote.config.num_hidden_layers,
            "hidden_size": remote.config.hidden_size,
            "vocabulary": remote.config.vocab_size,
        }

    def make_model(self, folder: str, model_type: str, options: dict[str, Any]) -> None:
        """Save a model with random weights, biases and norms, as the published ones of that type are."""
        torch.manual_seed(4)
        config = transformers.AutoConfig.for_model(model_type, torch_dtype="float32", **options)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.normal_(mean=parameter.mean().item(), std=0.2)
        # published BLOOMs have no "transformer." before their names, and stock servers find no others
        written = model.base_model if model_type == "bloom" else model
        written.save_pretrained(folder, safe_serialization=True)

    def run_blocks(self, key: str, shape: list[int], seed: int, steps: list[int]) -> dict[str, Any]:
        """What all blocks make of random hidden states, in one pass and in a session of steps of these lengths."""
        blocks = self._models[key].blocks
        hidden = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            passed = blocks(hidden)
            with blocks.inference_session(max_length=shape[1]) as session:
                stepped = [session.step(part) for part in hidden.split(steps, dim=1)]
        return {"passed": passed.tolist(), "stepped": torch.cat(stepped, dim=1).tolist()}

    def make_adapter(self, model: str, folder: str, seed: int, modules: list[str], rank: int) -> None:
        """Save a random LoRA adapter as peft does."""
        torch.manual_seed(seed)
        base = transformers.AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
        adapted = peft.get_peft_model(
            base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules)
        )
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:  # zeros in a new adapter
                    parameter.normal_(std=0.05)
        adapted.save_pretrained(folder, safe_serialization=True)

    def forget(self, key: str) -> None:
        """Stop asking the swarm for the servers of a model, and drop it."""
        manager = self._models.pop(key).blocks.sequence_manager
        manager.shutdown()
        manager.dht.shutdown()

    def route(self, key: str) -> list[dict[str, Any]]:
        """The spans that the next session would use, in order."""
        spans = self._models[key].blocks.sequence_manager.make_sequence(mode="min_latency")
        return [{"peer": s.peer_id.to_base58(), "start": s.start, "end": s.end} for s in spans]

    def refresh(self, key: str) -> None:
        """Read the servers' records again now; a client does it once a minute."""
        manager = self._models[key].blocks.sequence_manager
        manager.update(wait=True)

    def records(self, key: str, uids: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
        """What the swarm's records say now, as servers and monitors read them: by block, by peer."""
        found = get_remote_module_infos(self._models[key].blocks.sequence_manager.dht, uids, latest=True)
        return {
            module.uid: {
                peer.to_base58(): {
                    "state": server.state.name,
                    "start": server.start_block,
                    "end": server.end_block,
                    "version": server.version,
                }
                for peer, server in module.servers.items()
            }
            for module in found
        }

    def subkeys(self, key: str, dht_key: str) -> list[str] | None:
        """Who has an entry under a key of the DHT; None if there is nothing."""
        found = self._models[key].blocks.sequence_manager.dht.get(dht_key, latest=True)
        return None if found is None else sorted(found.value)

    def info(self, key: str) -> list[dict[str, Any]]:
        """The answer of each server on the route to rpc_info, as far as JSON can say it."""
        spans = self._models[key].blocks.sequence_manager.make_sequence(mode="min_latency")
        return [self.info_of(key, span.peer_id.to_base58(), span.start) for span in spans]

    def info_of(self, key: str, peer: str, block: int) -> dict[str, Any]:
        """One server's answer about one of its blocks."""
        manager = self._models[key].blocks.sequence_manager
        stub = TransformerConnectionHandler.get_stub(manager.state.p2p, PeerID.from_base58(peer))
        uid = ExpertUID(uid=manager.block_uids[block])
        response = RemoteExpertWorker.run_coroutine(stub.rpc_info(uid, timeout=10))
        answer = MSGPackSerializer.loads(response.serialized_info)
        hidden_states = answer["inference_schema"][0][0]
        return {
            "peer": peer,
            "version": answer["version"],
            "client_mode": answer["dht_client_mode"],
            "cache_tokens_available": answer["cache_tokens_available"],
            "compression": int(hidden_states.compression),
            "dtype": str(hidden_states.dtype),
        }

    def forward(self, key: str, ids: list[list[int]]) -> dict[str, float]:
        """Relative errors of the logits and of the last block's output."""
        models = self._models[key]
        with torch.inference_mode():
            entering, leaving = self._around_local_blocks(models, token_ids(ids))
            logits = relative_error(models.remote(token_ids(ids)).logits, models.local(token_ids(ids)).logits)
            blocks = relative_error(models.blocks(entering), leaving)
        return {"logits": logits, "blocks": blocks}

    @staticmethod
    def _around_local_blocks(models: Loaded, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the first block, and the final norm."""
        inner = models.local.base_model
        llama = hasattr(inner, "layers")
        first, norm = (inner.layers[0], inner.norm) if llama else (inner.h[0], inner.ln_f)
        caught: list[torch.Tensor] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
            for module in (first, norm)
        ]
        inner(ids)
        for hook in hooks:
            hook.remove()
        entering, leaving = caught
        return entering, leaving

    def generate(
        self, key: str, ids: list[list[int]], new_tokens: int, calls: int = 1, beams: int = 1
    ) -> dict[str, list[list[int]]]:
        """Greedy (or beam) search by the swarm and locally; ``calls`` cut it into calls within one session."""
        models = self._models[key]
        inputs, length = token_ids(ids), len(ids[0])
        # no token ends a sequence: all rows are as long as they were asked to be
        how = {"do_sample": False, "num_beams": beams, "eos_token_id": -1, "pad_token_id": 0}
        expected = models.local.generate(inputs, max_new_tokens=new_tokens, **how)[:, length:]
        if calls == 1:
            got = models.remote.generate(inputs, max_new_tokens=new_tokens, **how)[:, length:]
        else:
            each = new_tokens // calls
            with models.remote.inference_session(max_length=length + new_tokens):
                parts = [models.remote.generate(inputs, max_new_tokens=each, **how)[:, length:]]
                parts += [models.remote.generate(None, max_new_tokens=each, **how) for _ in range(calls - 1)]
            got = torch.cat(parts, dim=1)
        return {"swarm": got.tolist(), "local": expected.tolist()}

    def backward(self, key: str, ids: list[list[int]]) -> float:
        """Relative error of the gradient with respect to the embedded input."""
        models = self._models[key]
        gradients = []
        for model in (models.remote, models.local):
            embedded = models.local.get_input_embeddings()(token_ids(ids)).requires_grad_()
            logits = model(inputs_embeds=embedded).logits
            weights = torch.linspace(-1, 1, logits.numel()).view_as(
                logits
            )  # no symmetry that hides a mistake
            (logits * weights).sum().backward()
            gradients.append(embedded.grad)
        return relative_error(*gradients)

    def prompt_gradients(self, key: str, ids: list[list[int]]) -> dict[str, float]:
        """Relative errors of the gradients of a soft prompt, and of the deep prompts if the model has them."""
        models = self._models[key]
        inner = models.remote.transformer
        trained = {"prompt_embeddings": inner.prompt_embeddings.weight}
        if models.remote.config.tuning_mode == "deep_ptune":
            trained["intermediate_prompt_embeddings"] = inner.intermediate_prompt_embeddings.weight
        models.remote.zero_grad()
        models.remote(input_ids=token_ids(ids), labels=token_ids(ids)).loss.backward()
        got = {name: weight.grad.clone() for name, weight in trained.items()}
        models.remote.zero_grad()
        with local_prompts(models) as logits_of:
            logits = logits_of(token_ids(ids))
            targets = token_ids(ids)[:, 1:].reshape(-1)
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).backward()
        return {name: relative_error(got[name], weight.grad) for name, weight in trained.items()}

    def train(self, key: str, ids: list[list[int]], steps: int) -> list[float]:
        """Train the prompts with Adam on one batch; returns the losses."""
        model = self._models[key].remote
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(input_ids=token_ids(ids), labels=token_ids(ids)).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def sessions(self, key: str, count: int, tokens: int = 1) -> dict[str, Any]:
        """Open, step and close sessions; how many streams were opened, and how many of them failed to close."""
        blocks = self._models[key].blocks
        hidden = torch.randn(1, tokens, blocks.config.hidden_size)
        opened, failed, start = 0, 0, time.perf_counter()
        for _ in range(count):
            with torch.inference_mode(), blocks.inference_session(max_length=16) as session:
                session.step(hidden)
                streams = list(session._server_sessions)
            opened += len(streams)
            failed += sum(not stream.closed for stream in streams)
        return {"opened": opened, "failed": failed, "seconds": time.perf_counter() - start}

    def hold(self, key: str, max_length: int, tokens: int = 4) -> None:
        """Open a session, make a step, and leave it open until ``release``."""
        opening = self._models[key].blocks.inference_session(max_length=max_length)
        session = opening.__enter__()
        try:
            self._step(key, session, tokens)
        except BaseException:
            opening.__exit__(None, None, None)
            raise
        self._held.setdefault(key, []).append((opening, session))

    def step(self, key: str) -> None:
        """One more step of the session that was held last."""
        self._step(key, self._held[key][-1][1])

    def _step(self, key: str, session: Any, tokens: int = 4) -> None:
        with torch.inference_mode():
            session.step(torch.randn(1, tokens, self._models[key].blocks.config.hidden_size))

    def release(self, key: str) -> None:
        """Close the held sessions in order."""
        for opening, _ in reversed(self._held.pop(key)):
            opening.__exit__(None, None, None)

    def vanish(self, daemon: bool) -> None:
        """Die by SIGKILL, with the Go daemon or leaving it behind; there is no answer."""
        if daemon:
            for child in psutil.Process().children(recursive=True):
                child.kill()
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def local_prompts(models: Loaded) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """The local model with the prompts of the remote one: what Petals' client and servers do together.

    The soft prompt stands before the input; the deep prompt of block i is added to the input of block i at the
    positions of the soft prompt; the positions of the prompt are cut off before the final norm.
    """
    inner, local = models.remote.transformer, models.local
    length, hidden_size = inner.pre_seq_len, models.remote.config.hidden_size
    hooks = []
    if models.remote.config.tuning_mode == "deep_ptune":
        deep = inner.intermediate_prompt_embeddings.weight.view(length, -1, hidden_size)

        def adding(block: int) -> Callable[..., Any]:
            def add(_module: Any, args: Any) -> Any:
                hidden = args[0]
                prompted = hidden[:, :length] + deep[:, block]
                return (torch.cat([prompted, hidden[:, length:]], dim=1), *args[1:])

            return add

        layers = enumerate(local.model.layers)
        hooks = [layer.register_forward_pre_hook(adding(block)) for block, layer in layers]

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        soft = inner.prompt_embeddings.weight.expand(len(ids), -1, -1)
        embedded = torch.cat([soft, local.model.embed_tokens(ids)], dim=1)
        logits: torch.Tensor = local(inputs_embeds=embedded).logits[:, length:]
        return logits

    try:
        yield logits_of
    finally:
        for hook in hooks:
            hook.remove()


def serve(commands: Commands) -> None:
    """Obey ``commands`` until stdin ends; ends the process."""
    gc.disable()  # a session that failed to close hangs for ever when the collector runs in its loop's thread
    lines.event(
        "ready", petals=petals.__version__, transformers=transformers.__version__, torch=torch.__version__
    )
    for line in sys.stdin:
        request = json.loads(line)
        arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
        try:
            lines.result(request, getattr(commands, request["do"])(**arguments))
        except Exception as e:
            lines.error(request, e)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)  # an orderly exit could wait for ever for a session that failed to close


if __name__ == "__main__":
    serve(Commands())
