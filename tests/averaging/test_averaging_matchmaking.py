"""Matchmaking as a machine: what each peer says in each state, and what it is answered."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

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
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.pb import averaging_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId

OURS, LOW, HIGH, OTHER = (PeerId(bytes([0, 1, n])) for n in (5, 1, 9, 7))
SCHEMA = b"s" * 20
NOW = 1000.0
RULES = Rules(target_size=4, matchmaking_seconds=5.0, request_seconds=3.0)
GATHER = About(None, Mode.NODE, None).packed()


def machine(rules: Rules = RULES, **options: Any) -> Matchmaking:
    return Matchmaking(OURS, "run", SCHEMA, rules, rng=random.Random(0), **options)


def started(now: float = NOW, *, deadline: float = math.inf, **options: Any) -> Matchmaking:
    looking = machine(**options)
    looking.start(now, gather=GATHER, scheduled=now, deadline=deadline)
    return looking


def request(**fields: Any) -> pb.JoinRequest:
    return pb.JoinRequest(
        **{"schema_hash": SCHEMA, "expiration": NOW + 10, "gather": GATHER, "group_key": "run.0b"} | fields
    )


def said(actions: list[Action], follower: PeerId) -> list[str]:
    """The codes that a follower is told."""
    return [
        pb.MessageCode.Name(action.message.code)
        for action in actions
        if isinstance(action, Say) and action.follower == follower
    ]


def only(actions: list[Action], kind: type[Any]) -> Any:
    (found,) = [action for action in actions if isinstance(action, kind)]
    return found


def followed(looking: Matchmaking, leader: PeerId = LOW) -> list[Action]:
    """Have a machine follow a leader."""
    ask = only(looking.found(NOW, [(leader, NOW + 1)]), Ask)
    assert ask.leader == leader
    return looking.leader_said(NOW, leader_message(MessageCode.ACCEPTED))


# --- declaring and searching ------------------------------------------------------------------------------


def test_whoever_looks_declares_itself_and_searches() -> None:
    actions = machine().start(NOW, gather=GATHER, scheduled=NOW + 2, deadline=NOW + 60)
    assert actions == [Declare("run.0b", NOW + 5, looking=True), Search("run.0b")]


@pytest.mark.parametrize(
    ("scheduled", "deadline", "begins"), [(NOW + 30, NOW + 60, NOW + 30), (NOW, NOW + 4, NOW + 4)]
)
def test_it_begins_when_scheduled_but_before_the_deadline(
    scheduled: float, deadline: float, begins: float
) -> None:
    actions = machine().start(NOW, gather=GATHER, scheduled=scheduled, deadline=deadline)
    assert only(actions, Declare).expiration == begins


def test_a_peer_in_client_mode_does_not_declare_and_asks_anybody() -> None:
    looking = machine(client_mode=True)
    assert looking.start(NOW, gather=GATHER, scheduled=NOW, deadline=math.inf) == [Search("run.0b")]
    ask = only(looking.found(NOW, [(HIGH, NOW + 40)]), Ask)
    assert ask.leader == HIGH
    assert ask.request.client_mode
    assert ask.request.expiration == NOW + 5


def test_it_searches_again_after_pauses_that_grow() -> None:
    looking = started()
    pauses, now = [], NOW
    for _ in range(7):
        assert looking.found(now, []) == []
        again = looking.next_time()
        assert looking.tick(again) == [Search("run.0b")]
        assert looking.next_time() == NOW + 5  # until the answer there is no other search
        pauses.append(again - now)
        now = again
    first, longest = defaults.AVERAGING_FIRST_SEARCH_SECONDS, defaults.AVERAGING_SEARCH_SECONDS
    assert pauses == pytest.approx([min(first * 2**n, longest) for n in range(7)])


def test_it_declares_again_when_nobody_came_and_gives_up_at_the_deadline() -> None:
    looking = started(deadline=NOW + 8)
    looking.found(NOW, [])
    assert only(looking.tick(NOW + 5), Declare) == Declare("run.0b", NOW + 8, looking=True)
    actions = looking.tick(NOW + 8)
    assert actions[0] == GiveUp()
    withdrawn = only(actions, Declare)
    assert not withdrawn.looking
    assert withdrawn.expiration == math.nextafter(NOW + 8, math.inf)
    assert not looking.looking
    assert looking.next_time() == math.inf


# --- asking -----------------------------------------------------------------------------------------------


def test_it_asks_the_one_that_began_first_and_each_only_once() -> None:
    looking = started()
    entries = [(HIGH, NOW + 3), (LOW, NOW + 2), (OURS, NOW + 1), (OTHER, NOW + 6)]
    ask = only(looking.found(NOW, entries), Ask)
    assert ask.leader == LOW
    assert ask.request == pb.JoinRequest(
        schema_hash=SCHEMA, expiration=NOW + 5, gather=GATHER, group_key="run.0b"
    )
    refused = looking.leader_said(NOW, leader_message(MessageCode.GROUP_IS_FULL))
    assert refused[0] == Leave()
    assert only(refused, Ask).leader == HIGH
    assert looking.leader_failed(NOW) == []  # the third began after us
    assert looking.found(NOW, entries) == []


@pytest.mark.parametrize(("peer", "asks"), [(LOW, True), (HIGH, False)])
def test_of_two_that_begin_at_once_the_lower_id_leads(peer: PeerId, asks: bool) -> None:
    assert any(isinstance(action, Ask) for action in started().found(NOW, [(peer, NOW + 5)])) is asks


@pytest.mark.parametrize("expiration", [NOW, NOW - 1, math.nan, math.inf])
def test_it_asks_nobody_whose_time_is_over_or_none(expiration: float) -> None:
    assert started(client_mode=True).found(NOW, [(LOW, expiration)]) == []


def test_a_leader_that_does_not_answer_is_left() -> None:
    looking = started()
    looking.found(NOW, [(LOW, NOW + 4), (HIGH, NOW + 4.5)])
    assert looking.next_time() == NOW + 3
    actions = looking.tick(NOW + 3)
    assert actions[0] == Leave()
    assert only(actions, Ask).leader == HIGH


def test_a_leader_that_accepted_has_until_its_time_and_an_answer_more() -> None:
    looking = started()
    assert followed(looking) == []
    assert looking.following == LOW
    assert Leave() not in looking.tick(NOW + 7.9)
    actions = looking.tick(NOW + 8)
    assert Leave() in actions
    assert only(actions, Declare).expiration == NOW + 13
    assert looking.following is None


def test_a_follower_begins_with_the_leaders_group() -> None:
    looking = started(bits="01")
    looking.found(NOW, [(LOW, NOW + 1)])
    looking.leader_said(NOW, leader_message(MessageCode.ACCEPTED))
    group = Group(bytes(range(20)), (HIGH, LOW, OURS), (GATHER,) * 3)
    actions = looking.leader_said(NOW + 1, group.message())
    assert actions[0] == Begin(group)
    assert Leave() in actions
    assert not only(actions, Declare).looking
    assert looking.bits == "11"  # sample(range(4), 3)[2] is 3
    assert not looking.looking


def test_a_group_without_its_leader_is_no_group() -> None:
    looking = started()
    followed(looking)
    actions = looking.leader_said(NOW, Group(b"g", (HIGH, OURS), (GATHER,) * 2).message())
    assert Leave() in actions
    assert looking.looking


@pytest.mark.parametrize("code", [MessageCode.GROUP_DISBANDED, MessageCode.CANCELLED])
def test_a_follower_goes_where_its_leader_went_but_not_back_and_forth(code: MessageCode) -> None:
    looking = started()
    followed(looking)
    actions = looking.leader_said(NOW, leader_message(code, suggested=HIGH))
    assert actions[0] == Leave()
    assert only(actions, Ask).leader == HIGH
    looking.leader_said(NOW, leader_message(MessageCode.ACCEPTED))
    actions = looking.leader_said(NOW, leader_message(code, suggested=HIGH))
    assert not any(isinstance(action, Ask) for action in actions)


@pytest.mark.parametrize("suggested", [None, OURS])
def test_a_follower_without_a_leader_looks_on(suggested: PeerId | None) -> None:
    looking = started()
    followed(looking)
    actions = looking.leader_said(NOW, leader_message(MessageCode.GROUP_DISBANDED, suggested=suggested))
    assert actions == [Leave()]
    assert looking.looking


def test_a_leader_suggested_in_a_refusal_is_not_followed() -> None:
    looking = started()
    looking.found(NOW, [(LOW, NOW + 1)])
    actions = looking.leader_said(NOW, leader_message(MessageCode.NOT_A_LEADER, suggested=HIGH))
    assert actions == [Leave()]


# --- leading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"schema_hash": b""}, "PROTOCOL_VIOLATION"),
        ({"expiration": math.inf}, "PROTOCOL_VIOLATION"),
        ({"expiration": math.nan}, "PROTOCOL_VIOLATION"),
        ({"schema_hash": b"x"}, "BAD_SCHEMA_HASH"),
        ({"group_key": "run.0b1"}, "BAD_GROUP_KEY"),
        ({"expiration": NOW + 4}, "BAD_EXPIRATION_TIME"),
        ({"gather": b"\xc1"}, "PROTOCOL_VIOLATION"),
        ({"gather": About(10.0, Mode.NODE, None).packed()}, "ACCEPTED"),
        ({"gather": pack([-1.0, 0, pack(None)])}, "PROTOCOL_VIOLATION"),
        ({}, "ACCEPTED"),
        ({"expiration": 0.0}, "ACCEPTED"),
    ],
)
def test_who_may_join(fields: dict[str, Any], code: str) -> None:
    assert said(started().asked(HIGH, request(**fields)), HIGH) == [code]


def test_only_allowed_peers_are_asked_followed_and_accepted() -> None:
    looking = started(allowed=[HIGH])
    assert said(looking.asked(OTHER, request()), OTHER) == ["NOT_LOOKING_FOR_GROUP"]
    assert said(looking.asked(HIGH, request()), HIGH) == ["ACCEPTED"]
    assert not [a for a in looking.found(NOW, [(LOW, NOW + 1)]) if isinstance(a, Ask)]
    (ask,) = (a for a in looking.found(NOW, [(LOW, NOW + 1), (HIGH, NOW + 2)]) if isinstance(a, Ask))
    assert ask.leader == HIGH
    looking.leader_said(NOW, leader_message(MessageCode.ACCEPTED))
    group = Group(b"id", (OURS, HIGH, LOW), (b"",) * 3)
    assert Leave() in looking.leader_said(NOW, group.message())
    assert looking.looking


def test_who_does_not_look_for_a_group_accepts_nobody() -> None:
    assert said(machine().asked(HIGH, request()), HIGH) == ["NOT_LOOKING_FOR_GROUP"]


def test_a_peer_in_client_mode_leads_nobody() -> None:
    assert said(started(client_mode=True).asked(HIGH, request()), HIGH) == ["PROTOCOL_VIOLATION"]


def test_nobody_joins_twice_and_nobody_joins_itself() -> None:
    looking = started()
    looking.asked(HIGH, request())
    assert said(looking.asked(HIGH, request()), HIGH) == ["DUPLICATE_PEER_ID"]
    assert said(looking.asked(OURS, request()), OURS) == ["DUPLICATE_PEER_ID"]


def test_a_full_group_begins_at_once() -> None:
    looking = started(bits="00")
    joins = request(group_key="run.0b00")
    looking.asked(HIGH, joins)
    looking.asked(LOW, joins)
    actions = looking.asked(OTHER, joins)
    assert said(actions, OTHER) == ["ACCEPTED", "BEGIN_ALLREDUCE"]
    assert said(actions, HIGH) == said(actions, LOW) == ["BEGIN_ALLREDUCE"]
    group = only(actions, Begin).group
    assert set(group.members) == {OURS, LOW, HIGH, OTHER}
    assert len(group.group_id) == 20
    assert not only(actions, Declare).looking
    assert len(looking.bits) == 2


def test_at_its_time_a_leader_begins_with_those_who_came() -> None:
    looking = started()
    looking.asked(HIGH, request())
    actions = looking.tick(NOW + 5)
    assert said(actions, HIGH) == ["BEGIN_ALLREDUCE"]
    assert set(only(actions, Begin).group.members) == {OURS, HIGH}


def test_at_its_time_a_leader_with_too_few_sends_them_away() -> None:
    looking = started(rules=Rules(min_size=3))
    looking.asked(HIGH, request())
    actions = looking.tick(NOW + 5)
    assert said(actions, HIGH) == ["GROUP_DISBANDED"]
    assert only(actions, Declare).expiration == NOW + 10
    assert looking.followers == ()


def test_a_follower_that_left_is_no_member() -> None:
    looking = started()
    looking.asked(HIGH, request())
    looking.left(HIGH)
    assert not any(isinstance(action, Begin) for action in looking.tick(NOW + 5))


def test_who_finds_a_leader_sends_its_followers_there() -> None:
    looking = started()
    looking.asked(HIGH, request())
    actions = followed(looking)
    assert said(actions, HIGH) == ["GROUP_DISBANDED"]
    assert only(actions, Say).message.suggested_leader == LOW.raw
    refused = looking.asked(OTHER, request())
    assert said(refused, OTHER) == ["NOT_A_LEADER"]
    assert only(refused, Say).message.suggested_leader == LOW.raw


@pytest.mark.parametrize(("answer", "code"), [("ACCEPTED", "NOT_A_LEADER"), ("GROUP_IS_FULL", "ACCEPTED")])
def test_who_asks_while_we_ask_waits_for_our_answer(answer: str, code: str) -> None:
    looking = started()
    looking.found(NOW, [(LOW, NOW + 1)])
    assert looking.asked(HIGH, request()) == []
    assert said(looking.leader_said(NOW, leader_message(MessageCode[answer])), HIGH) == [code]


def test_who_waits_in_line_and_leaves_is_forgotten() -> None:
    looking = started()
    looking.found(NOW, [(LOW, NOW + 1)])
    looking.asked(HIGH, request())
    looking.left(HIGH)
    assert looking.leader_failed(NOW) == []


def test_of_two_that_ask_each_other_the_one_that_begins_later_is_refused_at_once() -> None:
    looking = started()
    looking.found(NOW, [(LOW, NOW + 1)])
    assert said(looking.asked(LOW, request(expiration=NOW + 1)), LOW) == ["BAD_EXPIRATION_TIME"]
    assert looking.leader_said(NOW, leader_message(MessageCode.ACCEPTED)) == []
    assert looking.following == LOW


@pytest.mark.parametrize(("peer", "expiration"), [(LOW, NOW + 10), (HIGH, NOW + 5)])
def test_of_two_that_ask_each_other_the_one_that_begins_first_leads_at_once(
    peer: PeerId, expiration: float
) -> None:
    looking = started()
    looking.found(NOW, [(peer, NOW + 1)])  # as it had declared before
    actions = looking.asked(peer, request(expiration=expiration))
    assert actions[0] == Leave()
    assert said(actions, peer) == ["ACCEPTED"]
    assert looking.followers == (peer,)
    assert looking.leader_failed(NOW) == []


def test_of_two_that_ask_each_other_and_begin_at_once_the_lower_id_is_waited_for() -> None:
    looking = started()
    looking.found(NOW, [(LOW, NOW + 5)])
    assert looking.asked(LOW, request(expiration=NOW + 5)) == []
    actions = looking.tick(NOW + 3)  # it does not answer
    assert said(actions, LOW) == ["ACCEPTED"]


def test_whoever_cannot_join_need_not_wait_for_our_answer() -> None:
    looking = started()
    looking.found(NOW, [(LOW, NOW + 1)])
    assert said(looking.asked(HIGH, request(group_key="run.0b1")), HIGH) == ["BAD_GROUP_KEY"]
    assert looking.asked(OTHER, request()) == []
    assert said(looking.asked(OTHER, request()), OTHER) == ["DUPLICATE_PEER_ID"]


def test_who_stops_sends_everybody_away() -> None:
    looking = started()
    looking.asked(HIGH, request())
    actions = looking.stop()
    assert said(actions, HIGH) == ["GROUP_DISBANDED"]
    assert not only(actions, Declare).looking
    assert looking.stop() == []
    busy = started()
    with pytest.raises(RuntimeError, match="looks for a group already"):
        busy.start(NOW, gather=GATHER, scheduled=NOW, deadline=math.inf)


def test_rules_and_bits_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 2 must fit"):
        Rules(target_size=1)
    with pytest.raises(ValueError, match="only 0 and 1"):
        machine(bits="012")
