"""From a configuration to blocks that can run: definition, tensors from hub or disk, KV cache, compute thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.adapters import Adapter
from kwaainet_bridge.engine.checkpoint import Checkpoint, Download
from kwaainet_bridge.engine.compute import ComputeThread
from kwaainet_bridge.engine.config import Choose, EngineConfig, LoadProgress, ModelInfo, ModelOutline
from kwaainet_bridge.engine.pages import pages_for
from kwaainet_bridge.engine.requests import check_blocks
from kwaainet_bridge.engine.weights.cache import WeightCache
from kwaainet_bridge.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from kwaainet_bridge.engine.family import Family
    from kwaainet_bridge.engine.parallel import Followers, LeadingRunner
    from kwaainet_bridge.engine.runner import Runner
    from kwaainet_bridge.engine.span import Span

log = logging.getLogger(__name__)

Progress = Callable[[LoadProgress], None]
Admit = Callable[[ModelInfo, range, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a hub repository's files come from: small ones whole, tensors into a cache, if there is one."""

    download: Download
    weights: WeightCache | None


@dataclass(frozen=True, slots=True, eq=False)
class LoadedSpan:
    """Blocks that can run, and what runs them."""

    span: Span
    model: ModelInfo
    runner: Runner | LeadingRunner
    compute: ComputeThread
    followers: Followers | None

    async def aclose(self) -> None:
        """Not cancellable for as long as the running piece takes."""
        await _end(self.compute, self.followers)


async def load_span(
    config: EngineConfig,
    *,
    report: Progress,
    on_described: Callable[[ModelInfo, range], None] | None,
    choose: Choose | None,
    admit: Admit | None,
    sources: Sources,
) -> LoadedSpan:
    """See :meth:`Engine.load`."""
    checkpoint = await _in_thread(
        partial(
            Checkpoint,
            config.model,
            revision=config.revision,
            download=sources.download,
            weights=sources.weights,
            allow_pickled=config.storage.allow_pickled,
        )
    )
    compute = ComputeThread(shares=config.shares)
    followers: Followers | None = None
    try:
        skeleton = await compute.run(partial(_construct, config, checkpoint))
        blocks = config.blocks
        if choose is not None:
            blocks = await choose(ModelOutline(skeleton.config.model_type, skeleton.num_blocks))
        span, model = await compute.run(partial(_prepare, config, checkpoint, skeleton, blocks))
        sizes = [span.weight_bytes(block) for block in span.blocks]
        if admit is not None:
            admit(model, span.blocks, *_device_bytes(config, model, sizes))
        if on_described is not None:
            on_described(model, span.blocks)
        tell = partial(_tell, report, sizes)
        adapters = [await _in_thread(partial(Adapter, s, download=sources.download)) for s in config.adapters]
        await _in_thread(partial(checkpoint.fetch_tensors, span.tensors(), _Teller(partial(tell, 0))))
        tell(0, 0, 0)
        if config.tensor_parallel > 1:
            followers = await compute.run(partial(_start_followers, config, span))
            await compute.run(partial(followers.meet, span))
        for done, block in enumerate(span.blocks, start=1):
            await compute.run(partial(span.load, block))
            await compute.run(partial(span.adapt, block, adapters))
            tell(done, 0, 0)
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
        span.held_bytes() // defaults.MIB,
    )
    return LoadedSpan(span, model, runner, compute, followers)


def _device_bytes(config: EngineConfig, model: ModelInfo, sizes: list[int]) -> tuple[int, int]:
    """Bytes of weights and KV cache on one device."""
    share = 1 if config.device == "cpu" else config.tensor_parallel
    token = 2 * model.num_kv_heads * model.head_dim * model.dtype.itemsize
    cache = pages_for(config.cache_tokens) * defaults.PAGE_TOKENS * token * len(sizes)
    return sum(sizes) // share, cache // share


async def _in_thread(work: Callable[[], T]) -> T:
    """What ``work``, which blocks on disk or network, returns. Cancelled: it is left behind."""
    return await trio.to_thread.run_sync(work, abandon_on_cancel=True)  # type: ignore[call-arg]  # the stubs of trio-typing are older than trio


def _tell(report: Progress, sizes: list[int], done: int, fetched: int, missing: int) -> None:
    report(LoadProgress(done, len(sizes), sum(sizes[:done]), sum(sizes), fetched, missing))


class _Teller:
    """Tells the trio thread of a download, a few times a second. Ends the download when nobody waits for it."""

    def __init__(
        self, tell: Callable[[int, int], None], *, clock: Callable[[], float] = perf_counter
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._next = clock()

    def __call__(self, fetched: int, missing: int) -> None:
        trio.from_thread.check_cancelled()
        if missing and (fetched == missing or self._clock() >= self._next):
            self._next = self._clock() + defaults.DOWNLOAD_TELL_SECONDS
            trio.from_thread.run_sync(self._tell, fetched, missing)


async def _end(compute: ComputeThread, followers: Followers | None) -> None:
    await compute.aclose()
    if followers is not None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(followers.close)


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
    from kwaainet_bridge.engine import ends, quantized
    from kwaainet_bridge.engine.span import Span

    if blocks is None:
        blocks = range(model.num_blocks)
    try:
        check_blocks(blocks, range(model.num_blocks))
    except InvalidRequest as error:
        raise ConfigError(f"{config.model} has blocks 0:{model.num_blocks}: {error}") from error
    span = Span(model, checkpoint, blocks, config.dtype, config.device_of(0))
    quantized.check(config.quantization, span.device)
    span.quantization = config.quantization
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
        no_ends=ends.obstacle(model),
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
