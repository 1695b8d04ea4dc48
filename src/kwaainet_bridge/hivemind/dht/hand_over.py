"""What a node that is newly met is given: the records that it should keep from now on.

Source of the rule: hivemind 1.1.12, ``dht/protocol.py``, ``update_routing_table``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht.client import DhtClient
from kwaainet_bridge.hivemind.dht.contacts import Contacts
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.messages import StoreItem
from kwaainet_bridge.hivemind.dht.routing import Contact
from kwaainet_bridge.hivemind.dht.storage import LocalStorage
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

_REMEMBERED_PEERS = 4096


class HandOver:
    """Gives newcomers those records of ``storage`` that this node is nearest to, of the nodes known.

    ``clock`` tells unix time, by which records expire.
    """

    def __init__(
        self,
        storage: LocalStorage,
        contacts: Contacts,
        remote: DhtClient,
        *,
        replicas: int,
        clock: Callable[[], float],
    ) -> None:
        self._storage = storage
        self._contacts = contacts
        self._remote = remote
        self._replicas = replicas
        self._clock = clock
        self._next: dict[PeerId, float] = {}

    async def to(self, newcomer: Contact) -> None:
        """Hand over what is the newcomer's, unless that was done lately: a peer may call itself new at will.

        Raises NetworkError or RemoteError if it does not take it.
        """
        now = trio.current_time()
        if now < self._next.get(newcomer.peer, -math.inf):
            return
        if len(self._next) >= _REMEMBERED_PEERS:
            self._next = {peer: then for peer, then in self._next.items() if then > now}
        self._next[newcomer.peer] = now + defaults.DHT_HAND_OVER_SECONDS
        items = []
        for key in self._storage.keys(now=self._clock()):
            await trio.lowlevel.checkpoint()
            record = self._storage.get(key, now=self._clock()) if self._belongs_to(newcomer, key) else None
            if record is not None:
                items.append(StoreItem.of_record(key, record))
        if items:
            accepted = await self._remote.store(newcomer.peer, items)
            log.debug("handed over to %s: it accepted %d of %d", newcomer.peer, sum(accepted), len(items))

    def _belongs_to(self, newcomer: Contact, key: DhtId) -> bool:
        known = self._contacts.nearest(key, self._replicas, exclude=newcomer.node_id)
        return not known or (
            newcomer.node_id.distance(key) < known[-1].node_id.distance(key)
            and self._contacts.own_id.distance(key) < known[0].node_id.distance(key)
        )
