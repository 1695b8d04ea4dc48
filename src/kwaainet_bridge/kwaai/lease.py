"""Leases on this node's places: who may begin something, and who is told to come again later.

Leases are advisory in KwaaiNet: whoever has none is served as long as there is a place that nobody has leased.
A place is what one session, or one tunnelled request, takes.

Source: KwaaiNet v0.6.2, ``kwaai-cli/src/capacity_lease.rs``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from kwaainet_bridge import defaults
from kwaainet_bridge.rpc import CallContext
from kwaainet_bridge.wire.kwaai_lease import Denial, Denied, Granted, LeaseReply, LeaseRequest, Outcome
from kwaainet_bridge.wire.peer_id import PeerId


class Source(Protocol):
    """Something that has places."""

    def room(self) -> int:
        """How many are free."""
        ...

    def uses(self) -> Mapping[PeerId, int]:
        """How many each peer takes."""
        ...


@dataclass(slots=True)
class _Lease:
    ends: float
    origin: object | None


class Leases:
    """A machine without I/O; times are seconds of any clock. ``new_id`` gives lease ids, u64.

    ``room`` is how many places are free, ``uses`` how many each peer takes. A lease whose peer uses no place yet holds
    one free. No peer gets more leases than ``per_peer``, nor more unused ones than are left for all others.
    """

    def __init__(
        self,
        new_id: Callable[[], int],
        *,
        ttl: int = defaults.KWAAI_LEASE_SECONDS,
        per_peer: int = defaults.KWAAI_LEASES_PER_PEER,
    ) -> None:
        self._new_id = new_id
        self._ttl = ttl
        self._per_peer = per_peer
        self._held: dict[PeerId, dict[int, _Lease]] = {}

    def __len__(self) -> int:
        """Leases that were granted and have neither been released nor seen to have ended."""
        return sum(map(len, self._held.values()))

    def grant(
        self,
        peer: PeerId,
        now: float,
        *,
        room: int,
        uses: Mapping[PeerId, int],
        origin: object | None = None,
    ) -> Outcome:
        """A lease for ``peer``, or the denial.

        ``origin`` is the stream on which it was asked for. Without one, a peer has one lease, and gets the same
        again, renewed: there is no message that would release it.
        """
        self._expire(now)
        held = self._held.get(peer, {})
        if origin is None:
            for lease_id, lease in held.items():
                if lease.origin is None:
                    lease.ends = now + self._ttl
                    return Granted(lease_id, self._ttl)
        unused = max(0, len(held) - uses.get(peer, 0))
        if len(held) >= self._per_peer or unused + 1 > room - self._unused(uses):
            return Denied(Denial.AT_CAPACITY, self.retry_after(now))
        lease_id = self._new_id()
        self._held.setdefault(peer, {})[lease_id] = _Lease(now + self._ttl, origin)
        return Granted(lease_id, self._ttl)

    def may_begin(self, peer: PeerId, now: float, *, room: int, uses: Mapping[PeerId, int]) -> bool:
        """Whether ``peer`` may take one more place: one that it has leased, or one that nobody has."""
        self._expire(now)
        has_unused = len(self._held.get(peer, ())) > uses.get(peer, 0)
        return room > (0 if has_unused else self._unused(uses))

    def renew(self, peer: PeerId, now: float) -> None:
        """Note a request of ``peer``: its lease that belongs to no stream lasts for another term."""
        self._expire(now)
        for lease in self._held.get(peer, {}).values():
            if lease.origin is None:
                lease.ends = now + self._ttl

    def keep(self, peer: PeerId, lease_id: int, now: float) -> bool:
        """Renew one lease; False if ``peer`` has none of that number."""
        self._expire(now)
        lease = self._held.get(peer, {}).get(lease_id)
        if lease is None:
            return False
        lease.ends = now + self._ttl
        return True

    def release(self, peer: PeerId, lease_id: int) -> None:
        """End a lease; one that ``peer`` does not have is nothing to end."""
        held = self._held.get(peer, {})
        held.pop(lease_id, None)
        if not held:
            self._held.pop(peer, None)

    def end(self, peer: PeerId, origin: object) -> None:
        """End all leases of ``peer`` that were asked for on the stream ``origin``, which has ended."""
        for lease_id in [i for i, lease in self._held.get(peer, {}).items() if lease.origin is origin]:
            self.release(peer, lease_id)

    def retry_after(self, now: float) -> int:
        """Whole seconds until the first lease ends, 1 to KWAAI_RETRY_SECONDS; that many without leases."""
        ends = [lease.ends - now for held in self._held.values() for lease in held.values()]
        soonest = math.ceil(min(ends, default=defaults.KWAAI_RETRY_SECONDS))
        return max(1, min(soonest, defaults.KWAAI_RETRY_SECONDS))

    def _unused(self, uses: Mapping[PeerId, int]) -> int:
        return sum(max(0, len(held) - uses.get(peer, 0)) for peer, held in self._held.items())

    def _expire(self, now: float) -> None:
        over = [(p, i) for p, held in self._held.items() for i, lease in held.items() if lease.ends <= now]
        for peer, lease_id in over:
            self.release(peer, lease_id)


class Places:
    """The leases of a node beside what its sources have free now. ``clock`` gives seconds."""

    def __init__(
        self,
        leases: Leases,
        sources: Callable[[], list[Source]],
        serves: Callable[[str], bool],
        *,
        clock: Callable[[], float],
    ) -> None:
        self.leases = leases
        self.accepting = True
        """Whether leases are given and new sessions and requests begun."""
        self.paused = False
        """Whether none are for now."""
        self._sources = sources
        self._serves = serves
        self._clock = clock

    def grant(self, peer: PeerId, model: str | None, origin: object | None = None) -> Outcome:
        """A lease for ``peer``, or the denial. See :meth:`Leases.grant`."""
        if model is not None and not self._serves(model):
            return Denied(Denial.WRONG_MODEL)
        if not self.accepting or self.paused:
            return Denied(Denial.AT_CAPACITY, defaults.KWAAI_LEASE_SECONDS)
        return self.leases.grant(peer, self._clock(), room=self._room(), uses=self._uses(), origin=origin)

    def may_begin(self, peer: PeerId, source: Source) -> bool:
        """Whether ``peer`` may take one more place of ``source``."""
        if not self.accepting or self.paused:
            return False
        room = source.room()
        if not self.leases:  # the usual case
            return room > 0
        return self.leases.may_begin(peer, self._clock(), room=room, uses=self._uses())

    def renew(self, peer: PeerId) -> None:
        """Note a request of ``peer``."""
        if self.leases:
            self.leases.renew(peer, self._clock())

    def keep(self, peer: PeerId, lease_id: int) -> bool:
        return self.leases.keep(peer, lease_id, self._clock())

    @property
    def retry_after(self) -> int:
        """When whoever is refused should ask again, whole seconds."""
        return self.leases.retry_after(self._clock())

    async def lease(self, request: LeaseRequest, context: CallContext) -> LeaseReply:
        """Serve ``/kwaai/capacity-lease/1.0.0``."""
        return LeaseReply(self.grant(context.peer, request.model))

    def _room(self) -> int:
        return min((source.room() for source in self._sources()), default=0)

    def _uses(self) -> Mapping[PeerId, int]:
        uses: Counter[PeerId] = Counter()
        for source in self._sources():
            uses.update(source.uses())
        return uses
