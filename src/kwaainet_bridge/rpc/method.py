"""How an RPC is declared: once, for mounting and for calling.

::

    PING = unary("DHTProtocol.rpc_ping", PingRequest, PingResponse)
    INFERENCE = streaming("TransformerConnectionHandler.rpc_inference", ExpertRequest, ExpertResponse)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from google.protobuf.message import Message

from kwaainet_bridge.wire.fields import BytesMessage
from kwaainet_bridge.wire.frames import MARKER_FIRST, FrameOrder

AnyMessage: TypeAlias = Message | BytesMessage

Req = TypeVar("Req", bound=AnyMessage)
Res = TypeVar("Res", bound=AnyMessage)


@dataclass(frozen=True, slots=True)
class Method(Generic[Req, Res]):
    """One remote procedure: its protocol id on the wire and its message types.

    A unary method is one envelope each way; a streaming one is frames in both directions, also where one side
    sends a single message. Source: hivemind 1.1.12, ``p2p/servicer.py``; the two never mix.
    """

    name: str
    request: type[Req]
    response: type[Res]

    def under(self, namespace: str) -> Method[Req, Res]:
        """The same method as ``namespace::name``, as averagers register theirs."""
        return dataclasses.replace(self, name=f"{namespace}::{self.name}")


@dataclass(frozen=True, slots=True)
class UnaryMethod(Method[Req, Res]):
    """One request, one response, each at most ``defaults.MAX_UNARY_BYTES``."""


@dataclass(frozen=True, slots=True)
class StreamMethod(Method[Req, Res]):
    """Any number of messages each way, in frames of one order."""

    order: FrameOrder = MARKER_FIRST


def unary(name: str, request: type[Req], response: type[Res]) -> UnaryMethod[Req, Res]:
    return UnaryMethod(name, request, response)


def streaming(
    name: str, request: type[Req], response: type[Res], *, order: FrameOrder = MARKER_FIRST
) -> StreamMethod[Req, Res]:
    return StreamMethod(name, request, response, order)
