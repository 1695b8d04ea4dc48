"""Putting records on their replicas: who is offered what, and what they answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.hivemind.dht.messages import StoreItem
from kwaainet_bridge.hivemind.dht.routing import Contact
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True, slots=True)
class StoreResult:
    """What the nodes answered to one item.

    Those in ``refused`` hold something that expires no earlier, or have no room; ``failed`` gives the error
    of those that did not answer.
    """

    accepted: tuple[PeerId, ...]
    refused: tuple[PeerId, ...]
    failed: dict[PeerId, str]

    @property
    def ok(self) -> bool:
        """At least one node keeps the item."""
        return bool(self.accepted)

    def __str__(self) -> str:
        parts = [f"accepted by {len(self.accepted)}", *(peer.short for peer in self.accepted)]
        if self.refused:
            parts += [f"refused by {len(self.refused)}", *(peer.short for peer in self.refused)]
        parts += [f"no answer from {peer.short} ({why})" for peer, why in self.failed.items()]
        return " ".join(parts)


@dataclass(slots=True)
class Placement:
    """One item on its way: the candidates left, nearest first, and the answers so far."""

    item: StoreItem
    candidates: deque[Contact] = field(default_factory=deque)
    accepted: list[PeerId] = field(default_factory=list)
    refused: list[PeerId] = field(default_factory=list)
    failed: dict[PeerId, str] = field(default_factory=dict)

    def next_candidates(self, replicas: int) -> list[Contact]:
        """Take as many candidates as answers are missing; a refusal is one too."""
        missing = replicas - len(self.accepted) - len(self.refused)
        return [self.candidates.popleft() for _ in range(min(missing, len(self.candidates)))]

    def result(self) -> StoreResult:
        return StoreResult(tuple(self.accepted), tuple(self.refused), dict(self.failed))


Offer = Callable[[Contact, Sequence[StoreItem]], Awaitable[list[bool]]]
"""Offers items to one node; returns which it accepted. Raises NetworkError or RemoteError."""


async def place(placements: Sequence[Placement], offer: Offer, *, replicas: int) -> None:
    """Offer each item to its nearest candidates until ``replicas`` have answered or there are no more.

    All items for one node go there together. Cancelled: running offers are cancelled, their outcome unknown.
    """

    async def offer_all(contact: Contact, group: list[Placement]) -> None:
        try:
            answers = await offer(contact, [placement.item for placement in group])
        except (NetworkError, RemoteError) as e:
            for placement in group:
                placement.failed[contact.peer] = str(e)
            return
        for placement, accepted in zip(group, answers, strict=True):
            (placement.accepted if accepted else placement.refused).append(contact.peer)

    while True:
        batches: dict[Contact, list[Placement]] = {}
        for placement in placements:
            for contact in placement.next_candidates(replicas):
                batches.setdefault(contact, []).append(placement)
        if not batches:
            return
        async with trio.open_nursery() as nursery:
            for contact, group in batches.items():
                nursery.start_soon(offer_all, contact, group)
