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
        self._spoken: dict[PeerId, frozenset[str]] = {}

    def __bool__(self) -> bool:
        """Whether there is any network: without one nobody can be told from a stranger."""
        return bool(self._prefixes)

    def of(self, peer: PeerId) -> str | None:
        """The network of a connected peer; None if none of its protocols is known to be of one."""
        if spoken := self._spoken.get(peer):
            return next(name for name, prefixes in self._prefixes.items() if not spoken.isdisjoint(prefixes))
        return None

    def all_of(self, peer: PeerId) -> list[str]:
        """All networks that a connected peer is in by its protocols."""
        spoken = self.spoken(peer)
        return [name for name, prefixes in self._prefixes.items() if not spoken.isdisjoint(prefixes)]

    def spoken(self, peer: PeerId) -> frozenset[str]:
        """Those beginnings, of all networks, with which some protocol of a connected peer begins."""
        return self._spoken.get(peer, frozenset())

    def speaks(self, peer: PeerId, protocols: Iterable[str]) -> None:
        """Note that a connected ``peer`` serves ``protocols``, or uses them here."""
        known = self.spoken(peer)
        missing = [p for prefixes in self._prefixes.values() for p in prefixes if p not in known]
        if missing and (new := {p for text in protocols for p in missing if text.startswith(p)}):
            self._spoken[peer] = known | new

    def forget(self, peer: PeerId) -> None:
        """Note that the last connection to ``peer`` has ended."""
        self._spoken.pop(peer, None)
