"""How averagers find each other, without I/O: what peers say and what the time is in, actions out.

Who wants to average declares under its group's key until when others may join it. Everybody asks the peer that began
before him, by (declared time, peer id), to be its leader; whoever is accepted sends its own followers there. At its
declared time, or when its group is full, a leader begins with those who came.
Source: hivemind 1.1.12, ``averaging/matchmaking.py``. Times are unix seconds.

Stock peers hold a lock while they wait for a leader's first answer, so that those who ask each other, or in a circle,
all wait until they give up. Here those who ask meanwhile are put in line, unless the leader's answer makes no
difference to theirs: in every circle somebody asks one that begins later, and is refused at once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.averaging.group import About, Group, leader_message, suggested_leader
from kwaainet_bridge.hivemind.averaging.group_keys import (
    Numbers,
    check_bits,
    group_key,
    next_bits,
    stock_numbers,
)
from kwaainet_bridge.hivemind.dht.id import ID_BYTES
from kwaainet_bridge.wire.averaging import MessageCode
from kwaainet_bridge.wire.pb import averaging_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True, slots=True)
class Declare:
    """Store under ``key`` whether this peer looks for a group until ``expiration``."""

    key: str
    expiration: float
    looking: bool


@dataclass(frozen=True, slots=True)
class Search:
    """Read ``key`` and report with ``found``."""

    key: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Send ``request`` to ``leader`` and report each message with ``leader_said``, the end with ``leader_failed``."""

    leader: PeerId
    request: pb.JoinRequest


@dataclass(frozen=True, slots=True)
class Leave:
    """Listen no more to the leader that was asked last."""


@dataclass(frozen=True, slots=True)
class Say:
    """Send ``message`` to a follower; with ``last`` its stream ends."""

    follower: PeerId
    message: pb.MessageFromLeader
    last: bool


@dataclass(frozen=True, slots=True)
class Begin:
    """The group is assembled. Looking for it is over."""

    group: Group


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The deadline has come without a group. Looking for one is over."""


Action: TypeAlias = Declare | Search | Ask | Leave | Say | Begin | GiveUp


@dataclass(frozen=True, slots=True)
class Rules:
    """What a run's peers should have alike, in seconds and members."""

    target_size: int | None = None
    min_size: int = 2
    matchmaking_seconds: float = defaults.AVERAGING_MATCHMAKING_SECONDS
    request_seconds: float = defaults.AVERAGING_REQUEST_SECONDS

    def __post_init__(self) -> None:
        if self.min_size < 2 or (self.target_size is not None and self.target_size < self.min_size):
            raise ValueError(f"group of {self.min_size} to {self.target_size} members: at least 2 must fit")

    @property
    def max_size(self) -> int:
        return self.target_size or defaults.AVERAGING_MAX_GROUP


@dataclass(slots=True)
class _Leader:
    """The leader that we ask or follow."""

    peer: PeerId
    expiration: float  # what we told it
    answer_by: float
    accepted: bool = False


class Matchmaking:
    """One averager's search for a group, again and again. Each method returns what is to be done, in order."""

    def __init__(
        self,
        own: PeerId,
        prefix: str,
        schema: bytes,
        rules: Rules,
        *,
        rng: random.Random,
        bits: str = "",
        client_mode: bool = False,
        leads: bool = True,
        allowed: Collection[PeerId] | None = None,
        numbers: Numbers = stock_numbers,
    ) -> None:
        """Unless it ``leads``, this peer only joins groups of others. With ``allowed`` it joins with nobody else.

        ``numbers`` draws the group bits of the next round.
        """
        check_bits(bits)
        self.bits = bits
        self.looking = False
        self._own = own
        self._prefix = prefix
        self._schema = schema
        self._rules = rules
        self._rng = rng
        self._client_mode = client_mode
        self._leads = leads and not client_mode
        self._allowed = None if allowed is None else frozenset(allowed) | {own}
        self._numbers = numbers
        self._reset()

    def _reset(self) -> None:
        self._gather = b""
        self._scheduled = -math.inf
        self._deadline = math.inf
        self._declared: Declare | None = None
        self._leader: _Leader | None = None
        self._followers: dict[PeerId, bytes] = {}
        self._in_line: dict[PeerId, pb.JoinRequest] = {}
        self._candidates: list[tuple[float, PeerId]] = []
        self._tried: set[tuple[float, PeerId]] = set()
        self._redirected: set[PeerId] = set()
        self._search_at = math.inf
        self._pause = defaults.AVERAGING_FIRST_SEARCH_SECONDS

    @property
    def key(self) -> str:
        return group_key(self._prefix, self.bits)

    @property
    def followers(self) -> tuple[PeerId, ...]:
        return tuple(self._followers)

    @property
    def following(self) -> PeerId | None:
        """The leader that accepted us."""
        return self._leader.peer if self._leader and self._leader.accepted else None

    # --- what happens -------------------------------------------------------------------------------------

    def start(self, now: float, *, gather: bytes, scheduled: float, deadline: float) -> list[Action]:
        """Look for a group that begins at ``scheduled`` or as soon after as it can, but before ``deadline``."""
        if self.looking:
            raise RuntimeError("this averager looks for a group already")
        self._reset()
        self.looking = True
        self._gather, self._scheduled, self._deadline = gather, scheduled, deadline
        self._search_at = now
        return self._declare(now) + self.tick(now)

    def stop(self) -> list[Action]:
        """Look no more."""
        return self._end([]) if self.looking else []

    def tick(self, now: float) -> list[Action]:
        """Do what is due; see ``next_time``."""
        actions: list[Action] = []
        if self.looking and self._leader and now >= self._leader.answer_by:
            actions += [Leave(), *self._without_leader(now)]
        if self.looking and not self._leader and self._declared and now >= self._declared.expiration:
            if len(self._followers) + 1 >= self._rules.min_size:
                return actions + self._assemble()
            actions += self._disband(None)
            if now < self._deadline:
                actions += self._declare(now)
        if self.looking and now >= self._deadline:
            return actions + self._end([GiveUp()])
        if self.looking and not self._leader and now >= self._search_at:
            self._search_at = math.inf
            actions.append(Search(self.key))
        return actions + self._choose(now)

    def next_time(self) -> float:
        """When ``tick`` is due."""
        if not self.looking:
            return math.inf
        if self._leader:
            return min(self._deadline, self._leader.answer_by)
        begin = self._declared.expiration if self._declared else math.inf
        return min(self._deadline, self._search_at, begin)

    def found(self, now: float, entries: Iterable[tuple[PeerId, float]]) -> list[Action]:
        """Who declared under our key, and until when."""
        if not self.looking:
            return []
        self._candidates = sorted(
            (expiration, peer)
            for peer, expiration in entries
            if peer != self._own and self._allows(peer) and math.isfinite(expiration)
        )
        # who leads nobody may look for days: often enough to find a group while it can be joined
        patience = 0.0 if self._leads else self._rules.matchmaking_seconds / 4
        self._search_at = now + max(self._pause, patience)
        self._pause = min(2 * self._pause, defaults.AVERAGING_SEARCH_SECONDS)
        return self.tick(now)

    def asked(self, peer: PeerId, request: pb.JoinRequest) -> list[Action]:
        """A peer wants to join our group."""
        leader = self._leader
        if leader is None or leader.accepted or self._refusal(peer, request) is not None:
            return self._judge(peer, request)
        self._in_line[peer] = request
        if peer != leader.peer or not self._begins_before(peer, request):
            return []
        self._leader = None  # it began later than we had heard, and would refuse us
        return [Leave(), *self._judge_line()]

    def left(self, peer: PeerId) -> None:
        """A follower, or one in line, has gone."""
        self._followers.pop(peer, None)
        self._in_line.pop(peer, None)

    def leader_said(self, now: float, message: pb.MessageFromLeader) -> list[Action]:
        """The leader that was asked last has answered."""
        leader = self._leader
        if not self.looking or leader is None:
            return []
        code = int(message.code)
        if not leader.accepted:
            if code != MessageCode.ACCEPTED:
                return [Leave(), *self._without_leader(now)]
            leader.accepted = True
            leader.answer_by = max(now, leader.expiration) + self._rules.request_seconds
            return self._disband(leader.peer) + self._judge_line()
        if code == MessageCode.BEGIN_ALLREDUCE:
            try:
                group = Group.read(message, own=self._own, leader=leader.peer, max_size=self._rules.max_size)
            except RemoteError:
                return [Leave(), *self._without_leader(now)]
            if not all(map(self._allows, group.members)):
                return [Leave(), *self._without_leader(now)]
            return self._begin(group, [])
        other = suggested_leader(message)
        redirects = code in (MessageCode.GROUP_DISBANDED, MessageCode.CANCELLED)
        if redirects and other and self._allows(other) and other not in self._redirected | {self._own}:
            self._redirected.add(other)  # once: two peers could send us back and forth
            return [Leave(), self._ask(now, other)]
        return [Leave(), *self._without_leader(now)]

    def leader_failed(self, now: float) -> list[Action]:
        """The stream to the leader that was asked last has ended."""
        return self._without_leader(now) if self.looking and self._leader else []

    # --- being led ----------------------------------------------------------------------------------------

    def _choose(self, now: float) -> list[Action]:
        """Ask the next who began before us."""
        if not self.looking or self._leader:
            return []
        ours = (self._declared.expiration, self._own) if self._declared else None
        for candidate in self._candidates:
            expiration, peer = candidate
            if ours is not None and candidate > ours:
                break
            if expiration > now and candidate not in self._tried:
                self._tried.add(candidate)
                return [self._ask(now, peer)]
        return []

    def _ask(self, now: float, leader: PeerId) -> Ask:
        expiration = self._declared.expiration if self._declared else self._begin_by(now)
        self._leader = _Leader(leader, expiration, now + self._rules.request_seconds)
        request = pb.JoinRequest(
            schema_hash=self._schema,
            expiration=expiration,
            client_mode=self._client_mode,
            gather=self._gather,
            group_key=self.key,
        )
        return Ask(leader, request)

    def _without_leader(self, now: float) -> list[Action]:
        self._leader = None
        return self._judge_line() + self.tick(now)

    # --- leading ------------------------------------------------------------------------------------------

    def _begin_by(self, now: float) -> float:
        return min(max(self._scheduled, now + self._rules.matchmaking_seconds), self._deadline)

    def _declare(self, now: float) -> list[Action]:
        if not self._leads:
            return []
        self._declared = Declare(self.key, self._begin_by(now), looking=True)
        self._redirected.clear()
        return [self._declared]

    def _judge_line(self) -> list[Action]:
        in_line, self._in_line = self._in_line, {}
        return [action for peer, request in in_line.items() for action in self._judge(peer, request)]

    def _judge(self, peer: PeerId, request: pb.JoinRequest) -> list[Action]:
        refusal = self._refusal(peer, request)
        if refusal is not None:
            return [Say(peer, refusal, last=True)]
        self._followers[peer] = request.gather
        accepted = Say(peer, leader_message(MessageCode.ACCEPTED), last=False)
        if len(self._followers) + 1 >= self._rules.max_size:
            return [accepted, *self._assemble()]
        return [accepted]

    def _refusal(self, peer: PeerId, request: pb.JoinRequest) -> pb.MessageFromLeader | None:
        """The answer to a peer that cannot join. The order of reasons is the stock leader's."""
        code = None
        if not self.looking or not self._allows(peer):
            code = MessageCode.NOT_LOOKING_FOR_GROUP
        elif not request.schema_hash or not math.isfinite(request.expiration) or self._client_mode:
            code = MessageCode.PROTOCOL_VIOLATION
        elif request.schema_hash != self._schema:
            code = MessageCode.BAD_SCHEMA_HASH
        elif request.group_key != self.key:
            code = MessageCode.BAD_GROUP_KEY
        elif self._declared is None:
            code = MessageCode.NOT_DECLARED
        elif self._declared.expiration > (request.expiration or math.inf):
            code = MessageCode.BAD_EXPIRATION_TIME
        elif self.following is not None:
            return leader_message(MessageCode.NOT_A_LEADER, suggested=self.following)
        elif peer == self._own or peer in self._followers or peer in self._in_line:
            code = MessageCode.DUPLICATE_PEER_ID
        elif len(self._followers) + 1 >= self._rules.max_size:
            code = MessageCode.GROUP_IS_FULL
        elif not _can_average_with(request.gather):
            code = MessageCode.PROTOCOL_VIOLATION
        return None if code is None else leader_message(code)

    def _allows(self, peer: PeerId) -> bool:
        return self._allowed is None or peer in self._allowed

    def _begins_before(self, peer: PeerId, request: pb.JoinRequest) -> bool:
        """Whether we, who are declared, lead rather than the peer that asks."""
        assert self._declared is not None
        return (self._declared.expiration, self._own) < (request.expiration or math.inf, peer)

    def _disband(self, new_leader: PeerId | None) -> list[Action]:
        message = leader_message(MessageCode.GROUP_DISBANDED, suggested=new_leader)
        followers, self._followers = self._followers, {}
        return [Say(follower, message, last=True) for follower in followers]

    def _assemble(self) -> list[Action]:
        gathered = {self._own: self._gather, **self._followers}
        members = list(gathered)
        self._rng.shuffle(members)
        group = Group(
            self._rng.randbytes(ID_BYTES), tuple(members), tuple(gathered[member] for member in members)
        )
        message = group.message()
        followers, self._followers = self._followers, {}
        return self._begin(group, [Say(follower, message, last=True) for follower in followers])

    # --- the end ------------------------------------------------------------------------------------------

    def _begin(self, group: Group, actions: list[Action]) -> list[Action]:
        index, size = group.members.index(self._own), len(group.members)
        ended = self._end([*actions, Begin(group)])
        self.bits = next_bits(
            self.bits, group.group_id, index, size, self._rules.target_size, numbers=self._numbers
        )
        return ended

    def _end(self, last: list[Action]) -> list[Action]:
        actions: list[Action] = [*self._disband(None), *last]
        if self._leader:
            actions.append(Leave())
        if self._declared:
            after = math.nextafter(self._declared.expiration, math.inf)  # later than what it replaces
            actions.append(Declare(self._declared.key, after, looking=False))
        self.looking = False
        self._leader = self._declared = None
        return actions + self._judge_line()


def _can_average_with(gather: bytes) -> bool:
    """One member's words reach the whole group, and a wrong one would fail it."""
    try:
        return About.read(gather).sound
    except RemoteError:
        return False
