"""The blocks that this node serves to KwaaiNet, with what comes before the first and after the last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import partial

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import ClientModel, Engine, ModelInfo, load_client_weights
from kwaainet_bridge.errors import BridgeError, ConfigError, EngineError, InvalidRequest

log = logging.getLogger(__name__)


def check_ends(model: ModelInfo, blocks: range) -> tuple[bool, bool]:
    """Whether these blocks have the first and the last of the model.

    Raises ConfigError if they have an end of a model whose ends this package cannot compute.
    """
    first, last = blocks.start == 0, blocks.stop == model.num_blocks
    if (first or last) and model.no_ends is not None:
        raise ConfigError(
            f"{model.name}: KwaaiNet's first and last blocks come with embeddings and head, which models of "
            f"type {model.family} have in another form ({model.no_ends}); serve blocks 1:{model.num_blocks - 1}, or "
            "another model"
        )
    return first, last


class ServedModel:
    """An engine and the names of its model; ``first`` and ``last`` say which ends of the model its span has.

    In KwaaiNet the holder of block 0 embeds, and the holder of the last block applies final norm and head. These
    weights are read when they are first needed, and stay on the CPU. ``names``: repository, DHT prefix and
    whatever else callers may call the model, beside the engine's own name for it. Raises what ``check_ends`` raises.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        names: Collection[str] = (),
        revision: str | None = None,
        load: Callable[..., ClientModel] = load_client_weights,
    ) -> None:
        model = engine.model
        self.engine = engine
        self.first, self.last = check_ends(model, engine.blocks)
        known = [name for name in (model.name, model.repository, *names) if name]
        self._names = {_plain(name) for name in known} | {_plain(name.rsplit("/", 1)[-1]) for name in known}
        self._read = partial(load, model.name, dtype=model.dtype, revision=revision)
        self._ends: ClientModel | None = None
        self._reading: trio.Event | None = None
        self._failure: BridgeError | None = None
        self._thread = trio.CapacityLimiter(1)  # two matrices at a time take as long as one after the other

    @property
    def ready(self) -> bool:
        """Whether requests can be computed at once: nothing is left to be read."""
        return self._ends is not None or not (self.first or self.last)

    def answers_to(self, name: str) -> bool:
        """Whether a caller who says ``name`` means this model. Case does not count, and dots are as good as dashes."""
        return _plain(name) in self._names

    async def make_ready(self, nursery: trio.Nursery, *, patience: float) -> bool:
        """Have the ends read, by a task in ``nursery``; whether they are after at most ``patience`` seconds.

        However many ask, they are read once. Raises the error with which reading failed; whoever asks next
        starts another attempt. Cancelled: reading goes on.
        """
        if self.ready:
            return True
        if self._reading is None:
            self._reading = trio.Event()
            self._failure = None
            nursery.start_soon(self._read_ends, self._reading)
        reading = self._reading
        with trio.move_on_after(patience):
            await reading.wait()
        if not self.ready and self._failure is not None:
            raise self._failure
        return self.ready

    async def _read_ends(self, done: trio.Event) -> None:
        try:
            self._ends = await trio.to_thread.run_sync(
                self._read,
                abandon_on_cancel=True,  # type: ignore[call-arg]  # the stubs of trio-typing are older than trio
            )
            log.info("read embeddings and head of %s", self.engine.model.name)
        except Exception as e:
            log.error("embeddings and head of %s: %s", self.engine.model.name, e)  # noqa: TRY400 - its text says it
            self._failure = e if isinstance(e, BridgeError) else EngineError(f"{type(e).__name__}: {e}")
        finally:
            self._reading = None
            done.set()

    async def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [1, n, H] of token ids int64 [n], in the engine's dtype. InvalidRequest for other ids."""
        ends = self._live_ends
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < ends.vocab_size:
            raise InvalidRequest(
                f"token ids must lie in 0..{ends.vocab_size - 1}, these go up to {int(ids.max())}"
            )
        width = self.engine.model.hidden_size * self.engine.model.dtype.itemsize
        if ids.numel() * width <= defaults.INLINE_BYTES:
            return _without_gradients(ends.embed, ids[None])
        return await trio.to_thread.run_sync(_without_gradients, ends.embed, ids[None], limiter=self._thread)

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [1, n, vocabulary] of the last block's output [1, n, H], computed in a worker thread."""
        return await trio.to_thread.run_sync(
            _without_gradients, self._live_ends.logits, hidden, limiter=self._thread
        )

    @property
    def _live_ends(self) -> ClientModel:
        if self._ends is None:
            raise EngineError("embeddings and head have not been read")
        return self._ends


def _without_gradients(compute: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return compute(values)


def _plain(name: str) -> str:
    return name.strip("/").replace(".", "-").casefold()
