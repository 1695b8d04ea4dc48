"""rpc_info, rpc_forward and rpc_backward with their streamed forms: calls that leave nothing behind.

Source: Petals main ``server/handler.py`` and ``server/block_functions.py``; recorded messages of sessions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import torch
import trio

from kwaainet_bridge import __version__, defaults
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.errors import AllocationFailed, InvalidRequest, Refusal
from kwaainet_bridge.hivemind.experts import trees
from kwaainet_bridge.hivemind.experts.requests import (
    Metadata,
    count_bytes,
    decode_tensors,
    encode_tensors,
    is_dummy,
    optional,
    receive_rest,
    send_split,
)
from kwaainet_bridge.hivemind.experts.span import ServedSpan, as_refusal
from kwaainet_bridge.rpc import CallContext, ServerStream
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertInfo, ExpertUID
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import TensorMessage

_SCHEMA_TOKENS = 2048  # stock servers describe inputs of this length; clients ignore it


class StatelessService:
    """Describes the span, runs forward and backward over it."""

    def __init__(self, span: ServedSpan, counts: ServingCounts) -> None:
        self._span = span
        self._counts = counts
        self._places = trio.CapacityLimiter(defaults.MAX_TRAINING_REQUESTS)
        self._shares: dict[PeerId, trio.CapacityLimiter] = {}
        self._under_way = 0
        self._idle = trio.Event()
        self.paused = False
        """Whether forward and backward requests are refused for now."""

    async def wait_idle(self) -> None:
        """Return once no forward or backward request is under way."""
        while self._under_way:
            await self._idle.wait()

    async def info(self, request: ExpertUID, _context: CallContext) -> ExpertInfo:
        """Answer rpc_info: the schema of one block, or only the server's state for an empty uid."""
        engine = self._span.engine
        info: dict[str, object] = {
            "version": f"kwaainet-bridge {__version__}",
            "dht_client_mode": False,  # blocks are served by nodes that hold records too
            "cache_tokens_available": engine.cache_bytes_left // engine.cache_bytes_per_token,
        }
        if request.uid:
            if self._span.block(request.uid) is None:
                raise Refusal(request.uid[:200], kind="KeyError")
            info |= self._schema()
        info[trees.KEY] = trees.announcement()  # after all that stock servers have
        return ExpertInfo(serialized_info=msgpack.pack(info))

    def _schema(self) -> dict[str, object]:
        model = self._span.engine.model
        dtype = str(model.dtype)
        hidden = self._descriptor((None, 1, _SCHEMA_TOKENS, model.hidden_size), dtype)
        return {
            "forward_schema": ((hidden,), {}),
            "outputs_schema": (hidden,),
            "keyword_names": (),
            "inference_schema": (
                (hidden, self._descriptor((None,), dtype), self._descriptor((None,), "torch.int64")),
                {},
            ),
        }

    def _descriptor(self, size: tuple[int | None, ...], dtype: str) -> msgpack.TensorDescriptor:
        compressed = len(size) > 1
        return msgpack.TensorDescriptor(
            size=size,
            dtype=dtype,
            layout="torch.strided",
            requires_grad=False,
            pin_memory=False,
            compression=int(self._span.compression) if compressed else 0,
            device_type=None,
            device_index=None,
        )

    async def forward(self, request: ExpertRequest, context: CallContext) -> ExpertResponse:
        async with self._admitted(context.peer):
            answer = await self._forward(
                context.peer, request.uid, Metadata(request.metadata), request.tensors
            )
        return ExpertResponse(tensors=answer)

    async def backward(self, request: ExpertRequest, context: CallContext) -> ExpertResponse:
        async with self._admitted(context.peer):
            answer = await self._backward(
                context.peer, request.uid, Metadata(request.metadata), request.tensors
            )
        return ExpertResponse(tensors=answer)

    async def forward_stream(
        self, call: ServerStream[ExpertRequest, ExpertResponse], first: ExpertRequest
    ) -> None:
        await self._serve_stream(call, first, self._forward)

    async def backward_stream(
        self, call: ServerStream[ExpertRequest, ExpertResponse], first: ExpertRequest
    ) -> None:
        await self._serve_stream(call, first, self._backward)

    async def _serve_stream(
        self,
        call: ServerStream[ExpertRequest, ExpertResponse],
        first: ExpertRequest,
        run: Callable[[PeerId, str, Metadata, Sequence[TensorMessage]], Awaitable[list[TensorMessage]]],
    ) -> None:
        async with self._admitted(call.context.peer):
            tensors = await receive_rest(call, first, self._span.max_request_bytes)
            answer = await run(call.context.peer, first.uid, Metadata(first.metadata), tensors)
        await send_split(call, answer)

    @asynccontextmanager
    async def _admitted(self, peer: PeerId) -> AsyncIterator[None]:
        """Bound the number and time of requests that hold tensors; tell clients what the engine refuses.

        A peer has a share of the places, so that one that sends slowly cannot keep all others waiting.
        """
        if self.paused:
            self._counts.refused += 1
            raise Refusal("this server is paused by its operator and takes no requests")
        self._under_way += 1
        share = self._shares.setdefault(peer, trio.CapacityLimiter(defaults.MAX_TRAINING_REQUESTS_PER_PEER))
        try:
            with trio.fail_after(defaults.REQUEST_TIMEOUT_SECONDS):
                async with share, self._places:
                    yield
        except trio.TooSlowError:
            raise Refusal(
                f"the request took longer than {defaults.REQUEST_TIMEOUT_SECONDS:g} s", kind="TimeoutError"
            ) from None
        except (InvalidRequest, AllocationFailed) as e:
            self._counts.refused += 1
            raise as_refusal(e) from e
        except Refusal:
            self._counts.refused += 1
            raise
        finally:
            if not share.borrowed_tokens and not share.statistics().tasks_waiting:
                self._shares.pop(peer, None)
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
                self._idle = trio.Event()

    async def _forward(
        self, peer: PeerId, uid: str, metadata: Metadata, messages: Sequence[TensorMessage]
    ) -> list[TensorMessage]:
        blocks = self._span.chain(uid)
        metadata.check_common()
        adapter = metadata.adapter(self._span.engine.adapters)
        hidden, prompts = _arguments(metadata, await decode_tensors(messages), 2)
        compression = metadata.output_compression(self._span.compression, 1)
        output = await self._span.engine.forward(
            hidden, blocks, optional(prompts), adapter=adapter, peer=peer
        )
        return self._counted(hidden, messages, await encode_tensors([output], compression))

    async def _backward(
        self, peer: PeerId, uid: str, metadata: Metadata, messages: Sequence[TensorMessage]
    ) -> list[TensorMessage]:
        blocks = self._span.chain(uid)
        metadata.check_common()
        adapter = metadata.adapter(self._span.engine.adapters)
        hidden, gradients, prompts = _arguments(metadata, await decode_tensors(messages), 3)
        if gradients is None:
            raise Refusal("the gradient of the outputs is missing", kind="ValueError")
        compression = metadata.output_compression(self._span.compression, 1 if is_dummy(prompts) else 2)
        grad_inputs, grad_prompts = await self._span.engine.backward(
            hidden, gradients, blocks, optional(prompts), adapter=adapter, peer=peer
        )
        grads = [grad_inputs] if grad_prompts is None else [grad_inputs, grad_prompts]
        return self._counted(hidden, messages, await encode_tensors(grads, compression))

    def _counted(
        self, hidden: torch.Tensor, received: Sequence[TensorMessage], sent: list[TensorMessage]
    ) -> list[TensorMessage]:
        """``sent``, after counting a request that is done."""
        self._counts.passes += 1
        self._counts.pass_tokens += hidden.shape[0] * hidden.shape[1]
        count_bytes(self._counts.received_bytes, received)
        count_bytes(self._counts.sent_bytes, sent)
        return sent


def _arguments(metadata: Metadata, tensors: list[torch.Tensor], count: int) -> tuple[torch.Tensor, ...]:
    """The first ``count`` arguments; the first is always a tensor. Raises Refusal with the stock texts."""
    arranged = metadata.arrange(tensors)
    if len(arranged) < count:
        raise Refusal(
            f"not enough values to unpack (expected at least {count}, got {len(arranged)})", kind="ValueError"
        )
    if arranged[0] is None:
        raise Refusal("the first argument must be the hidden states", kind="ValueError")
    return tuple(arranged[:count])
