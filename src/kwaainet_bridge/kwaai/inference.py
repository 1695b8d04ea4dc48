"""``/kwaai/inference/1.0.0``: steps of sessions through all blocks of this node.

Values travel as float16. What leaves a span is rounded to it, beyond its range clamped to ±65504; what enters is
widened to the engine's dtype. Everything in between is computed in the engine's dtype.
Source: KwaaiNet v0.6.2, ``kwaai-cli/src/block_rpc.rs``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.errors import (
    AllocationFailed,
    BridgeError,
    EngineError,
    InvalidRequest,
    Refusal,
    WarmingUp,
)
from kwaainet_bridge.kwaai.lease import Places
from kwaainet_bridge.kwaai.methods import most_tokens
from kwaainet_bridge.kwaai.model import ServedModel
from kwaainet_bridge.kwaai.sessions import Sessions
from kwaainet_bridge.rpc import CallContext
from kwaainet_bridge.wire.kwaai_inference import (
    WARMING_UP,
    InferenceRequest,
    InferenceResponse,
    PayloadType,
    ResponseType,
)
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

T = TypeVar("T")


class InferenceService:
    """Serves the blocks of one model. Answers with the text of an error where KwaaiNet's servers do."""

    def __init__(
        self,
        model: ServedModel,
        places: Places,
        nursery: trio.Nursery,
        counts: ServingCounts,
        *,
        connected: Callable[[], Collection[PeerId]],
        clock: Callable[[], float],
    ) -> None:
        self._counts = counts
        self.model = model
        self.sessions = Sessions(model.engine, places, nursery, connected=connected, clock=clock)
        self._places = places
        self._nursery = nursery

    async def serve(self, request: InferenceRequest, context: CallContext) -> InferenceResponse:
        """Answer one request. Cancelled, because its caller left: the session is closed."""
        self._places.renew(context.peer)
        try:
            kind, values = await self._step(request, context.peer)
            self._counts.sent_bytes[CompressionType.FLOAT16.name] += values.numel() * 2
            return await _off_loop(
                values.nbytes, lambda: InferenceResponse.of_values(request.session_id, kind, values)
            )
        except WarmingUp:
            return warming_up()
        except (InvalidRequest, AllocationFailed, Refusal) as e:
            self._counts.refused += 1
            log.debug("session %d of %s: %.200s", request.session_id, context.peer, e)
            return InferenceResponse.of_error(request.session_id, str(e))
        except EngineError:
            log.exception("session %d of %s failed", request.session_id, context.peer)
            return InferenceResponse.of_error(request.session_id, "this server failed to compute the step")

    async def _step(self, request: InferenceRequest, peer: PeerId) -> tuple[ResponseType, torch.Tensor]:
        model = self.model
        self._check(request)
        try:
            ready = await model.make_ready(self._nursery, patience=defaults.KWAAI_EMBEDDINGS_SECONDS)
        except BridgeError as e:
            raise Refusal("this server cannot read its model's embeddings and head") from e
        if not ready:
            raise WarmingUp(WARMING_UP)
        times = [trio.current_time()]
        hidden = await self._inputs(request)
        async with self.sessions.step(peer, request.session_id, request.seq_pos, request.tokens) as session:
            times.append(trio.current_time())
            output = await session.step(hidden)
            times.append(trio.current_time())
            self._counts.steps += 1
            self._counts.step_tokens += output.shape[1]
            coding = (
                CompressionType.NONE if model.first else CompressionType.FLOAT16
            )  # ids travel as they are
            self._counts.received_bytes[coding.name] += len(request.data)
            if not model.last:
                self._counts.time_step(*times, times[-1])
                return ResponseType.HIDDEN_STATES, output
            logits = await model.logits(output[:, -1:])
            self._counts.time_step(*times, trio.current_time())
            return ResponseType.LOGITS, logits

    def _check(self, request: InferenceRequest) -> None:
        """Raises InvalidRequest for what this span cannot take, before anything is computed or opened."""
        model = self.model
        blocks, width = model.engine.blocks, model.engine.model.hidden_size
        expected = PayloadType.TOKEN_IDS if model.first else PayloadType.HIDDEN_STATES
        if request.payload_type != expected:
            raise InvalidRequest(
                f"blocks {blocks.start}:{blocks.stop} are served here, which take {expected.value}, "
                f"not {request.payload_type.value}"
            )
        if not model.first and request.shape[2] != width:
            raise InvalidRequest(f"hidden states here are [1, tokens, {width}], not {list(request.shape)}")
        most = model.engine.max_batch_tokens
        if not model.last:
            most = min(most, most_tokens(width))
        if request.tokens > most:
            raise InvalidRequest(
                f"one request may have {most} tokens here, this one has {request.tokens}: send them in several"
            )

    async def _inputs(self, request: InferenceRequest) -> torch.Tensor:
        """Hidden states [1, n, H] in the engine's dtype."""
        if self.model.first:
            return await self.model.embed(request.token_ids())
        dtype = self.model.engine.model.dtype
        return await _off_loop(len(request.data), lambda: request.hidden_states(dtype))


def warming_up() -> InferenceResponse:
    """What a KwaaiNet server says while its model loads."""
    return InferenceResponse.of_error(0, WARMING_UP)


async def _off_loop(num_bytes: int, work: Callable[[], T]) -> T:
    """What ``work`` returns; in a worker thread if it is about more than ``defaults.INLINE_BYTES``."""
    return work() if num_bytes <= defaults.INLINE_BYTES else await trio.to_thread.run_sync(work)
