"""A group of peers that average together, and what its members tell each other about themselves."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.averaging.group_keys import is_peer_id
from kwaainet_bridge.wire.averaging import MessageCode
from kwaainet_bridge.wire.msgpack import pack, unpack
from kwaainet_bridge.wire.pb import averaging_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId


class Mode(enum.IntEnum):
    """How a member takes part. Source: hivemind 1.1.12, ``averaging/allreduce.py``."""

    NODE = 0
    CLIENT = 1
    """Averages nothing for others; nobody can call it."""
    AUXILIARY = 2
    """Averages for others, with weight 0 for its own tensors."""


@dataclass(frozen=True, slots=True)
class About:
    """What one member says of itself: its bandwidth (None: not specified), its mode, and anything for the others.

    A bandwidth that was read may be any number: whoever refuses a group that stock members begin leaves them waiting.
    """

    bandwidth: float | None
    mode: Mode
    data: Any

    def packed(self) -> bytes:
        """Raises what ``pack`` raises for data that msgpack cannot carry."""
        return pack([self.bandwidth, int(self.mode), pack(self.data)])

    @classmethod
    def read(cls, raw: bytes) -> About:
        """Raises RemoteError."""
        if len(raw) > defaults.AVERAGING_GATHER_BYTES:
            raise RemoteError(
                f"gather: {len(raw)} bytes, at most {defaults.AVERAGING_GATHER_BYTES} are accepted"
            )
        fields = unpack(raw)
        if not isinstance(fields, list) or len(fields) != 3:
            raise RemoteError("gather: not a list of 3")
        bandwidth, mode, data = fields
        if isinstance(bandwidth, bool) or not isinstance(bandwidth, int | float | None):
            raise RemoteError(f"gather: bandwidth is {bandwidth!r:.40}")
        if isinstance(mode, bool) or mode not in tuple(Mode):
            raise RemoteError(f"gather: mode is {mode!r:.40}")
        if not isinstance(data, bytes):
            raise RemoteError("gather: its data are not bytes")
        return cls(bandwidth, Mode(mode), unpack(data))

    @property
    def sound(self) -> bool:
        """Whether the bandwidth is one; with others given, every group fails that has a member whose is not."""
        return self.bandwidth is None or 0 <= self.bandwidth < math.inf


@dataclass(frozen=True, slots=True)
class Group:
    """Members in the order that decides who averages what; ``about`` has the same order."""

    group_id: bytes
    members: tuple[PeerId, ...]
    gathered: tuple[bytes, ...]

    def about(self) -> tuple[About, ...]:
        """What the members say of themselves. Raises RemoteError."""
        return tuple(map(About.read, self.gathered))

    def message(self) -> pb.MessageFromLeader:
        return pb.MessageFromLeader(
            code=MessageCode.BEGIN_ALLREDUCE.name,
            group_id=self.group_id,
            ordered_peer_ids=[member.raw for member in self.members],
            gathered=self.gathered,
        )

    @classmethod
    def read(cls, message: pb.MessageFromLeader, *, own: PeerId, leader: PeerId, max_size: int) -> Group:
        """The group that a leader assembled. Raises RemoteError if it cannot be one of ours."""
        if not 0 < len(message.group_id) <= defaults.AVERAGING_GROUP_ID_BYTES:
            raise RemoteError(f"group: its id has {len(message.group_id)} bytes")
        if len(message.ordered_peer_ids) > max_size:
            raise RemoteError(
                f"group: {len(message.ordered_peer_ids)} members, at most {max_size} are accepted"
            )
        members = tuple(map(PeerId, message.ordered_peer_ids))
        if len(set(members)) != len(members) or not {own, leader} <= set(members):
            raise RemoteError("group: a member appears twice, or we or its leader are not in it")
        if len(message.gathered) != len(members):
            raise RemoteError(f"group: {len(members)} members, {len(message.gathered)} gathered")
        return cls(message.group_id, members, tuple(message.gathered))


def leader_message(code: MessageCode, *, suggested: PeerId | None = None) -> pb.MessageFromLeader:
    return pb.MessageFromLeader(code=code.name, suggested_leader=b"" if suggested is None else suggested.raw)


def suggested_leader(message: pb.MessageFromLeader) -> PeerId | None:
    """Whom a leader sends us to, if it names anybody."""
    return PeerId(message.suggested_leader) if is_peer_id(message.suggested_leader) else None
