"""Which network each connected peer takes part in, as far as its protocols tell. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kwaainet_bridge.wire.peer_id import PeerId


class Membership:
    """What is known of connected peers; a peer that is in none of the networks is a stranger in all.

    ``networks``: how the protocols of each network begin, by its name. A peer that speaks those of several counts for
    the first.
    """

    def __init__(self, networks: Mapping[str, Sequence[str]]) -> None:
        self._prefixes = {name: tuple(prefixes) for name, prefixes in networks.items()}
        self._of: dict[PeerId, str] = {}

    def __bool__(self) -> bool:
        """Whether there is any network: without one nobody can be told from a stranger."""
        return bool(self._prefixes)

    def of(self, peer: PeerId) -> str | None:
        """The network of a connected peer; None if none of its protocols is known to be of one."""
        return self._of.get(peer)

    def speaks(self, peer: PeerId, protocols: Iterable[str]) -> None:
        """Note that a connected ``peer`` serves ``protocols``, or uses them here."""
        spoken = tuple(protocols)
        known = self._of.get(peer)
        for name, prefixes in self._prefixes.items():
            if name == known:
                return
            if any(protocol.startswith(prefixes) for protocol in spoken):
                self._of[peer] = name
                return

    def forget(self, peer: PeerId) -> None:
        """Note that the last connection to ``peer`` has ended."""
        self._of.pop(peer, None)
