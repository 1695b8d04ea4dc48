"""Messages of averagers, and what a member does with them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from fuzz.wire_targets import expect
from kwaainet_bridge.hivemind.averaging.group import About, Group, Mode, leader_message, suggested_leader
from kwaainet_bridge.hivemind.averaging.matchmaking import Ask, Matchmaking, Rules, Say
from kwaainet_bridge.rpc.streams import parse
from kwaainet_bridge.wire.averaging import AveragingData, DownloadData, MessageCode
from kwaainet_bridge.wire.pb import averaging_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId

OWN, PEER = PeerId(bytes((0, 1, 5))), PeerId(bytes((0, 1, 1)))
SCHEMA: Final = b"schema"
_NOW: Final = 1000.0


def averaging_data(data: bytes) -> None:
    written = b"".join(AveragingData.read(data).parts())
    expect(b"".join(AveragingData.read(written).parts()) == written, "round trip")


def download_data(data: bytes) -> None:
    written = b"".join(DownloadData.read(data).parts())
    expect(b"".join(DownloadData.read(written).parts()) == written, "round trip")


def about(data: bytes) -> None:
    """What a member says of itself."""
    About.read(data)


def join_request(data: bytes) -> None:
    """What a leader answers to it: one message, and the group stays one that can begin."""
    machine = _looking()
    actions = machine.asked(PEER, parse(pb.JoinRequest, data, "join"))
    expect(len(actions) == 1 and isinstance(actions[0], Say), "one answer")
    machine.tick(_NOW + 5)


def leader_says(data: bytes) -> None:
    """What a follower does with it, once as a leader's first word and once as its second."""
    message = parse(pb.MessageFromLeader, data, "leader")
    suggested_leader(message)
    for accepted in (False, True):
        machine = _looking()
        actions = machine.found(_NOW, [(PEER, _NOW + 1)])
        expect(any(isinstance(action, Ask) for action in actions), "the leader is asked")
        if accepted:
            machine.leader_said(_NOW, leader_message(MessageCode.ACCEPTED))
        machine.leader_said(_NOW, message)
        machine.tick(_NOW + 10)


def group(data: bytes) -> None:
    message = parse(pb.MessageFromLeader, data, "leader")
    read = Group.read(message, own=OWN, leader=PEER, max_size=8)
    expect({OWN, PEER} <= set(read.members), "it is our group")
    read.about()


def _looking() -> Matchmaking:
    machine = Matchmaking(OWN, "run", SCHEMA, Rules(target_size=8), rng=random.Random(0), bits="0")
    gather = About(None, Mode.NODE, None).packed()
    machine.start(_NOW, gather=gather, scheduled=_NOW, deadline=_NOW + 60)
    return machine


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "averaging-data": averaging_data,
    "averaging-download": download_data,
    "averaging-about": about,
    "averaging-join": join_request,
    "averaging-leader": leader_says,
    "averaging-group": group,
}
