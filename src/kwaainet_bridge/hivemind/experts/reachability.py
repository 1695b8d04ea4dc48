"""ReachabilityProtocol.rpc_check: dial a peer back, for peers that want to know if others can reach them.

Source: Petals main ``server/reachability.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import BridgeError, Refusal
from kwaainet_bridge.hivemind.experts.methods import RPC_CHECK
from kwaainet_bridge.net.dial_quota import DialQuota
from kwaainet_bridge.rpc import CallContext, RpcServer
from kwaainet_bridge.wire.pb.dht_pb2 import PingRequest, PingResponse
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

Probe = Callable[[PeerId], Awaitable[bool]]
"""Dials a peer over a connection of its own and asks it to check itself."""


class ReachabilityService:
    """Answers whether a peer can be dialled from here."""

    def __init__(self, own: PeerId, probe: Probe) -> None:
        self._own = own
        self._probe = probe
        self._under_way: set[PeerId] = set()
        self._quota = DialQuota(
            defaults.AUTONAT_DIALS,
            per_peer=defaults.AUTONAT_DIALS_PER_PEER,
            seconds=defaults.AUTONAT_PERIOD_SECONDS,
        )

    def mount(self, server: RpcServer) -> None:
        server.mount(RPC_CHECK, self.check)

    async def check(self, request: PingRequest, context: CallContext) -> PingResponse:
        """Answer True for this node's own id, else whether a fresh dial to the named peer succeeds."""
        peer = PeerId(request.peer.node_id)
        if peer == self._own:
            return PingResponse(available=True)
        if peer != context.peer:
            # stock peers ask only about themselves; anything else would make this node a scanner
            raise Refusal("a peer may ask about itself only")
        if peer in self._under_way or len(self._under_way) >= defaults.REACHABILITY_CHECKS_AT_ONCE:
            raise Refusal("busy with other checks")  # which is no verdict: stock peers do not count it
        if not self._quota.take(peer):
            raise Refusal("too many checks within a minute")
        available = False
        self._under_way.add(peer)
        try:
            with trio.move_on_after(defaults.REACHABILITY_CHECK_SECONDS):
                available = await self._probe(peer)
        except BridgeError as e:
            log.debug("dial-back to %s failed: %s", peer, e)
        finally:
            self._under_way.discard(peer)
        return PingResponse(available=available)
