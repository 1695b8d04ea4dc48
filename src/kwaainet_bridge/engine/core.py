"""The engine: one model's served blocks, their KV cache, and the thread that computes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import passes
from kwaainet_bridge.engine.budget import CacheBudget
from kwaainet_bridge.engine.checkpoint import Checkpoint, Download, hub_download
from kwaainet_bridge.engine.compute import ComputeThread
from kwaainet_bridge.engine.config import Choose, EngineConfig, LoadProgress, ModelInfo, ModelOutline
from kwaainet_bridge.engine.requests import check_batch_tokens, check_blocks, check_hidden, check_prompts
from kwaainet_bridge.engine.session import Session
from kwaainet_bridge.errors import AllocationFailed, ConfigError, InvalidRequest

if TYPE_CHECKING:
    from kwaainet_bridge.engine.family import Family
    from kwaainet_bridge.engine.span import Span

log = logging.getLogger(__name__)

Progress = Callable[[LoadProgress], None]


class Engine:
    """Serves a span of blocks to any number of tasks of one trio run. Made by :meth:`load`."""

    def __init__(self, config: EngineConfig, model: ModelInfo, span: Span, compute: ComputeThread) -> None:
        self.model = model
        self.blocks = span.blocks
        self.max_length = config.max_length
        self.max_batch_tokens = config.max_batch_tokens
        self.cache_bytes_per_token = 2 * model.num_kv_heads * model.head_dim * model.dtype.itemsize
        """Bytes of keys and values of one block for one token of one sequence."""
        self._budget = CacheBudget(config.cache_tokens * len(span.blocks) * self.cache_bytes_per_token)
        self._span = span
        self._compute = compute

    @classmethod
    async def load(
        cls,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        on_described: Callable[[ModelInfo, range], None] | None = None,
        choose: Choose | None = None,
        download: Download = hub_download,
    ) -> Engine:
        """Read the configured blocks and return an engine that can serve them.

        ``choose`` is asked for the blocks, in the trio thread, in place of ``config.blocks``; what it raises is raised.
        ``on_described`` is told the model and its served blocks as soon as they are known, before weights are
        read; ``progress`` before each file is fetched and after each block is read; both in the trio thread.
        ``download`` fetches the files of a hub repository, in a worker thread. Raises CheckpointError if the
        model cannot be read or served, ConfigError if it has no such blocks.
        Cancelled: the block being read is finished first, a download is left behind; nothing stays in
        memory.
        """
        report = progress or (lambda _progress: None)
        checkpoint = await trio.to_thread.run_sync(
            partial(Checkpoint, config.model, revision=config.revision, download=download),
            abandon_on_cancel=True,  # type: ignore[call-arg]  # the stubs of trio-typing are older than trio
        )
        compute = ComputeThread()
        try:
            skeleton = await compute.run(partial(_construct, config, checkpoint))
            blocks = config.blocks
            if choose is not None:
                blocks = await choose(ModelOutline(skeleton.config.model_type, skeleton.num_blocks))
            span, model = await compute.run(partial(_prepare, config, checkpoint, skeleton, blocks))
            if on_described is not None:
                on_described(model, span.blocks)
            sizes = [span.weight_bytes(block) for block in span.blocks]

            def tell(blocks_done: int, file: str | None) -> None:
                report(LoadProgress(blocks_done, len(sizes), sum(sizes[:blocks_done]), sum(sizes), file))

            for file in span.files():
                tell(0, file)
                await trio.to_thread.run_sync(
                    checkpoint.fetch,
                    file,
                    abandon_on_cancel=True,  # type: ignore[call-arg]  # as above
                )
            tell(0, None)
            for done, block in enumerate(span.blocks, start=1):
                await compute.run(partial(span.load, block))
                tell(done, None)
            await compute.run(span.check)
        except BaseException:
            await compute.aclose()
            raise
        log.info(
            "loaded blocks %d:%d of %s as %s, %d MiB",
            span.blocks.start,
            span.blocks.stop,
            config.model,
            model.dtype,
            sum(sizes) // defaults.MIB,
        )
        return cls(config, model, span, compute)

    @property
    def cache_bytes_total(self) -> int:
        """Bytes of KV cache for all sessions together."""
        return self._budget.total

    @property
    def cache_bytes_left(self) -> int:
        """Bytes of KV cache that no session holds."""
        return self._budget.left

    @asynccontextmanager
    async def open_session(
        self, blocks: range, batch_size: int, max_length: int, *, timeout: float = 0.0
    ) -> AsyncIterator[Session]:
        """An inference session of ``batch_size`` sequences of up to ``max_length`` tokens on ``blocks``.

        Its whole KV cache is promised on entry: it waits up to ``timeout`` seconds for room, first come
        first served; with 0 not at all. Raises AllocationFailed without room, InvalidRequest for blocks that
        are not served or lengths that no session can have. On exit, however it comes about, the memory is
        free.
        """
        check_blocks(blocks, self.blocks)
        if batch_size < 1:
            raise InvalidRequest(f"the batch size of a session must be at least 1, got {batch_size}")
        if not 0 <= max_length <= self.max_length:
            raise InvalidRequest(f"Cannot allocate KV cache for {max_length} tokens, max = {self.max_length}")
        num_bytes = len(blocks) * batch_size * max_length * self.cache_bytes_per_token
        async with self._budget.reserve(num_bytes, timeout=timeout):
            session = self._new_session(blocks, batch_size, max_length, num_bytes)
            try:
                yield session
            finally:
                session.close()

    async def forward(
        self, hidden: torch.Tensor, blocks: range, prompts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run [B, T, H] through ``blocks`` at positions 0 … T-1, causally and without a cache; no gradients.

        ``prompts`` [blocks, B or 1, P, H] with P <= T are added to the first P positions before their block.
        Returns [B, T, H] in the engine's dtype, on the CPU. Raises InvalidRequest. Cancelled: what waits
        never runs, the block that runs is finished first.
        """
        prompts = self._check_batch(hidden, blocks, prompts)
        return await passes.forward(
            self._span, self._compute, hidden.detach(), blocks=blocks, prompts=prompts
        )

    async def backward(
        self,
        hidden: torch.Tensor,
        grad_output: torch.Tensor,
        blocks: range,
        prompts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of :meth:`forward` for ``grad_output`` [B, T, H]: with regard to ``hidden`` and to
        ``prompts``.

        Both in the engine's dtype, on the CPU. Those of the prompts are [blocks, B, P, H], also where
        prompts came with batch 1; None without prompts. Weights never change. Raises and is cancelled as
        forward.
        """
        prompts = self._check_batch(hidden, blocks, prompts)
        check_hidden(
            grad_output, self.model.hidden_size, what="gradients of the outputs", batch=hidden.shape[0]
        )
        if grad_output.shape != hidden.shape:
            raise InvalidRequest(
                f"gradients of the outputs must be {list(hidden.shape)}, got {list(grad_output.shape)}"
            )
        return await passes.backward(
            self._span, self._compute, hidden.detach(), grad_output.detach(), blocks=blocks, prompts=prompts
        )

    async def check(self) -> None:
        """Return once the compute thread has had a turn for this, which takes no time: it lives and gets on.

        Raises EngineError if it is closed. Cancelled: nothing remains.
        """
        await self._compute.run(lambda: None)

    async def aclose(self) -> None:
        """Stop computing: waiting work fails with EngineError, the running piece ends, the thread is joined.

        Not cancellable for as long as that piece takes. Open sessions stay accounted for until they are left.
        """
        await self._compute.aclose()

    def _check_batch(
        self, hidden: torch.Tensor, blocks: range, prompts: torch.Tensor | None
    ) -> torch.Tensor | None:
        check_blocks(blocks, self.blocks)
        check_hidden(hidden, self.model.hidden_size)
        check_batch_tokens(hidden, self.max_batch_tokens)
        return check_prompts(prompts, blocks, hidden)

    def _new_session(self, blocks: range, batch_size: int, max_length: int, num_bytes: int) -> Session:
        from kwaainet_bridge.engine.attention import SpanCache

        shape = (len(blocks), 2, batch_size, self.model.num_kv_heads, max_length, self.model.head_dim)
        try:
            storage = torch.empty(shape, dtype=self.model.dtype, device=self._span.device)
        except (RuntimeError, MemoryError) as error:
            raise AllocationFailed(
                f"Could not allocate {num_bytes} bytes immediately: out of memory"
            ) from error
        return Session(
            self._span, self._compute, blocks, SpanCache(storage, blocks.start), (batch_size, max_length)
        )


def _construct(config: EngineConfig, checkpoint: Checkpoint) -> Family:
    """The model without weights. Runs in the compute thread: importing transformers alone takes seconds."""
    from kwaainet_bridge.engine import family

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        torch.empty(1, device=config.device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {config.device} cannot be used: {reason}") from error
    return family.build(checkpoint)


def _prepare(
    config: EngineConfig, checkpoint: Checkpoint, model: Family, blocks: range | None
) -> tuple[Span, ModelInfo]:
    """The span without weights; ``blocks`` None is all of them. Runs in the compute thread."""
    from kwaainet_bridge.engine.span import Span

    if blocks is None:
        blocks = range(model.num_blocks)
    try:
        check_blocks(blocks, range(model.num_blocks))
    except InvalidRequest as error:
        raise ConfigError(f"{config.model} has blocks 0:{model.num_blocks}: {error}") from error
    span = Span(model, checkpoint, blocks, config.dtype, config.device)
    return span, ModelInfo(
        name=config.model,
        repository=checkpoint.repository,
        family=str(model.config.model_type),
        hidden_size=model.config.hidden_size,
        num_blocks=model.num_blocks,
        dtype=span.dtype,
        num_heads=model.config.num_attention_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.config.vocab_size,
    )
