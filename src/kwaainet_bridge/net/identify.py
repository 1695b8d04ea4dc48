"""Identify: what this host says of itself when a peer asks. Source: libp2p identify specification."""

from __future__ import annotations

from collections.abc import Iterable

import kwaainet_bridge
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.wire.varint import encode_uvarint

IDENTIFY = "/ipfs/id/1.0.0"

_PROTOCOL_VERSION = "ipfs/0.1.0"
_AGENT_VERSION = f"kwaainet-bridge/{kwaainet_bridge.__version__}"


def identify_message(
    public_key: bytes, listening: Iterable[Address], protocols: Iterable[str], observed: bytes
) -> bytes:
    """Encode the length-prefixed answer.

    There is no signed peer record: py-libp2p's leaves out the key type when it is RSA, which Go peers
    report as an error on every connection; without one they take the plain addresses, which noise has
    authenticated already. ``public_key`` is the protobuf ``PublicKey``, ``observed`` the binary address
    the peer came from.
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
