"""The stock Petals client of the engine's benchmark, driven over stdin and stdout. Runs in the stock environment.

It works on hidden states: embeddings, head and sampling are the client's own and cost both servers alike.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# in place of this folder, where another module is called petals
sys.path[0] = str(Path(__file__).resolve().parents[1] / "tests" / "interop" / "stock")

import torch  # noqa: E402
import transformers  # noqa: E402
from petals_client import Commands, serve  # noqa: E402

PROMPT_TOKENS = 8
NEW_TOKENS = 64
WARM_STEPS = 4


def _tokens_per_second(model: Any) -> float:
    """After a prompt of 8 tokens."""
    prompt = torch.arange(3, 3 + PROMPT_TOKENS).view(1, -1)
    how = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=NEW_TOKENS // 8, **how)
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=NEW_TOKENS, **how)
        return NEW_TOKENS / (time.perf_counter() - start)


def _pass_duration(run: Callable[[], Any], repeats: int, *, backward: bool) -> float:
    """The median of a pass in milliseconds, with that of its gradient; the first one is not counted."""
    durations = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        output = run()
        if backward:
            output.sum().backward()
        durations.append((time.perf_counter() - start) * 1000)
    return statistics.median(durations[1:])


def quantile(values: list[float], share: float) -> float:
    """The least value that is not exceeded by this share of them."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


class EngineCommands(Commands):
    """What :class:`Commands` can, and the measurements. Durations are in milliseconds."""

    def steps(self, key: str, count: int) -> float:
        """The median step of one token in one session."""
        durations = self._decode(key, sessions=1, tokens=count)
        return statistics.median(durations[0])

    def sessions_at_once(self, key: str, sessions: int, tokens: int) -> float:
        """The time from the first step to the last of so many sessions that decode, over their number of tokens."""
        began: list[float] = []
        self._decode(
            key, sessions=sessions, tokens=tokens, at_start=lambda: began.append(time.perf_counter())
        )
        return (time.perf_counter() - min(began)) * 1000 / (sessions * tokens)

    def steps_at_once(self, key: str, sessions: int, tokens: int) -> dict[str, float]:
        """Steps of one token in so many sessions at once."""
        steps = [d for of in self._decode(key, sessions=sessions, tokens=tokens) for d in of]
        return {"p50": statistics.median(steps), "p99": quantile(steps, 0.99)}

    def tokens_per_second(self, key: str) -> float:
        """Of one session that generates, embeddings and head included."""
        return _tokens_per_second(self._models[key].remote)

    def local_tokens_per_second(self, model: str) -> float:
        """The same of transformers in this process."""
        local = transformers.AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
        return _tokens_per_second(local)

    def cache_held(self, key: str, sessions: int, max_length: int, tokens: int) -> int:
        """Tokens of KV cache, of each block, that so many open sessions take, which have used so many each."""
        before = self._cache_left(key)
        try:
            for _ in range(sessions):
                self.hold(key, max_length, tokens)
            return before - self._cache_left(key)
        finally:
            self.release(key)

    def _cache_left(self, key: str) -> int:
        return int(self.info(key)[0]["cache_tokens_available"]) // len(self._models[key].blocks)

    def passes(self, key: str, batch: int, tokens: int, repeats: int, backward: bool) -> float:
        """The median of a forward pass, and of the backward pass that follows it."""
        blocks = self._models[key].blocks
        hidden = torch.randn(batch, tokens, blocks.config.hidden_size, requires_grad=backward)
        return _pass_duration(lambda: blocks(hidden), repeats, backward=backward)

    def local_passes(
        self, model: str, *, threads: int, batch: int, tokens: int, repeats: int, backward: bool
    ) -> float:
        """The same of transformers in this process, on as many threads as a server has."""
        local = transformers.AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).model
        hidden = torch.randn(batch, tokens, local.config.hidden_size, requires_grad=backward)
        threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.set_grad_enabled(backward):
                return _pass_duration(
                    lambda: local(inputs_embeds=hidden).last_hidden_state, repeats, backward=backward
                )
        finally:
            torch.set_num_threads(threads_before)

    def beside_a_prompt(self, key: str, sessions: int, tokens: int, prompt: int) -> dict[str, float]:
        """Steps of sessions that decode: alone, then while another session's prompt is computed, its time beside."""
        idle = [d for of in self._decode(key, sessions=sessions, tokens=tokens) for d in of]
        done = threading.Event()
        seconds: list[float] = []
        blocks = self._models[key].blocks
        hidden = torch.randn(1, prompt, blocks.config.hidden_size)

        def feed() -> None:
            with torch.inference_mode(), blocks.inference_session(max_length=prompt) as session:
                start = time.perf_counter()
                session.step(hidden)
                seconds.append(time.perf_counter() - start)
            done.set()

        feeder = threading.Thread(target=feed)
        limit = 100 * tokens
        busy = self._decode(key, sessions=sessions, tokens=limit, at_start=feeder.start, until=done)
        feeder.join()
        during = [d for of in busy for d in of]
        return {
            "idle_p50": statistics.median(idle),
            "idle_p99": quantile(idle, 0.99),
            "prompt_p50": statistics.median(during),
            "prompt_p99": quantile(during, 0.99),
            "prompt_seconds": seconds[0],
            "steps_beside": float(len(during)),
        }

    def _decode(
        self,
        key: str,
        *,
        sessions: int,
        tokens: int,
        at_start: Callable[[], Any] = lambda: None,
        until: threading.Event | None = None,
    ) -> list[list[float]]:
        """Sessions side by side, each in a thread: a prompt, some steps to warm up, and those that count, in ms."""
        blocks = self._models[key].blocks
        size = blocks.config.hidden_size
        barrier = threading.Barrier(sessions, action=at_start)
        results: list[list[float]] = [[] for _ in range(sessions)]
        failures: list[BaseException] = []

        def converse(index: int) -> None:
            try:
                with torch.inference_mode(), ExitStack() as stack:
                    length = PROMPT_TOKENS + WARM_STEPS + tokens
                    session = stack.enter_context(blocks.inference_session(max_length=min(length, 1024)))
                    session.step(torch.randn(1, PROMPT_TOKENS, size))
                    for _ in range(WARM_STEPS):
                        session.step(torch.randn(1, 1, size))
                    one = torch.randn(1, 1, size)
                    barrier.wait()
                    for _ in range(tokens):
                        if until is not None and until.is_set():
                            break
                        start = time.perf_counter()
                        session.step(one)
                        results[index].append((time.perf_counter() - start) * 1000)
            except BaseException as e:
                failures.append(e)
                barrier.abort()

        threads = [threading.Thread(target=converse, args=(index,)) for index in range(sessions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return results


if __name__ == "__main__":
    serve(EngineCommands())
