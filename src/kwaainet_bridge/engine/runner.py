"""Running steps and prompts on the served blocks. Everything here runs in the compute thread."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import TypeVar

import outcome
import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import passes
from kwaainet_bridge.engine.attention import RaggedCache
from kwaainet_bridge.engine.config import EngineConfig
from kwaainet_bridge.engine.pages import pages_for
from kwaainet_bridge.engine.prompts import add_prompt
from kwaainet_bridge.engine.ragged import PagedStore, RaggedBatch
from kwaainet_bridge.engine.span import Span
from kwaainet_bridge.engine.step import Step
from kwaainet_bridge.errors import ConfigError

T = TypeVar("T")


class Runner:
    """Runs steps on a span and its KV cache."""

    def __init__(self, span: Span, store: PagedStore) -> None:
        self._span = span
        self._store = store
        self.hidden_size = int(span.model.config.hidden_size)
        self.dtype = span.dtype
        self._block_weights: int = span.weight_bytes(span.blocks.start) // span.dtype.itemsize

    @classmethod
    def make(cls, config: EngineConfig, span: Span) -> Runner:
        """Check the loaded blocks and make their KV cache. Raises CheckpointError, ConfigError."""
        model = span.model
        pages = pages_for(config.cache_tokens)
        try:
            store = PagedStore(span.blocks, pages, (span.kv_heads, model.head_dim), span.dtype, span.device)
        except (RuntimeError, MemoryError) as error:
            num_bytes = pages * defaults.PAGE_TOKENS * len(span.blocks) * 2 * span.kv_heads * model.head_dim
            raise ConfigError(
                f"the KV cache of {num_bytes * span.dtype.itemsize // defaults.MIB} MiB does not fit into the memory "
                f"of {span.device}: lower cache_tokens ({config.cache_tokens}) or serve fewer blocks"
            ) from error
        span.check(store)
        return cls(span, store)

    def check(self) -> None:
        """Raise EngineError if it can run nothing any more."""

    def forward(
        self, hidden: torch.Tensor, blocks: range, prompts: torch.Tensor | None, adapter: str | None
    ) -> Generator[None, None, torch.Tensor]:
        """[B, T, H] through ``blocks``, see :func:`passes.forward`."""
        pieces = passes.forward(self._span, hidden, blocks=blocks, prompts=prompts, adapter=adapter)
        return self._of_pass(pieces, hidden)

    def backward(
        self,
        hidden: torch.Tensor,
        grad_output: torch.Tensor,
        blocks: range,
        prompts: torch.Tensor | None,
        adapter: str | None,
    ) -> Generator[None, None, tuple[torch.Tensor, torch.Tensor | None]]:
        """Gradients of that, see :func:`passes.backward`."""
        pieces = passes.backward(
            self._span, hidden, grad_output, blocks=blocks, prompts=prompts, adapter=adapter
        )
        return self._of_pass(pieces, hidden)

    def _of_pass(self, pieces: Generator[None, None, T], hidden: torch.Tensor) -> Generator[None, None, T]:
        """The pieces of a pass over ``hidden``, on as many threads as it is worth."""
        return _on_one_thread(pieces) if self._is_small(hidden.shape[0] * hidden.shape[1]) else pieces

    def _is_small(self, tokens: int) -> bool:
        """Whether a second thread would not pay for so many tokens."""
        return (defaults.READ_PRODUCTS + tokens) * self._block_weights <= defaults.ONE_THREAD_PRODUCTS

    def run_merged(self, steps: Sequence[Step]) -> Sequence[outcome.Outcome[torch.Tensor]]:
        """The outputs [B, T, H] of each, on the CPU, from one ragged batch.

        If that fails each runs alone, so that one that cannot be computed does not hurt the others.
        """
        # once: what is moved may be written over by what is computed then
        copied = [outcome.capture(self._copy, step) for step in steps]
        ready = [step for step, done in zip(steps, copied, strict=True) if isinstance(done, outcome.Value)]
        outputs = iter(self._run_copied(ready))
        return [next(outputs) if isinstance(done, outcome.Value) else done for done in copied]

    def _run_copied(self, steps: Sequence[Step]) -> Sequence[outcome.Outcome[torch.Tensor]]:
        small = self._is_small(sum(step.tokens for step in steps))
        try:
            with _one_thread() if small else nullcontext():
                return [outcome.Value(output) for output in self._run_together(steps)]
        except Exception as error:  # handed to whoever waits for the step
            if len(steps) == 1:
                return [outcome.Error(error)]
        return [self._run_copied([step])[0] for step in steps]

    def _run_together(self, steps: Sequence[Step]) -> list[torch.Tensor]:
        states = [self._begin(step.hidden) for step in steps]
        bounds = sorted({bound for step in steps for bound in (step.blocks.start, step.blocks.stop)})
        for first, last in itertools.pairwise(bounds):
            active = [i for i, step in enumerate(steps) if first in step.blocks]
            if active:
                outputs = self._segment(
                    range(first, last), [steps[i] for i in active], [states[i] for i in active]
                )
                for index, output in zip(active, outputs, strict=True):
                    states[index] = output
        return [state.reshape(step.hidden.shape).to("cpu") for state, step in zip(states, steps, strict=True)]

    def _segment(self, blocks: range, steps: list[Step], states: list[torch.Tensor]) -> list[torch.Tensor]:
        """[tokens, H] of each step through blocks that all of them want."""
        batch = RaggedBatch(self._store, [part for s in steps for part in s.parts(0, s.hidden.shape[1])])
        cache = RaggedCache(batch)
        state = (states[0] if len(states) == 1 else torch.cat(states))[None]
        for block in blocks:
            state = self._span.run(block, _prompted(state, block, steps), cache=cache)
        return list(state[0].split([step.tokens for step in steps]))

    def run_prompt(self, step: Step, contended: Callable[[], bool]) -> Generator[None, None, torch.Tensor]:
        """The output [B, T, H] of a long step, on the CPU; chunk by chunk, and a piece is one block's work on it."""
        self._copy(step)
        rows = int(step.hidden.shape[0])
        output = torch.empty(step.hidden.shape, dtype=self._span.dtype)
        first = 0
        while first < rows:
            last = min(rows, first + self._piece_tokens(contended=contended()))
            if first:
                yield
            yield from self._run_rows(step.of_rows(first, last), output[first:last], contended)
            first = last
        return output

    def _run_rows(
        self, step: Step, output: torch.Tensor, contended: Callable[[], bool]
    ) -> Generator[None, None, None]:
        rows, tokens, _ = step.hidden.shape
        offset = 0
        while offset < tokens:
            count = min(tokens - offset, max(1, self._piece_tokens(contended=contended()) // rows))
            where = slice(offset, offset + count)
            cache = RaggedCache(RaggedBatch(self._store, step.parts(offset, count)))
            state = self._begin(step.hidden[:, where])[None]
            for block in step.blocks:
                state = self._span.run(block, _prompted_rows(state, block, step, offset, count), cache=cache)
                if block + 1 < step.blocks.stop:
                    yield
            output[:, where] = state.reshape(rows, count, -1)
            offset += count
            if offset < tokens:
                yield

    def read_pages(
        self, blocks: range, pages: Sequence[int], _contended: object
    ) -> Generator[None, None, list[torch.Tensor]]:
        """What pages hold, by block, on the host; a piece is one block."""
        contents = []
        for block in blocks:
            contents.append(self._store.read(block, pages))
            yield
        return contents

    def write_pages(
        self, blocks: range, pages: Sequence[int], contents: Sequence[torch.Tensor], _contended: object
    ) -> Generator[None, None, None]:
        """Put back what :meth:`read_pages` gave, into other pages."""
        for block, content in zip(blocks, contents, strict=True):
            self._store.write(block, pages, content)
            yield

    def _piece_tokens(self, *, contended: bool) -> int:
        if not contended:
            return defaults.PIECE_TOKENS
        shared = defaults.SHARED_PIECE_TOKENS_PER_BLOCK * len(self._span.blocks)
        return min(defaults.PIECE_TOKENS, max(defaults.MIN_SHARED_PIECE_TOKENS, shared))

    def _copy(self, step: Step) -> None:
        if step.copies:
            self._store.copy(step.blocks, step.copies)
        if step.moves:
            self._store.move(step.blocks, step.rows[0], step.moves)

    def _begin(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, H] of [B, T, H], row by row."""
        return hidden.to(self._span.device, self._span.dtype).reshape(-1, hidden.shape[2])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute in this thread alone: waking another one takes as long as a few small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _on_one_thread(pieces: Generator[None, None, T]) -> Generator[None, None, T]:
    """The same pieces, each computed in this thread alone."""
    with closing(pieces):
        while True:
            with _one_thread():
                try:
                    next(pieces)
                except StopIteration as end:
                    result: T = end.value
                    return result
            yield


def _prompted(state: torch.Tensor, block: int, steps: Sequence[Step]) -> torch.Tensor:
    """``state`` [1, N, H] with the prompts of those steps that have any."""
    if all(step.prompts is None for step in steps):
        return state
    parts = state[0].split([step.tokens for step in steps])
    changed = [
        _prompted_rows(part[None], block, step, 0, step.hidden.shape[1])[0]
        for part, step in zip(parts, steps, strict=True)
    ]
    return torch.cat(changed)[None]


def _prompted_rows(state: torch.Tensor, block: int, step: Step, offset: int, count: int) -> torch.Tensor:
    """``state`` [1, B * count, H], which begins ``offset`` tokens after the step, with the step's prompts."""
    if step.prompts is None:
        return state
    rows = state.reshape(len(step.rows), count, -1)
    return add_prompt(rows, step.prompts[block - step.blocks.start], offset).reshape(state.shape)
