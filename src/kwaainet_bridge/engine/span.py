"""The served blocks: loading them, and running one of them. Everything here runs in the compute thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kwaainet_bridge.engine import attention, linear, lora, quantized
from kwaainet_bridge.engine.adapters import Adapter
from kwaainet_bridge.engine.attention import RaggedCache, Rule
from kwaainet_bridge.engine.checkpoint import Checkpoint
from kwaainet_bridge.engine.config import SUPPORTED_DTYPES, Quantization
from kwaainet_bridge.engine.family import Family
from kwaainet_bridge.engine.layout import Part, parts_of
from kwaainet_bridge.engine.own_attention import OwnAttention
from kwaainet_bridge.engine.ragged import PagedStore, RaggedBatch
from kwaainet_bridge.engine.rotary import Places, RotaryTable
from kwaainet_bridge.engine.step import SequencePart
from kwaainet_bridge.errors import CheckpointError, EngineError

CHECK_TOKENS = 5
CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far a block may be from the model's own attention, relative to its largest output."""


class Span:
    """Consecutive blocks of one model with their weights."""

    def __init__(
        self, model: Family, checkpoint: Checkpoint, blocks: range, dtype: torch.dtype | str, device: str
    ) -> None:
        """Prepare; no weights are read yet. ``dtype`` "auto" is that of the span's first tensor."""
        self.blocks = blocks
        self.model = model
        self._checkpoint = checkpoint
        self._layers: dict[int, Any] = {block: model.layers[block] for block in blocks}
        names = [
            f"{model.layers_name}.{blocks.start}.{name}" for name in self._layers[blocks.start].state_dict()
        ]
        self._prefix = checkpoint.prefix_of(*names)
        stored = checkpoint.dtype_of(self._prefix + names[0])
        self.dtype: torch.dtype = stored if dtype == "auto" else dtype
        if self.dtype not in SUPPORTED_DTYPES:
            raise CheckpointError(f"{checkpoint.name} is stored as {stored}: choose a dtype instead of auto")
        self.device = torch.device(device)
        self.kv_heads = model.num_kv_heads
        """Heads of keys that are in this process."""
        self.share: Callable[[torch.Tensor, torch.Tensor, torch.device], torch.Tensor] | None = None
        """What this process has of a whole tensor, for one of the model's parameters; None: all of it."""
        self.adapters = lora.Active()
        self._rotary = RotaryTable(model, self.dtype, self.device)
        self._own = None
        if model.attends_itself:
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            self._own = OwnAttention(model, self._rotary, self.adapters, like)
        self._parts = {block: self._find(block) for block in blocks}
        self.quantization: Quantization = "none"
        """What :meth:`load` makes of large matrices."""
        self._linear = linear.quicker(self.dtype) if self.device.type == "cpu" else None
        if self._own is not None and self._linear is linear.PackedLinear:
            self._linear = None  # these layers read rows of weights themselves

    @property
    def repeats(self) -> bool:
        """Whether what a token gives depends on what is before it alone, not also on how long its step is."""
        return self._rotary.keeps

    def weight_bytes(self, block: int) -> int:
        """Bytes of one block's weights in the engine's dtype."""
        values = sum(int(tensor.numel()) for tensor in self._layers[block].state_dict().values())
        return values * int(self.dtype.itemsize)

    def held_bytes(self, block: int | None = None) -> int:
        """Bytes that the weights of all loaded blocks, or of one, and of their adapters take here, as they are."""
        layers = self._layers.values() if block is None else [self._layers[block]]
        return sum(
            int(tensor.numel()) * int(tensor.element_size())
            for layer in layers
            for _, tensor in _tensors(layer)
        )

    def tensors(self) -> list[str]:
        """The checkpoint's tensors that the span is made of."""
        return [part.name for block in self.blocks for parts in self._parts[block].values() for part in parts]

    def load(self, block: int) -> None:
        """Read one block's tensors from its files, which must have been fetched, into memory of their own."""
        layer = self._layers[block]
        parameters = layer.state_dict()
        where = {part.name: (name, part) for name, parts in self._parts[block].items() for part in parts}
        tensors: dict[str, torch.Tensor] = {}
        for source, tensor in self._checkpoint.read({name: part.shape for name, (_, part) in where.items()}):
            name, part = where[source]
            if name not in tensors:
                place = "cpu" if self.share is not None else self.device
                tensors[name] = torch.empty(parameters[name].shape, dtype=self.dtype, device=place)
            part.of(tensors[name]).copy_(tensor)
        if self.share is not None:
            tensors = {
                name: self.share(parameters[name], tensor, self.device) for name, tensor in tensors.items()
            }
        layer.load_state_dict(tensors, strict=True, assign=True)
        layer.requires_grad_(requires_grad=False)
        left = [name for name, tensor in _tensors(layer) if tensor.is_meta]
        if left:
            raise CheckpointError(
                f"block {block} of {self._checkpoint.name} computes {left[0]} itself: not supported"
            )
        if self.quantization != "none":
            weights = sum(int(tensor.numel()) for tensor in tensors.values())
            done = quantized.quantise(self.quantization, layer, self.device)
            if done < weights * quantized.LEAST_SHARE:
                raise CheckpointError(
                    f"{self._checkpoint.name} cannot be quantised: in block {block} large linear layers have "
                    f"{done / weights:.0%} of the weights; set model.quantization to none"
                )
        if self._linear is not None and self.share is None:
            linear.replace(layer, self._linear)

    def adapt(self, block: int, adapters: Sequence[Adapter]) -> None:
        """Have these adapters at hand in a block that is loaded. Raises CheckpointError for one that does not fit."""
        for adapter in adapters:
            adapter.check(self.model.num_blocks)
        pairs = {adapter.name: adapter.of(block, self.dtype, self.device) for adapter in adapters}
        lora.install(self._layers[block], block, pairs, self.adapters)

    def run(self, block: int, hidden: torch.Tensor, *, cache: RaggedCache | None = None) -> torch.Tensor:
        """One block's output for [B, T, H] at the positions 0 … T-1, which see each other only.

        With a cache, for its ragged batch [1, N, H]: each token is where the batch says, and sees what its sequence
        has up to there.
        """
        layer = self._layers[block]
        if self._own is not None:
            return (
                self._own.run(layer, hidden) if cache is None else self._own.run_ragged(layer, hidden, cache)
            )
        kind = self.model.layer_type(block)
        if cache is None:
            places: Places = [(0, hidden.shape[1], hidden.shape[1])]
            further: dict[str, Any] = {"use_cache": False}
        else:
            places = cache.batch.places
            further = {"use_cache": True, "ragged": cache.batch}
        with self.adapters.to_rows(() if cache is None else cache.batch.adapted):
            output = layer(
                hidden,
                attention_mask=None,
                position_ids=self._rotary.positions(places),
                past_key_values=cache,
                position_embeddings=self._rotary.embeddings(places, kind),
                **further,
            )
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def check(self, store: PagedStore) -> None:
        """Compare one block of each kind with the model's own attention on a short random input.

        Once without a cache, and once in steps with ``store``, which nobody uses yet, for its cache.

        Raises CheckpointError if they differ, if the blocks do not run in this dtype on this device, or if attention
        is asked for another window than the configuration names: a family that needs more than the engine knows must
        not be served.
        """
        kinds = {(self.model.layer_type(b), _kind(self._layers[b])): b for b in reversed(self.blocks)}
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, CHECK_TOKENS, self.model.config.hidden_size, generator=generator)
        hidden = hidden.to(self.device, self.dtype)
        for block in kinds.values():
            try:
                outputs = [self.run(block, hidden).float(), self._run_in_steps(block, hidden, store).float()]
                theirs = self._run_eager(block, hidden).float()
            except EngineError as error:
                raise CheckpointError(f"{self._checkpoint.name} cannot be served: {error}") from error
            except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
                raise CheckpointError(
                    f"{self._checkpoint.name} does not run as {self.dtype} on {self.device}: {error}"
                ) from error
            scale = theirs.abs().max()
            differences = [(ours - theirs).abs().max() for ours in outputs]
            tolerance = CHECK_TOLERANCE[self.dtype]
            if self.quantization != "none":
                tolerance = max(tolerance, quantized.TOLERANCE)
            if not all(difference <= tolerance * scale for difference in differences):
                raise CheckpointError(
                    f"{self._checkpoint.name} cannot be served: block {block} differs from what its own "
                    f"attention gives as {self.dtype} on {self.device}; the family is not supported"
                )

    def _run_in_steps(self, block: int, hidden: torch.Tensor, store: PagedStore) -> torch.Tensor:
        outputs, start = [], 0
        for tokens in hidden.split(CHECK_TOKENS // 2, 1):
            batch = _NotedBatch(store, [SequencePart([0], start, tokens.shape[1])])
            outputs.append(self.run(block, tokens, cache=RaggedCache(batch)))
            start += tokens.shape[1]
            expected = self.model.window(block)
            if any(rule.window != expected for rule in batch.rules):
                raise EngineError(
                    f"block {block} should see {expected or 'all'} positions, and asks for another number"
                )
        return torch.cat(outputs, 1)

    def _run_eager(self, block: int, hidden: torch.Tensor) -> torch.Tensor:
        if self._own is not None:
            return self.run(block, hidden)  # it is their own attention already
        count = hidden.shape[1]
        places = [(0, count, count)]
        allowed = attention.causal_mask(count, count, self.model.window(block), self.device)
        mask = torch.zeros(1, 1, count, count, dtype=self.dtype, device=self.device)
        mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)
        self.model.causal_lm.set_attn_implementation("eager")
        try:
            output = self._layers[block](
                hidden,
                attention_mask=mask,
                position_ids=self._rotary.positions(places),
                position_embeddings=self._rotary.embeddings(places, self.model.layer_type(block)),
            )
        finally:
            self.model.causal_lm.set_attn_implementation(attention.NAME)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _find(self, block: int) -> dict[str, list[Part]]:
        """Where the checkpoint has the block's tensors."""
        stem = f"{self._prefix}{self.model.layers_name}.{block}."
        return {
            name: parts_of(stem + name, list(tensor.shape), self._checkpoint.__contains__)
            for name, tensor in self._layers[block].state_dict().items()
        }


class _NotedBatch(RaggedBatch):
    """Keeps what the layer that runs it wants of its attention, and says whether its keys and values fit."""

    def __init__(self, store: PagedStore, sequences: Sequence[SequencePart]) -> None:
        super().__init__(store, sequences)
        self.rules: list[Rule] = []

    def write(self, block: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        expected = [tensor.shape[::2] for tensor in self.store.of(block)]
        if [tensor.shape[1::2] for tensor in (keys, values)] != expected:
            raise EngineError(
                f"block {block} has keys {list(keys.shape)} and values {list(values.shape)}, where its configuration "
                f"says (heads, size) {list(expected[0])}"
            )
        super().write(block, keys, values)

    def attend(self, block: int, query: torch.Tensor, rule: Rule) -> torch.Tensor:
        self.rules.append(rule)
        return super().attend(block, query, rule)


def _kind(layer: torch.nn.Module) -> str:
    """The same for layers that differ in their weights only."""
    parts = []
    for name, module in layer.named_modules():
        plain = {
            key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)
        }
        plain.pop("layer_idx", None)
        parts.append((name, type(module).__name__, plain))
    return repr((parts, [(name, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()]))


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
