"""What is before a model's first block and after its last one, computed by the model's own definition.

The definition runs without its blocks. What its final norm is given is then what the first block would be, and what is
put in the place of that comes out as scores. So scalings, further norms and caps are those of the family's own code,
and none of them is named here. Where that code applies one module and nothing else, the module is called by itself:
that takes a tenth of the time for a single token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kwaainet_bridge.engine.family import Family

CHECKED_TOKENS = 3
_FOREIGN_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Unfit(Exception):
    """Why a family's ends cannot be computed so."""


@dataclass(slots=True)
class _Splice:
    """One run of the definition: what its final norm gets instead, or else what it got."""

    given: torch.Tensor | None = None
    seen: torch.Tensor | None = None


class Ends:
    """Embeddings and head of one model. Any number of threads may compute at once."""

    def __init__(self, model: Family) -> None:
        """Take the blocks out of ``model``, which has no weights yet. Raises Unfit."""
        self.causal_lm: Any = model.causal_lm
        self._base: Any = model.base
        self._hidden_size = int(model.config.hidden_size)
        self._vocab_size = int(model.config.vocab_size)
        self._options: dict[str, Any] = {"use_cache": False}
        if hasattr(
            model.config, "output_router_logits"
        ):  # for a loss of blocks, of which there are none here
            self._options["output_router_logits"] = False
        setattr(model.base, model.layers_name, torch.nn.ModuleList())
        self.embedding = self.causal_lm.get_input_embeddings()
        if self.embedding is None:
            raise Unfit("it has no embeddings of tokens")
        modules = self.causal_lm.named_modules()
        self.embedding_name = next(name for name, module in modules if module is self.embedding) + ".weight"
        self._head = self.causal_lm.get_output_embeddings()
        with _foreign():
            self._final, self._embeds_plainly, self._heads_plainly = self._trace()
        self._running = threading.local()
        self._hook = self._final.register_forward_pre_hook(self._at_final)
        try:
            with _foreign():
                self._check_shapes()
        except Unfit:
            self.close()
            raise

    def close(self) -> None:
        """Leave the modules as they were, but for the blocks."""
        self._hook.remove()

    def make_buffers(self) -> None:
        """Compute the tensors that checkpoints do not have, on the CPU. Raises Unfit if the family does not say how."""
        for name, module in self.causal_lm.named_modules():
            kept = module.state_dict(keep_vars=True)
            made = [key for key, value in module.named_buffers(recurse=False) if key not in kept]
            for key in made:
                buffer = getattr(module, key)
                unset = float("nan") if buffer.is_floating_point() else 0
                module.register_buffer(
                    key, torch.full(buffer.shape, unset, dtype=buffer.dtype), persistent=False
                )
            if made:
                with _foreign():
                    self.causal_lm._init_weights(module)  # noqa: SLF001  # how transformers computes them after loading
            for key in made:
                if getattr(module, key).isnan().any():
                    raise Unfit(f"its class does not say how {name}.{key} is computed")

    def check(self) -> None:
        """Raises Unfit if what a token is embedded as depends on where it is. With the weights at hand."""
        if self._embeds_plainly:
            return
        ids = torch.ones(1, CHECKED_TOKENS, dtype=torch.int64)
        hidden = self._run(_Splice(), lambda: self._base(input_ids=ids, use_cache=False))
        if not torch.equal(hidden, hidden[:, :1].expand_as(hidden)):
            raise Unfit("its embeddings depend on the position of a token")

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T, H], what the first block gets, of token ids int64 [B, T]."""
        if self._embeds_plainly:
            plain: torch.Tensor = self.embedding(ids)
            return plain
        if not ids.numel():
            like = self.embedding.weight
            return torch.empty(*ids.shape, self._hidden_size, dtype=like.dtype, device=like.device)
        # sequences of one token: no masks of a long prompt are made, which nothing here would use
        rows = ids.reshape(-1, 1)
        hidden = self._run(_Splice(), lambda: self._base(input_ids=rows, use_cache=False))
        return hidden.reshape(*ids.shape, self._hidden_size)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., vocabulary] of what the last block gave, [..., H]."""
        if self._heads_plainly:
            plain: torch.Tensor = self._head(self._final(hidden))
            return plain
        rows = hidden.reshape(1, -1, self._hidden_size)
        instead = rows.new_zeros(1, 1, self._hidden_size)
        scores = self._run(
            _Splice(given=rows), lambda: self.causal_lm(inputs_embeds=instead, **self._options).logits
        )
        return scores.reshape(*hidden.shape[:-1], scores.shape[-1])

    def _run(self, splice: _Splice, compute: Callable[[], Any]) -> torch.Tensor:
        """What the final norm was given, or with something in the place of that what ``compute`` returns."""
        self._running.splice = splice
        try:
            result: torch.Tensor = compute()
        finally:
            self._running.splice = None
        if splice.given is not None:
            return result
        assert splice.seen is not None  # the final norm was called when the definition was traced
        return splice.seen

    def _at_final(self, _module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        splice: _Splice | None = getattr(self._running, "splice", None)
        if splice is None:
            return None
        if splice.given is None:
            (splice.seen,) = args
            return None
        return (splice.given,)

    def _trace(self) -> tuple[torch.nn.Module, bool, bool]:
        """The final norm; whether the embedding is all that is before it, and the head all that is after it."""
        with _noting(self._base, self.embedding, self._head, *self._base.children()) as calls:
            ids = torch.zeros(1, 1, dtype=torch.int64, device="meta")
            scores = self.causal_lm(input_ids=ids, **self._options).logits
        if list(scores.shape) != [1, 1, self._vocab_size]:
            raise Unfit(f"its head gives {list(scores.shape)}, not a score for each entry of its vocabulary")
        last = calls[self._base].output.last_hidden_state
        finals = [
            module
            for module, call in calls.items()
            if call.output is last and call.fits and module is not self.embedding
        ]
        if len(finals) != 1:
            raise Unfit("what follows its last block is not one norm")
        (final,) = finals
        into, out_of = calls[final], calls.get(self._head)
        embedded = calls.get(self.embedding)
        embeds_plainly = (
            embedded is not None and into.input is embedded.output and into.version == embedded.output_version
        )
        heads_plainly = (
            out_of is not None
            and out_of.fits
            and out_of.output is scores
            and out_of.output_version == _version(scores)
            and _same(out_of.input, last)
            and out_of.version == into.output_version
        )
        return final, embeds_plainly, heads_plainly

    def _check_shapes(self) -> None:
        """Whether as many hidden states and scores come out as go in, with something in the place of the blocks."""
        ids = torch.zeros(1, CHECKED_TOKENS, dtype=torch.int64, device="meta")
        hidden = self.embed(ids)
        scores = self.logits(hidden)
        for tensor, width in ((hidden, self._hidden_size), (scores, self._vocab_size)):
            if list(tensor.shape) != [1, CHECKED_TOKENS, width]:
                raise Unfit(
                    f"of {CHECKED_TOKENS} tokens it makes {list(tensor.shape)}, not [1, {CHECKED_TOKENS}, {width}]"
                )


def obstacle(model: Family) -> str | None:
    """Why the ends of ``model``, which has no weights, cannot be computed; None if they can. It stays as it is."""
    layers = model.layers
    try:
        Ends(model).close()
    except Unfit as reason:
        return str(reason)
    finally:
        setattr(model.base, model.layers_name, layers)
    return None


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a module: its only tensor and its result, and how often each had been written to by then."""

    input: Any
    version: int
    output: Any
    output_version: int
    fits: bool
    """Whether a tensor of floating-point numbers was its only argument, and it was called once."""


@contextmanager
def _noting(*modules: torch.nn.Module | None) -> Iterator[dict[torch.nn.Module | None, _Call]]:
    """The calls of these modules within the block."""
    calls: dict[torch.nn.Module | None, _Call] = {}

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else None
        fits = (
            module not in calls
            and not kwargs
            and len(args) == 1
            and isinstance(given, torch.Tensor)
            and given.is_floating_point()
        )
        calls[module] = _Call(given, _version(given), output, _version(output), fits)

    handles = [
        module.register_forward_hook(note, with_kwargs=True)
        for module in dict.fromkeys(modules)
        if module is not None
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0  # noqa: SLF001  # torch's count of writes, that views share


def _same(view: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether ``view`` is ``whole`` or a view of all of it."""
    return view is whole or (
        view._base is whole  # noqa: SLF001  # what torch calls it
        and view.shape == whole.shape
        and view.stride() == whole.stride()
        and view.storage_offset() == whole.storage_offset()
    )


@contextmanager
def _foreign() -> Iterator[None]:
    """Models' own code, of which nothing is known, runs in here: what it raises is a reason to refuse it."""
    try:
        yield
    except _FOREIGN_ERRORS as error:
        raise Unfit(f"its definition does not run without blocks ({error})") from error
