"""Identify and its push: what peers say of themselves. Source: libp2p identify specification."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

import kwaainet_bridge
from kwaainet_bridge.defaults import (
    MAX_ADDRESSES_PER_PEER,
    MAX_IDENTIFY_BYTES,
    MAX_PROTOCOL_ID_BYTES,
    MAX_PROTOCOLS_PER_PEER,
)
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.net.addresses import Address, parse_binary_address
from kwaainet_bridge.net.delimited import read_one
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.envelope import text_of
from kwaainet_bridge.wire.varint import encode_uvarint

IDENTIFY = "/ipfs/id/1.0.0"
IDENTIFY_PUSH = "/ipfs/id/push/1.0.0"

_PROTOCOL_VERSION = "ipfs/0.1.0"
_AGENT_VERSION = f"kwaainet-bridge/{kwaainet_bridge.__version__}"


@dataclass(frozen=True)
class PeerDescription:
    """What a connected peer says of itself. Only its identity is proven; the rest is its word.

    ``observed``: where it says this host's end of the connection is; None if it does not say, or names no IP
    address and TCP port.
    """

    agent: str
    protocols: frozenset[str]
    addresses: tuple[Address, ...]
    observed: Address | None = None


def encode_identify(
    public_key: bytes, listening: Iterable[Address], protocols: Iterable[str], observed: bytes
) -> bytes:
    """Encode the length-prefixed message.

    ``public_key`` is the protobuf ``PublicKey``, ``observed`` the binary address the peer came from.
    There is no signed peer record: noise has authenticated the sender, and stock daemons then take the
    plain addresses.
    """
    from libp2p.identity.identify.pb.identify_pb2 import Identify

    body = Identify(
        protocol_version=_PROTOCOL_VERSION,
        agent_version=_AGENT_VERSION,
        public_key=public_key,
        listen_addrs=[address.binary for address in listening],
        observed_addr=observed,
        protocols=sorted(protocols),
    ).SerializeToString()
    return encode_uvarint(len(body)) + body


def decode_identify(body: bytes) -> PeerDescription:
    """Read a message without its prefix. Unusable addresses are left out. RemoteError if it is malformed."""
    from libp2p.identity.identify.pb.identify_pb2 import Identify

    try:
        message = Identify.FromString(body)
    except DecodeError as e:
        raise RemoteError(f"identify: {e}") from e
    addresses = (parse_binary_address(a) for a in message.listen_addrs[:MAX_ADDRESSES_PER_PEER])
    agent = text_of(message.agent_version, "identify: agent_version")
    protocols = [text_of(p, "identify: protocols") for p in message.protocols[:MAX_PROTOCOLS_PER_PEER]]
    return PeerDescription(
        agent=agent[:MAX_PROTOCOL_ID_BYTES],
        protocols=frozenset(p for p in protocols if len(p) <= MAX_PROTOCOL_ID_BYTES),
        addresses=tuple(a for a in addresses if a is not None and a.port),
        observed=_endpoint(message.observed_addr),
    )


def _endpoint(data: bytes) -> Address | None:
    """The end of a TCP connection, which has an IP address and a port; None for anything else."""
    address = parse_binary_address(data)
    if address is None or address.relay is not None or address.is_name or not address.port:
        return None
    return address.without_peer()


async def read_identify(stream: Stream) -> PeerDescription:
    """Read one message. Raises RemoteError if it is malformed, too long or cut short."""
    return decode_identify(await read_one(stream, MAX_IDENTIFY_BYTES))
