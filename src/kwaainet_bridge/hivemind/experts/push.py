"""Pushes from server to server: a step's output goes straight to the next server of the chain.

The client sends every step itself too; whichever copy comes first is computed. So a push is only ever a short
cut: it is sent in the background, its failure is not the session's, and it may be left out.
Source: Petals main ``server/handler.py``.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import BridgeError, Refusal
from kwaainet_bridge.hivemind.experts.methods import RPC_PUSH
from kwaainet_bridge.hivemind.experts.records import block_uid
from kwaainet_bridge.hivemind.experts.requests import Metadata, NextServer
from kwaainet_bridge.rpc import RpcClient
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import TensorMessage

log = logging.getLogger(__name__)

_ENVELOPE_ROOM = 1024  # bytes of a unary message that are not its body


class Pusher:
    """Sends outputs to next servers, in tasks of ``nursery``."""

    def __init__(self, client: RpcClient, nursery: trio.Nursery) -> None:
        self._client = client
        self._nursery = nursery
        self._under_way = 0

    def push(self, prefix: str, step: ExpertRequest, metadata: Metadata, output: TensorMessage) -> None:
        """Start pushing ``output`` if the step's metadata names a next server.

        The other tensors are those of this step (stock servers send those of the session's first step, which
        breaks beam search). The caller leaves out steps with prompts: those belong to this server's blocks.
        """
        try:
            chain = metadata.next_servers
        except BridgeError as e:
            log.debug("a step is not pushed on: %.200s", e)
            return
        if not chain or self._under_way >= defaults.MAX_PUSHES_UNDER_WAY:
            return
        target, rest = chain[0], metadata.raw["next_servers"][1:]
        request = ExpertRequest(
            uid=" ".join(block_uid(prefix, block) for block in target.blocks),
            tensors=[output, *step.tensors[1:]],
            metadata=msgpack.pack(
                {**metadata.raw, "session_id": target.session_id, "next_servers": rest, "pushed": True}
            ),
        )
        if request.length() > defaults.MAX_UNARY_BYTES - _ENVELOPE_ROOM:
            return  # a long prompt: the unary call cannot carry it
        self._under_way += 1
        # the step and its bytes, which may be many more, are done with once it is answered
        self._nursery.start_soon(self._send, target, request.copied())

    async def _send(self, target: NextServer, request: ExpertRequest) -> None:
        try:
            await self._client.call(target.peer, RPC_PUSH, request, timeout=defaults.PUSH_TIMEOUT_SECONDS)
        except BridgeError as e:
            log.debug("push to %s failed: %s", target.peer, e)
        finally:
            self._under_way -= 1


class PushLimit:
    """Counts, per peer and minute, the pushes that fit no session; late ones are normal, floods are not."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent: dict[PeerId, deque[float]] = {}

    def count_unknown(self, peer: PeerId) -> None:
        """Raise Refusal when ``peer`` has made too many."""
        now = self._clock()
        if peer not in self._recent:
            self._forget_before(now - 60)
        times = self._recent.setdefault(peer, deque(maxlen=defaults.UNKNOWN_PUSHES_PER_MINUTE))
        if len(times) == times.maxlen and times[0] > now - 60:
            raise Refusal("too many pushes to sessions that are not open here")
        times.append(now)

    def _forget_before(self, then: float) -> None:
        for peer in [p for p, times in self._recent.items() if times[-1] < then]:
            del self._recent[peer]
