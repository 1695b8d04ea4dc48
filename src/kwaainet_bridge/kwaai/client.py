"""Calls to KwaaiNet servers: steps of sessions, leases, greetings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import CapacityDenied, HandlerError, LeaseDenied, RemoteError, WarmingUp
from kwaainet_bridge.kwaai.methods import HELLO, INFERENCE, LEASE
from kwaainet_bridge.rpc import RpcClient
from kwaainet_bridge.wire.kwaai_hello import Hello
from kwaainet_bridge.wire.kwaai_inference import WARMING_UP, InferenceRequest, InferenceResponse, ResponseType
from kwaainet_bridge.wire.kwaai_lease import Denial, Granted, LeaseRequest, Outcome
from kwaainet_bridge.wire.peer_id import PeerId

_WARMING: Final = WARMING_UP.partition(" — ")[0]


class KwaaiClient:
    """Makes calls through an RpcClient; holds no state of its own.

    A server that warms up, or denies a lease, is well: neither WarmingUp nor LeaseDenied is a failure of it.
    """

    def __init__(self, rpc: RpcClient) -> None:
        self._rpc = rpc

    async def step_ids(
        self,
        peer: PeerId,
        session_id: int,
        position: int,
        ids: Sequence[int],
        *,
        timeout: float = defaults.CLIENT_STEP_SECONDS,
    ) -> torch.Tensor:
        """Send the next token ids of a session to a holder of block 0.

        Returns hidden states [1, n, H], or logits [1, 1, V] of the last token from a server that has the last block as
        well; float32, on the CPU. ``position`` is that of the first token; 0 begins the session, in place of a former
        one. At most ``methods.most_tokens(H)`` tokens go in one step. A step that failed or was cancelled may have
        ended the session at its server: begin a new one with all tokens.

        Raises WarmingUp, HandlerError with the server's text, RemoteError for an answer that does not fit the
        request, ValueError for ids that no field holds, and what RpcClient.call raises.
        """
        return await self._step(peer, InferenceRequest.of_token_ids(session_id, position, ids), timeout)

    async def step_hidden(
        self,
        peer: PeerId,
        session_id: int,
        position: int,
        hidden: torch.Tensor,
        *,
        timeout: float = defaults.CLIENT_STEP_SECONDS,
    ) -> torch.Tensor:
        """Send hidden states [1, n, H] of the next tokens to a server of later blocks. As ``step_ids``."""
        return await self._step(
            peer, InferenceRequest.of_hidden_states(session_id, position, hidden), timeout
        )

    async def _step(self, peer: PeerId, request: InferenceRequest, timeout: float) -> torch.Tensor:
        answer = await self._rpc.call(peer, INFERENCE, request, timeout=timeout)
        if answer.error is not None:
            if answer.error.startswith(_WARMING):
                raise WarmingUp(f"{peer}: {answer.error}")
            raise HandlerError(INFERENCE.name, peer, answer.error)
        _check_answer(peer, request, answer)
        return answer.values()

    async def lease(
        self, peer: PeerId, model: str | None = None, *, timeout: float = defaults.INFO_SECONDS
    ) -> Granted:
        """Ask for a lease. Raises CapacityDenied, LeaseDenied, and what RpcClient.call raises."""
        reply = await self._rpc.call(peer, LEASE, LeaseRequest(model), timeout=timeout)
        return granted(peer, reply.outcome)

    async def hello(
        self, peer: PeerId, text: str = "hello", *, timeout: float = defaults.INFO_SECONDS
    ) -> str:
        """Greet a peer; returns its reply, ``ok`` from all that are known. Raises what RpcClient.call raises."""
        return (await self._rpc.call(peer, HELLO, Hello(text), timeout=timeout)).text


def granted(peer: PeerId, outcome: Outcome) -> Granted:
    """The lease of an outcome. Raises CapacityDenied or LeaseDenied."""
    if isinstance(outcome, Granted):
        return outcome
    if outcome.reason == Denial.AT_CAPACITY:
        raise CapacityDenied(
            f"{peer} is at capacity, ask again in {outcome.retry_after_secs} s",
            reason=outcome.reason.value,
            retry_after=outcome.retry_after_secs,
        )
    raise LeaseDenied(f"{peer} gives no lease: {outcome.reason.value}", reason=outcome.reason.value)


def _check_answer(peer: PeerId, request: InferenceRequest, answer: InferenceResponse) -> None:
    """Raises RemoteError unless the values can be those of this request."""
    if answer.session_id != request.session_id:
        raise RemoteError(f"{peer} answered session {answer.session_id}, asked was {request.session_id}")
    if answer.response_type == ResponseType.LOGITS:
        return
    tokens = answer.shape[1]
    if tokens != request.tokens:
        raise RemoteError(f"{peer} answered hidden states of {tokens} tokens, asked were {request.tokens}")
    if len(request.shape) == 3 and answer.shape != request.shape:
        raise RemoteError(f"{peer} answered shape {list(answer.shape)}, asked was {list(request.shape)}")
