"""AutoNAT v1: peers tell each other whether they can be dialled.

A peer names its addresses and is dialled back there, over a connection of its own. Only its own IP address is ever
dialled, and how long a failure took is not to be seen: whoever asks learns nothing about other machines, and little
about other ports of its own. Source: libp2p AutoNAT specification; go-libp2p v0.32.1 (p2p/host/autonat), in hivemind
1.1.12's p2pd. Unlike that, private addresses are dialled too: a swarm may live in one network.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import trio
from google.protobuf.message import DecodeError

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import DeadlineExceeded, NetworkError, RemoteError
from kwaainet_bridge.net.addresses import Address, parse_binary_address, private_block
from kwaainet_bridge.net.delimited import read_one
from kwaainet_bridge.net.dial_quota import DialQuota
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.envelope import text_of
from kwaainet_bridge.wire.pb.autonat_pb2 import Dial, DialResponse, Message, PeerInfo
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.varint import encode_uvarint

log = logging.getLogger(__name__)

AUTONAT: Final = "/libp2p/autonat/1.0.0"

OK: Final = DialResponse.OK
E_DIAL_ERROR: Final = DialResponse.E_DIAL_ERROR
E_DIAL_REFUSED: Final = DialResponse.E_DIAL_REFUSED
E_BAD_REQUEST: Final = DialResponse.E_BAD_REQUEST


@dataclass(frozen=True, slots=True)
class DialBack:
    """What a peer found when it dialled this host; all of it is its word.

    ``reachable``: None if it gives no verdict, since it would not dial or could not. ``address``: where it reached
    this host, if it did and says so. ``text``: its explanation, fit for a terminal.
    """

    reachable: bool | None
    address: Address | None = None
    text: str = ""


async def ask(host: Host, peer: PeerId, addresses: Iterable[Address]) -> DialBack:
    """Ask ``peer`` to dial this host back at ``addresses``, of which it is told the direct ones.

    Stock peers also dial the address that they see this host at, and replace IP addresses by the one there. An
    address that was not asked about is left out of the answer. Takes 15 s where the dial fails. Raises what
    ``open_stream`` raises, RemoteError for a malformed answer, and DeadlineExceeded. Cancelled: no stream stays open.
    """
    direct = [a.without_peer() for a in addresses if a.relay is None and not a.is_name][
        : defaults.MAX_AUTONAT_ADDRESSES
    ]
    named = PeerInfo(id=host.peer_id.raw, addrs=[a.binary for a in direct])
    try:
        with trio.fail_after(defaults.AUTONAT_SECONDS):
            stream = await host.open_stream(peer, AUTONAT)
            try:
                await stream.write(_encode(Message(type=Message.DIAL, dial=Dial(peer=named))))
                found = read_answer(await read_one(stream, defaults.MAX_AUTONAT_BYTES))
                known = found.address in direct  # others are told of it, so it must not be anybody else's
                return found if known else replace(found, address=None)
            finally:
                await stream.close()
    except trio.TooSlowError:
        raise DeadlineExceeded(
            f"{peer} did not say within {defaults.AUTONAT_SECONDS:g} s whether it can dial this host"
        ) from None


def read_answer(body: bytes) -> DialBack:
    """Read a DIAL_RESPONSE without its length. RemoteError if it is malformed or its status is unknown."""
    message = _decode(body)
    answer = message.dial_response
    if message.type != Message.DIAL_RESPONSE or not answer.HasField("status"):
        raise RemoteError("AutoNAT: expected a DIAL_RESPONSE with a status known in version 1")
    text = text_of(answer.status_text, "AutoNAT: statusText")[: defaults.MAX_AUTONAT_CHARACTERS]
    text = "".join(c if c.isprintable() else "?" for c in text)
    if answer.status == OK:
        return DialBack(True, parse_binary_address(answer.addr), text)
    if answer.status == E_DIAL_ERROR:
        return DialBack(False, text=text)
    return DialBack(None, text=text or DialResponse.Status.Name(answer.status))


class AutoNatService:
    """Dials peers back that ask for it.

    ``observed_host``: the IP address that a connected peer is seen at, empty if it is seen through a relay only.
    ``dial``: connects to a peer at one of the addresses, over a connection of its own, and returns that one; raises
    NetworkError or RemoteError (see :func:`~kwaainet_bridge.net.probe.dial_anew`).
    """

    def __init__(
        self,
        observed_host: Callable[[PeerId], str],
        dial: Callable[[PeerId, Sequence[Address]], Awaitable[Address]],
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._observed_host = observed_host
        self._dial = dial
        self._dialling = 0
        self._quota = DialQuota(
            defaults.AUTONAT_DIALS,
            per_peer=defaults.AUTONAT_DIALS_PER_PEER,
            seconds=defaults.AUTONAT_PERIOD_SECONDS,
            clock=clock,
        )

    async def serve(self, stream: Stream) -> None:
        """Answer one request. Raises RemoteError, which resets the stream, if it is malformed."""
        with trio.move_on_after(defaults.AUTONAT_SECONDS) as limit:
            request = _decode(await read_one(stream, defaults.MAX_AUTONAT_BYTES))
            if request.type != Message.DIAL:
                raise RemoteError("AutoNAT: expected a DIAL")
            answer = await self._answer(stream.remote, request.dial.peer)
            await stream.write(_encode(Message(type=Message.DIAL_RESPONSE, dial_response=answer)))
        if limit.cancelled_caught:
            await stream.reset()

    async def _answer(self, asker: PeerId, named: PeerInfo) -> DialResponse:
        if named.id != asker.raw:
            return DialResponse(status=E_BAD_REQUEST, status_text="a peer may ask about itself only")
        addresses = _at_host(self._observed_host(asker), named.addrs)
        if not addresses:
            return _refusal("no address that can be dialled from here")
        if self._dialling >= defaults.AUTONAT_DIALS_AT_ONCE or not self._quota.take(asker):
            return _refusal("too many dials")
        self._dialling += 1
        try:
            return await self._dial_back(asker, addresses)
        finally:
            self._dialling -= 1

    async def _dial_back(self, asker: PeerId, addresses: Sequence[Address]) -> DialResponse:
        end = trio.current_time() + defaults.AUTONAT_DIAL_SECONDS
        try:
            with trio.move_on_at(end):
                return DialResponse(status=OK, addr=(await self._dial(asker, addresses)).binary)
        except (NetworkError, RemoteError) as e:
            log.debug("dial-back to %s failed: %s", asker, e)
        await trio.sleep_until(end)  # a closed port shall not be told from a silent one
        return DialResponse(status=E_DIAL_ERROR, status_text="dial failed")


def _at_host(host: str, named: Sequence[bytes]) -> list[Address]:
    """The TCP ports that a peer names, at the IP address that it is seen at.

    Behind a router it need not know that address; a private one it does know, or it is seen through a proxy, where
    nothing can be told from a failure. Link-local addresses of IPv6 mean nothing without an interface, which an
    :class:`Address` cannot name.
    """
    if not host or "%" in host:
        return []
    ip, private = ipaddress.ip_address(host), private_block(host) is not None
    found = (parse_binary_address(a) for a in named[: defaults.MAX_ADDRESSES_PER_PEER])
    ports = dict.fromkeys(
        a.port
        for a in found
        if a is not None and a.relay is None and a.port and (a.host == host or not private)
    )
    return [Address(f"ip{ip.version}", host, port) for port in ports][: defaults.MAX_AUTONAT_ADDRESSES]


def _refusal(text: str) -> DialResponse:
    return DialResponse(status=E_DIAL_REFUSED, status_text=text)


def _encode(message: Message) -> bytes:
    body: bytes = message.SerializeToString()
    return encode_uvarint(len(body)) + body


def _decode(body: bytes) -> Message:
    try:
        return Message.FromString(body)
    except DecodeError as e:
        raise RemoteError(f"AutoNAT message: {e}") from e
