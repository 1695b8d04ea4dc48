"""Carries out what matchmaking decides: DHT records, calls to leaders, answers to followers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.hivemind.averaging.group import Group, leader_message
from kwaainet_bridge.hivemind.averaging.group_keys import entries_of
from kwaainet_bridge.hivemind.averaging.matchmaking import (
    Action,
    Ask,
    Begin,
    Declare,
    GiveUp,
    Leave,
    Matchmaking,
    Say,
    Search,
)
from kwaainet_bridge.hivemind.averaging.methods import first_request
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.rpc import RpcClient, ServerStream, StreamMethod
from kwaainet_bridge.wire.averaging import MessageCode, code_name
from kwaainet_bridge.wire.pb import averaging_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

JoinMethod = StreamMethod[pb.JoinRequest, pb.MessageFromLeader]

_MESSAGES_TO_FOLLOWER = 2  # that it is accepted, and how it went on


class Meeting:
    """Runs one ``Matchmaking``. To be used while ``running`` is entered."""

    def __init__(
        self,
        machine: Matchmaking,
        dht: DhtNode,
        client: RpcClient,
        method: JoinMethod,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.machine = machine
        self._dht = dht
        self._client = client
        self._method = method
        self._clock = clock
        self._nursery: trio.Nursery | None = None
        self._changed = trio.Event()
        self._asking = trio.CancelScope()
        self._to_followers: dict[PeerId, trio.MemorySendChannel[pb.MessageFromLeader]] = {}
        self._found: Group | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Own the tasks that actions start. Leaving the block cancels them."""
        async with trio.open_nursery() as self._nursery:
            yield
            self._nursery.cancel_scope.cancel()

    async def find_group(self, *, gather: bytes, scheduled: float, deadline: float) -> Group | None:
        """Look for a group until ``deadline``; None if there was none. Cancelled: followers are sent away."""
        self._found = None
        machine = self.machine
        try:
            self._do(machine.start(self._clock(), gather=gather, scheduled=scheduled, deadline=deadline))
            while machine.looking:
                with trio.move_on_after(max(0.0, machine.next_time() - self._clock())):
                    await self._changed.wait()
                self._do(machine.tick(self._clock()))
        finally:
            self._do(machine.stop())
        return self._found

    async def serve(self, stream: ServerStream[pb.JoinRequest, pb.MessageFromLeader]) -> None:
        """Answer one peer that wants to join."""
        peer = stream.context.peer
        request = await first_request(stream)
        send, receive = trio.open_memory_channel[pb.MessageFromLeader](_MESSAGES_TO_FOLLOWER)
        is_second = peer in self._to_followers
        if not is_second:
            self._to_followers[peer] = send
        try:
            if is_second:
                # the machine knows one conversation per peer: the other one goes on
                await stream.send(leader_message(MessageCode.DUPLICATE_PEER_ID))
                return
            self._do(self.machine.asked(peer, request))
            async for message in receive:
                await stream.send(message)
        finally:
            if not is_second and self._to_followers.get(peer) is send:
                del self._to_followers[peer]
                self.machine.left(peer)

    def _do(self, actions: Iterable[Action]) -> None:
        assert self._nursery is not None, "the averager is not running"
        for action in actions:
            match action:
                case Declare():
                    self._nursery.start_soon(self._declare, action)
                case Search(key):
                    self._nursery.start_soon(self._search, key)
                case Ask():
                    self._asking = trio.CancelScope()
                    self._nursery.start_soon(self._ask, action, self._asking)
                case Leave():
                    self._asking.cancel()
                case Say(follower, message, last):
                    self._say(follower, message, last=last)
                case Begin(group):
                    log.info("averaging: a group of %d begins", len(group.members))
                    self._found = group
                case GiveUp():
                    log.info("averaging: no group in time")
        self._changed.set()
        self._changed = trio.Event()

    def _say(self, follower: PeerId, message: pb.MessageFromLeader, *, last: bool) -> None:
        channel = self._to_followers.get(follower)
        if channel is None:
            return  # it left
        log.debug("averaging: %s to %s", code_name(message.code), follower)
        channel.send_nowait(message)
        if last:
            channel.close()
            del self._to_followers[follower]

    async def _declare(self, action: Declare) -> None:
        result = await self._dht.store(
            action.key, action.looking, action.expiration, subkey=self._dht.peer_id.raw
        )
        if not result.ok:
            log.info("averaging: nobody keeps the record of %s", action.key)

    async def _search(self, key: str) -> None:
        entries = entries_of(await self._dht.get(key))
        looking = [(peer, entry.expiration) for peer, entry in entries if entry.value]
        self._do(self.machine.found(self._clock(), looking))

    async def _ask(self, action: Ask, scope: trio.CancelScope) -> None:
        with scope:
            try:
                async with self._client.stream(
                    action.leader,
                    self._method,
                    open_timeout=defaults.CONNECT_SECONDS,
                    max_message_bytes=defaults.AVERAGING_LEADER_BYTES,
                ) as stream:
                    await stream.send(action.request)
                    await stream.end()
                    async for message in stream:
                        log.debug("averaging: %s says %s", action.leader, code_name(message.code))
                        self._do(self.machine.leader_said(self._clock(), message))
            except (NetworkError, RemoteError) as e:
                log.debug("averaging: %s cannot lead: %.200s", action.leader, e)
        if scope is self._asking and not scope.cancel_called:
            self._do(self.machine.leader_failed(self._clock()))
