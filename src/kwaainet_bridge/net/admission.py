"""Which peers a host has connections with, by their ids."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kwaainet_bridge.errors import PeerUnreachable
from kwaainet_bridge.wire.peer_id import PeerId


class PeerDenied(PeerUnreachable):
    """This host's own configuration keeps a peer out."""


@dataclass(frozen=True)
class Admission:
    """``allow`` are the only peers that are let in, None for all; but never those of ``deny``."""

    allow: Collection[PeerId] | None = None
    deny: Collection[PeerId] = frozenset()

    def admits(self, peer: PeerId) -> bool:
        return peer not in self.deny and (self.allow is None or peer in self.allow)

    def check(self, peer: PeerId) -> None:
        """Raise PeerDenied for a peer that is kept out."""
        if peer in self.deny:
            raise PeerDenied(f"{peer} is kept out by peers.deny: remove it there", hop="address")
        if not self.admits(peer):
            raise PeerDenied(f"{peer} is kept out by peers.allow: add it there", hop="address")
