"""From a relayed connection to a direct one: both sides dial at the same time, so that each one's router takes the
other's dial for an answer to its own.

The side that the relay was asked for begins. In the handshake over the connection that comes of it, it is the responder
by the specification, which rust-libp2p follows; in stock daemons it is the initiator (go-libp2p v0.32.1: seen). So it
plays both in turn here, and the other side waits a moment whether it is spoken to.
Source: libp2p specification ``relay/DCUtR.md``; go-libp2p, ``p2p/protocol/holepunch``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.net.addresses import Address, parse_binary_address, private_block
from kwaainet_bridge.net.circuit import read_message
from kwaainet_bridge.net.connection import Connection
from kwaainet_bridge.net.dial_quota import DialQuota
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.circuit import DCUTR, PunchMessage, PunchType, decode_punch, encode_punch
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)


class PunchingHost(Protocol):
    """What is asked of the host."""

    def punching_addresses(self) -> Sequence[Address]:
        """Public addresses from which the dials of this host come, as far as peers see."""

    def where(self, peer: PeerId) -> list[Address]:
        """Where ``peer`` may be dialled, as far as it says."""

    def has_direct_connection(self, peer: PeerId) -> bool:
        """Whether ``peer`` is connected without a relay."""

    async def open_stream_on(self, connection: Connection, protocol: str) -> YamuxStream:
        """Open a stream on this very connection."""

    async def dial_at(
        self, peer: PeerId, address: Address, *, responder: bool | None = False, punch: bool = True
    ) -> None:
        """Dial one address, and play the responder or not, or whichever the peer leaves; to ``punch``, from the port
        that this host listens on.

        Raises OSError, NetworkError or RemoteError.
        """


class HolePuncher:
    """Makes direct connections beside relayed ones."""

    def __init__(self, host: PunchingHost) -> None:
        self._host = host
        self._quota = DialQuota(
            defaults.HOLE_PUNCHES,
            per_peer=defaults.HOLE_PUNCHES_PER_PEER,
            seconds=defaults.HOLE_PUNCH_PERIOD_SECONDS,
        )

    async def upgrade(self, connection: Connection) -> bool:
        """Try to connect directly to the peer of ``connection``, which a relay has brought; say whether that is done.

        Raises nothing for peers that fail or refuse. Cancelled: a dial under way is given up.
        """
        peer = connection.remote
        # From another port than that for punching: a router that remembers a dial which nobody answered takes the
        # other side's for a stray answer to it.
        if await self._dial(peer, _public(self._host.where(peer)), punch=False):
            return True
        for attempt in range(1, defaults.HOLE_PUNCH_ATTEMPTS + 1):
            try:
                with trio.fail_after(defaults.RELAY_ANSWER_SECONDS):
                    addresses = await self._agree(connection)
            except (NetworkError, RemoteError, trio.TooSlowError) as e:
                log.debug("no hole punching with %s: %s", peer, e)
                return False
            if await self._dial(peer, addresses, responder=attempt % 2 == 0):
                log.info("connected to %s directly, after %d attempts", peer, attempt)
                return True
        log.debug("hole punching with %s failed", peer)
        return False

    async def _agree(self, connection: Connection) -> list[Address]:
        """Exchange addresses and say when to dial; returns at that moment."""
        own = self._own()
        stream = await self._host.open_stream_on(connection, DCUTR)
        try:
            asked_at = trio.current_time()
            await stream.write(encode_punch(PunchType.CONNECT, own))
            theirs = _addresses(await _read(stream, PunchType.CONNECT))
            round_trip = trio.current_time() - asked_at
            await stream.write(encode_punch(PunchType.SYNC))
        except BaseException:
            stream.reset_now()
            raise
        stream.close_now()
        await trio.sleep(round_trip / 2)
        return theirs

    async def serve(self, stream: YamuxStream) -> None:
        """Serve DCUTR for the side that had asked the relay. Raises RemoteError or NetworkError."""
        connection = stream.connection
        if not isinstance(connection, Connection) or connection.relay is None or not connection.initiator:
            raise RemoteError(f"{stream.remote} wants to punch a hole for a connection that needs none")
        theirs = _addresses(await _read(stream, PunchType.CONNECT))
        await stream.write(encode_punch(PunchType.CONNECT, self._own()))
        await _read(stream, PunchType.SYNC)
        await self._dial(stream.remote, theirs, responder=None)

    def _own(self) -> list[bytes]:
        own = [address.binary for address in self._host.punching_addresses()]
        if not own:
            raise NetworkError("no peer has seen a public address of this host")
        return own

    async def _dial(
        self,
        peer: PeerId,
        addresses: Sequence[Address],
        *,
        responder: bool | None = False,
        punch: bool = True,
    ) -> bool:
        if self._host.has_direct_connection(peer):
            return True
        if not addresses or not self._quota.take(peer):
            return False

        async def try_one(address: Address) -> None:
            try:
                await self._host.dial_at(peer, address, responder=responder, punch=punch)
            except (OSError, NetworkError, RemoteError) as e:
                log.debug("direct dial of %s at %s: %s", peer, address, e)
            else:
                nursery.cancel_scope.cancel()

        with trio.move_on_after(defaults.HOLE_PUNCH_SECONDS):
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    nursery.start_soon(try_one, address)
        return self._host.has_direct_connection(peer)


async def _read(stream: YamuxStream, expected: PunchType) -> PunchMessage:
    message = decode_punch(await read_message(stream))
    if message.type != expected:
        raise RemoteError(f"{stream.remote}: {DCUTR} message of type {message.type}, expected {expected}")
    return message


def _addresses(message: PunchMessage) -> list[Address]:
    named = (parse_binary_address(data) for data in message.addresses[: defaults.MAX_ADDRESSES_PER_PEER])
    return _public([address for address in named if address is not None])


def _public(addresses: Sequence[Address]) -> list[Address]:
    """Those that a dial can get through to; of what strangers name only a few."""
    good = [
        a for a in addresses if a.relay is None and a.port and not a.is_name and private_block(a.host) is None
    ]
    return good[: defaults.MAX_SUPPOSED_ADDRESSES]
