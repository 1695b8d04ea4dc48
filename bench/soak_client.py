"""The stock Petals clients of the soak, driven over stdin and stdout. Runs in the stock environment."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

# in place of this folder, where another module is called petals
sys.path[0] = str(Path(__file__).resolve().parents[1] / "tests" / "interop" / "stock")

import torch  # noqa: E402
from petals_client import Commands, lines, serve  # noqa: E402

GREEDY = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
TOKENS = 48
CHUNK = 4
"""Tokens between two places where a text may be left."""
PASS_TOKENS = (16, 64, 128)
CLOSE_ENOUGH = 1e-3
"""Relative error of passes and gradients."""


def _through_blocks(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What enters the final norm, with its graph."""
    caught: list[torch.Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(inputs_embeds=hidden)
    hook.remove()
    return caught[0]


class SoakCommands(Commands):
    """What :class:`Commands` can, and load of all kinds."""

    def prepare(self, key: str, prompts: list[list[int]]) -> None:
        """Compute here what the swarm is to give."""
        models = self._models[key]
        self._texts = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            self._texts.append((ids, models.local.generate(ids, max_new_tokens=TOKENS, **GREEDY)[0].tolist()))
        self._passes = []
        for tokens in PASS_TOKENS:
            hidden = models.local.model.embed_tokens(torch.randint(3, 200, (1, tokens))).detach()
            inputs = hidden.clone().requires_grad_()
            output = _through_blocks(models.local.model, inputs)
            (gradient,) = torch.autograd.grad(output.square().sum(), inputs)
            self._passes.append((hidden, output.detach(), gradient))

    def mix(self, key: str, seconds: float, workers: int, seed: int) -> dict[str, Any]:
        """Load by so many threads for so long. What the servers have computed is counted and told after each chunk."""
        end = time.monotonic() + seconds
        counts: Counter[str] = Counter()
        failures: list[str] = []
        lock = threading.Lock()

        def note(**more: int) -> None:
            with lock:
                counts.update(more)
            lines.event("computed", **more)

        def work(number: int) -> None:
            rng = random.Random(seed * 1000 + number)
            while time.monotonic() < end:
                try:
                    if rng.random() < 0.1:
                        self._pass(key, rng, note)
                    else:
                        self._text(key, rng, note)
                except Exception as e:
                    failures.append(f"worker {number}: {e!r}")
                    return

        threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"counts": dict(counts), "failures": failures}

    def _text(self, key: str, rng: random.Random, note: Any) -> None:
        """One text, of which a part is left in the middle; token for token what was expected."""
        remote = self._models[key].remote
        ids, expected = rng.choice(self._texts)
        wanted = TOKENS if rng.random() < 0.6 else CHUNK * rng.randrange(1, TOKENS // CHUNK)
        length = ids.shape[1]
        with (
            torch.inference_mode(),
            remote.inference_session(max_length=length + TOKENS) as session,
        ):
            # ids that the session has are not sent again; the last one of a call has not been sent yet
            output, done = ids, 0
            while output.shape[1] < length + wanted:
                feed = ids if done == 0 else None
                new = remote.generate(feed, max_new_tokens=CHUNK, **GREEDY)
                output = new if feed is not None else torch.cat([output, new], dim=1)
                note(step_tokens=session.position - done)
                done = session.position
        got = output[0].tolist()
        if got != expected[: len(got)]:
            raise AssertionError(f"another text after {length} tokens: {got}, not {expected}")
        note(texts=1, left=int(wanted < TOKENS))

    def _pass(self, key: str, rng: random.Random, note: Any) -> None:
        blocks = self._models[key].blocks
        hidden, expected, expected_gradient = rng.choice(self._passes)
        inputs = hidden.clone().requires_grad_()
        output = blocks(inputs)
        (gradient,) = torch.autograd.grad(output.square().sum(), inputs)
        for ours, theirs in ((output, expected), (gradient, expected_gradient)):
            error = float((ours - theirs).norm() / theirs.norm())
            if error > CLOSE_ENOUGH:
                raise AssertionError(f"a pass or gradient is off by {error}")
        note(passes=2, pass_tokens=2 * hidden.shape[1])


if __name__ == "__main__":
    serve(SoakCommands())
