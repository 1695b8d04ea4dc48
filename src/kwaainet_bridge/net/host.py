"""The narrow interface of a host: what everything above ``net`` may ask of the network."""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable, Sequence

from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.peer_id import PeerId

StreamHandler = Callable[[Stream], Awaitable[None]]
"""Serves one inbound stream. When it returns or raises, the host closes or resets the stream."""


class Host(abc.ABC):
    """One identity on the network: dials peers, opens streams, serves protocols.

    Addresses are multiaddr strings (``/ip4/127.0.0.1/tcp/4001/p2p/Qm…``).
    """

    peer_id: PeerId

    @abc.abstractmethod
    def addresses(self) -> list[str]:
        """Addresses under which others can dial this host, each ending in ``/p2p/<own id>``."""

    @abc.abstractmethod
    def connected_peers(self) -> list[PeerId]:
        """Peers with a live connection."""

    @abc.abstractmethod
    async def wait_disconnected(self, peer: PeerId) -> None:
        """Return once no connection to ``peer`` is open, at once if there is none."""

    @abc.abstractmethod
    def protect(self, peer: PeerId, tag: str) -> None:
        """Keep connections to ``peer`` open when this host closes idle ones. ``tag`` names the reason.

        Lasts until :meth:`unprotect` was called as often for the same tag. Connects to nobody.
        """

    @abc.abstractmethod
    def unprotect(self, peer: PeerId, tag: str) -> None:
        """Undo one :meth:`protect`. ValueError if there was none."""

    @abc.abstractmethod
    def known_addresses(self, peer: PeerId) -> list[str]:
        """Where ``peer`` may be dialled, as far as this host was told, by the peer itself too."""

    @abc.abstractmethod
    def add_addresses(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Remember where ``peer`` may be dialled. Malformed addresses raise RemoteError."""

    @abc.abstractmethod
    async def connect(self, address: str) -> PeerId:
        """Connect to a full address and return its peer id; returns at once when already connected.

        Raises PeerUnreachable, which names the hop that failed.
        """

    @abc.abstractmethod
    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """Open a stream that speaks ``protocol``, dialling or looking up the peer if need be.

        Raises PeerUnreachable, ProtocolNotSupported or StreamReset. A peer that is known to serve ``protocol``
        is not waited for; should it refuse after all, the first read raises these, and writes may. Has no
        deadline beyond those of dialling: the caller brings one. Cancelled: no stream stays open.
        """

    @abc.abstractmethod
    def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of ``protocol``. ValueError if it is served already.

        A handler's exception resets its stream and is logged; it reaches no other stream.
        """

    @abc.abstractmethod
    def unserve(self, protocol: str) -> None:
        """Refuse new streams of ``protocol``; running ones go on."""
