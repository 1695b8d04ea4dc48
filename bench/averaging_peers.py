"""Averagers in simulated time: ``Matchmaking`` as it is, with simulated streams and DHT around it.

A ``Peer`` carries out what its ``Matchmaking`` decides, as ``averaging/meeting.py`` does with real streams: one
conversation per pair of peers, answers to conversations that were left are dropped, and the machine is ticked after
everything that happened to it. What a group does with its values is in ``averaging_reduction.py``.

A peer can die in two ways. With an end of stream, whoever talks with it learns of it one message later, and who
calls it is refused. Silently, nobody learns anything but by waiting.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from bench.averaging_network import Dht, Network
from bench.averaging_reduction import Reduction
from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.averaging.group import About, Group, Mode, leader_message
from kwaainet_bridge.hivemind.averaging.matchmaking import (
    Action,
    Ask,
    Begin,
    Declare,
    GiveUp,
    Leave,
    Matchmaking,
    Rules,
    Say,
    Search,
)
from kwaainet_bridge.wire.averaging import MessageCode
from kwaainet_bridge.wire.pb import averaging_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId

PREFIX, SCHEMA = "simulated", b"s" * 20
GATHER = About(None, Mode.NODE, None).packed()
TICK = 1e-6  # later than what is due: unix seconds are no finer than a quarter of it


@dataclass
class Look:
    """One peer's look for a group, and what it cost. Times are those of the network."""

    key: str
    began: float
    deadline: float
    ended: float | None = None
    declared: float | None = None
    """The time that it first told others the group would begin."""
    group: Group | None = None
    averaged: float | None = None
    """When the group's average was in."""
    missing: int = 0
    """Elements that kept their local values."""
    asks: int = 0
    messages: int = 0
    """That it sent to find a group: requests, answers and ends of streams before their time."""
    reads: int = 0
    writes: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    """What leaders answered instead of accepting it."""


class Conversation:
    """One stream: a peer asks another to lead it. Messages of one direction arrive in the order they were sent."""

    def __init__(self, asker: Peer, leader: Peer) -> None:
        self.asker, self.leader = asker, leader
        self.is_over = False
        self._at_asker = self._at_leader = 0.0  # the last arrival

    def request(self, request: pb.JoinRequest) -> None:
        self._to_leader(self.leader.asked, request)

    def answer(self, message: pb.MessageFromLeader, *, last: bool) -> None:
        self.leader.look_costs.messages += 1
        self._to_asker(self.asker.leader_said, message)
        if last:
            self.end()

    def end(self) -> None:
        """By the leader, or since it died with an end of stream."""
        self.is_over = True
        self._to_asker(self.asker.leader_ended)

    def leave(self) -> None:
        """By the asker, or since it died with an end of stream."""
        self.is_over = True
        self._to_leader(self.leader.follower_left)

    def delay(self) -> float:
        return self.asker.network.delay(self.asker.peer_id, self.leader.peer_id)

    def _to_asker(self, function: Callable[..., None], *arguments: object) -> None:
        self._at_asker = max(self._at_asker, self.asker.network.now + self.delay())
        self.asker.network.at(self._at_asker, function, self, *arguments)

    def _to_leader(self, function: Callable[..., None], *arguments: object) -> None:
        self._at_leader = max(self._at_leader, self.asker.network.now + self.delay())
        self.asker.network.at(self._at_leader, function, self, *arguments)


class Peer:
    """One averager. ``values``: float32, one-dimensional; they are averaged in place."""

    def __init__(
        self,
        number: int,
        network: Network,
        dht: Dht,
        peers: dict[PeerId, Peer],
        values: torch.Tensor,
        *,
        rules: Rules,
        bits: str,
        skew: float,
        seed: int,
    ) -> None:
        self.peer_id = PeerId(b"\x12\x20" + random.Random(f"{seed}:{number}").randbytes(32))
        self.network, self.values, self.peers = network, values, peers
        self.alive = True
        self.silent = False
        self.look: Look | None = None
        self.reduction: Reduction | None = None
        self.early: dict[bytes, list[tuple[PeerId, torch.Tensor]]] = {}
        self.machine = Matchmaking(
            self.peer_id, PREFIX, SCHEMA, rules, rng=random.Random(f"{number}:{seed}"), bits=bits
        )
        self._dht = dht
        self._rules = rules
        self._skew = skew
        self._asking: Conversation | None = None
        self._answering: dict[PeerId, Conversation] = {}
        self._alarm = 0
        self._idle = Look("", 0, 0)

    def clock(self) -> float:
        """Unix seconds, as this peer has them."""
        return self.network.now + self._skew

    @property
    def look_costs(self) -> Look:
        """What is done now counts here: peers answer also when they do not look for a group."""
        return self.look or self._idle

    @property
    def is_busy(self) -> bool:
        return self.alive and (self.machine.looking or self.reduction is not None)

    def start(self, timeout: float) -> None:
        """Look for a group."""
        if not self.alive:
            return
        now = self.clock()
        self.look = Look(self.machine.key, self.network.now, self.network.now + timeout)
        self._happened(
            self.machine.start(
                now,
                gather=GATHER,
                scheduled=now + self._rules.matchmaking_seconds,
                deadline=now + timeout,
            )
        )

    def die(self, *, silent: bool) -> None:
        self.alive, self.silent = False, silent
        if not silent:
            if self._asking is not None:
                self._asking.leave()
            for conversation in list(self._answering.values()):
                conversation.end()
            if self.reduction is not None:
                self.reduction.ends()

    # --- the machine --------------------------------------------------------------------------------------

    def _happened(self, actions: Iterable[Action]) -> None:
        self._do(actions)
        self.network.after(0.0, self._tick, None)

    def _tick(self, alarm: int | None) -> None:
        if self.alive and self.machine.looking and alarm in (None, self._alarm):
            self._do(self.machine.tick(self.clock()))
            self._alarm += 1
            due = self.machine.next_time() - self._skew + TICK
            if math.isfinite(due):
                self.network.at(max(due, self.network.now + TICK), self._tick, self._alarm)

    def _do(self, actions: Iterable[Action]) -> None:
        look = self.look_costs
        for action in actions:
            match action:
                case Declare(key, expiration, looking):
                    look.writes += 1
                    if looking and look.declared is None:
                        look.declared = expiration - self._skew
                    self._dht.store(key, self.peer_id, looking, expiration)
                case Search(key):
                    look.reads += 1
                    self._dht.read(key, self._found)
                case Ask(leader, request):
                    look.asks += 1
                    look.messages += 1
                    self._ask(self.peers[leader], request)
                case Leave():
                    if self._asking is not None and not self._asking.is_over:
                        look.messages += 1
                        self._asking.leave()
                    self._asking = None
                case Say(follower, message, last):
                    conversation = self._answering.get(follower)
                    if conversation is not None:
                        conversation.answer(message, last=last)
                        if last:
                            del self._answering[follower]
                case Begin(group):
                    look.ended, look.group = self.network.now, group
                    self.reduction = Reduction(self, group)
                case GiveUp():
                    look.ended = self.network.now
        if self.reduction is not None and not self.reduction.begun:
            self.reduction.begin()  # the machine's last words are said

    def _found(self, entries: list[tuple[PeerId, float]]) -> None:
        if self.alive:
            self._happened(self.machine.found(self.clock(), entries))

    # --- asking -------------------------------------------------------------------------------------------

    def _ask(self, leader: Peer, request: pb.JoinRequest) -> None:
        conversation = self._asking = Conversation(self, leader)
        opened = conversation.delay() + conversation.delay()

        def open_stream() -> None:
            if conversation.is_over or not self.alive:
                return
            if leader.alive:
                conversation.request(request)
            elif leader.silent:
                self.network.after(defaults.CONNECT_SECONDS - opened, self.leader_ended, conversation)
            else:
                self.leader_ended(conversation)

        self.network.after(opened, open_stream)

    def leader_said(self, conversation: Conversation, message: pb.MessageFromLeader) -> None:
        if self.alive and conversation is self._asking:
            code, look = MessageCode(int(message.code)), self.look_costs
            if code not in _WELCOME:
                name = code.name
                look.refusals[name] = look.refusals.get(name, 0) + 1
            self._happened(self.machine.leader_said(self.clock(), message))

    def leader_ended(self, conversation: Conversation) -> None:
        if self.alive and conversation is self._asking:
            self._asking = None
            self._happened(self.machine.leader_failed(self.clock()))

    # --- being asked --------------------------------------------------------------------------------------

    def asked(self, conversation: Conversation, request: pb.JoinRequest) -> None:
        if not self.alive:
            if not self.silent:
                conversation.end()
        elif conversation.asker.peer_id in self._answering:
            conversation.answer(leader_message(MessageCode.DUPLICATE_PEER_ID), last=True)
        else:
            self._answering[conversation.asker.peer_id] = conversation
            self._happened(self.machine.asked(conversation.asker.peer_id, request))

    def follower_left(self, conversation: Conversation) -> None:
        if self.alive and self._answering.get(conversation.asker.peer_id) is conversation:
            del self._answering[conversation.asker.peer_id]
            self.machine.left(conversation.asker.peer_id)


_WELCOME = (MessageCode.ACCEPTED, MessageCode.BEGIN_ALLREDUCE)
