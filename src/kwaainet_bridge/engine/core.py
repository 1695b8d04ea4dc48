"""The engine: one model's served blocks, their KV cache, and the thread that computes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Hashable
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import EngineCounts
from kwaainet_bridge.engine.adapters import names_of
from kwaainet_bridge.engine.budget import PageBudget
from kwaainet_bridge.engine.checkpoint import Download, hub_download
from kwaainet_bridge.engine.compute import Pieces, Priority
from kwaainet_bridge.engine.config import Choose, EngineConfig, ModelInfo
from kwaainet_bridge.engine.holding import CacheRoom
from kwaainet_bridge.engine.loading import Admit, LoadedSpan, Progress, Sources, load_span
from kwaainet_bridge.engine.offload import Offload, OffloadUse
from kwaainet_bridge.engine.pages import PageAllocator, pages_for
from kwaainet_bridge.engine.prefix import PrefixCache, PrefixUse
from kwaainet_bridge.engine.requests import check_batch_tokens, check_blocks, check_hidden, check_prompts
from kwaainet_bridge.engine.session import Session
from kwaainet_bridge.engine.weights.cache import WeightCache, cache_of
from kwaainet_bridge.errors import AllocationFailed, EngineError, InvalidRequest

if TYPE_CHECKING:
    from kwaainet_bridge.engine.parallel import LeadingRunner
    from kwaainet_bridge.engine.runner import Runner
    from kwaainet_bridge.engine.span import Span


class Engine:
    """Serves a span of blocks to any number of tasks of one trio run. Made by :meth:`load`."""

    def __init__(self, config: EngineConfig, loaded: LoadedSpan, files: ExitStack) -> None:
        model, span = loaded.model, loaded.span
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
                cast("Runner", loaded.runner),  # of one process: the configuration has seen to it
                loaded.compute,
                idle_seconds=config.offload_idle_seconds,
                max_bytes=config.offload_bytes,
                clock=trio.current_time,
            )
        self._room = CacheRoom(allocator, budget, page_bytes, span.blocks.start, prefixes, offload)
        self.adapters = names_of(config.adapters)
        """Names of the LoRA adapters that requests may ask for."""
        self.quantization = config.quantization
        self.block_bytes = {block: span.held_bytes(block) for block in span.blocks}
        """What each block's weights and those of adapters take in this process' memory, measured."""
        self.weights_bytes = sum(self.block_bytes.values())
        """The same of all."""
        self.tensor_parallel = config.tensor_parallel
        """How many processes share each block."""
        self._compute = loaded.compute
        self._loaded: LoadedSpan | None = loaded
        self._files = files

    @classmethod
    async def load(
        cls,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        on_described: Callable[[ModelInfo, range], None] | None = None,
        choose: Choose | None = None,
        admit: Admit | None = None,
        download: Download = hub_download,
        weights: WeightCache | None = None,
    ) -> Engine:
        """Read the configured blocks and return an engine that can serve them.

        ``choose`` is asked for the blocks, in the trio thread, in place of ``config.blocks``; what it raises is raised.
        ``admit`` is told the model, those blocks, and the bytes of weights and of KV cache that they will take on the
        device (on the CPU those of all processes), before anything is fetched, and may raise.
        ``on_described`` is told the model and its served blocks as soon as they are known, before weights are
        read; ``progress`` while tensors are fetched and after each block is read; both in the trio thread.
        ``download`` fetches the small files of a hub repository, ``weights`` its tensors, both in a worker thread.
        Without ``weights`` the configuration says where these are kept, for this engine until it is closed; with
        another ``download`` alone that fetches whole files. Raises CheckpointError if the model cannot be read or
        served, ConfigError if it has no such blocks.
        Cancelled: the block being read is finished first, a download is kept as far as it is; nothing stays in
        memory.
        """
        names_of(config.adapters)  # before anything is in memory
        with ExitStack() as files:
            if weights is None and download is hub_download:
                weights = files.enter_context(closing(cache_of(config.storage)))
            loaded = await load_span(
                config,
                report=progress or (lambda _progress: None),
                on_described=on_described,
                choose=choose,
                admit=admit,
                sources=Sources(download, weights),
            )
            return cls(config, loaded, files.pop_all())

    @property
    def counts(self) -> EngineCounts:
        """What the compute thread has done since it began."""
        return self._compute.counts

    @property
    def prefix_use(self) -> PrefixUse | None:
        """How far sessions have had beginnings in common; None where they share nothing."""
        return None if self._room.prefixes is None else self._room.prefixes.use

    @property
    def offload_use(self) -> OffloadUse | None:
        """Sessions that made room for others; None where they do not."""
        return None if self._room.offload is None else self._room.offload.use

    @property
    def cache_bytes_total(self) -> int:
        """Bytes of KV cache for all sessions together."""
        return self._room.budget.pages * len(self.blocks) * self._room.page_bytes

    @property
    def cache_bytes_left(self) -> int:
        """Bytes of KV cache that are promised to no session."""
        return self._room.budget.left * self._room.page_bytes

    @property
    def cache_bytes_untaken(self) -> int:
        """Bytes of KV cache that no session has had yet: on a CPU the system is still to give memory for them."""
        return self._room.allocator.unused * self._room.page_bytes

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

        room, runner = self._room, self._runner
        if batch_size * pages_for(max(1, max_length)) > room.budget.pages:
            raise AllocationFailed(refusal("immediately"))
        promised = batch_size * pages_for(max(1, min(max_length, defaults.CACHE_PROMISE_TOKENS)))
        if room.offload is not None:
            await room.offload.make_room(room.budget, room.inner(blocks), promised)
        await room.budget.take(room.inner(blocks), promised, timeout=timeout, refusal=refusal)
        session = Session(
            runner,
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
        runner = self._runner

        def pieces(_contended: object) -> Generator[None, None, torch.Tensor]:
            return runner.forward(hidden.detach(), blocks, prompts, adapter)

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
        runner = self._runner

        def pieces(_contended: object) -> Generator[None, None, tuple[torch.Tensor, torch.Tensor | None]]:
            return runner.backward(hidden.detach(), grad_output.detach(), blocks, prompts, adapter)

        grads: tuple[torch.Tensor, torch.Tensor | None] = await self._compute.run(
            Pieces(pieces, peer), Priority.BATCH
        )
        return grads

    async def check(self) -> None:
        """Return once the compute thread has had a turn for this, which takes no time: it lives and gets on.

        Raises EngineError if it is closed, EngineDied if the thread or processes that share the model are gone.
        Cancelled: nothing remains.
        """
        await self._compute.run(self._runner.check)

    async def aclose(self) -> None:
        """Stop computing: waiting work fails with EngineError, the running piece ends, the thread is joined.

        Not cancellable for as long as that piece takes. Once open sessions are left, too, the memory is free, whoever
        still has the engine: a request that is being received, say.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            await loaded.aclose()
            self._compute.merged = None
            self._room = replace(self._room, prefixes=None, offload=None)
            self._files.close()

    @property
    def _runner(self) -> Runner | LeadingRunner:
        if self._loaded is None:
            raise EngineError("the engine is closed")
        return self._loaded.runner

    @property
    def _span(self) -> Span:
        assert self._loaded is not None
        return self._loaded.span

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
