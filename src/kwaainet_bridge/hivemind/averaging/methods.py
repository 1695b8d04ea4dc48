"""The calls of an averager: streams all of them, under the averager's prefix.

Source of Hivemind's: hivemind 1.1.12, ``averaging/averager.py``; KwaaiNet's are those of docs/protocols/kwaai-avg.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.rpc import ServerStream, StreamMethod, streaming
from kwaainet_bridge.rpc.method import Req, Res
from kwaainet_bridge.wire.averaging import AveragingData, DownloadData
from kwaainet_bridge.wire.frames import LENGTH_FIRST
from kwaainet_bridge.wire.pb import averaging_pb2 as pb


@dataclass(frozen=True, slots=True)
class Methods:
    """The calls of one averager."""

    join_group: StreamMethod[pb.JoinRequest, pb.MessageFromLeader]
    aggregate_part: StreamMethod[AveragingData, AveragingData]
    download_state: StreamMethod[pb.DownloadRequest, DownloadData]


def methods(prefix: str, kind: str) -> Methods:
    """``kind`` is the class of averager that the group's peers run: ``DecentralizedAverager``, say."""
    name = f"{prefix}::{kind}"
    return Methods(
        streaming(f"{name}.rpc_join_group", pb.JoinRequest, pb.MessageFromLeader),
        streaming(f"{name}.rpc_aggregate_part", AveragingData, AveragingData),
        streaming(f"{name}.rpc_download_state", pb.DownloadRequest, DownloadData),
    )


def kwaai_methods(name: str) -> Methods:
    """``name`` is the protocol's id with the run's prefix."""
    return Methods(
        streaming(f"{name}/join", pb.JoinRequest, pb.MessageFromLeader, order=LENGTH_FIRST),
        streaming(f"{name}/parts", AveragingData, AveragingData, order=LENGTH_FIRST),
        streaming(f"{name}/state", pb.DownloadRequest, DownloadData, order=LENGTH_FIRST),
    )


async def first_request(stream: ServerStream[Req, Res]) -> Req:
    """The first message of a call. Raises RemoteError if there is none, or none in time."""
    try:
        with trio.move_on_after(defaults.AVERAGING_FIRST_PART_SECONDS):
            return await stream.receive()
    except trio.EndOfChannel:
        raise RemoteError("a call without a message") from None
    raise RemoteError(f"no message within {defaults.AVERAGING_FIRST_PART_SECONDS:g} s")
