"""The engine: one model's served blocks, their KV cache, and the thread that computes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Generator, Hashable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import EngineCounts
from kwaainet_bridge.engine.adapters import Adapter, names_of
from kwaainet_bridge.engine.budget import PageBudget
from kwaainet_bridge.engine.checkpoint import Checkpoint, Download, hub_download
from kwaainet_bridge.engine.compute import ComputeThread, Pieces, Priority
from kwaainet_bridge.engine.config import Choose, EngineConfig, LoadProgress, ModelInfo, ModelOutline
from kwaainet_bridge.engine.holding import CacheRoom
from kwaainet_bridge.engine.offload import Offload
from kwaainet_bridge.engine.pages import PageAllocator, pages_for
from kwaainet_bridge.engine.prefix import PrefixCache
from kwaainet_bridge.engine.requests import check_batch_tokens, check_blocks, check_hidden, check_prompts
from kwaainet_bridge.engine.session import Session
from kwaainet_bridge.errors import AllocationFailed, ConfigError, InvalidRequest

if TYPE_CHECKING:
    from kwaainet_bridge.engine.family import Family
    from kwaainet_bridge.engine.parallel import Followers, LeadingRunner
    from kwaainet_bridge.engine.runner import Runner
    from kwaainet_bridge.engine.span import Span

log = logging.getLogger(__name__)

Progress = Callable[[LoadProgress], None]


class Engine:
    """Serves a span of blocks to any number of tasks of one trio run. Made by :meth:`load`."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelInfo,
        span: Span,
        runner: Runner | LeadingRunner,
        compute: ComputeThread,
        *,
        followers: Followers | None = None,
    ) -> None:
        self.model = model
        self.blocks = span.blocks
        self.max_length = config.max_length
        self.max_batch_tokens = config.max_batch_tokens
        self.cache_bytes_per_token = 2 * model.num_kv_heads * model.head_dim * model.dtype.itemsize
        """Bytes of keys and values of one block for one token of one sequence."""
        pages = pages_for(config.cache_tokens)
        allocator, budget = PageAllocator(pages, len(span.blocks)), PageBudget(pages, len(span.blocks))
        page_bytes = defaults.PAGE_TOKENS * self.cache_bytes_per_token
        self._share_prefixes = config.share_prefixes if span.repeats else "off"
        prefixes = None
        if self._share_prefixes != "off":
            max_bytes = int(pages * len(span.blocks) * page_bytes * defaults.PREFIX_SHARE)
            prefixes = PrefixCache(allocator, budget, page_bytes=page_bytes, max_bytes=max_bytes)
        offload = None
        if config.offload_idle_seconds is not None:
            offload = Offload(
                cast("Runner", runner),  # of one process: the configuration has seen to it
                compute,
                idle_seconds=config.offload_idle_seconds,
                max_bytes=config.offload_bytes,
                clock=trio.current_time,
            )
        self._room = CacheRoom(allocator, budget, page_bytes, span.blocks.start, prefixes, offload)
        self.adapters = names_of(config.adapters)
        """Names of the LoRA adapters that requests may ask for."""
        self._span = span
        self._runner = runner
        self._compute = compute
        self._followers = followers

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
        followers: Followers | None = None
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

            adapters = [
                await trio.to_thread.run_sync(
                    partial(Adapter, source, download=download),
                    abandon_on_cancel=True,  # type: ignore[call-arg]  # as above
                )
                for source in config.adapters
            ]
            for file in span.files():
                tell(0, file)
                await trio.to_thread.run_sync(
                    checkpoint.fetch,
                    file,
                    abandon_on_cancel=True,  # type: ignore[call-arg]  # as above
                )
            tell(0, None)
            if config.tensor_parallel > 1:
                followers = await compute.run(partial(_start_followers, config, span))
                await compute.run(partial(followers.meet, span))
            for done, block in enumerate(span.blocks, start=1):
                await compute.run(partial(span.load, block))
                await compute.run(partial(span.adapt, block, adapters))
                tell(done, None)
            runner = await compute.run(partial(_complete, config, span, followers))
            compute.merged = runner.run_merged
        except BaseException:
            await _end(compute, followers)
            raise
        log.info(
            "loaded blocks %d:%d of %s as %s, %d MiB",
            span.blocks.start,
            span.blocks.stop,
            config.model,
            model.dtype,
            sum(sizes) // defaults.MIB,
        )
        return cls(config, model, span, runner, compute, followers=followers)

    @property
    def counts(self) -> EngineCounts:
        """What the compute thread has done since it began."""
        return self._compute.counts

    @property
    def cache_bytes_total(self) -> int:
        """Bytes of KV cache for all sessions together."""
        return self._room.budget.pages * len(self.blocks) * self._room.page_bytes

    @property
    def cache_bytes_left(self) -> int:
        """Bytes of KV cache that are promised to no session."""
        return self._room.budget.left * self._room.page_bytes

    @asynccontextmanager
    async def open_session(
        self,
        blocks: range,
        batch_size: int,
        max_length: int,
        *,
        timeout: float = 0.0,
        adapter: str | None = None,
        peer: Hashable = None,
    ) -> AsyncIterator[Session]:
        """An inference session of ``batch_size`` sequences of up to ``max_length`` tokens on ``blocks``.

        It is promised room in the KV cache for its first ``defaults.CACHE_PROMISE_TOKENS`` tokens on entry: it waits up
        to ``timeout`` seconds for them, first come first served; with 0 not at all. Further room is taken as its steps
        need it. Raises AllocationFailed without room, InvalidRequest for blocks that are not served or lengths that no
        session can have. On exit, however it comes about, the memory is free. ``adapter`` is the name of one of
        :attr:`adapters` or None. ``peer`` is on whose behalf it is: all sessions of one share in its turn and, unless
        the configuration says otherwise, in what their prompts have in common; errors name it.
        """
        check_blocks(blocks, self.blocks)
        self._check_adapter(adapter)
        if batch_size < 1:
            raise InvalidRequest(f"the batch size of a session must be at least 1, got {batch_size}")
        if not 0 <= max_length <= self.max_length:
            raise InvalidRequest(f"Cannot allocate KV cache for {max_length} tokens, max = {self.max_length}")
        num_bytes = len(blocks) * batch_size * max_length * self.cache_bytes_per_token

        def refusal(when: str) -> str:
            return f"Could not allocate {num_bytes} bytes {when}: out of memory"

        room = self._room
        if batch_size * pages_for(max(1, max_length)) > room.budget.pages:
            raise AllocationFailed(refusal("immediately"))
        promised = batch_size * pages_for(max(1, min(max_length, defaults.CACHE_PROMISE_TOKENS)))
        if room.offload is not None:
            await room.offload.make_room(room.budget, room.inner(blocks), promised)
        await room.budget.take(room.inner(blocks), promised, timeout=timeout, refusal=refusal)
        session = Session(
            self._runner,
            self._compute,
            room,
            blocks,
            (batch_size, max_length),
            promised=promised,
            adapter=adapter,
            peer=peer,
            scope=peer if self._share_prefixes == "peer" else self._share_prefixes,
        )
        try:
            yield session
        finally:
            session.close()

    async def forward(
        self,
        hidden: torch.Tensor,
        blocks: range,
        prompts: torch.Tensor | None = None,
        *,
        adapter: str | None = None,
        peer: Hashable = None,
    ) -> torch.Tensor:
        """Run [B, T, H] through ``blocks`` at positions 0 … T-1, causally and without a cache; no gradients.

        ``prompts`` [blocks, B or 1, P, H] with P <= T are added to the first P positions before their block.
        Returns [B, T, H] in the engine's dtype, on the CPU. Raises InvalidRequest. Cancelled: what waits
        never runs, the block that runs is finished first.
        """
        self._check_adapter(adapter)
        prompts = self._check_batch(hidden, blocks, prompts)

        def pieces(_contended: object) -> Generator[None, None, torch.Tensor]:
            return self._runner.forward(hidden.detach(), blocks, prompts, adapter)

        output: torch.Tensor = await self._compute.run(Pieces(pieces, peer), Priority.BATCH)
        return output

    async def backward(
        self,
        hidden: torch.Tensor,
        grad_output: torch.Tensor,
        blocks: range,
        prompts: torch.Tensor | None = None,
        *,
        adapter: str | None = None,
        peer: Hashable = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of :meth:`forward` for ``grad_output`` [B, T, H]: with regard to ``hidden`` and to
        ``prompts``.

        Both in the engine's dtype, on the CPU. Those of the prompts are [blocks, B, P, H], also where
        prompts came with batch 1; None without prompts. Weights never change. Raises and is cancelled as
        forward.
        """
        self._check_adapter(adapter)
        prompts = self._check_batch(hidden, blocks, prompts)
        check_hidden(
            grad_output, self.model.hidden_size, what="gradients of the outputs", batch=hidden.shape[0]
        )
        if grad_output.shape != hidden.shape:
            raise InvalidRequest(
                f"gradients of the outputs must be {list(hidden.shape)}, got {list(grad_output.shape)}"
            )

        def pieces(_contended: object) -> Generator[None, None, tuple[torch.Tensor, torch.Tensor | None]]:
            return self._runner.backward(hidden.detach(), grad_output.detach(), blocks, prompts, adapter)

        grads: tuple[torch.Tensor, torch.Tensor | None] = await self._compute.run(
            Pieces(pieces, peer), Priority.BATCH
        )
        return grads

    async def check(self) -> None:
        """Return once the compute thread has had a turn for this, which takes no time: it lives and gets on.

        Raises EngineError if it is closed, or if processes that share the model are gone. Cancelled: nothing remains.
        """
        await self._compute.run(self._runner.check)

    async def aclose(self) -> None:
        """Stop computing: waiting work fails with EngineError, the running piece ends, the thread is joined.

        Not cancellable for as long as that piece takes. Open sessions stay accounted for until they are left.
        """
        await _end(self._compute, self._followers)

    def _check_adapter(self, adapter: str | None) -> None:
        if adapter is not None and adapter not in self.adapters:
            raise InvalidRequest(f"adapter {adapter[:200]} not found")

    def _check_batch(
        self, hidden: torch.Tensor, blocks: range, prompts: torch.Tensor | None
    ) -> torch.Tensor | None:
        check_blocks(blocks, self.blocks)
        check_hidden(hidden, self.model.hidden_size)
        check_batch_tokens(hidden, self.max_batch_tokens)
        return check_prompts(prompts, blocks, hidden)


def _construct(config: EngineConfig, checkpoint: Checkpoint) -> Family:
    """The model without weights. Runs in the compute thread: importing transformers alone takes seconds."""
    from kwaainet_bridge.engine import family

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        torch.empty(1, device=config.device_of(0))
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
    span = Span(model, checkpoint, blocks, config.dtype, config.device_of(0))
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


def _start_followers(config: EngineConfig, span: Span) -> Followers:
    """The processes that share the model with this one. Runs in the compute thread."""
    from kwaainet_bridge.engine import sharding
    from kwaainet_bridge.engine.parallel import Followers

    sharding.check(span.model, config.tensor_parallel)
    return Followers(config, span.blocks)


def _complete(config: EngineConfig, span: Span, followers: Followers | None) -> Runner | LeadingRunner:
    """What runs the loaded blocks. Runs in the compute thread."""
    from kwaainet_bridge.engine.parallel import LeadingRunner
    from kwaainet_bridge.engine.runner import Runner

    if followers is None:
        return Runner.make(config, span)
    followers.wait()
    followers.tell()
    return LeadingRunner(Runner.make(config, span), followers)


async def _end(compute: ComputeThread, followers: Followers | None) -> None:
    """Not cancellable for as long as the running piece takes."""
    await compute.aclose()
    if followers is not None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(followers.close)
