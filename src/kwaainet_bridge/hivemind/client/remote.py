"""Forward and backward through a chain of servers, without KV caches: for training and scoring.

Source: Petals main ``client/sequential_autograd.py``, ``client/remote_forward_backward.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import DeadlineExceeded, InvalidRequest, StreamReset
from kwaainet_bridge.hivemind.client import calls
from kwaainet_bridge.hivemind.client.attempts import RECOVERABLE, Attempts
from kwaainet_bridge.hivemind.client.routing import Hop
from kwaainet_bridge.hivemind.client.swarm import Swarm
from kwaainet_bridge.hivemind.experts.methods import (
    RPC_BACKWARD,
    RPC_BACKWARD_STREAM,
    RPC_FORWARD,
    RPC_FORWARD_STREAM,
)
from kwaainet_bridge.rpc import StreamMethod, UnaryMethod
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.tensors import TensorJoiner, TensorMessage, split_tensor

_Unary = UnaryMethod[ExpertRequest, ExpertResponse]
_Stream = StreamMethod[ExpertRequest, ExpertResponse]
_FORWARD: tuple[_Unary, _Stream] = RPC_FORWARD, RPC_FORWARD_STREAM
_BACKWARD: tuple[_Unary, _Stream] = RPC_BACKWARD, RPC_BACKWARD_STREAM


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """Outputs [batch, tokens, hidden size] of ``blocks``, and what backward needs of the way there.

    ``inputs`` holds each hop of the chain with the hidden states that it received.
    """

    blocks: range
    output: torch.Tensor
    inputs: tuple[tuple[Hop, torch.Tensor], ...]


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of the input [batch, tokens, hidden size] and, if there were deep prompts, of those."""

    hidden: torch.Tensor
    prompts: torch.Tensor | None


async def forward(
    swarm: Swarm,
    hidden: torch.Tensor,
    *,
    prompts: torch.Tensor | None = None,
    blocks: range | None = None,
) -> ForwardPass:
    """Run ``hidden`` [batch, tokens, hidden size] through ``blocks`` (None: all of the model).

    ``prompts`` [len(blocks), batch or 1, prefix, hidden size] with prefix <= tokens: each block adds its own
    to the first ``prefix`` tokens. The output has the shape and dtype of the input and lies on the CPU.

    A server that fails is avoided and the rest of the chain chosen anew. Raises InvalidRequest for shapes
    that do not fit; NoRoute when some blocks have no server, or none that works. Cancelled: nothing remains.
    """
    blocks = blocks if blocks is not None else range(swarm.num_blocks)
    _check(hidden, prompts, blocks)
    # not under no_grad(): that is a setting of the thread, which other tasks would leave in another order
    prompts = None if prompts is None else prompts.detach()
    return await _forward(swarm, hidden.detach().cpu(), prompts, blocks, prompts_from=blocks.start)


async def _forward(
    swarm: Swarm, hidden: torch.Tensor, prompts: torch.Tensor | None, blocks: range, *, prompts_from: int
) -> ForwardPass:
    inputs: list[tuple[Hop, torch.Tensor]] = []
    chain = await swarm.request_chain(blocks)
    attempts = Attempts(swarm, blocks)
    block = blocks.start
    while block < blocks.stop:
        hop: Hop | None = None
        try:
            chain = chain or await swarm.request_chain(range(block, blocks.stop))
            hop = chain.pop(0)
            arguments = [hidden, _own_prompts(prompts, hop, prompts_from)]
            (output,) = await _call(
                swarm, hop, _FORWARD, arguments, expected=[hidden.shape], dtype=hidden.dtype
            )
        except RECOVERABLE as e:
            await attempts.failed(hop, e)
            chain = []
        else:
            swarm.note_success(hop)
            inputs.append((hop, hidden))
            hidden, block = output, hop.blocks.stop
            attempts = Attempts(swarm, range(block, blocks.stop))
    return ForwardPass(blocks, hidden, tuple(inputs))


async def backward(
    swarm: Swarm,
    forward_pass: ForwardPass,
    grad_output: torch.Tensor,
    *,
    prompts: torch.Tensor | None = None,
) -> Gradients:
    """Gradients of the inputs of ``forward_pass`` for ``grad_output``, of the output's shape.

    ``prompts`` are those of the forward pass. Their gradient is [len(blocks), batch, prefix, hidden size],
    also where they came with a batch of 1: sum it over the batch then. Gradients have the dtype of
    ``grad_output`` and lie on the CPU; no server's weights change.

    Where a server fails, forward is run again for its blocks on others. Raises like forward.
    """
    blocks = forward_pass.blocks
    _check(grad_output, prompts, blocks)
    if grad_output.shape != forward_pass.output.shape:
        raise InvalidRequest(
            f"grad_output {list(grad_output.shape)} differs from the output {list(forward_pass.output.shape)}"
        )
    grad, dtype = grad_output.detach().cpu(), grad_output.dtype
    prompts = None if prompts is None else prompts.detach()
    prompt_grads: list[torch.Tensor] = []
    todo = list(forward_pass.inputs)
    attempts: Attempts | None = None
    while todo:
        hop, hidden = todo.pop()
        attempts = attempts or Attempts(swarm, hop.blocks)
        own_prompts = _own_prompts(prompts, hop, blocks.start)
        expected: list[Sequence[int]] = [grad.shape]
        if prompts is not None:
            expected.append((len(hop.blocks), grad.shape[0], *prompts.shape[2:]))
        try:
            answer = await _call(
                swarm, hop, _BACKWARD, [hidden, grad, own_prompts], expected=expected, dtype=dtype
            )
        except RECOVERABLE as e:
            await attempts.failed(hop, e)
            again = await _forward(swarm, hidden, prompts, hop.blocks, prompts_from=blocks.start)
            todo += again.inputs
        else:
            swarm.note_success(hop)
            grad = answer[0]
            prompt_grads = answer[1:] + prompt_grads
            attempts = None
    return Gradients(grad, torch.cat(prompt_grads) if prompt_grads else None)


def _check(hidden: torch.Tensor, prompts: torch.Tensor | None, blocks: range) -> None:
    if hidden.dim() != 3 or not hidden.numel():
        raise InvalidRequest(f"hidden states {list(hidden.shape)} are not [batch, tokens, hidden size]")
    if prompts is not None and not (
        prompts.dim() == 4
        and prompts.shape[0] == len(blocks)
        and prompts.shape[1] in (1, hidden.shape[0])
        and 0 < prompts.shape[2] <= hidden.shape[1]
        and prompts.shape[3] == hidden.shape[2]
    ):
        raise InvalidRequest(
            f"deep prompts {list(prompts.shape)} do not fit {len(blocks)} blocks and {list(hidden.shape)}"
        )


def _own_prompts(prompts: torch.Tensor | None, hop: Hop, first: int) -> torch.Tensor:
    if prompts is None:
        return calls.NO_TENSOR
    return prompts[hop.blocks.start - first : hop.blocks.stop - first]


async def _call(
    swarm: Swarm,
    hop: Hop,
    methods: tuple[_Unary, _Stream],
    arguments: Sequence[torch.Tensor],
    *,
    expected: Sequence[Sequence[int]],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """One request to one server, in a stream if it or its answer is large.

    Raises NetworkError or RemoteError.
    """
    unary, streaming = methods
    traits = await swarm.traits(hop)
    uid = swarm.uid(hop.blocks)
    metadata = msgpack.pack(_metadata(swarm, len(arguments)))
    tensors = await calls.encode_arguments(arguments, traits.training)
    answer_values = sum(torch.Size(shape).numel() for shape in expected)
    # servers answer in their own dtype, of at most 4 bytes per value
    size = max(calls.tensor_bytes(arguments), 4 * answer_values)
    if size <= defaults.CLIENT_UNARY_BYTES:
        request = ExpertRequest(uid=uid, tensors=tensors, metadata=metadata)
        answer = await swarm.rpc.call(hop.peer, unary, request, timeout=defaults.CLIENT_STEP_SECONDS)
        received: Sequence[TensorMessage] = answer.tensors
    else:
        parts = (part for tensor in tensors for part in split_tensor(tensor, defaults.STREAM_PART_BYTES))
        requests = (ExpertRequest(uid=uid, tensors=[part], metadata=metadata) for part in parts)
        # room for what codecs put in front of the values; each tensor keeps the message that it came in
        joiner = TensorJoiner(8 * answer_values + defaults.MIB, max_tensors=len(expected))
        with trio.move_on_after(defaults.CLIENT_STEP_SECONDS) as scope:
            received = await _exchange(swarm, hop, streaming, requests, joiner)
        if scope.cancelled_caught:
            raise DeadlineExceeded(
                f"{streaming.name} at {hop.peer}: no answer within {defaults.CLIENT_STEP_SECONDS:g} s"
            )
    return await calls.decode_answer(received, expected, dtype)


async def _exchange(
    swarm: Swarm, hop: Hop, method: _Stream, requests: Iterable[ExpertRequest], joiner: TensorJoiner
) -> list[TensorMessage]:
    received: list[TensorMessage] = []
    async with swarm.rpc.stream(hop.peer, method, open_timeout=defaults.CONNECT_SECONDS) as stream:
        # a server that refused says why before it closes: read on although sending failed
        with contextlib.suppress(StreamReset):
            for request in requests:
                await stream.send(request)
            await stream.end()
        async for response in stream:
            for part in response.tensors:
                received += joiner.feed(part)
    return received + joiner.finish()


def _metadata(swarm: Swarm, arguments: int) -> dict[str, Any]:
    return {
        "points": 0.0,
        "active_adapter": swarm.adapter,
        "args_structure": calls.args_structure(arguments),
    }
